"""Evaluation of several samplers on one policy: reward in closed loop, latency per chunk, chunk error."""

import dataclasses
import time
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import gymnasium
import torch
from omegaconf import DictConfig, OmegaConf
from tqdm import tqdm

from parapolicy.control import ControlRecord, SimulatedClock
from parapolicy.digest import digest
from parapolicy.evaluate.measure.chunk_error import measure_errors
from parapolicy.evaluate.measure.fidelity import draw_reference, measure_fidelity
from parapolicy.evaluate.measure.machine import describe_git, describe_machine, describe_versions
from parapolicy.evaluate.measure.timing import measure_chunks, select_observations
from parapolicy.evaluate.run.results import (
    compare_to_baseline,
    control_row,
    episode_row,
    summarize_chunks,
    summarize_control,
    summarize_episodes,
    summarize_errors,
    summarize_fidelity,
)
from parapolicy.evaluate.run.rollout import EpisodeRecord, rollout
from parapolicy.evaluate.run.run_folder import RunFolder
from parapolicy.evaluate.run.simulated_latency import SimulatedLatency, run_with_latency
from parapolicy.evaluate.run.variants import Variant, build_variants, find_baseline
from parapolicy.evaluate.run.watchers import Watcher, open_watcher
from parapolicy.loading import load_policy
from parapolicy.policy import Policy
from parapolicy.spec import PolicySpec

MakeEnv = Callable[[PolicySpec, "SimulatedClock | None"], gymnasium.Env]
Recorded = list[list[dict[str, Any]]]  # observations {key: (To, …)} by episode and chunk


def evaluate(config: DictConfig, folder: Path, make_env: MakeEnv) -> dict[str, Any]:
    """Run an evaluation into its folder, or the rest of an interrupted one.

    Args:
        config: the settings of ``conf/eval.yaml``.
        folder: of the run; the results of a finished run are only read.
        make_env: builds an environment for a policy; with a clock, it keeps moving during inference.

    Returns:
        The content of ``results.json``.

    Raises:
        ValueError: a setting is wrong; the message names it and what is expected.
    """
    if config.episodes < 1 or config.latency_chunks < 0:
        raise ValueError(f"episodes is {config.episodes}, latency_chunks {config.latency_chunks}; expected at least 1")
    asked = config.fidelity
    if asked.observations < 1 or asked.draws < 2:
        raise ValueError(
            f"fidelity.observations is {asked.observations} and fidelity.draws {asked.draws}, expected at least 1 and "
            "2; set fidelity.measure=false to measure none"
        )
    if config.env_timeout_s is not None and not config.env_timeout_s > 0:
        raise ValueError(f"env_timeout_s is {config.env_timeout_s}, expected seconds, or null for no limit")
    if config.threads:
        torch.set_num_threads(config.threads)
    policy = load_policy(config.checkpoint, device=config.device, engine=config.engine)
    if policy.spec.control_hz is None and (rate := config.env.get("control_hz")) is not None:
        policy = dataclasses.replace(policy, spec=policy.spec.with_control_hz(rate))
    plain: Any = OmegaConf.to_container(config, resolve=True)
    variants = build_variants(policy, plain["samplers"], config.control, config.env.latency, config.seam)
    machine = {"machine": describe_machine(policy.device), "versions": describe_versions()}
    weights = digest([policy.spec.to_dict(), policy.network.state_dict(), policy.normalizer.state_dict()])
    about = {"checkpoint_digest": weights, **machine, "git": describe_git(Path(__file__).parent)}
    kept = RunFolder(folder, {"config": plain, **about})
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
    cameras = [key for key, feature in policy.spec.observation.items() if feature.kind == "image"]
    recorded: Recorded = []  # by the first sampler
    with open_watcher(config.watch, cameras) as view:
        for label, variant in variants.items():
            episodes, row = run_episodes(label, variant, config, kept, make_env, not recorded, view)
            results["samplers"][label] = row
            recorded = recorded or [e.observations for e in sorted(episodes, key=lambda episode: episode.seed)]
    if not any(recorded) and (config.latency_chunks or config.fidelity.measure or config.errors.chunks):
        first, row = next(iter(results["samplers"].items()))
        raise ValueError(
            f"no episode of {first} reached its first chunk ({row['per_episode'][0]['error']}), so there is nothing to "
            "measure; repair the environment and delete this folder, or set latency_chunks=0"
        )
    policies = {label: variant.policy for label, variant in variants.items()}
    for measure in (_add_latency, _add_fidelity):
        measure(results, policies, recorded, config)
    if config.errors.chunks:
        entries = plain["errors"]["samplers"] or plain["samplers"]
        results["errors"] = _measure_errors(policy, entries, recorded, config)
    if baseline := find_baseline(policies):
        for row in results["samplers"].values():
            row |= compare_to_baseline(row, results["samplers"][baseline], baseline)
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
    view: Watcher | None = None,
) -> tuple[list[EpisodeRecord], dict[str, Any]]:
    """Run one sampler's episodes that are not in the folder yet. Returns all its episodes, and their summary.

    With simulated latency, asynchronous control or a view, a controller runs episodes one after the other.
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
            if bar.update(steps):  # True when the bar is redrawn
                kept.note_progress(label, bar.n / bar.total)

        stream: Iterator[tuple[EpisodeRecord, ControlRecord | None]]
        if not variant.needs_controller and view is None:
            build = partial(make_env, policy.spec, None)
            limit = config.env_timeout_s
            rolled = rollout(
                policy, build, seeds, config.noise_seed, config.num_envs, filmed, advance, config.processes, limit
            )
            stream = ((episode, None) for episode in rolled)
        else:
            stream = run_with_latency(
                policy,
                label,
                partial(make_env, policy.spec),
                seeds,
                SimulatedLatency.parse(variant.latency),
                variant.asynchronous,
                config.noise_seed,
                filmed,
                lambda row: kept.append("actions.jsonl", {"sampler": label, **row}),
                advance,
                view,
                variant.seam,
            )
        for episode, control in stream:
            advance(length - len(episode.rewards))
            if episode.error:
                tqdm.write(f"{label}, seed {episode.seed}: {episode.error}; it counts as a failure")
            row = episode_row(episode.seed - config.seed, episode)
            if control is not None:
                row["control"] = control_row(control)
                for number, seconds in enumerate(episode.charged):
                    timed = {"seed": episode.seed, "chunk": number, "seconds": seconds}
                    kept.append("chunks.jsonl", {"sampler": label, **timed})
            kept.save_episode(label, episode, row, keep_observations)
            if episode.frames:
                kept.save_video(label, episode.seed, episode.frames, round(policy.spec.require_control_hz()))
                episode.frames.clear()
            episodes.append(episode)
            rows.append(row)
            bar.set_postfix(reward=f"{sum(e.max_reward for e in episodes) / len(episodes):.3f}")
    kept.note_progress(label, 1.0)
    videos = [str(path) for seed in filmed if (path := kept.video(label, seed)).is_file()]
    summary = summarize_episodes(episodes, time.perf_counter() - begin, videos)
    if controls := [row["control"] for row in rows if "control" in row]:
        loop = {"asynchronous": variant.asynchronous, "latency": variant.latency, "seam": variant.seam}
        summary["control"] = {**loop, **summarize_control(controls)}
    return episodes, summary


def _add_latency(
    results: dict[str, Any], policies: Mapping[str, Policy], recorded: Recorded, config: DictConfig
) -> None:
    if not config.latency_chunks:
        return
    chosen = select_observations(recorded, config.latency_chunks)
    with tqdm(total=len(chosen) * len(policies), desc="latency", unit="chunk") as bar:
        previous, current = zip(*chosen, strict=True)
        measured = measure_chunks(policies, current, config.noise_seed, previous, bar.update)
    for label, row in results["samplers"].items():
        row |= summarize_chunks(measured[label], policies[label])


def _add_fidelity(
    results: dict[str, Any], policies: Mapping[str, Policy], recorded: Recorded, config: DictConfig
) -> None:
    if not config.fidelity.measure:
        return
    pairs = select_observations(recorded, config.fidelity.observations)
    previous, chosen = zip(*pairs, strict=True)
    plain = next(iter(policies.values())).with_schedule().with_sampler("sequential")
    with tqdm(total=len(chosen) * (len(policies) + 2), desc="fidelity", unit="set") as bar:
        reference = draw_reference(plain, chosen, config.fidelity.draws, bar.update)
        for label, row in results["samplers"].items():
            distances = measure_fidelity(policies[label], reference, chosen, previous, bar.update)
            row |= summarize_fidelity(*distances, reference)


def _measure_errors(policy: Policy, entries: Any, recorded: Recorded, config: DictConfig) -> dict[str, Any]:
    variants = build_variants(policy, entries)
    policies = {label: variant.policy for label, variant in variants.items()}
    with tqdm(desc="errors", unit="chunk") as bar:
        errors = measure_errors(policies, recorded, config.errors.chunks, config.noise_seed, bar.update)
    return {label: summarize_errors(errors[label], p.sampler.asked_error) for label, p in policies.items()}
