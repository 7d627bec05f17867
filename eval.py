"""Evaluate samplers on one policy: reward in closed loop, latency per chunk, side by side.

    python eval.py [env=pusht checkpoint=FOLDER samplers=[sequential,secant] episodes=20 seed=100000]

Results go to hydra's run folder: run.json, results.json, episodes.jsonl, latency_reward.png, videos/, and
charged_latency.png where thinking took simulated time. A run that was interrupted goes on in its own folder:
``hydra.run.dir=FOLDER``.
"""

from pathlib import Path
from typing import Any

import gymnasium
import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig

from envs import make_env
from envs.charged import Charged
from parapolicy.checkpoint.spec import PolicySpec
from parapolicy.control import SimulatedClock
from parapolicy.evaluate import report
from parapolicy.evaluate.evaluation import evaluate
from parapolicy.evaluate.sweep import note_failure


@hydra.main(version_base="1.3", config_path="conf", config_name="eval")
def main(config: DictConfig) -> None:
    folder = Path(HydraConfig.get().runtime.output_dir)

    def build(spec: PolicySpec, clock: SimulatedClock | None) -> gymnasium.Env:
        env = make_env(config.env.name, spec, **config.env.options)
        return env if clock is None else Charged(env, clock, spec.control_hz)

    def run() -> dict[str, Any]:
        results = evaluate(config, folder, build)
        report.plot_latency_reward(results, folder / "latency_reward.png")
        if any("control" in row for row in results["samplers"].values()):
            report.plot_charged_latency(results, folder / "charged_latency.png")
        report.print_table(results)
        print(f"wrote {folder}")
        return results

    try:
        if HydraConfig.get().mode == RunMode.MULTIRUN:
            note_failure(folder, run)
        else:
            run()
    except ValueError as error:
        raise SystemExit(f"error: {error}") from error
    except KeyboardInterrupt:
        raise SystemExit(f"interrupted; to go on: hydra.run.dir={folder}, or the same sweep again") from None


if __name__ == "__main__":
    main()
