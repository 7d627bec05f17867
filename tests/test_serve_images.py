"""Images that reach the policy server as JPEG or PNG bytes: the same answers as for arrays, and what is refused."""

import functools
import io
import os
import re
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageFile

from parapolicy import image_file
from parapolicy.noise import mix_seeds
from parapolicy.policy import Policy
from parapolicy.serve import session as sessions
from parapolicy.serve.client import PolicyClient
from parapolicy.serve.wire import Limits, pack, unpack
from parapolicy.spec import Feature
from tests.conftest import PATIENCE, ROOT
from tests.helpers import DDPM_CONFIG
from tests.serving import Running, infer, running, served_policy

HEIGHT, WIDTH = 24, 32
CAMERA = {"width": 16, "levels": 1, "keypoints": 4, "features": 5}
CLIENT = Path(os.environ.get("PARAPOLICY_CLIENT_PYTHON", ROOT / ".venv-client" / "bin" / "python"))
OPENPI = """
import sys, numpy as np
from openpi_client.websocket_client_policy import WebsocketClientPolicy
files = [open(name, "rb").read() for name in sys.argv[3:]]
state = np.zeros((2, 2), np.float32)
client = WebsocketClientPolicy("127.0.0.1", int(sys.argv[1]))
assert client.get_server_metadata()["image_files"]["camera"] == ["jpeg", "png"]
np.save(sys.argv[2], client.infer({"camera": files, "grey": np.zeros((2, 16, 16, 1), np.uint8), "s": state})["actions"])
"""


@pytest.fixture(scope="module")
def policy() -> Policy:
    cameras = {"camera": CAMERA, "grey": CAMERA}
    observation = {"camera": Feature((HEIGHT, WIDTH, 3), "image"), "grey": Feature((16, 16, 1), "image"), "s": (2,)}
    network = {"name": "unet1d", "diffusion_step_embed_dim": 16, "down_dims": [16], "n_groups": 4}
    scheduler = {**DDPM_CONFIG, "num_train_timesteps": 3}
    settings = {"observation": observation, "network": {**network, "encoder": {"cameras": cameras}}}
    return served_policy(**settings, scheduler=scheduler)


@pytest.fixture(scope="module")
def server(policy: Policy) -> Iterator[Running]:
    with running(policy) as server:
        yield server


def picture(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def encode(pixels: np.ndarray, kind: str = "PNG", **options: Any) -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels[..., 0] if pixels.shape[-1] == 1 else pixels).save(file, kind, **options)
    return file.getvalue()


def step(seed: int) -> dict[str, Any]:
    state = np.random.default_rng(seed).uniform(0, 100, 2).astype(np.float32)
    return {"camera": picture(seed, HEIGHT, WIDTH, 3), "grey": picture(seed + 1, 16, 16, 1), "s": state}


def stacked(seed: int) -> dict[str, Any]:
    one, other = step(seed), step(seed + 10)
    return {key: np.stack([one[key], other[key]]) for key in one}


def test_files_are_answered_as_their_pixels_are(server: Running, policy: Policy) -> None:
    """PNG gives the pixels that were encoded, and JPEG those that Pillow decodes, of one step or of all."""
    arrays, one = stacked(0), step(1)
    jpegs = [encode(frame, "JPEG") for frame in arrays["camera"]]
    decoded = np.stack([np.asarray(Image.open(io.BytesIO(jpeg))) for jpeg in jpegs])
    assert not np.array_equal(decoded, arrays["camera"])
    with server.connect() as client:
        assert unpack(client.recv())["image_files"] == {"camera": ["jpeg", "png"], "grey": ["jpeg", "png"]}

        def actions(message: dict[str, Any]) -> np.ndarray:
            found: np.ndarray = infer(client, {**message, "reset": True})["actions"]
            return found

        pngs = {key: [encode(frame) for frame in arrays[key]] for key in ("camera", "grey")}
        expected = actions(arrays)
        np.testing.assert_array_equal(actions({**arrays, **pngs}), expected)
        np.testing.assert_array_equal(actions({**arrays, "camera": pngs["camera"]}), expected)
        np.testing.assert_array_equal(actions({**arrays, "camera": jpegs}), actions({**arrays, "camera": decoded}))
        assert not np.array_equal(actions({**arrays, "camera": jpegs}), expected)
        files = {key: encode(one[key]) for key in ("camera", "grey")}
        np.testing.assert_array_equal(actions({**one, **files}), actions(one))
        infer(client, {**one, **files, "executed": 1})
    here = policy.predict(arrays, seed=mix_seeds(0, 0)).trajectory[1:]
    np.testing.assert_allclose(expected, here, rtol=1e-5, atol=1e-4)


def scans(count: int) -> bytes:
    """A progressive JPEG whose last scan comes again and again."""
    file = encode(np.zeros((HEIGHT, WIDTH, 3), np.uint8), "JPEG", progressive=True)
    last = file.rindex(b"\xff\xda")
    return file[:-2] + file[last:-2] * count + file[-2:]


@functools.cache
def bad_images() -> dict[str, tuple[Any, str]]:
    good = picture(0, HEIGHT, WIDTH, 3)
    turned = Image.Exif()
    turned[0x0112] = 6
    return {
        "size": (encode(good[:-1]), "the image is 32 × 23, expected 32 × 24"),
        "bomb": (encode(np.zeros((5000, 5000, 1), np.uint8)), "the image is 5000 × 5000, expected 32 × 24"),
        "grey": (encode(good[..., :1]), "mode is 'L' .grey., expected 8 bits of RGB"),
        "alpha": (encode(np.dstack([good, good[..., :1]])), "mode is 'RGBA' .RGB with alpha., expected 8 bits of RGB"),
        "turned": (encode(good, "JPEG", exif=turned), "EXIF orientation 6"),
        "scans": (scans(100), "JPEG has 110 scans, expected at most 32"),
        "cut off": (encode(good, "JPEG")[:-100], "not a whole JPEG or PNG"),
        "another format": (encode(good, "BMP"), "not a whole JPEG or PNG"),
        "empty": (b"", "0 bytes are not a whole"),
        "long": (encode(good) + bytes(100_000), "bytes, expected at most 70144"),
        "too few": ([encode(good)], "a list of 1, expected 2 JPEG or PNG files"),
        "mixed": ([encode(good), 3], "a list of 2, expected 2 JPEG or PNG files"),
        "one of two": ([encode(good), encode(good[:-1])], "32 × 23, expected 32 × 24"),
        "one step": (encode(good), "send all keys stacked"),
    }


@pytest.mark.parametrize("name", list(bad_images()))
def test_a_bad_image_is_told_by_its_key_and_the_next_good_one_is_answered(server: Running, name: str) -> None:
    value, told = bad_images()[name]
    with server.connect(max_queue=None) as client:
        client.recv()
        client.send(pack({**stacked(0), "camera": value}))
        error = client.recv(timeout=PATIENCE)
        assert isinstance(error, str)
        assert "'camera'" in error
        assert re.search(told, error), error
        infer(client, stacked(0))


def test_no_pixel_is_decoded_before_the_header_is_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    bad_images()  # made before
    monkeypatch.setattr(ImageFile.ImageFile, "load", lambda *_: pytest.fail("the image was decoded"))
    for name in ("size", "bomb", "grey", "alpha", "scans"):
        with pytest.raises(image_file.ObservationError):
            image_file.decode_image(bad_images()[name][0], ("RGB",), (WIDTH, HEIGHT))


def test_images_are_decoded_beside_the_event_loop(policy: Policy, monkeypatch: pytest.MonkeyPatch) -> None:
    """While one is decoded, health is answered."""
    asked, answered, decode = threading.Event(), threading.Event(), sessions.decode_images

    def slow(*arguments: Any) -> dict[str, Any]:
        asked.set()
        assert answered.wait(PATIENCE)
        return decode(*arguments)

    monkeypatch.setattr(sessions, "decode_images", slow)
    with running(policy) as server, server.connect() as client:
        client.recv()
        client.send(pack(step(0)))
        assert asked.wait(PATIENCE)
        assert server.get("/healthz") == "OK\n"
        answered.set()
        assert isinstance(client.recv(timeout=PATIENCE), bytes)


def test_messages_of_files_are_within_the_limits(policy: Policy) -> None:
    """Noise at the highest quality is the longest that a camera's image can become."""
    message = stacked(0)
    files = {key: [encode(frame, "JPEG", quality=100) for frame in message[key]] for key in ("camera", "grey")}
    assert len(pack({**message, **files})) < Limits.of(policy.spec).message_bytes


def test_the_client_sends_jpeg_files_where_it_is_told_to(server: Running) -> None:
    observation = {**stacked(0), "camera": np.full((2, HEIGHT, WIDTH, 3), 90, np.uint8)}  # which a JPEG keeps nearly
    uri = f"ws://127.0.0.1:{server.port}"
    with PolicyClient(uri, jpeg_quality=95) as client, PolicyClient(uri) as plain:
        client.connect()
        sent: list[bytes] = []
        send = client._connection.send  # type: ignore[union-attr]
        client._connection.send = lambda data: (sent.append(data), send(data))  # type: ignore
        files, arrays = client.infer(observation)["actions"], plain.infer(observation)["actions"]
        message = unpack(sent[0])
        assert [[file[:2] for file in message[key]] for key in ("camera", "grey")] == 2 * [2 * [b"\xff\xd8"]]
        np.testing.assert_array_equal(message["s"], observation["s"])
        single = client.infer({**step(3), "reset": True})["actions"]
        assert unpack(sent[1])["camera"][:2] == b"\xff\xd8"
    assert files.shape == single.shape == arrays.shape
    with pytest.raises(ValueError, match="jpeg_quality is 0"):
        PolicyClient(uri, jpeg_quality=0)


def test_openpis_client_sends_files(server: Running, tmp_path: Path) -> None:
    if not CLIENT.is_file() or subprocess.run([CLIENT, "-c", "import openpi_client"]).returncode:
        pytest.skip(f"no openpi-client at {CLIENT}; make test installs it where its own pins can be had")
    frames = stacked(0)["camera"]
    names = [tmp_path / f"{i}.png" for i in range(2)]
    for name, frame in zip(names, frames, strict=True):
        name.write_bytes(encode(frame))
    answer = tmp_path / "actions.npy"
    subprocess.run([CLIENT, "-c", OPENPI, str(server.port), answer, *names], check=True, timeout=PATIENCE)
    with server.connect() as client:
        client.recv()
        message = {"camera": frames, "grey": np.zeros((2, 16, 16, 1), np.uint8), "s": np.zeros((2, 2), np.float32)}
        np.testing.assert_array_equal(np.load(answer), infer(client, message)["actions"])
