"""The evaluation of samplers on one policy: reward in closed loop, latency per chunk, side by side."""

import time
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import gymnasium
import torch
from omegaconf import DictConfig, OmegaConf
from tqdm import tqdm

from parapolicy.checkpoint.spec import PolicySpec
from parapolicy.control import ControlRecord, SimulatedClock
from parapolicy.evaluate import metrics, report
from parapolicy.evaluate.charged import Latency, run_charged
from parapolicy.evaluate.errors import measure_errors
from parapolicy.evaluate.fidelity import measure_fidelity
from parapolicy.evaluate.folder import RunFolder, describe_git
from parapolicy.evaluate.latency import measure_chunks
from parapolicy.evaluate.rollout import Episode, rollout
from parapolicy.evaluate.variants import Variant, build_variants, find_baseline
from parapolicy.evaluate.watch import View
from parapolicy.policy import Policy, load_policy

MakeEnv = Callable[[PolicySpec, "SimulatedClock | None"], gymnasium.Env]
Observations = list[tuple[dict[str, Any], dict[str, Any]]]  # (previous, current) of each chunk


def evaluate(config: DictConfig, folder: Path, make_env: MakeEnv) -> dict[str, Any]:
    """Run the whole evaluation into its folder, or what is left of it.

    Args:
        config: as ``conf/eval.yaml`` has it.
        folder: of the run; one that is finished is read, one that was interrupted goes on.
        make_env: an environment for what a policy observes and does, charged on a clock where one is given.

    Returns:
        What ``results.json`` holds.

    Raises:
        ValueError: a setting, named with what was expected.
    """
    if config.episodes < 1 or config.latency_chunks < 0:
        raise ValueError(f"episodes is {config.episodes}, latency_chunks {config.latency_chunks}; expected at least 1")
    if config.threads:
        torch.set_num_threads(config.threads)
    policy = load_policy(config.checkpoint, device=config.device, engine=config.engine)
    plain: Any = OmegaConf.to_container(config, resolve=True)
    variants = build_variants(policy, plain["samplers"], config.control, config.env.latency)
    machine = {"machine": report.describe_machine(policy.device), "versions": report.describe_versions()}
    kept = RunFolder(folder, {"config": plain, **machine, "git": describe_git(Path(__file__).parent)})
    if (finished := kept.results()) is not None:
        print(f"{folder} is finished")
        return finished

    results: dict[str, Any] = {
        "env": config.env.name,
        "checkpoint": str(config.checkpoint),
        "episodes": config.episodes,
        "seeds": list(range(config.seed, config.seed + config.episodes)),
        **machine,
        "samplers": {},
    }
    view = View(config.watch) if config.watch else None
    recorded: list[list[Any]] = []  # the first sampler's observations, by episode and chunk
    for label, variant in variants.items():
        episodes, results["samplers"][label] = run_episodes(label, variant, config, kept, make_env, not recorded, view)
        recorded = recorded or [e.observations for e in sorted(episodes, key=lambda episode: episode.seed)]
    # (previous, current); an episode's first chunk counts as its own predecessor.
    observations = [pair for e in recorded for pair in zip(e[:1] + e, e, strict=False)]
    policies = {label: variant.policy for label, variant in variants.items()}
    for measure in (_add_latency, _add_fidelity):
        measure(results, policies, observations, config)
    if config.errors.chunks:
        entries = plain["errors"]["samplers"] or plain["samplers"]
        results["errors"] = _measure_errors(policy, entries, recorded, config)
    if baseline := find_baseline(policies):
        for row in results["samplers"].values():
            row |= metrics.compare(row, results["samplers"][baseline], baseline)
    results["test/mean_score"] = list(results["samplers"].values())[-1]["test/mean_score"]
    kept.finish(results)
    return results


def run_episodes(
    label: str,
    variant: Variant,
    config: DictConfig,
    kept: RunFolder,
    make_env: MakeEnv,
    keep_observations: bool,
    view: View | None = None,
) -> tuple[list[Episode], dict[str, Any]]:
    """One sampler's episodes, but for those that the folder has, and their summary.

    Where thinking takes time, or is watched, they run one after the other, each by a controller.
    """
    before = kept.load_episodes(label)
    episodes, rows = [episode for episode, _ in before], [row for _, row in before]
    all_seeds = range(config.seed, config.seed + config.episodes)
    seeds = [seed for seed in all_seeds if seed not in {episode.seed for episode in episodes}]
    filmed = all_seeds[: config.videos] if isinstance(config.videos, int) else list(config.videos)
    length, policy = config.env.options.max_episode_steps, variant.policy
    begin = time.perf_counter()
    with tqdm(total=len(all_seeds) * length, initial=len(episodes) * length, desc=label, unit="step") as bar:

        def advance(steps: int) -> None:
            if bar.update(steps):  # as often as it is drawn
                kept.note_progress(label, bar.n / bar.total)

        stream: Iterator[tuple[Episode, ControlRecord | None]]
        if variant.latency == "none" and not variant.asynchronous and view is None:
            build = partial(make_env, policy.spec, None)
            rolled = rollout(
                policy, build, seeds, config.noise_seed, config.num_envs, filmed, advance, config.processes
            )
            stream = ((episode, None) for episode in rolled)
        else:
            stream = run_charged(
                policy,
                label,
                partial(make_env, policy.spec),
                seeds,
                Latency.parse(variant.latency),
                variant.asynchronous,
                config.noise_seed,
                filmed,
                lambda row: kept.append("actions.jsonl", {"sampler": label, **row}),
                advance,
                view,
            )
        for episode, control in stream:
            advance(length - len(episode.rewards))
            if episode.error:
                tqdm.write(f"{label}, seed {episode.seed}: {episode.error}; it counts as a failure")
            row = metrics.episode_row(episode.seed - config.seed, episode)
            if control is not None:
                row["control"] = metrics.control_row(control)
                for number, seconds in enumerate(row["control"]["chunk_seconds"]):
                    timed = {"seed": episode.seed, "chunk": number, "seconds": seconds}
                    kept.append("chunks.jsonl", {"sampler": label, **timed})
            if episode.frames:
                path = kept.path / "videos" / f"{label}_{episode.seed}.mp4"
                report.write_video(episode.frames, path, fps=round(policy.spec.control_hz))
                episode.frames.clear()
                row["video_path"] = str(path)
            kept.save_episode(label, episode, row, keep_observations)
            episodes.append(episode)
            rows.append(row)
            bar.set_postfix(reward=f"{sum(e.max_reward for e in episodes) / len(episodes):.3f}")
    kept.note_progress(label, 1.0)
    videos = [row["video_path"] for row in rows if "video_path" in row]
    summary = metrics.summarize_episodes(episodes, time.perf_counter() - begin, videos)
    if controls := [row["control"] for row in rows if "control" in row]:
        loop = {"asynchronous": variant.asynchronous, "latency": variant.latency}
        summary["control"] = {**loop, **metrics.summarize_control(controls)}
    return episodes, summary


def _add_latency(
    results: dict[str, Any], policies: Mapping[str, Policy], observations: Observations, config: DictConfig
) -> None:
    if not config.latency_chunks:
        return
    chosen = _spread(observations, config.latency_chunks)
    with tqdm(total=len(chosen) * len(policies), desc="latency", unit="chunk") as bar:
        previous, current = zip(*chosen, strict=True)
        measured = measure_chunks(policies, current, config.noise_seed, previous, bar.update)
    for label, row in results["samplers"].items():
        row |= metrics.summarize_chunks(measured[label], policies[label])


def _add_fidelity(
    results: dict[str, Any], policies: Mapping[str, Policy], observations: Observations, config: DictConfig
) -> None:
    if not config.fidelity.observations:
        return
    chosen = [current for _, current in _spread(observations, config.fidelity.observations)]
    reference = next(iter(policies.values())).with_schedule().with_sampler("sequential")
    with tqdm(total=len(chosen) * (len(policies) + 2), desc="fidelity", unit="set") as bar:
        distances = measure_fidelity(policies, reference, chosen, config.fidelity.draws, bar.update)
    for label, row in results["samplers"].items():
        row["energy_distance"] = metrics.summarize_distances(distances[label], distances["resampling"])


def _measure_errors(policy: Policy, entries: Any, recorded: list[list[Any]], config: DictConfig) -> dict[str, Any]:
    variants = build_variants(policy, entries)
    policies = {label: variant.policy for label, variant in variants.items()}
    with tqdm(desc="errors", unit="chunk") as bar:
        errors = measure_errors(policies, recorded, config.errors.chunks, config.noise_seed, bar.update)
    return {label: metrics.summarize_errors(errors[label], metrics.asked_error(p)) for label, p in policies.items()}


def _spread(items: list[Any], count: int) -> list[Any]:
    """About ``count`` of the items, evenly spaced."""
    return items[:: max(1, len(items) // count)][:count]
