"""Sweeps by hydra: a progress bar over all jobs; at the end, timings of all samplers and a report."""

from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

from hydra.experimental.callback import Callback
from omegaconf import DictConfig
from tqdm import tqdm

from parapolicy.evaluate.measure.machine import describe_machine
from parapolicy.evaluate.measure.timing import count_evaluations, measure_chunks, select_observations
from parapolicy.evaluate.report.gather import Run, gather_runs
from parapolicy.evaluate.report.html_report import write_report
from parapolicy.evaluate.run.progress import SweepBar
from parapolicy.evaluate.run.records import read_latencies, write_latencies
from parapolicy.evaluate.run.results import summarize_chunks
from parapolicy.evaluate.run.run_folder import read_observations
from parapolicy.evaluate.run.variants import build_variants, entry_label
from parapolicy.loading import load_policy

COUNTED = 20  # chunks per sampler whose evaluations are counted by step of the schedule


def measure_latencies(
    runs: Sequence[Run], path: Path, chunks: int, engine: str | None = None, upstream: Collection[str] = ()
) -> None:
    """Time all samplers of the runs in turn, per environment and checkpoint. Groups that are in ``path`` are skipped.

    Args:
        runs: with ``run.json`` and the observations of their episodes.
        path: of the result, JSON with a record per sampler.
        chunks: per sampler.
        engine: None for the runs' own.
        upstream: labels of sequential samplers whose schedules are also timed with the published code, see
            :func:`parapolicy.evaluate.measure.upstream.upstream_chunk`.
    """
    done = read_latencies(path)
    groups: dict[tuple[str, str], list[tuple[Path, dict[str, Any]]]] = {}
    for run in runs:
        if run.about is not None:
            group = groups.setdefault((run.results["env"], run.results["checkpoint"]), [])
            group.append((run.folder, run.about["config"]))
    for (env, checkpoint), members in groups.items():
        entries: dict[str, Any] = {}
        for _, config in members:
            for entry in config["samplers"]:
                entries.setdefault(entry_label(entry), entry)
        timed = {record["sampler"] for record in done if (record["env"], record["checkpoint"]) == (env, checkpoint)}
        files = [file for folder, _ in members for file in sorted((folder / "observations").glob("*.npz"))]
        if not files or not entries.keys() - timed:
            continue
        settings = members[0][1]
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
        write_latencies(path, done)


class SweepReport(Callback):
    """Hydra's callback of a sweep: a progress bar over all its jobs, and the report at the end.

    When all jobs have ended and the machine is free, it times every sampler of the sweep in this process and writes the
    report to the sweep's folder.

    Args:
        latency_chunks: chunks per sampler that are timed; 0 for none, for example to time them in a later run.
        engine: of these chunks; None for the jobs' own.
        upstream: labels of sequential samplers whose schedules are also timed with the published code.
    """

    def __init__(self, latency_chunks: int = 100, engine: str | None = None, upstream: Collection[str] = ()) -> None:
        self.latency_chunks, self.engine, self.upstream = latency_chunks, engine, upstream
        self._bar: SweepBar | None = None

    def __reduce__(self) -> tuple[Any, ...]:
        """Launchers pickle the callback for their workers; the bar cannot be pickled."""
        return SweepReport, (self.latency_chunks, self.engine, self.upstream)

    def on_multirun_start(self, config: DictConfig, **kwargs: Any) -> None:
        """Called by hydra."""
        self._bar = SweepBar(config)

    def on_multirun_end(self, config: DictConfig, **kwargs: Any) -> None:
        """Called by hydra."""
        if self._bar is not None:
            self._bar.close()
        folder = Path(config.hydra.sweep.dir)
        runs = gather_runs([folder])
        if self.latency_chunks:
            measure_latencies(runs, folder / "latency.json", self.latency_chunks, self.engine, self.upstream)
        write_report([folder], folder / "report")
