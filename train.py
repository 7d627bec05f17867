"""Train a Diffusion Policy on demonstrations, score it in closed loop, write its model card.

    python train.py data.path=FOLDER.zarr [data=pusht_state output=FOLDER train.steps=10000]
    python train.py data=lift data.path=FILE.hdf5 score.options.max_episode_steps=400

Interrupt it at any time; the same command resumes.
"""

import dataclasses
import sys
from pathlib import Path
from typing import Any

import gymnasium
import hydra
import torch
from omegaconf import DictConfig, OmegaConf
from tqdm import tqdm

import parapolicy
from envs import make_env
from parapolicy.checkpoint.native import CONFIG
from parapolicy.evaluate.measure.machine import describe_machine, describe_versions
from parapolicy.evaluate.run.results import summarize_episodes
from parapolicy.evaluate.run.rollout import rollout
from parapolicy.loading import pick_device
from parapolicy.spec import Feature, PolicySpec
from parapolicy.train.card import CARD, write_card
from parapolicy.train.data import read_hdf5, read_zarr
from parapolicy.train.log import LOGGERS
from parapolicy.train.state import STATE
from parapolicy.train.trainer import TrainConfig, train

DATA_SETTINGS = {"path", "name", "env", "control_hz", "mask", "observation", "action", "targets"}


def run(config: DictConfig) -> None:
    """Train, score, and write the model card."""
    if config.threads:
        torch.set_num_threads(config.threads)
    if OmegaConf.is_missing(config.data, "path"):
        raise ValueError("data.path is not set; give the zarr replay buffer to train on, data.path=FOLDER")
    settings: Any = OmegaConf.to_container(config, resolve=True)
    data, policy = settings["data"], settings["policy"]
    if unknown := sorted(set(data) - DATA_SETTINGS):
        raise ValueError(f"data has unknown settings {unknown}, expected some of {sorted(DATA_SETTINGS)}")
    device = pick_device(config.device)
    targets = data.get("targets") or {}
    given = {**data["observation"], "action": data["action"], **targets}
    if clashing := sorted(targets.keys() & {*data["observation"], "action"}):
        raise ValueError(
            f"data.targets has {clashing}, which are also observations or actions; remove them from one of the two"
        )
    for key, source in given.items():
        if not isinstance(source, dict) or not isinstance(source.get("shape"), list):
            raise ValueError(f"data gives {source!r} for {key!r}, expected {{shape: [...], array: NAME}}")
    for key, source in targets.items():
        if not isinstance(source.get("camera"), str):
            raise ValueError(
                f"data.targets gives {source} for {key!r}, expected the camera to train on it, camera: KEY"
            )
    sources = {key: {k: v for k, v in source.items() if k != "camera"} for key, source in given.items()}
    if len(data["action"]["shape"]) != 1:
        raise ValueError(
            f"data.action.shape is {data['action']['shape']}, expected the length of one action, such as [2]"
        )
    spec = PolicySpec(
        observation={
            key: Feature(tuple(value["shape"]), value.get("kind", "state"))
            for key, value in data["observation"].items()
        },
        action_dim=data["action"]["shape"][0],
        control_hz=data["control_hz"],
        provenance={"data": data["name"], "trained_with": "parapolicy train.py"},
        **policy,
    )
    if config.logger not in LOGGERS:
        raise ValueError(f"logger is {config.logger!r}, expected one of {[*LOGGERS]}")
    train_config = TrainConfig(**settings["train"])
    folder = Path(config.output)
    if str(data["path"]).endswith((".hdf5", ".h5")):
        demonstrations = read_hdf5(data["path"], sources, data.get("mask"), scratch=folder)
    elif data.get("mask") is None:
        demonstrations = read_zarr(data["path"], sources, scratch=folder)
    else:
        raise ValueError(
            f"data.mask is {data['mask']!r}, but only HDF5 files have masks; leave it out (data.mask=null)"
        )
    if config.score.episodes < 0:
        raise ValueError(f"score.episodes is {config.score.episodes}, expected at least 0")

    def build() -> gymnasium.Env:
        return make_env(data["env"], spec, **config.score.options)

    if config.score.episodes:  # fail before hours of training if it cannot be built
        build().close()
    complete = not (folder / STATE).is_file() and all((folder / name).is_file() for name in (CONFIG, CARD))
    cameras = {key: source["camera"] for key, source in targets.items()}
    result = train(spec, demonstrations, train_config, folder, device, targets=cameras, logger=LOGGERS[config.logger])
    if complete:
        print(f"{folder} is finished")
        return

    score = None
    if config.score.episodes:
        trained = parapolicy.load_policy(folder, sampler="sequential", device=str(device), engine="eager")
        seeds = range(config.score.seed, config.score.seed + config.score.episodes)
        with tqdm(total=len(seeds), desc="score", unit="episode") as bar:
            episodes = []
            for episode in rollout(trained, build, seeds, num_envs=50):
                episodes.append(episode)
                bar.update()
        score = summarize_episodes(episodes, 0.0, [])
    overrides = [word for word in sys.argv[1:] if not word.startswith(("data.path=", "hydra."))]
    write_card(
        folder,
        spec,
        data_name=data["name"],
        command=" ".join(["parapolicy train data.path=FOLDER", *overrides]),
        settings=dataclasses.asdict(train_config),
        result=result,
        machine=describe_machine(device),
        versions=describe_versions(),
        score=score,
        first_seed=config.score.seed,
        targets=cameras,
    )
    print(f"wrote {folder}")


@hydra.main(version_base="1.3", config_path="conf", config_name="train")
def main(config: DictConfig) -> None:
    try:
        run(config)
    except (ValueError, FloatingPointError, OSError) as error:
        raise SystemExit(f"error: {error}") from error
    except KeyboardInterrupt:
        raise SystemExit(130) from None


if __name__ == "__main__":
    main()
