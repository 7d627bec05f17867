"""Sweeps with hydra: a progress bar over all jobs; at the end, measurements of all samplers and a report."""

from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

from hydra.experimental.callback import Callback
from omegaconf import DictConfig
from tqdm import tqdm

from parapolicy.evaluate.measure.fidelity import draw_reference, measure_fidelity
from parapolicy.evaluate.measure.machine import describe_machine
from parapolicy.evaluate.measure.timing import count_evaluations, measure_chunks, select_observations
from parapolicy.evaluate.report.gather import Run, find_references, gather_runs
from parapolicy.evaluate.report.html_report import write_report
from parapolicy.evaluate.run.progress import SweepBar
from parapolicy.evaluate.run.records import COMPARED, read_records, write_records
from parapolicy.evaluate.run.results import summarize_chunks, summarize_fidelity
from parapolicy.evaluate.run.run_folder import read_observations
from parapolicy.evaluate.run.variants import build_variants, entry_label
from parapolicy.loading import load_policy

COUNTED = 20  # chunks per sampler whose evaluations are counted by step of the schedule


def measure_latencies(
    runs: Sequence[Run], path: Path, chunks: int, engine: str | None = None, upstream: Collection[str] = ()
) -> None:
    """Time all samplers of the runs in turn, per environment and checkpoint. Groups in ``path`` are skipped.

    Args:
        runs: with ``run.json`` and the observations of their episodes.
        path: of the result, JSON with a record per sampler.
        chunks: per sampler.
        engine: that computes the chunks; None: the runs' own.
        upstream: labels of sequential samplers whose schedules are also timed with the published code, see
            :func:`parapolicy.evaluate.measure.upstream.upstream_chunk`.
    """
    done = read_records(path)
    for (env, checkpoint), members in _group(runs).items():
        entries = _entries(members)
        timed = {record["sampler"] for record in done if (record["env"], record["checkpoint"]) == (env, checkpoint)}
        files = [file for run in members for file in sorted((run.folder / "observations").glob("*.npz"))]
        if not files or not entries.keys() - timed:
            continue
        settings = members[0].settings
        name = engine or settings["engine"]
        policy = load_policy(checkpoint, device=settings["device"], engine=name)
        policies = {label: variant.policy for label, variant in build_variants(policy, list(entries.values())).items()}
        chosen = select_observations([read_observations(file) for file in files], chunks)
        previous, current = zip(*chosen, strict=True)
        published = {f"upstream {label}": policies[label] for label in upstream if label in policies}
        with tqdm(total=len(chosen) * len(policies | published), desc=f"latency, {env}", unit="chunk") as bar:
            measured = measure_chunks(policies, current, 0, previous, bar.update, published)
        machine = describe_machine(policy.device)
        done = [record for record in done if (record["env"], record["checkpoint"]) != (env, checkpoint)]
        for label, result in measured.items():
            record: dict[str, Any] = {"env": env, "checkpoint": checkpoint, "sampler": label, "machine": machine}
            if label in published:
                record |= {"engine": "upstream", "same_as": label.removeprefix("upstream ")}
            else:
                record["engine"] = name
                record["evaluated"] = count_evaluations(policies[label], current[:COUNTED])
            done.append(record | summarize_chunks(result, policies.get(label)))
        write_records(path, done)


def measure_fidelities(runs: Sequence[Run], path: Path, observations: int, draws: int) -> None:
    """Measure the samplers' distance in distribution from the policy, per environment and checkpoint.

    A sampler that is in ``path`` is skipped. Each result is written as soon as it is measured.

    Args:
        runs: with ``run.json`` and the observations of their episodes; the episodes of the policy's own steps are used.
        path: of the result, JSON with a record per sampler.
        observations: their number, evenly spaced.
        draws: chunks per observation and sampler.
    """
    done = read_records(path, COMPARED)
    for (env, checkpoint), members in _group(runs).items():
        entries = _entries(members)
        missing = entries.keys() - {
            row["sampler"] for row in done if (row["env"], row["checkpoint"]) == (env, checkpoint)
        }
        own = [run for run in members if next(iter(run.results["samplers"])) in find_references(run)]
        files = [file for run in own for file in sorted((run.folder / "observations").glob("*.npz"))]
        if not files or not missing:
            continue
        settings = members[0].settings
        policy = load_policy(checkpoint, device=settings["device"], engine=settings["engine"])
        variants = build_variants(policy, [entry for label, entry in entries.items() if label in missing])
        pairs = select_observations([read_observations(file) for file in files], observations)
        previous, chosen = zip(*pairs, strict=True)
        with tqdm(total=len(chosen) * (len(variants) + 2), desc=f"fidelity, {env}", unit="set") as bar:
            reference = draw_reference(policy.with_sampler("sequential"), chosen, draws, bar.update)
            for label, variant in variants.items():
                distances = measure_fidelity(variant.policy, reference, chosen, previous, bar.update)
                record = {"env": env, "checkpoint": checkpoint, "sampler": label}
                done.append(record | summarize_fidelity(*distances, reference))
                write_records(path, done)


def _group(runs: Sequence[Run]) -> dict[tuple[str, str], list[Run]]:
    """(env, checkpoint) -> its runs that have a ``run.json``."""
    groups: dict[tuple[str, str], list[Run]] = {}
    for run in runs:
        if run.about is not None:
            groups.setdefault((run.results["env"], run.results["checkpoint"]), []).append(run)
    return groups


def _entries(runs: Sequence[Run]) -> dict[str, Any]:
    """Label -> entry of every sampler of the runs; if several runs have a label, the first counts."""
    entries: dict[str, Any] = {}
    for run in runs:
        for entry in run.settings["samplers"]:
            entries.setdefault(entry_label(entry), entry)
    return entries


class SweepReport(Callback):
    """Hydra's callback of a sweep: a progress bar over all its jobs, and the report at the end.

    After all jobs, when the machine is free, it measures every sampler of the sweep in this process and writes
    the report to the sweep's folder.

    Args:
        latency_chunks: number of timed chunks per sampler; 0: none, for example to time them in a later run.
        engine: of these chunks; None: the jobs' own.
        upstream: labels of sequential samplers whose schedules are also timed with the published code.
        fidelity_observations: number of observations at which distributions are compared; 0: none.
        fidelity_draws: chunks per observation and sampler.
    """

    def __init__(
        self,
        latency_chunks: int = 100,
        engine: str | None = None,
        upstream: Collection[str] = (),
        fidelity_observations: int = 0,
        fidelity_draws: int = 100,
    ) -> None:
        self.latency_chunks, self.engine, self.upstream = latency_chunks, engine, upstream
        self.fidelity_observations, self.fidelity_draws = fidelity_observations, fidelity_draws
        self._bar: SweepBar | None = None

    def __reduce__(self) -> tuple[Any, ...]:
        """Launchers pickle the callback for their workers; the bar cannot be pickled."""
        fidelity = self.fidelity_observations, self.fidelity_draws
        return SweepReport, (self.latency_chunks, self.engine, self.upstream, *fidelity)

    def on_multirun_start(self, config: DictConfig, **kwargs: Any) -> None:
        """Called by hydra."""
        self._bar = SweepBar(config)

    def on_multirun_end(self, config: DictConfig, **kwargs: Any) -> None:
        """Called by hydra."""
        if self._bar is not None:
            self._bar.close()
        folder = Path(config.hydra.sweep.dir)
        runs = gather_runs([folder])
        if self.fidelity_observations:
            measure_fidelities(runs, folder / "fidelity.json", self.fidelity_observations, self.fidelity_draws)
        if self.latency_chunks:
            measure_latencies(runs, folder / "latency.json", self.latency_chunks, self.engine, self.upstream)
        write_report([folder], folder / "report")
