"""From messages' fields to observations and back, without ROS; tests/test_ros2_node.py does so with real messages."""

import io
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from parapolicy.errors import ObservationError
from parapolicy.ros2 import messages
from parapolicy.ros2.messages import action_numbers, observed_value, stamp_seconds
from parapolicy.ros2.node_settings import ActionSettings, SourceSettings
from parapolicy.spec import Feature


@dataclass
class Joints:
    name: list[str]
    position: list[float] = field(default_factory=list)
    velocity: list[float] = field(default_factory=list)


@dataclass
class Dimension:
    size: int


@dataclass
class Layout:
    dim: list[Dimension] = field(default_factory=list)
    data_offset: int = 0


@dataclass
class Numbers:
    data: list[float]
    layout: Layout = field(default_factory=Layout)


@dataclass
class Picture:
    height: int
    width: int
    step: int
    encoding: str
    data: bytes


@dataclass
class Compressed:
    data: bytes


@dataclass
class Stamp:
    sec: int
    nanosec: int


def joints(**settings: Any) -> SourceSettings:
    return SourceSettings("/q", "sensor_msgs/msg/JointState", **{"names": ["b", "a"], **settings})


def array(**settings: Any) -> SourceSettings:
    return SourceSettings("/x", "std_msgs/msg/Float64MultiArray", **settings)


def raw(**settings: Any) -> SourceSettings:
    return SourceSettings("/c", "sensor_msgs/msg/Image", **settings)


def compressed(**settings: Any) -> SourceSettings:
    return SourceSettings("/c", "sensor_msgs/msg/CompressedImage", **settings)


PAIR, COLOUR, GREY = Feature((2,)), Feature((4, 6, 3), "image"), Feature((4, 6, 1), "image")
PIXELS = np.random.default_rng(0).integers(0, 256, (4, 6, 3), dtype=np.uint8)


def encoded(pixels: np.ndarray, kind: str = "PNG", **options: Any) -> Compressed:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, kind, **options)
    return Compressed(file.getvalue())


def test_joints_come_by_name_in_the_policys_units() -> None:
    message = Joints(["a", "b", "c"], [1.0, 2.0, 3.0], [4.0, 5.0, 6.0])
    np.testing.assert_array_equal(observed_value(message, joints(), PAIR), np.float32([2, 1]))
    source = joints(field="velocity", scale=[10.0, 1.0], offset=0.5)
    value = observed_value(message, source, PAIR)
    np.testing.assert_array_equal(value, np.float32([50.5, 4.5]))
    assert value.dtype == np.float32


@pytest.mark.parametrize(
    ("message", "text"),
    [
        (Joints(["a", "c"], [1.0, 2.0]), r"lacks the joints \['b'\]"),
        (Joints(["a", "b"], [1.0]), "2 names and 1 numbers"),
        (Joints(["a", "b"]), "2 names and 0 numbers"),
        (Joints(["a", "b", "a"], [1.0, 2.0, 3.0]), "twice"),
        (Joints(["a", "b"], [1.0, float("nan")]), "joint 'b' is nan"),
        (Joints(["a", "b"], [1.0, 1e300]), "joint 'b' is 1e"),
        (Joints(["a"] * 200_000, [0.0] * 200_000), "200000 names"),
    ],
)
def test_joint_states_that_cannot_be_used(message: Joints, text: str) -> None:
    with pytest.raises(ObservationError, match=text):
        observed_value(message, joints(), PAIR)


def test_arrays_come_by_index() -> None:
    message = Numbers([1.0, 2.0, 3.0, 4.0], Layout([Dimension(2), Dimension(2)]))
    matrix = observed_value(message, array(), Feature((2, 2)))
    np.testing.assert_array_equal(matrix, np.float32([[1, 2], [3, 4]]))
    np.testing.assert_array_equal(observed_value(message, array(indices=[3, 0]), PAIR), np.float32([4, 1]))


@pytest.mark.parametrize(
    ("message", "settings", "text"),
    [
        (Numbers([1.0]), {}, "1 numbers, expected 2"),
        (Numbers([1.0, 2.0], Layout([Dimension(3)])), {}, "layout"),
        (Numbers([1.0, 2.0], Layout(data_offset=1)), {}, "layout"),
        (Numbers([1.0, 2.0]), {"indices": [0, 2]}, "indices asks for number 2"),
        (Numbers([1.0, float("inf")]), {}, "number 1 is inf"),
    ],
)
def test_arrays_that_cannot_be_used(message: Numbers, settings: Any, text: str) -> None:
    with pytest.raises(ObservationError, match=text):
        observed_value(message, array(**settings), PAIR)


def test_images_of_every_encoding() -> None:
    padded = np.pad(PIXELS.reshape(4, 18), ((0, 0), (0, 2)))
    four = np.dstack([PIXELS, np.full((4, 6, 1), 7, np.uint8)])
    for encoding, pixels in (("rgb8", PIXELS), ("rgba8", four)):
        order = {"rgb8": [2, 1, 0], "rgba8": [2, 1, 0, 3]}[encoding]
        for name, data in ((encoding, pixels), (encoding.replace("rgb", "bgr"), pixels[..., order])):
            message = Picture(4, 6, 6 * pixels.shape[2], name, np.ascontiguousarray(data).tobytes())
            np.testing.assert_array_equal(observed_value(message, raw(), COLOUR), PIXELS)
    np.testing.assert_array_equal(observed_value(Picture(4, 6, 20, "rgb8", padded.tobytes()), raw(), COLOUR), PIXELS)
    grey = observed_value(Picture(4, 6, 6, "mono8", PIXELS[..., 0].tobytes()), raw(), GREY)
    np.testing.assert_array_equal(grey, PIXELS[..., :1])
    np.testing.assert_array_equal(observed_value(encoded(PIXELS), compressed(), COLOUR), PIXELS)
    np.testing.assert_array_equal(observed_value(encoded(four), compressed(), COLOUR), PIXELS)
    np.testing.assert_array_equal(observed_value(encoded(PIXELS[..., 0]), compressed(), GREY), PIXELS[..., :1])
    smooth = np.full((4, 6, 3), 90, np.uint8)
    assert abs(observed_value(encoded(smooth, "JPEG"), compressed(), COLOUR).astype(int) - 90).max() < 3


def test_images_are_cropped_and_resized() -> None:
    wide = np.zeros((8, 14, 3), np.uint8)
    wide[:, 1:13] = np.repeat(np.repeat(PIXELS, 2, 0), 2, 1)
    message = Picture(8, 14, 42, "rgb8", wide.tobytes())
    value = observed_value(message, raw(crop=[0, 1, 8, 12], resize="box"), COLOUR)
    np.testing.assert_array_equal(value, PIXELS)
    assert observed_value(message, raw(crop=[0, 1, 8, 12], resize="bilinear"), COLOUR).shape == (4, 6, 3)
    with pytest.raises(ObservationError, match="aspect ratio"):
        observed_value(message, raw(resize="box"), COLOUR)
    with pytest.raises(ObservationError, match="too small for crop"):
        observed_value(message, raw(crop=[0, 1, 9, 12]), COLOUR)


@pytest.mark.parametrize(
    ("message", "text"),
    [
        (Picture(4, 6, 18, "yuv422", b""), "encoding is 'yuv422'"),
        (Picture(4, 6, 18, "rgb8", bytes(71)), "has 71 bytes"),
        (Picture(4, 6, 12, "rgb8", bytes(48)), "rows of 12 bytes"),
        (Picture(0, 6, 18, "rgb8", b""), "0 rows"),
        (Picture(2**31, 2**31, 0, "mono8", b""), "at most"),
        (Picture(6, 4, 12, "rgb8", bytes(72)), "4 × 6, expected 6 × 4"),
        (Picture(4, 6, 6, "mono8", bytes(24)), "1 channels, expected 3"),
    ],
)
def test_images_that_cannot_be_used(message: Picture, text: str) -> None:
    with pytest.raises(ObservationError, match=text):
        observed_value(message, raw(), COLOUR)


def test_compressed_images_are_bounded_before_they_are_decoded(monkeypatch: pytest.MonkeyPatch) -> None:
    bomb = encoded(np.zeros((5000, 5000), np.uint8))
    assert len(bomb.data) < 100_000
    for message, text in (
        (bomb, "5000 × 5000, expected at most"),
        (encoded(PIXELS[..., 0], "GIF"), "not a whole JPEG or PNG"),
        (Compressed(encoded(PIXELS).data[:-30]), "not a whole JPEG or PNG"),
        (Compressed(b""), "0 bytes"),
        (encoded(np.zeros((4, 6), bool)), "mode is '1'"),
    ):
        with pytest.raises(ObservationError, match=text):
            observed_value(message, compressed(), GREY)
    monkeypatch.setattr(messages, "MAX_COMPRESSED", 10)
    with pytest.raises(ObservationError, match="bytes, expected at most 10"):
        observed_value(encoded(PIXELS), compressed(), COLOUR)


@given(st.binary(max_size=200), st.integers(0, 150))
def test_no_damage_of_an_image_gives_another_error(noise: bytes, place: int) -> None:
    data = encoded(PIXELS).data
    try:
        value = observed_value(Compressed(data[:place] + noise + data[place + len(noise) :]), compressed(), COLOUR)
    except ObservationError:
        return
    assert (value.shape, value.dtype) == ((4, 6, 3), np.uint8)


def test_stamps() -> None:
    assert stamp_seconds(Stamp(3, 500_000_000)) == 3.5
    for stamp in (Stamp(0, 0), Stamp(-1, 0), Stamp(1, 1_000_000_000)):
        with pytest.raises(ObservationError, match="stamp"):
            stamp_seconds(stamp)


def test_actions_go_out_in_the_robots_units() -> None:
    actions = np.arange(6, dtype=np.float32).reshape(2, 3)
    target = ActionSettings("/a", "std_msgs/msg/Float64MultiArray", indices=[2, 0], scale=[0.1, 1.0], offset=1.0)
    np.testing.assert_allclose(action_numbers(actions, target), [[1.2, 1.0], [1.5, 4.0]])
    assert action_numbers(actions, ActionSettings("/a", "std_msgs/msg/Float64MultiArray")).dtype == np.float64
