"""Training on pictures: how they are read, cropped, encoded, and what the run leaves."""

import dataclasses
import sys
import tracemalloc
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import torch
import zarr

import parapolicy
from parapolicy.normalizer import Normalizer
from parapolicy.spec import Feature, PolicySpec
from parapolicy.train import frames
from parapolicy.train.data import Demonstrations, read_hdf5, read_zarr
from parapolicy.train.log import EVENTS, LOG, LOGGERS, TensorboardLog
from parapolicy.train.loss import Loss, shift
from parapolicy.train.state import STATE
from parapolicy.train.trainer import TrainConfig, train
from tests.helpers import received_condition, small_spec

CPU = torch.device("cpu")
CAMERA = {"width": 16, "levels": 1, "keypoints": 4, "features": 6, "relu": False, "crop": [14, 12]}
SPEC = small_spec(
    observation={"camera": Feature((16, 16, 3), "image"), "position": Feature((2,))},
    network={**small_spec().network, "encoder": {"cameras": {"camera": CAMERA}}},
)
SOURCES = {
    "camera": {"array": "pictures", "shape": [16, 16, 3], "kind": "image"},
    "position": "position",
    "points": "points",
    "action": "action",
}
CONFIG = TrainConfig(
    steps=8, batch_size=8, warmup_steps=2, checkpoint_every=4, precision="float32", validation=0.3, validate_every=4
)
TARGETS = {"points": "camera"}


@pytest.fixture
def arrays() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    shapes = {"position": (2,), "points": (3, 2), "action": (2,)}
    values = {name: rng.uniform(0, 512, (40, *shape)).astype(np.float32) for name, shape in shapes.items()}
    return {**values, "pictures": rng.integers(0, 256, (40, 16, 16, 3), dtype=np.uint8)}


@pytest.fixture
def buffer(tmp_path: Path, arrays: dict[str, np.ndarray]) -> Path:
    """Four episodes of ten steps, whose pictures are float32, as published."""
    root = zarr.open_group(str(tmp_path / "replay.zarr"), mode="w")
    for name, value in arrays.items():
        root[f"data/{name}"] = value.astype(np.float32)
    root["meta/episode_ends"] = np.array([10, 20, 30, 40])
    return tmp_path / "replay.zarr"


@pytest.fixture
def data(buffer: Path, tmp_path: Path) -> Demonstrations:
    return read_zarr(buffer, SOURCES, scratch=tmp_path)


def test_pictures_are_read_as_bytes(buffer: Path, data: Demonstrations, arrays: dict[str, np.ndarray]) -> None:
    assert data.arrays["camera"].dtype == torch.uint8
    np.testing.assert_array_equal(data.arrays["camera"].numpy(), arrays["pictures"])
    assert not list(buffer.parent.glob("*tmp*"))  # the file they are in has no name that could stay behind


def test_pictures_of_a_robomimic_file_are_read_alike(
    tmp_path: Path, arrays: dict[str, np.ndarray], data: Demonstrations
) -> None:
    with h5py.File(tmp_path / "demos.hdf5", "w") as file:
        for i in range(4):
            for name in ("position", "pictures"):
                file[f"data/demo_{i}/obs/{name}"] = arrays[name][10 * i : 10 * i + 10]
            file[f"data/demo_{i}/actions"] = arrays["action"][10 * i : 10 * i + 10]
    sources = {
        "camera": {**SOURCES["camera"], "array": "obs/pictures"},  # type: ignore[dict-item]
        "position": "obs/position",
        "action": "actions",
    }
    there = read_hdf5(tmp_path / "demos.hdf5", sources, scratch=tmp_path)
    assert all(torch.equal(value, data.arrays[key]) for key, value in there.arrays.items())
    with h5py.File(tmp_path / "demos.hdf5", "a") as file:
        del file["data/demo_2/obs/pictures"]
        file["data/demo_2/obs/pictures"] = arrays["pictures"][:9]
    with pytest.raises(parapolicy.DataError, match="demo_2/obs/pictures has 9 steps for 10 actions"):
        read_hdf5(tmp_path / "demos.hdf5", sources)


def test_reading_takes_the_memory_of_a_few_blocks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(frames, "BLOCK_BYTES", 2**18)
    root = zarr.open_group(str(tmp_path / "long.zarr"), mode="w")
    root.require_group("data")
    pictures = zarr.open_array(  # as zarr 2 and 3 have it
        str(tmp_path / "long.zarr/data/pictures"),
        mode="w",
        shape=(4000, 16, 16, 3),
        chunks=(50, 16, 16, 3),
        dtype="float32",
    )
    for start in range(0, 4000, 500):
        pictures[start : start + 500] = start % 256
    root["data/action"] = np.zeros((4000, 2), np.float32)
    root["meta/episode_ends"] = np.array([4000])
    sources = {"camera": SOURCES["camera"], "action": "action"}
    tracemalloc.start()
    try:
        camera = read_zarr(tmp_path / "long.zarr", sources, scratch=tmp_path).arrays["camera"]
        most = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert [int(camera[step].max()) for step in (499, 500, 3999)] == [0, 244, 172]
    assert most < camera.numel() / 2  # that is an eighth of what is stored


@pytest.mark.parametrize(
    ("change", "source", "message"),
    [
        ({"value": 0.5}, {}, r"data/pictures holds 0.5 at step 7, expected whole numbers from 0 to 255"),
        ({"value": 256}, {}, r"holds 256.0 at step 7, expected whole numbers from 0 to 255"),
        ({"value": np.nan}, {}, r"holds nan at step 7, expected whole numbers"),
        ({}, {"shape": [3, 16, 16]}, r"images of shape \(16, 16, 3\), expected \(3, 16, 16\)"),
        ({}, {"shape": None}, "expected only an array and its shape"),
        ({}, {"columns": [0]}, "expected only an array and its shape"),
        ({}, {"kind": "picture"}, "has the kind 'picture', expected one of"),
    ],
)
def test_bad_pictures_are_named(buffer: Path, change: dict, source: dict, message: str) -> None:
    if change:
        zarr.open_group(str(buffer), mode="a")["data/pictures"][7, 3, 4, 1] = change["value"]
    with pytest.raises(parapolicy.DataError, match=message):
        read_zarr(buffer, {**SOURCES, "camera": {**SOURCES["camera"], **source}})  # type: ignore[dict-item]


def with_camera(**settings: Any) -> PolicySpec:
    encoder = {"cameras": {"camera": {**CAMERA, **settings}}}
    return dataclasses.replace(SPEC, network={**SPEC.network, "encoder": encoder})


@pytest.mark.parametrize(
    ("spec", "targets", "config", "error", "message"),
    [
        (
            small_spec(observation={"camera": (16, 16, 3)}),
            {},
            {},
            parapolicy.DataError,
            "the policy's kind is 'state'",
        ),
        (SPEC, {"corners": "camera"}, {}, parapolicy.DataError, "no target 'corners', expected one of"),
        (SPEC, {"position": "camera"}, {}, ValueError, "'position' is also an observation"),
        (SPEC, {"points": "position"}, {}, ValueError, "for the camera 'position', expected an image"),
        (with_camera(features=5), TARGETS, {}, ValueError, "has 6 numbers, but the camera 'camera' has 5 features"),
        (SPEC, {}, {"target_steps": 1}, ValueError, "target_steps is 1, but the data has no targets"),
        (SPEC, {}, {"validation": 0.9}, parapolicy.DataError, "validation is 0.9 of 4 episodes, which leaves none"),
    ],
)
def test_what_cannot_be_trained_is_named_before_training(
    data: Demonstrations, tmp_path: Path, spec: PolicySpec, targets: Any, config: Any, error: Any, message: str
) -> None:
    with pytest.raises(error, match=message):
        train(spec, data, dataclasses.replace(CONFIG, **config), tmp_path / "run", CPU, targets=targets)
    assert not (tmp_path / "run").exists()


def test_bad_settings_are_named() -> None:
    with pytest.raises(ValueError, match=r"validation is 1\.0, expected a share"):
        TrainConfig(validation=1.0)
    with pytest.raises(ValueError, match="target_steps is -1"):
        TrainConfig(target_steps=-1)
    with pytest.raises(ValueError, match="init and initial_weights are both set"):
        TrainConfig(init="a", initial_weights="b")


def test_an_interrupted_run_on_pictures_ends_with_the_same_weights_and_log(
    data: Demonstrations, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = dataclasses.replace(CONFIG, target_steps=3)
    train(SPEC, data, config, tmp_path / "whole", CPU, targets=TARGETS)
    original = Loss.__call__

    def interrupted(self: Loss, now: int, *arguments: Any, **named: Any) -> dict[str, torch.Tensor]:
        if now == 6:
            raise KeyboardInterrupt
        return original(self, now, *arguments, **named)

    with monkeypatch.context() as patch:
        patch.setattr(Loss, "__call__", interrupted)
        with pytest.raises(KeyboardInterrupt):
            train(SPEC, data, config, tmp_path / "parts", CPU, targets=TARGETS)
    assert (tmp_path / "parts" / STATE).is_file()
    with (tmp_path / "parts" / LOG).open("a") as log:
        log.write("7,loss,1\n")  # of a step that is taken again
    train(SPEC, data, config, tmp_path / "parts", CPU, targets=TARGETS)

    whole, parts = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("whole", "parts"))
    assert whole == parts
    assert (tmp_path / "whole" / LOG).read_text() == (tmp_path / "parts" / LOG).read_text()
    names = {line.split(",")[1] for line in (tmp_path / "whole" / LOG).read_text().splitlines()[1:]}
    assert {"loss", "denoising", "target", "learning_rate", "validation/denoising"} <= names


def test_training_and_sampling_see_the_same_picture(data: Demonstrations, tmp_path: Path) -> None:
    """The condition of a held-out window is what the policy computes of its raw observation."""
    train(SPEC, data, dataclasses.replace(CONFIG, steps=1), tmp_path / "run", CPU)
    policy = parapolicy.load_policy(tmp_path / "run", device="cpu", engine="eager")
    loss = Loss(
        SPEC,
        policy.network,
        policy.normalizer,
        data.arrays,
        targets={},
        seed=0,
        batch_size=3,
        compile=False,
        bfloat16=False,
        target_weight=0.0,
        device=CPU,
    )
    conditions = []
    embed = policy.network.embed_condition
    policy.network.embed_condition = lambda observation: conditions.append(embed(observation)) or conditions[-1]  # type: ignore[method-assign, func-returns-value]
    loss.held_out(torch.arange(11, 19).expand(1, -1), 1)
    del policy.network.embed_condition
    seen = received_condition(policy, {key: data.arrays[key][11:13].numpy() for key in SPEC.observation})
    torch.testing.assert_close(conditions[0], seen.expand_as(conditions[0]), rtol=0, atol=1e-6)


def test_moved_pictures_are_crops_at_random_places() -> None:
    """All of a window's pictures are moved alike, each by every offset that the crop leaves room for."""
    pictures = torch.randint(256, (200, 2, 9, 8, 3), dtype=torch.uint8)
    moved = shift(pictures, (2, 1), torch.Generator().manual_seed(0))
    places = set()
    for before, after in zip(pictures, moved, strict=True):
        crops = {(y, x): before[:, y : y + 5, x : x + 6] for y in range(5) for x in range(3)}
        (place,) = (place for place, crop in crops.items() if torch.equal(crop, after[:, 2:7, 1:7]))
        places.add(place)
    assert len(places) == 15


def test_the_crop_leaves_the_margin_that_training_uses() -> None:
    assert parapolicy.networks.build_network(SPEC).image_margins == {"camera": (1, 2)}
    scaled = with_camera(resize=[8, 8], crop=[4, 8])
    assert parapolicy.networks.build_network(scaled).image_margins == {"camera": (4, 0)}
    assert parapolicy.networks.build_network(small_spec()).image_margins == {}


def test_a_run_begins_with_every_tensor_that_fits(data: Demonstrations, tmp_path: Path) -> None:
    """A policy of points and positions hands its denoiser to one of pictures with as many features."""
    states = small_spec(observation={"points": (3, 2), "position": (2,)})
    train(states, data, CONFIG, tmp_path / "states", CPU)
    moved = {key: value if value.dtype == torch.uint8 else value + 1 for key, value in data.arrays.items()}
    still = dataclasses.replace(CONFIG, steps=1, learning_rate=0.0, initial_weights=str(tmp_path / "states"))
    train(SPEC, Demonstrations(moved, data.episode_ends), still, tmp_path / "pictures", CPU, targets=TARGETS)
    before, after = (parapolicy.load_policy(tmp_path / name, device="cpu") for name in ("states", "pictures"))
    own = after.network.state_dict()
    assert all(torch.equal(value, own[name]) for name, value in before.network.state_dict().items())
    for key in ("position", "action"):
        assert torch.equal(before.normalizer.maps[key].offset, after.normalizer.maps[key].offset)
    assert set(after.normalizer.maps) == {"camera", "position", "action"}

    wide = small_spec(
        network={**small_spec().network, "down_dims": [24, 48], "diffusion_step_embed_dim": 20}, action_dim=3
    )
    other = Demonstrations({**data.arrays, "action": torch.rand(40, 3)}, data.episode_ends)
    train(dataclasses.replace(wide, observation={"points": (3, 2)}), other, CONFIG, tmp_path / "wide", CPU)
    with pytest.raises(ValueError, match="has no tensor with the name and shape"):
        train(SPEC, data, dataclasses.replace(still, initial_weights=str(tmp_path / "wide")), tmp_path / "none", CPU)


def test_cameras_learn_the_targets_alone_first(data: Demonstrations, tmp_path: Path) -> None:
    """A camera says where a bright spot is after a few steps, which do not touch the denoiser."""
    rng = np.random.default_rng(1)
    places = rng.integers(2, 14, (40, 2))
    pictures = torch.zeros(40, 16, 16, 3, dtype=torch.uint8)
    for picture, (y, x) in zip(pictures, places, strict=True):
        picture[y - 1 : y + 2, x - 1 : x + 2] = 255
    spots = {**data.arrays, "camera": pictures, "points": torch.tensor(places, dtype=torch.float32)}
    spec = with_camera(features=2, crop=None)
    config = dataclasses.replace(
        CONFIG, steps=101, target_steps=100, learning_rate=5e-3, batch_size=32, validation=0.0, ema_power=0.5
    )
    train(spec, Demonstrations(spots, data.episode_ends), config, tmp_path / "run", CPU, targets=TARGETS)
    lines = [line.split(",") for line in (tmp_path / "run" / LOG).read_text().splitlines()[1:]]
    errors = {int(step): float(value) for step, name, value in lines if name == "target"}
    assert errors[100] < 0.3 * errors[20]
    assert {int(step) for step, name, _ in lines if name == "denoising"} == {101}


def test_images_are_normalised_to_minus_one_and_one(data: Demonstrations, tmp_path: Path) -> None:
    train(SPEC, data, dataclasses.replace(CONFIG, steps=1), tmp_path / "run", CPU)
    normalizer = parapolicy.load_policy(tmp_path / "run", device="cpu").normalizer
    assert isinstance(normalizer, Normalizer)
    assert normalizer.normalize("camera", torch.tensor([0.0, 1.0]).expand(3, 1, 2)).tolist() == [[[-1.0, 1.0]]] * 3


def test_the_transformer_is_trained_on_pictures_too(data: Demonstrations, tmp_path: Path) -> None:
    transformer = {"name": "transformer1d", "n_layer": 1, "n_head": 2, "n_emb": 16}
    spec = dataclasses.replace(SPEC, network={**transformer, "encoder": SPEC.network["encoder"]})
    train(spec, data, dataclasses.replace(CONFIG, target_steps=2), tmp_path / "run", CPU, targets=TARGETS)
    policy = parapolicy.load_policy(tmp_path / "run", device="cpu")
    observation = {key: data.arrays[key][:2].numpy() for key in spec.observation}
    assert policy.predict(observation).actions.shape == (spec.n_action_steps, 2)


def test_tensorboard_gets_what_the_csv_file_gets(data: Demonstrations, tmp_path: Path) -> None:
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    train(SPEC, data, CONFIG, tmp_path / "run", CPU, logger=LOGGERS["tensorboard"])
    events = accumulator.EventAccumulator(str(tmp_path / "run" / EVENTS)).Reload()
    assert [event.step for event in events.Scalars("denoising")] == [8]
    assert [event.step for event in events.Scalars("validation/denoising")] == [4, 8]


def test_a_missing_tensorboard_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(ValueError, match=r"tensorboard is not installed .*; pip install 'parapolicy\[tensorboard\]'"):
        TensorboardLog(tmp_path, 0)
