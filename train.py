"""Train a Diffusion Policy on demonstrations, score it in closed loop, write its model card.

    python train.py data.path=FOLDER.zarr [data=pusht_state output=FOLDER train.steps=10000]
    python train.py data=lift data.path=FILE.hdf5 score.options.max_episode_steps=400

Interrupt it at any time; the same command resumes.
"""

import dataclasses
import sys
from pathlib import Path
from typing import Any

import hydra
import torch
from omegaconf import DictConfig, OmegaConf
from tqdm import tqdm

import parapolicy
from envs import make_env
from parapolicy.evaluate.measure.machine import describe_machine, describe_versions
from parapolicy.evaluate.run.results import summarize_episodes
from parapolicy.evaluate.run.rollout import rollout
from parapolicy.loading import pick_device
from parapolicy.spec import Feature, PolicySpec
from parapolicy.train.card import write_card
from parapolicy.train.data import read_hdf5, read_zarr
from parapolicy.train.trainer import TrainConfig, train


def run(config: DictConfig) -> None:
    """Train, score, write the card."""
    if config.threads:
        torch.set_num_threads(config.threads)
    if OmegaConf.is_missing(config.data, "path"):
        raise ValueError("data.path is not set; give the zarr replay buffer to train on, data.path=FOLDER")
    settings: Any = OmegaConf.to_container(config, resolve=True)
    data, policy = settings["data"], settings["policy"]
    device = pick_device(config.device)
    sources = {
        key: {name: value[name] for name in ("array", "columns", "rotation_6d") if name in value}
        for key, value in {**data["observation"], "action": data["action"]}.items()
    }
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
    train_config = TrainConfig(**settings["train"])
    folder = Path(config.output)
    if str(data["path"]).endswith((".hdf5", ".h5")):
        demonstrations = read_hdf5(data["path"], sources, data.get("mask"))
    else:
        demonstrations = read_zarr(data["path"], sources)
    result = train(spec, demonstrations, train_config, folder, device)

    score = None
    if config.score.episodes:
        trained = parapolicy.load_policy(folder, sampler="sequential", device=str(device))
        seeds = range(config.score.seed, config.score.seed + config.score.episodes)
        with tqdm(total=len(seeds), desc="score", unit="episode") as bar:
            episodes = []
            for episode in rollout(
                trained, lambda: make_env(data["env"], spec, **config.score.options), seeds, num_envs=50
            ):
                episodes.append(episode)
                bar.update()
        score = summarize_episodes(episodes, 0.0, [])
    overrides = [word for word in sys.argv[1:] if not word.startswith(("data.path=", "hydra."))]
    write_card(
        folder,
        spec,
        data_name=data["name"],
        command=" ".join(["python train.py data.path=FOLDER", *overrides]),
        settings=dataclasses.asdict(train_config),
        result=result,
        machine=describe_machine(device),
        versions=describe_versions(),
        score=score,
        first_seed=config.score.seed,
    )
    print(f"wrote {folder}")


@hydra.main(version_base="1.3", config_path="conf", config_name="train")
def main(config: DictConfig) -> None:
    try:
        run(config)
    except ValueError as error:
        raise SystemExit(f"error: {error}") from error
    except KeyboardInterrupt:
        raise SystemExit(130) from None


if __name__ == "__main__":
    main()
