"""Evaluate samplers on one policy: reward in closed loop, latency per chunk, chunk error.

    python eval.py [env=pusht checkpoint=FOLDER samplers=[sequential,secant] episodes=20 seed=100000]

Results go to hydra's run folder: run.json, results.json, episodes.jsonl, latency_reward.png, videos/, and, with
simulated latency, simulated_latency.png. To continue an interrupted run, give its folder: ``hydra.run.dir=FOLDER``.
"""

import sys
from pathlib import Path
from typing import Any

import gymnasium
import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf

from envs import make_env
from envs.inference_delay import InferenceDelay
from parapolicy.control import SimulatedClock
from parapolicy.evaluate.report.plots import plot_latency_reward, plot_simulated_latency
from parapolicy.evaluate.report.terminal import advise, print_tables
from parapolicy.evaluate.run.evaluation import evaluate
from parapolicy.evaluate.run.run_folder import job_folder, note_failure
from parapolicy.spec import PolicySpec

OmegaConf.register_new_resolver("job_folder", job_folder, replace=True)

HERE = Path(__file__).parent


def find_policy(name: str) -> str:
    """The path of a policy; a shipped policy's name, such as ``pusht_lowdim``, works from any folder.

    Raises:
        ValueError: there is no such policy.
    """
    if "://" in name or Path(name).exists():
        return name
    for shipped in (HERE / name, HERE / "checkpoints" / name):
        if (shipped / "config.json").is_file():
            return str(shipped)
    raise ValueError(
        f"no checkpoint at {name!r}; give checkpoint=FOLDER, checkpoint=FILE or checkpoint=hf://owner/name. The "
        "shipped policies are in the folder checkpoints/ of parapolicy's repository, not in its wheel"
    )


@hydra.main(version_base="1.3", config_path="conf", config_name="eval")
def main(config: DictConfig) -> None:
    folder = Path(HydraConfig.get().runtime.output_dir)

    def build(spec: PolicySpec, clock: SimulatedClock | None) -> gymnasium.Env:
        env = make_env(config.env.name, spec, **config.env.options)
        return env if clock is None else InferenceDelay(env, clock, spec.require_control_hz())

    def run() -> dict[str, Any]:
        config.checkpoint = find_policy(str(config.checkpoint))
        results = evaluate(config, folder, build)
        plot_latency_reward(results, folder / "latency_reward.png")
        if any("control" in row for row in results["samplers"].values()):
            plot_simulated_latency(results, folder / "simulated_latency.png")
        print_tables(results)
        print(f"{advise(folder)}\nwrote {folder}")
        return results

    try:
        if HydraConfig.get().mode == RunMode.MULTIRUN:
            note_failure(folder, run)
        else:
            run()
    except ValueError as error:
        raise SystemExit(f"error: {error}") from error
    except KeyboardInterrupt:
        print(f"interrupted; to continue: hydra.run.dir={folder}, or the same sweep again", file=sys.stderr)
        raise SystemExit(130) from None


if __name__ == "__main__":
    main()
