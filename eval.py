"""Evaluate samplers on one policy: reward in closed loop, latency per chunk, side by side.

    python eval.py [env=pusht checkpoint=FOLDER samplers=[sequential,secant] episodes=20 seed=100000]

Results go to hydra's run folder: results.json, episodes.jsonl, latency_reward.png, videos/.
"""

import json
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import IO, Any

import hydra
import torch
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf
from tqdm import tqdm

import parapolicy
from envs import make_env
from envs.charged import Charged
from parapolicy.control import ControlRecord
from parapolicy.evaluate import metrics, report
from parapolicy.evaluate.charged import Latency, run_charged
from parapolicy.evaluate.errors import measure_errors
from parapolicy.evaluate.fidelity import measure_fidelity
from parapolicy.evaluate.latency import measure_chunks
from parapolicy.evaluate.rollout import Episode, rollout
from parapolicy.evaluate.variants import build_variants, find_baseline
from parapolicy.policy import Policy
from parapolicy.samplers import Sampler, Secant


def run_episodes(
    policy: Policy, label: str, asynchronous: bool, latency: str, config: DictConfig, folder: Path
) -> tuple[list[Episode], dict[str, Any]]:
    """One sampler's episodes, each on disk as soon as it ends, and their summary."""
    seeds = range(config.seed, config.seed + config.episodes)
    length = config.env.options.max_episode_steps
    filmed = seeds[: config.videos] if isinstance(config.videos, int) else list(config.videos)
    episodes, videos, controls = [], [], []
    begin = time.perf_counter()
    with ExitStack() as stack:
        bar = stack.enter_context(tqdm(total=len(seeds) * length, desc=label, unit="step"))

        def write(name: str, row: Mapping[str, Any]) -> None:
            if name not in files:
                files[name] = stack.enter_context((folder / name).open("a"))
            print(json.dumps(row), file=files[name], flush=True)

        files: dict[str, IO[str]] = {}
        stream: Iterator[tuple[Episode, ControlRecord | None]]
        if latency == "none" and not asynchronous:
            build = partial(make_env, config.env.name, policy.spec, **config.env.options)
            rolled = rollout(policy, build, seeds, config.noise_seed, config.num_envs, filmed, bar.update)
            stream = ((episode, None) for episode in rolled)
        else:
            stream = run_charged(
                policy,
                label,
                lambda clock: Charged(
                    make_env(config.env.name, policy.spec, **config.env.options), clock, policy.spec.control_hz
                ),
                seeds,
                Latency.parse(latency),
                asynchronous,
                config.noise_seed,
                filmed,
                lambda row: write("actions.jsonl", {"sampler": label, **row}),
                bar.update,
            )
        for episode, control in stream:
            bar.update(length - len(episode.rewards))
            episodes.append(episode)
            row = metrics.episode_row(episode.seed - config.seed, episode)
            if control is not None:
                controls.append(control)
                row["control"] = control.summary()
                for chunk in control.chunks:
                    timed = {"seed": episode.seed, "chunk": chunk.number, "seconds": chunk.seconds}
                    write("chunks.jsonl", {"sampler": label, **timed})
            write("episodes.jsonl", {"sampler": label, **row})
            if episode.frames:
                path = folder / "videos" / f"{label}_{episode.seed}.mp4"
                report.write_video(episode.frames, path, fps=round(policy.spec.control_hz))
                episode.frames.clear()
                videos.append(str(path))
            bar.set_postfix(reward=f"{sum(e.max_reward for e in episodes) / len(episodes):.3f}")
    summary = metrics.summarize_episodes(episodes, time.perf_counter() - begin, videos)
    if controls:
        summary["control"] = {"asynchronous": asynchronous, "latency": latency, **metrics.summarize_control(controls)}
    return episodes, summary


def spread(items: list[Any], count: int) -> list[Any]:
    """About ``count`` of the items, evenly spaced."""
    return items[:: max(1, len(items) // count)][:count]


def split_control(entries: list[Any], config: DictConfig) -> tuple[list[Any], list[tuple[bool, str]]]:
    """What of each sampler's entry is about the loop around it: asynchronous or not, and the latency it is charged."""
    samplers, loops = [], []
    for entry in entries:
        parameters = dict(entry) if isinstance(entry, Mapping) else {"name": entry}
        control, latency = parameters.pop("control", config.control), parameters.pop("latency", config.env.latency)
        if control not in ("sync", "async"):
            raise ValueError(f"control is {control!r}, expected sync or async")
        Latency.parse(latency)  # what is wrong with it is said before the first episode
        samplers.append(parameters)
        loops.append((control == "async", latency))
    return samplers, loops


def asked_error(sampler: Sampler) -> float | None:
    """The tolerance of a sampler that takes it as an error of the chunk."""
    return sampler.tolerance if isinstance(sampler, Secant) else None


def evaluate(config: DictConfig) -> dict[str, Any]:
    """Run the whole evaluation and write its folder; returns what ``results.json`` holds."""
    if config.episodes < 1 or config.latency_chunks < 1:
        raise ValueError(f"episodes is {config.episodes}, latency_chunks {config.latency_chunks}; expected at least 1")
    if config.threads:
        torch.set_num_threads(config.threads)
    policy = parapolicy.load_policy(config.checkpoint, device=config.device, engine=config.engine)
    entries: Any = OmegaConf.to_container(config.samplers)
    samplers, loops = split_control(entries, config)
    variants = build_variants(policy, samplers)
    folder = Path(HydraConfig.get().runtime.output_dir)
    results: dict[str, Any] = {
        "env": config.env.name,
        "checkpoint": str(config.checkpoint),
        "episodes": config.episodes,
        "seeds": list(range(config.seed, config.seed + config.episodes)),
        "machine": report.describe_machine(policy.device),
        "versions": report.describe_versions(),
        "samplers": {},
    }
    recorded: list[list[Any]] = []  # the first sampler's observations, by episode and chunk
    for (label, variant), (asynchronous, latency) in zip(variants.items(), loops, strict=True):
        episodes, results["samplers"][label] = run_episodes(variant, label, asynchronous, latency, config, folder)
        recorded = recorded or [e.observations for e in sorted(episodes, key=lambda episode: episode.seed)]
    # (previous, current); an episode's first chunk counts as its own predecessor.
    observations = [pair for e in recorded for pair in zip(e[:1] + e, e, strict=False)]

    chosen = spread(observations, config.latency_chunks)
    with tqdm(total=len(chosen) * len(variants), desc="latency", unit="chunk") as bar:
        previous, current = zip(*chosen, strict=True)
        measured = measure_chunks(variants, current, config.noise_seed, previous, bar.update)
    baseline = find_baseline(variants)
    if config.fidelity.observations:
        chosen = spread(observations, config.fidelity.observations)
        with tqdm(total=len(chosen) * (len(variants) + 2), desc="fidelity", unit="set") as bar:
            reference = policy.with_sampler("sequential")
            distances = measure_fidelity(
                variants, reference, [current for _, current in chosen], config.fidelity.draws, bar.update
            )
        for label, row in results["samplers"].items():
            row["energy_distance"] = metrics.summarize_distances(distances[label], distances["resampling"])
    if config.errors.chunks:
        entries = OmegaConf.to_container(config.errors.samplers) if config.errors.samplers else entries
        measured_variants = build_variants(policy, entries)
        with tqdm(desc="errors", unit="chunk") as bar:
            errors = measure_errors(measured_variants, recorded, config.errors.chunks, config.noise_seed, bar.update)
        results["errors"] = {
            label: metrics.summarize_errors(errors[label], asked_error(variant.sampler))
            for label, variant in measured_variants.items()
        }
    for label, row in results["samplers"].items():
        row |= metrics.summarize_chunks(measured[label])
    for row in results["samplers"].values():
        row |= metrics.compare(row, results["samplers"][baseline], baseline) if baseline else {}
    results["test/mean_score"] = list(results["samplers"].values())[-1]["test/mean_score"]

    (folder / "results.json").write_text(json.dumps(results, indent=2) + "\n")
    report.plot_latency_reward(results, folder / "latency_reward.png")
    report.print_table(results)
    print(f"wrote {folder}")
    return results


@hydra.main(version_base="1.3", config_path="conf", config_name="eval")
def main(config: DictConfig) -> None:
    try:
        evaluate(config)
    except ValueError as error:
        raise SystemExit(f"error: {error}") from error
    except KeyboardInterrupt:
        raise SystemExit("interrupted; the episodes that had ended stand in episodes.jsonl in the run folder") from None


if __name__ == "__main__":
    main()
