"""From images and states to the condition vector: the encoders of published visuomotor policies.

They differ in the processing of an image before and after a residual network, which are settings here: Diffusion
Policy's two encoders (Chi et al., RSS 2023), robomimic's (Mandlekar et al., CoRL 2021) and LeRobot's. Backbones of timm
are in :mod:`parapolicy.networks.timm_encoder`.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from parapolicy.networks.base import flatten_keys, flatten_observation
from parapolicy.networks.checks import check_count, check_flag, check_size
from parapolicy.networks.resnet import LEVELS, WIDTH, ResNet
from parapolicy.networks.timm_encoder import TimmEncoder
from parapolicy.spec import Feature, PolicySpec

IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))  # mean and standard deviation of its colours
CROP_OFFSETS: dict[str, Callable[[float], int]] = {"round": round, "floor": math.floor}
LAYOUTS = ("step", "key")
IMAGE_NDIM = 5  # (B, To, C, H, W); features have 3


class SpatialSoftmax(nn.Module):
    """The mean position of each feature map's mass, from -1 to 1 (Finn et al., ICRA 2016): (N, C, h, w) -> (N, 2 K),
    ordered by map, x before y."""

    temperature: Tensor

    def __init__(self, channels: int, keypoints: int, height: int, width: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, keypoints, 1)
        self.register_buffer("temperature", torch.ones(()))
        self.height, self.width = height, width

    def forward(self, x: Tensor) -> Tensor:
        attention = (self.conv(x).flatten(2) / self.temperature).softmax(-1).unflatten(2, (self.height, self.width))
        across = torch.linspace(-1, 1, self.width, device=x.device)
        down = torch.linspace(-1, 1, self.height, device=x.device)
        place = attention.sum(2) @ across, attention.sum(3) @ down
        return torch.stack(place, -1).flatten(1)


def crop_margin(picture: Sequence[int], scaled: Sequence[int], crop: Sequence[int]) -> tuple[int, int]:
    """Margins (down, across) of a centre crop made after scaling, in pixels of the original picture."""
    down, across = ((s - c) * p // (2 * s) for p, s, c in zip(picture, scaled, crop, strict=True))
    return down, across


class CameraEncoder(nn.Module):
    """One camera's pictures -> features.

    Args:
        image: shape and kind of the camera's image.
        backbone: ``resnet18``, ``resnet34`` or ``resnet50``.
        norm: its normalisation: ``group`` (16 channels each) or ``batch`` (statistics of training).
        resize: (height, width) to which pictures are scaled first, bilinear; None: no scaling.
        crop: (height, width) of the middle that is then cropped; None: no crop.
        imagenet: after the normalizer, normalise colours by ImageNet's mean and standard deviation.
        keypoints: feature maps of a spatial softmax over the backbone's output; None: its mean over the picture.
        features: length of the output of a final linear layer; None: no such layer.
        relu: a ReLU at the end.
        antialias: when scaling down, average over the source pixels of each target pixel.
        crop_offset: rounding of the offset for an odd margin: ``round``, to even, as torchvision; ``floor``, as
            robomimic.
        width, levels: of the backbone; see :class:`parapolicy.networks.resnet.ResNet`.

    Raises:
        ValueError: a setting of another kind or size.
    """

    def __init__(
        self,
        image: Feature,
        backbone: str = "resnet18",
        norm: str = "group",
        resize: Sequence[int] | None = None,
        crop: Sequence[int] | None = None,
        imagenet: bool = False,
        keypoints: int | None = 32,
        features: int | None = 64,
        relu: bool = True,
        antialias: bool = False,
        crop_offset: str = "round",
        width: int = WIDTH,
        levels: int = LEVELS,
    ) -> None:
        super().__init__()
        for name, flag in {"imagenet": imagenet, "relu": relu, "antialias": antialias}.items():
            check_flag(name, flag)
        if crop_offset not in CROP_OFFSETS:
            raise ValueError(f"crop_offset is {crop_offset!r}, expected one of {[*CROP_OFFSETS]}")
        self.crop_offset = CROP_OFFSETS[crop_offset]
        *size, channels = image.shape
        if imagenet and channels != 3:
            raise ValueError(f"imagenet is on for pictures of {channels} channels, expected 3")
        self.resize, self.crop = check_size("resize", resize), check_size("crop", crop)
        given, size = size, list(self.resize or size)
        if self.crop and (self.crop[0] > size[0] or self.crop[1] > size[1]):
            raise ValueError(f"crop is {list(self.crop)}, expected at most the picture's {tuple(size)}")
        scaled, size = size, list(self.crop or size)
        self.margin = crop_margin(given, scaled, size)
        self.imagenet, self.relu, self.antialias = imagenet, relu, antialias
        self.backbone = ResNet(backbone, channels, norm, levels, width)
        self.pool: nn.Module | None = None
        self.linear: nn.Module | None = None
        self.features = self.backbone.channels
        if keypoints is not None:
            rows, columns = (-(-side // self.backbone.stride) for side in size)
            self.pool = SpatialSoftmax(self.features, check_count("keypoints", keypoints), rows, columns)
            self.features = 2 * keypoints
        if features is not None:
            self.linear = nn.Linear(self.features, check_count("features", features))
            self.features = features

    def forward(self, pictures: Tensor) -> Tensor:
        """(N, C, H, W), normalised -> (N, ``features``)."""
        x = pictures
        if self.resize:
            x = functional.interpolate(x, self.resize, mode="bilinear", align_corners=False, antialias=self.antialias)
        if self.crop:
            top, left = (
                self.crop_offset((int(have) - want) / 2) for have, want in zip(x.shape[2:], self.crop, strict=True)
            )
            x = x[..., top : top + self.crop[0], left : left + self.crop[1]]
        if self.imagenet:
            mean, spread = (torch.tensor(v, device=x.device)[:, None, None] for v in IMAGENET)
            x = (x - mean) / spread
        x = self.backbone(x)
        with torch.autocast(x.device.type, enabled=False):  # positions need more digits than bfloat16 has
            x = x.to(self.backbone.conv1.weight.dtype)
            x = x.mean((2, 3)) if self.pool is None else self.pool(x)
            if self.linear is not None:
                x = self.linear(x)
            return x.relu() if self.relu else x


# The values of a camera's setting "encoder".
CAMERAS: dict[str, type[CameraEncoder] | type[TimmEncoder]] = {"resnet": CameraEncoder, "timm": TimmEncoder}


class ObservationEncoder(nn.Module):
    """All observations of all steps -> the condition vector; states are passed through unchanged.

    Args:
        spec: the policy's observations; features have the order of its keys.
        cameras: each image's encoder settings: ``encoder``, one of ``CAMERAS``, and its arguments.
        shared: one encoder for all cameras, whose settings must then be equal.
        layout: order of the features. ``step``: by step, then by key. ``key``: by key, then by step; keys may then have
            different numbers of steps.

    Raises:
        ValueError: settings that do not fit the images, or numbers of steps that do not fit the layout.
    """

    def __init__(
        self, spec: PolicySpec, cameras: Mapping[str, Any], shared: bool = False, layout: str = "step"
    ) -> None:
        super().__init__()
        if layout not in LAYOUTS:
            raise ValueError(f"layout is {layout!r}, expected one of {LAYOUTS}")
        if layout == "step":
            _check_equal_steps(spec)
        self.layout = layout
        images = {key: feature for key, feature in spec.observation.items() if feature.kind == "image"}
        if not isinstance(cameras, Mapping) or set(cameras) != set(images) or not images:
            raise ValueError(f"the encoder has cameras {list(cameras)}, expected the images, {list(images)}")
        check_flag("shared", shared)
        first = next(iter(images))
        if shared and any((images[key].shape, cameras[key]) != (images[first].shape, cameras[first]) for key in images):
            raise ValueError(f"one encoder is shared by the images {list(images)}, which differ in shape or settings")
        built = [first] if shared else list(images)
        self.cameras = nn.ModuleList(_build_camera(images[key], cameras[key]) for key in built)
        self.place = {key: 0 if shared else i for i, key in enumerate(images)}
        lengths = {
            key: self._camera(key).features if key in images else torch.Size(feature.shape).numel()
            for key, feature in spec.observation.items()
        }
        self.features = sum(spec.obs_steps(key) * length for key, length in lengths.items())

    def _camera(self, key: str) -> CameraEncoder | TimmEncoder:
        camera = self.cameras[self.place[key]]
        assert isinstance(camera, CameraEncoder | TimmEncoder)
        return camera

    @property
    def margins(self) -> dict[str, tuple[int, int]]:
        """Margins (down, across) in pixels that each camera's crop leaves on each side of the image."""
        return {key: self._camera(key).margin for key in self.place}

    def encode_images(self, observation: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The observation with features (B, To, F) in place of images (B, To, C, H, W)."""
        encoded = dict(observation)
        for key, value in observation.items():
            if key in self.place and value.ndim == IMAGE_NDIM:
                encoded[key] = self._camera(key)(value.flatten(0, 1)).unflatten(0, value.shape[:2])
        return encoded

    def forward(self, observation: Mapping[str, Tensor]) -> Tensor:
        """{key: (B, To, …)}, normalised, images (B, To, C, H, W) or their features -> (B, ``features``)."""
        encoded = self.encode_images(observation)
        return flatten_keys(encoded) if self.layout == "key" else flatten_observation(encoded)


def build_encoder(
    spec: PolicySpec, settings: Mapping[str, Any] | None, by_step: bool = False
) -> ObservationEncoder | None:
    """The encoder of a policy that observes images; None if it observes states only.

    Args:
        spec: of the policy.
        settings: arguments of :class:`ObservationEncoder`.
        by_step: whether the network splits the condition into observed steps.

    Raises:
        ValueError: images without settings, settings without images, or settings that do not fit.
    """
    images = [key for key, feature in spec.observation.items() if feature.kind == "image"]
    if settings is None and images:
        raise ValueError(f"the network has no encoder, but {images} are images; expected {{'cameras': …}}")
    if settings is None:
        _check_equal_steps(spec)
    if by_step and settings is not None and settings.get("layout", "step") != "step":
        raise ValueError("the network takes observed steps, but the encoder's layout is by key; expected 'step'")
    return None if settings is None else ObservationEncoder(spec, **settings)


def encode(encoder: ObservationEncoder | None, observation: Mapping[str, Tensor]) -> Tensor:
    """{key: (B, To, …)} -> the condition vector; without an encoder, the states."""
    condition: Tensor = flatten_observation(observation) if encoder is None else encoder(observation)
    return condition


def _build_camera(image: Feature, settings: Any) -> CameraEncoder | TimmEncoder:
    if not isinstance(settings, Mapping) or (name := settings.get("encoder", "resnet")) not in CAMERAS:
        raise ValueError(f"a camera has the settings {settings!r:.200}, expected an encoder of {[*CAMERAS]}")
    return CAMERAS[name](image, **{key: value for key, value in settings.items() if key != "encoder"})


def _check_equal_steps(spec: PolicySpec) -> None:
    steps = {key: feature.steps for key, feature in spec.observation.items() if feature.steps is not None}
    if steps:
        raise ValueError(
            f"keys have their own numbers of steps, {steps}; expected an encoder with layout 'key', or equal numbers"
        )
