"""The progress bar of a sweep. It reads the jobs' folders, so jobs may run on any machine that shares these."""

import itertools
import json
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.experimental.callback import Callback
from omegaconf import DictConfig, OmegaConf
from tqdm import tqdm

from parapolicy.evaluate.run.run_folder import read_about
from parapolicy.evaluate.run.variants import entry_label

# Evaluations per chunk, in multiples of the schedule's length. Rough values that only weight the time estimate.
EVALUATIONS = {"sequential": 1.0, "collocation": 0.3, "paradigms": 4.0}
OTHER_EVALUATIONS = 2.0
STEPS = 100  # of the schedule, for entries that do not set them


class SweepBar:
    """A progress bar over all jobs of a sweep, in a thread that polls their folders.

    Work on disk at the start counts as done, but not for the speed.

    Args:
        config: of the sweep, with hydra's part.
        interval: seconds between two polls.
    """

    def __init__(self, config: DictConfig, interval: float = 5.0) -> None:
        jobs = list(list_jobs(config))
        self.folder, self.interval = Path(config.hydra.sweep.dir), interval
        self.bar = tqdm(
            total=sum(job_cost(job) for job in jobs),
            initial=sweep_cost(self.folder),
            desc=f"all {len(jobs)} jobs",
            bar_format="{desc}: {percentage:3.0f}% |{bar}| {elapsed} gone, {remaining} left",
            smoothing=0,
        )
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="sweep bar", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Update once more and stop."""
        self._ended.set()
        self._thread.join()
        self._update()
        self.bar.close()

    def _watch(self) -> None:
        while not self._ended.wait(self.interval):
            self._update()

    def _update(self) -> None:
        self.bar.n = min(sweep_cost(self.folder), self.bar.total)
        self.bar.refresh()


class SweepStatus(Callback):
    """Hydra's callback of a sweep that ends the command with status 1 if a job in its folder has failed."""

    def on_multirun_end(self, config: DictConfig, **kwargs: Any) -> None:
        """Called by hydra, after the other callbacks."""
        failed = sorted(str(note) for note in Path(config.hydra.sweep.dir).rglob("error.txt"))
        if failed:
            print(f"{len(failed)} jobs failed: {', '.join(failed)}; run the sweep again, or delete these folders")
            raise SystemExit(1)


def list_jobs(config: DictConfig) -> Iterator[dict[str, Any]]:
    """``samplers`` and ``episodes`` of each job, as hydra's basic sweeper combines them."""
    plain: Any = OmegaConf.to_container(config, resolve=False)
    params = plain["hydra"]["sweeper"].get("params") or {}
    words = [f"{key}={value}" for key, value in params.items()] + plain["hydra"]["overrides"]["task"]
    choices: dict[str, list[Any]] = {}
    for override in OverridesParser.create().parse_overrides(words):
        swept = override.is_discrete_sweep()
        choices[override.key_or_group] = list(override.sweep_iterator()) if swept else [override.value()]
    for values in itertools.product(*choices.values()):
        job = dict(zip(choices, values, strict=True))
        yield {key: job.get(key, plain[key]) for key in ("samplers", "episodes")}


def job_cost(config: Mapping[str, Any]) -> float:
    """The cost of a job: network evaluations of a chunk, times episodes, summed over samplers."""
    return sum(_sampler_costs(config).values())


def sweep_cost(folder: Path) -> float:
    """The cost of the episodes that a sweep's jobs have computed so far."""
    done = 0.0
    for about in folder.rglob("run.json"):
        try:
            costs = _sampler_costs((read_about(about.parent) or {})["config"])
        except (ValueError, KeyError, TypeError):  # the job itself reports it
            continue
        finished = about.with_name("results.json").is_file()
        parts = dict.fromkeys(costs, 1.0) if finished else _read_parts(about.with_name("progress.json"))
        done += sum(parts.get(label, 0.0) * cost for label, cost in costs.items())
    return done


def _read_parts(path: Path) -> dict[str, float]:
    try:
        return {str(label): float(part) for label, part in json.loads(path.read_text()).items()}
    except (OSError, ValueError, TypeError, AttributeError):  # not started, or being written
        return {}


def _sampler_costs(config: Mapping[str, Any]) -> dict[str, float]:
    costs = {}
    for entry in config["samplers"]:
        settings = {"name": entry} if isinstance(entry, str) else entry
        name, steps = str(settings["name"]), settings.get("steps", STEPS)
        costs[entry_label(entry)] = config["episodes"] * steps * EVALUATIONS.get(name, OTHER_EVALUATIONS)
    return costs
