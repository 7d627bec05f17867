"""Images in messages as JPEG or PNG files, as clients send them over slow networks."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from parapolicy.errors import ObservationError
from parapolicy.image_file import decode_image, encode_image
from parapolicy.spec import Feature, PolicySpec

_MODES = {1: "L", 3: "RGB", 4: "RGBA"}  # by number of channels
_FORMATS = {1: ["jpeg", "png"], 3: ["jpeg", "png"], 4: ["png"]}
_SLACK = 1 << 16  # bytes of a file besides its pixels


def image_files(spec: PolicySpec) -> dict[str, list[str]]:
    """The accepted file formats of each image key."""
    images = {key: feature for key, feature in spec.observation.items() if feature.kind == "image"}
    return {key: _FORMATS.get(feature.shape[2], []) for key, feature in images.items()}


def decode_images(spec: PolicySpec, observation: Mapping[str, Any]) -> dict[str, Any]:
    """The observation with image files decoded to uint8 arrays (H, W, C), or (To, H, W, C) for a list of one file per
    step. Other values are unchanged.

    Raises:
        ObservationError: the number of files differs from that of steps, or a file is too long, damaged, or of another
            size or mode than the policy's.
    """
    decoded = dict(observation)
    for key, feature in spec.observation.items():
        value = observation.get(key)
        if feature.kind != "image":
            continue
        if isinstance(value, bytes):
            decoded[key] = _decode(key, feature, value)
        elif isinstance(value, list) and any(isinstance(file, bytes) for file in value):
            steps = spec.obs_steps(key)
            if len(value) != steps or not all(isinstance(file, bytes) for file in value):
                raise ObservationError(
                    f"the image {key!r} is a list of {len(value)}, expected {steps} JPEG or PNG files"
                )
            decoded[key] = np.stack([_decode(key, feature, file) for file in value])
    return decoded


def encode_images(observation: Mapping[str, Any], formats: Mapping[str, list[str]], quality: int) -> dict[str, Any]:
    """The observation with uint8 arrays (H, W, C) or (To, H, W, C) encoded as JPEG, for keys that accept them."""
    encoded = dict(observation)
    for key, taken in formats.items():
        value = observation.get(key)
        if "jpeg" in taken and isinstance(value, np.ndarray) and value.dtype == np.uint8:
            if value.ndim == 3:
                encoded[key] = encode_image(value, quality)
            elif value.ndim == 4:
                encoded[key] = [encode_image(frame, quality) for frame in value]
    return encoded


def _decode(key: str, feature: Feature, data: bytes) -> np.ndarray:
    height, width, channels = feature.shape
    most = 2 * height * width * channels + _SLACK  # noise takes 1.4 times its size
    if channels not in _MODES:
        raise ObservationError(f"the image {key!r} has {channels} channels; send a uint8 array, not a file")
    if len(data) > most:
        raise ObservationError(f"the image {key!r} has {len(data)} bytes, expected at most {most}")
    try:
        return decode_image(data, (_MODES[channels],), (width, height))
    except ObservationError as error:
        raise ObservationError(f"observation {key!r}: {error}") from error
