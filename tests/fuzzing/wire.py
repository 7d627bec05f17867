"""Messages to the policy server, good and damaged: each is read as what was sent, or refused by name.

A case takes a generator of random numbers and a folder of its own. It returns "equal" or "refused", and raises on
anything else.
"""

import functools
import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from parapolicy.episode import Request
from parapolicy.errors import ObservationError
from parapolicy.policy import Chunk
from parapolicy.serve.session import Session
from parapolicy.serve.wire import Limits, WireError, pack, unpack
from parapolicy.spec import Feature, PolicySpec
from tests.helpers import small_policy, small_spec, some_observation

DTYPES = ("<f2", "<f4", ">f4", "<f8", "|i1", "|u1", "<i2", ">u4", "<i8", "|b1")


def spec_with_an_image() -> PolicySpec:
    return small_spec(observation={"position": (2,), "points": (3, 2), "camera": Feature((8, 6, 3), "image")})


def good_message(rng: np.random.Generator, spec: PolicySpec, stacked: bool, nested: bool) -> dict[str, Any]:
    """Observations of float32 and uint8, so that what is read can be compared to the bit."""
    message: dict[str, Any] = {}
    for key, feature in spec.observation.items():
        shape = (spec.n_obs_steps, *feature.shape) if stacked else feature.shape
        value = rng.normal(0, 100, shape).astype(np.float32)
        if feature.kind == "image":
            value = rng.integers(0, 256, shape, dtype=np.uint8)
        message[key] = value.tolist() if nested and feature.kind == "state" else value
    return message


def with_files(message: dict[str, Any], spec: PolicySpec) -> dict[str, Any]:
    """The message, with PNG files for its images."""
    files = dict(message)
    for key, feature in spec.observation.items():
        if feature.kind == "image":
            stacked = message[key].ndim == 4
            frames = [_png(frame) for frame in (message[key] if stacked else [message[key]])]
            files[key] = frames if stacked else frames[0]
    return files


def _png(pixels: np.ndarray) -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def mutated(rng: np.random.Generator, data: bytes) -> bytes:
    """Almost the same bytes: cut off, changed, with more between, doubled in part, or others altogether."""
    place = int(rng.integers(len(data)))
    match rng.integers(5):
        case 0:
            return data[:place]
        case 1:
            changed = bytearray(data)
            for i in rng.integers(len(data), size=rng.integers(1, 9)):
                changed[i] = rng.integers(256)
            return bytes(changed)
        case 2:
            return data[:place] + rng.bytes(rng.integers(1, 31)) + data[place:]
        case 3:
            return data[:place] + data[int(rng.integers(place + 1)) :]
    return rng.bytes(rng.integers(200))


def same(value: Any, expected: Any) -> bool:
    """Equal to the bit, with the same types."""
    if isinstance(expected, np.ndarray | np.generic):
        return (
            type(value) is type(expected)
            and (value.dtype, value.shape) == (expected.dtype, expected.shape)
            and value.tobytes() == expected.tobytes()
        )
    if isinstance(expected, dict):
        return list(value) == list(expected) and all(same(value[key], expected[key]) for key in expected)
    if isinstance(expected, list):
        return len(value) == len(expected) and all(map(same, value, expected))
    return type(value) is type(expected) and value == expected


def random_value(rng: np.random.Generator, depth: int) -> Any:
    kind = rng.integers(8 if depth else 6)
    if kind < 2:
        shape = tuple(rng.integers(0, 4, size=rng.integers(4)))
        array = np.frombuffer(rng.bytes(8 * int(np.prod(shape))), "<u8").reshape(shape)
        with np.errstate(all="ignore"):
            array = array.astype(rng.choice(DTYPES))
        return array if kind == 0 or array.ndim or array.dtype.kind == "f" else array[()]
    if kind == 2:
        return int(rng.integers(-(2**63), 2**63))
    if kind == 3:
        return float(rng.normal())
    if kind == 4:
        return [None, True, False][rng.integers(3)]
    if kind == 5:
        return "".join(map(chr, rng.integers(32, 0x2FFF, size=rng.integers(20))))
    values = [random_value(rng, depth - 1) for _ in range(rng.integers(5))]
    return values if kind == 6 else {f"{rng.integers(1000)}-{i}": value for i, value in enumerate(values)}


def check(spec: PolicySpec, request: Request) -> None:
    """What a policy can be given: finite arrays of the right shapes."""
    assert list(request.observation) == list(spec.observation)
    for key, feature in spec.observation.items():
        value = request.observation[key]
        shapes = {np.dtype("uint8"): feature.shape, np.dtype("float32"): feature.tensor_shape}
        assert value.shape == (spec.n_obs_steps, *shapes[value.dtype])
        assert np.isfinite(value).all()


def any_value(rng: np.random.Generator, folder: Path) -> str:
    """What is packed is unpacked, whatever it is."""
    value = random_value(rng, depth=4)
    assert same(unpack(pack(value)), value)
    return "equal"


def observations(rng: np.random.Generator, folder: Path) -> str:
    """A good message, in any of its forms, reaches the policy as it was sent."""
    spec = spec_with_an_image()
    stacked, nested, files = (bool(b) for b in rng.integers(2, size=3))
    message = good_message(rng, spec, stacked, nested)
    data, limits = pack(with_files(message, spec) if files else message), Limits.of(spec)
    assert len(data) <= limits.message_bytes
    request = Session(spec, warm_start=False).request(unpack(data, limits))
    check(spec, request)
    for key, value in request.observation.items():
        sent = np.asarray(message[key], value.dtype)
        assert value.tobytes() == (sent if stacked else np.stack([sent] * spec.n_obs_steps)).tobytes()
    return "equal"


def damaged(rng: np.random.Generator, folder: Path) -> str:
    """A damaged message is refused, or is by chance still one that the policy can be given; then the next good one is
    read as ever."""
    spec = spec_with_an_image()
    limits, session = Limits.of(spec), Session(spec, warm_start=False)
    good = good_message(rng, spec, stacked=True, nested=bool(rng.integers(2)))
    outcome = "equal"
    try:
        with np.errstate(all="ignore"):
            sent = with_files(good, spec) if rng.integers(2) else good
            check(spec, session.request(unpack(mutated(rng, pack(sent)), limits)))
    except (WireError, ObservationError):
        outcome = "refused"
    request = session.request(unpack(pack(good), limits))
    assert all(request.observation[key].tobytes() == np.float32(good[key]).tobytes() for key in ("position", "points"))
    return outcome


def containers(rng: np.random.Generator, folder: Path) -> str:
    """Lists and maps that are short to send and large to hold are refused before they are made."""
    limits = Limits.of(spec_with_an_image())
    leaf = [b"\x90", b"\x80", b"\xc0", b"\x81\xa0\xc0"][rng.integers(4)]
    width = int(rng.integers(16, 1000))
    inner = b"\xdc" + width.to_bytes(2, "big") + leaf * width
    count = limits.values // width + 1
    data = b"\xdc" + count.to_bytes(2, "big") + inner * count
    if rng.integers(2):
        data = b"\x91" * int(rng.integers(1, 100)) + data
    try:
        unpack(data, limits)
    except WireError:
        return "refused"
    raise AssertionError(f"{count} lists of {width} times {leaf!r} were read")


@functools.cache
def any_chunk() -> tuple[PolicySpec, Chunk]:
    policy = small_policy(n_obs_steps=3)
    return policy.spec, policy.predict(some_observation(policy.spec))


def episodes(rng: np.random.Generator, folder: Path) -> str:
    """The history of each message is what the rules of a session make of all answered messages before it."""
    spec, chunk = any_chunk()
    session = Session(spec, warm_start=False, pause_s=1.0)
    history: list[float] = []
    number = -1
    for _ in range(12):
        stacked, executed = bool(rng.integers(2)), [None, 0, 1, 4][rng.integers(4)]
        reset, silence = [None, True, False][rng.integers(3)], [0.0, 2.0][rng.integers(2)]
        message = good_message(rng, spec, stacked, nested=False)
        options = {"executed": executed, "reset": reset}
        request = session.request(message | {k: v for k, v in options.items() if v is not None}, silence)
        begins = number < 0 or reset is True or (reset is None and silence > 1.0)
        first = message["position"][..., 0]
        joined = [*history[1:], first] if executed == 1 and not begins else [first] * 3
        expected = [float(value) for value in (first if stacked else joined)]
        assert request.number == (0 if begins else number + 1)
        assert request.observation["position"][:, 0].tolist() == expected
        if rng.integers(4):  # otherwise computing it failed
            assert session.answer(chunk)["new_episode"] == begins
            history, number = expected, request.number
    return "equal"


CASES: dict[str, Callable[[np.random.Generator, Path], str]] = {
    "any value": any_value,
    "observations": observations,
    "damaged": damaged,
    "containers": containers,
    "episodes": episodes,
}
