"""Encoders of pictures: order of features, what is done to a picture, and what is refused."""

import dataclasses
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import parapolicy
from parapolicy.engine import make_engine
from parapolicy.networks import build_network
from parapolicy.networks.resnet import FrozenBatchNorm, ResNet
from parapolicy.networks.vision import IMAGENET, CameraEncoder, ObservationEncoder, SpatialSoftmax
from parapolicy.normalizer import Affine, Normalizer
from parapolicy.samplers import make_sampler
from parapolicy.schedule import make_schedule
from parapolicy.spec import Feature, PolicySpec
from tests.helpers import DDPM_CONFIG

CAMERA: dict[str, Any] = {"crop": [40, 60], "keypoints": 5, "features": 7}


def spec_of(cameras: dict[str, Any], shared: bool = False, **observation: Feature) -> PolicySpec:
    network = {"name": "unet1d", "down_dims": [16], "encoder": {"cameras": cameras, "shared": shared}}
    return PolicySpec(observation, 2, 8, 4, 3, network, {**DDPM_CONFIG, "num_train_timesteps": 5}, None)


TWO = spec_of(
    {"b": CAMERA, "a": CAMERA}, b=Feature((48, 64, 3), "image"), s=Feature((2,)), a=Feature((48, 64, 3), "image")
)


@pytest.fixture(scope="module")
def policy() -> parapolicy.Policy:
    torch.manual_seed(0)
    network = build_network(TWO).eval().requires_grad_(False)
    maps = {
        key: Affine(torch.full(shape, 2.0), torch.full(shape, -1.0)) for key, shape in TWO.normalizer_shapes.items()
    }
    schedule = make_schedule(TWO.scheduler, sample_shape=TWO.sample_shape)
    sampler = make_sampler("sequential")
    return parapolicy.Policy(TWO, network, Normalizer(maps), schedule, sampler, torch.device("cpu"))


def observe(batch: int = 2) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    pictures = {key: rng.integers(0, 256, (batch, 2, 48, 64, 3), dtype=np.uint8) for key in "ba"}
    return {**pictures, "s": rng.normal(size=(batch, 2, 2)).astype(np.float32)}


def test_features_stand_in_the_order_of_the_spec_one_step_after_the_other(policy: parapolicy.Policy) -> None:
    encoder = policy.network.encoder
    pictures = {key: torch.rand(3, 2, 3, 48, 64) for key in "ba"}
    numbers = torch.rand(3, 2, 2)
    condition = policy.network.embed_condition({"b": pictures["b"], "s": numbers, "a": pictures["a"]})
    assert condition.shape == (3, encoder.features) == (3, 2 * (7 + 2 + 7))
    for step in range(2):
        expected = [
            encoder.cameras[0](pictures["b"][:, step]),
            numbers[:, step],
            encoder.cameras[1](pictures["a"][:, step]),
        ]
        torch.testing.assert_close(condition[:, 16 * step : 16 * (step + 1)], torch.cat(expected, 1))


def test_a_shared_encoder_sees_all_cameras() -> None:
    spec = dataclasses.replace(TWO, network={**TWO.network, "encoder": {**TWO.network["encoder"], "shared": True}})
    encoder = ObservationEncoder(spec, **spec.network["encoder"])
    assert len(encoder.cameras) == 1
    picture = torch.rand(1, 2, 3, 48, 64)
    condition = encoder({"b": picture, "s": torch.zeros(1, 2, 2), "a": picture}).unflatten(1, (2, 16))
    torch.testing.assert_close(condition[..., :7], condition[..., 9:])


def test_a_picture_is_resized_then_cut_in_the_middle_then_given_imagenets_colours() -> None:
    encoder = CameraEncoder(Feature((50, 71, 3), "image"), resize=[45, 70], crop=[40, 63], imagenet=True)
    seen: list[torch.Tensor] = []
    encoder.backbone.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    picture = torch.rand(1, 3, 50, 71)
    encoder(picture)
    scaled = nn.functional.interpolate(picture, (45, 70), mode="bilinear", align_corners=False, antialias=False)
    cut = scaled[:, :, 2:42, 4:67]  # margins of 5 and 7: halves round to even, 2 and 4
    mean, spread = (torch.tensor(v).view(3, 1, 1) for v in IMAGENET)
    torch.testing.assert_close(seen[0], (cut - mean) / spread)


def test_spatial_softmax_finds_where_the_mass_is() -> None:
    pool = SpatialSoftmax(2, 2, 3, 5)
    nn.init.zeros_(pool.conv.bias)
    pool.conv.weight.data = torch.eye(2)[..., None, None] * 1000.0
    maps = torch.zeros(1, 2, 3, 5)
    maps[0, 0, 0, 4] = maps[0, 1, 2, 1] = 1.0
    torch.testing.assert_close(pool(maps), torch.tensor([[1.0, -1.0, -0.5, 1.0]]))  # x, y of each map
    pool.temperature.fill_(1e9)
    torch.testing.assert_close(pool(maps), torch.zeros(1, 4), atol=1e-5, rtol=0)


def test_frozen_batch_norm_is_batch_norm_at_evaluation() -> None:
    reference, ours = nn.BatchNorm2d(4).eval(), FrozenBatchNorm(4)
    for value in (reference.weight.data, reference.bias.data, reference.running_mean):
        value.uniform_(-1, 1)
    reference.running_var.uniform_(0.5, 2)
    state = {k: v for k, v in reference.state_dict().items() if k != "num_batches_tracked"}
    ours.load_state_dict(state)
    x = torch.randn(3, 4, 5, 6)
    torch.testing.assert_close(ours.train()(x), reference(x))


@pytest.mark.parametrize(
    ("name", "channels", "parameters"),
    [("resnet18", 512, 11_176_512), ("resnet34", 512, 21_284_672), ("resnet50", 2048, 23_508_032)],
)
def test_backbones_have_the_published_sizes(name: str, channels: int, parameters: int) -> None:
    with torch.device("meta"):
        network = ResNet(name, 3, "batch")
        assert network(torch.empty(1, 3, 65, 33)).shape == (1, channels, 3, 2)
    assert sum(p.numel() for p in network.parameters()) == parameters  # without the classifier


def test_pictures_come_as_bytes_or_as_floats(policy: parapolicy.Policy) -> None:
    observation = observe()
    floats = {k: v if k == "s" else np.moveaxis(v, -1, -3).astype(np.float32) / 255 for k, v in observation.items()}
    first, second = policy.predict(observation, seed=[1, 2]), policy.predict(floats, seed=[1, 2])
    np.testing.assert_allclose(first.trajectory, second.trajectory, atol=1e-5)
    with pytest.raises(parapolicy.ObservationError, match="'b'"):
        policy.predict({**observation, "b": np.moveaxis(observation["b"], -1, -3)})


def test_a_visuomotor_policy_is_saved_and_read_back_to_the_bit(policy: parapolicy.Policy, tmp_path: Any) -> None:
    parapolicy.save_policy(policy, tmp_path)
    again = parapolicy.load_policy(tmp_path, sampler="sequential", device="cpu", engine="eager")
    assert again.spec == policy.spec
    observation = observe()
    np.testing.assert_array_equal(again.predict(observation).trajectory, policy.predict(observation).trajectory)


@pytest.mark.distributed  # half a minute of compiling
def test_the_compiled_engine_takes_encoders(policy: parapolicy.Policy) -> None:
    compiled = dataclasses.replace(policy, engine=make_engine("compiled", policy.device))
    observation = observe()
    np.testing.assert_allclose(
        compiled.predict(observation).trajectory, policy.predict(observation).trajectory, atol=1e-4
    )


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"backbone": "vgg"}, "backbone is 'vgg'"),
        ({"norm": "layer"}, "norm 'layer'"),
        ({"crop": [49, 64]}, r"crop is \[49, 64\], expected at most"),
        ({"resize": [40]}, r"resize is \[40\]"),
        ({"resize": [0, 4]}, r"resize\[0\] is 0"),
        ({"keypoints": 0}, "keypoints is 0"),
        ({"features": 1.5}, "features is 1.5"),
        ({"imagenet": 1}, "imagenet is 1"),
        ({"colour": True}, "colour"),
    ],
)
def test_settings_that_do_not_fit_are_named(settings: dict[str, Any], words: str) -> None:
    spec = spec_of({"a": {**CAMERA, **settings}}, a=Feature((48, 64, 3), "image"))
    with pytest.raises(ValueError, match=words):
        build_network(spec)


def test_pictures_and_settings_belong_together() -> None:
    image = Feature((48, 64, 3), "image")
    with pytest.raises(ValueError, match="has no encoder"):
        build_network(dataclasses.replace(spec_of({}, a=image), network={"name": "unet1d"}))
    with pytest.raises(ValueError, match=r"cameras \['b'\], expected the images, \['a'\]"):
        build_network(spec_of({"b": CAMERA}, a=image))
    with pytest.raises(ValueError, match="differ in shape or settings"):
        build_network(spec_of({"a": CAMERA, "b": {**CAMERA, "relu": False}}, shared=True, a=image, b=image))
