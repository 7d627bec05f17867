"""Many evaluations by one hydra command: failures that cost one job, and a report when all have ended."""

import traceback
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

from hydra.experimental.callback import Callback
from omegaconf import DictConfig

from parapolicy.evaluate.gather import gather_runs, measure_latencies
from parapolicy.evaluate.page import write_report
from parapolicy.evaluate.progress import SweepBar


def note_failure(folder: Path, job: Callable[[], Any]) -> None:
    """Run one job of a sweep; what it raises is written to ``error.txt`` in its folder, and the others go on."""
    note = folder / "error.txt"
    try:
        job()
    except Exception:
        note.write_text(traceback.format_exc())
        print(f"this job failed; the others go on: {note}")
    else:
        note.unlink(missing_ok=True)


class SweepReport(Callback):
    """Hydra's callback around a sweep: a bar over all its jobs, and the report at the end.

    When the jobs no longer compete for the machine, it times every sampler of the sweep side by side in this process,
    and writes the report to the sweep's folder.

    Args:
        latency_chunks: chunks per sampler that are timed; 0: none, for a sweep that is timed when it is run again.
        engine: that computes them; None: the jobs' own.
        upstream: labels of sequential samplers beside which the published code is timed, where the sweep has them.
    """

    def __init__(self, latency_chunks: int = 100, engine: str | None = None, upstream: Collection[str] = ()) -> None:
        self.latency_chunks, self.engine, self.upstream = latency_chunks, engine, upstream
        self._bar: SweepBar | None = None

    def __reduce__(self) -> tuple[Any, ...]:
        """Launchers send it to their workers, where the bar cannot go."""
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
