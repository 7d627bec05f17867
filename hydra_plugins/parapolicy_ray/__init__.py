"""Hydra's jobs as tasks of a Ray cluster: ``python eval.py -m hydra/launcher=parapolicy_ray …``.

Hydra's own hydra-ray-launcher (1.2.2) cannot be installed with this project: it needs cloudpickle below 3, boto3 and
Ray's dashboard. This launcher needs only ``ray``. If a job's process or machine dies, Ray starts the job again; its
folder has the finished episodes, so only the others are run.
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hydra.core.config_store import ConfigStore
from hydra.core.singleton import Singleton
from hydra.core.utils import JobReturn, JobStatus, configure_log, run_job, setup_globals
from hydra.plugins.launcher import Launcher
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig, open_dict

from parapolicy.evaluate.run.run_folder import note_failure


@dataclass
class RayLauncherConf:
    """Settings, such as ``hydra.launcher.cpus_per_job=2``.

    Attributes:
        address: of a cluster, as for ``ray.init``; ``local`` starts one on this machine for the duration of the sweep.
        cpus: of the local cluster; None: all of the machine's.
        cpus_per_job, gpus_per_job: resources of a job, which limit the number of jobs at a time.
        max_retries: how often a job is restarted after its process died.
    """

    _target_: str = "hydra_plugins.parapolicy_ray.RayLauncher"
    address: str = "local"
    cpus: int | None = None
    cpus_per_job: float = 1
    gpus_per_job: float = 0
    max_retries: int = 3


ConfigStore.instance().store(group="hydra/launcher", name="parapolicy_ray", node=RayLauncherConf)


class RayLauncher(Launcher):
    """Runs each job in its own process in a Ray cluster that shares this machine's folders.

    The parameters are those of :class:`RayLauncherConf`.
    """

    def __init__(
        self, address: str, cpus: int | None, cpus_per_job: float, gpus_per_job: float, max_retries: int
    ) -> None:
        local: dict[str, Any] = {"num_cpus": cpus, "include_dashboard": False, "object_store_memory": 80 * 2**20}
        self.cluster = {"address": address} | (local if address == "local" else {})
        # A process per job: threads and other settings must not carry over to the next.
        self.task: dict[str, Any] = {
            "num_cpus": cpus_per_job,
            "num_gpus": gpus_per_job,
            "max_retries": max_retries,
            "max_calls": 1,
        }

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        """Called by hydra."""
        self.hydra_context, self.task_function, self.config = hydra_context, task_function, config

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Sequence[JobReturn]:
        """Called by hydra: run all jobs, and shut down a local cluster."""
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # no usage reports, unless requested
        try:
            import ray
        except ImportError as error:
            raise SystemExit(
                f"hydra/launcher is parapolicy_ray, which needs Ray ({error}): pip install 'parapolicy[distributed]'"
            ) from error
        setup_globals()
        configure_log(self.config.hydra.hydra_logging, self.config.hydra.verbose)
        ray.init(**self.cluster)
        try:
            remote = ray.remote(**self.task)(_run)
            jobs = []
            for number, overrides in enumerate(job_overrides, initial_job_idx):
                config = self.hydra_context.config_loader.load_sweep_config(self.config, list(overrides))
                with open_dict(config):
                    config.hydra.job.id = config.hydra.job.num = number
                work = (self.hydra_context, self.task_function, config, Singleton.get_state(), os.getcwd())
                jobs.append((config, remote.options(name=f"job {number}").remote(*work)))
            return [_result(config, lambda task=task: ray.get(task)) for config, task in jobs]
        finally:
            ray.shutdown()


def _run(context: HydraContext, function: TaskFunction, config: DictConfig, singletons: Any, folder: str) -> JobReturn:
    """One job, in a worker's process."""
    os.chdir(folder)  # relative paths are relative to the launching process
    setup_globals()
    Singleton.set_state(singletons)
    return run_job(function, config, "hydra.sweep.dir", "hydra.sweep.subdir", context)


def _result(config: DictConfig, wait: Any) -> JobReturn:
    """A job's result. If its process died too often, that is noted in its folder, and the others continue."""
    found = [JobReturn(status=JobStatus.COMPLETED)]
    folder = Path(config.hydra.sweep.dir, str(config.hydra.sweep.subdir))
    folder.mkdir(parents=True, exist_ok=True)
    note_failure(folder, lambda: found.append(wait()))
    return found[-1]
