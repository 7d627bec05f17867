"""Observations from the fields of messages, and numbers of messages from actions. Imports no ROS.

The sizes that a message states are checked against its data and against the expected sizes before the data are used.
"""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL import Image

from parapolicy.errors import ObservationError
from parapolicy.image_file import MAX_PIXELS, decode_image
from parapolicy.ros2.node_settings import COMPRESSED, IMAGE, JOINT_STATE, ActionSettings, SourceSettings
from parapolicy.spec import Feature

MAX_NUMBERS = 100_000  # of a joint state or an array
MAX_COMPRESSED = 1 << 26  # bytes
_CHANNELS = {"rgb8": 3, "bgr8": 3, "rgba8": 4, "bgra8": 4, "mono8": 1, "8UC1": 1, "8UC3": 3}
_RESIZING = {"bilinear": Image.Resampling.BILINEAR, "box": Image.Resampling.BOX}


def observed_value(message: Any, source: SourceSettings, feature: Feature) -> np.ndarray:
    """The value in a message: float32 of the feature's shape, or uint8 (height, width, channels).

    Raises:
        ObservationError: the message does not contain it.
    """
    if source.type == IMAGE:
        return _fit_image(_raw_image(message), source, feature)
    if source.type == COMPRESSED:
        return _fit_image(_compressed_image(message), source, feature)
    numbers = _joint_numbers(message, source) if source.type == JOINT_STATE else _array_numbers(message, source)
    size = math.prod(feature.shape)
    if numbers.size != size:
        raise ObservationError(f"the message has {numbers.size} numbers, expected {size}")
    with np.errstate(over="ignore", invalid="ignore"):
        value = (numbers * np.asarray(source.scale) + np.asarray(source.offset)).astype(np.float32)
    if not np.isfinite(value).all():
        index = int(np.argmin(np.isfinite(value)))
        name = f"joint {source.names[index]!r}" if source.names else f"number {index}"
        raise ObservationError(f"{name} is {numbers[index]}, expected a finite number")
    return value.reshape(feature.shape)


def action_numbers(actions: np.ndarray, target: ActionSettings) -> np.ndarray:
    """The numbers of a message, (n, k) float64, for actions (n, Da)."""
    taken = actions if target.indices is None else actions[:, target.indices]
    return np.asarray(taken.astype(np.float64) * np.asarray(target.scale) + np.asarray(target.offset))


def stamp_seconds(stamp: Any) -> float:
    """The time in a header, s.

    Raises:
        ObservationError: it is zero, or not a time.
    """
    if not 0 <= stamp.nanosec < 1_000_000_000 or stamp.sec < 0:
        raise ObservationError(f"the stamp is {stamp.sec} s and {stamp.nanosec} ns, expected a time")
    if stamp.sec == stamp.nanosec == 0:
        raise ObservationError("the stamp is zero; have the driver fill it in, or set stamp: arrival")
    return float(stamp.sec + 1e-9 * stamp.nanosec)


def _joint_numbers(message: Any, source: SourceSettings) -> np.ndarray:
    names: Sequence[str] = message.name
    field = source.field or "position"
    values = getattr(message, field)
    assert source.names is not None  # a JointState has names
    if len(names) > MAX_NUMBERS or len(values) != len(names):
        raise ObservationError(f"the message has {len(names)} names and {len(values)} numbers in {field!r}")
    index = {name: i for i, name in enumerate(names)}
    if len(index) < len(names):
        raise ObservationError("the message names a joint twice")
    missing = [name for name in source.names if name not in index]
    if missing:
        raise ObservationError(f"the message lacks the joints {missing}; it has {list(names)[:20]}")
    return np.array([values[index[name]] for name in source.names], dtype=np.float64)


def _array_numbers(message: Any, source: SourceSettings) -> np.ndarray:
    if len(message.data) > MAX_NUMBERS:
        raise ObservationError(f"the message has {len(message.data)} numbers, expected at most {MAX_NUMBERS}")
    sizes = [dim.size for dim in message.layout.dim]
    if message.layout.data_offset or (sizes and math.prod(sizes) != len(message.data)):
        raise ObservationError(f"the message's layout says {sizes} for {len(message.data)} numbers")
    numbers = np.array(message.data, dtype=np.float64)
    if source.indices is None:
        return numbers
    if max(source.indices) >= len(numbers):
        raise ObservationError(
            f"the message has {len(numbers)} numbers, but indices asks for number {max(source.indices)}"
        )
    return numbers[source.indices]


def _raw_image(message: Any) -> np.ndarray:
    height, width, step, encoding = message.height, message.width, message.step, message.encoding
    channels = _CHANNELS.get(encoding)
    if channels is None:
        raise ObservationError(f"the image's encoding is {encoding[:40]!r}, expected one of {list(_CHANNELS)}")
    if not 0 < height * width <= MAX_PIXELS or step < width * channels or height * step != len(message.data):
        raise ObservationError(
            f"the image states {height} rows of {step} bytes for {width} pixels of {channels} bytes, but has "
            f"{len(message.data)} bytes; expected them to agree, and at most {MAX_PIXELS} pixels"
        )
    rows = np.frombuffer(message.data, np.uint8).reshape(height, step)[:, : width * channels]
    image = rows.reshape(height, width, channels)
    return image[..., 2::-1] if encoding.startswith("bgr") else image[..., :3]


def _compressed_image(message: Any) -> np.ndarray:
    if len(message.data) > MAX_COMPRESSED:
        raise ObservationError(f"the image has {len(message.data)} bytes, expected at most {MAX_COMPRESSED}")
    return decode_image(bytes(message.data), ("L", "RGB", "RGBA"))[..., :3]


def _fit_image(image: np.ndarray, source: SourceSettings, feature: Feature) -> np.ndarray:
    """Crop and resize an image as the settings say, and check that it has the policy's shape."""
    if source.crop is not None:
        top, left, height, width = source.crop
        if top + height > image.shape[0] or left + width > image.shape[1]:
            raise ObservationError(
                f"the image is {image.shape[1]} × {image.shape[0]}, too small for crop {source.crop}"
            )
        image = image[top : top + height, left : left + width]
    height, width, channels = feature.shape
    if image.shape[2] != channels:
        raise ObservationError(f"the image has {image.shape[2]} channels, expected {channels}")
    if source.resize is not None and image.shape != feature.shape:
        if not math.isclose(image.shape[0] * width, image.shape[1] * height, rel_tol=0.02):
            raise ObservationError(
                f"the image is {image.shape[1]} × {image.shape[0]}, expected the aspect ratio of {width} × {height}; "
                "crop it"
            )
        picture = Image.fromarray(np.ascontiguousarray(image[..., 0] if channels == 1 else image))
        image = np.asarray(picture.resize((width, height), _RESIZING[source.resize])).reshape(feature.shape)
    if image.shape != feature.shape:
        raise ObservationError(
            f"the image is {image.shape[1]} × {image.shape[0]}, expected {width} × {height}; crop or resize it"
        )
    return image.copy()
