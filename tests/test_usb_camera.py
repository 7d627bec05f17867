"""examples/usb_camera.py with real video files in place of the camera."""

import threading
from pathlib import Path

import numpy as np
import pytest

cv2 = pytest.importorskip("cv2", reason="opencv-python is not installed")

import parapolicy  # noqa: E402
from examples import usb_camera  # noqa: E402
from parapolicy.loading import save_policy  # noqa: E402
from parapolicy.spec import Feature  # noqa: E402
from tests.helpers import DDPM_CONFIG, small_policy  # noqa: E402

RED, BLUE = (0, 0, 255), (255, 0, 0)  # as OpenCV has them


def write_video(path: Path, frames: list[np.ndarray], fps: float = 8) -> Path:
    """A file of frames (h, w, 3) in blue, green, red."""
    height, width = frames[0].shape[:2]
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter_fourcc(*"MJPG"), fps, (width, height))
    assert writer.isOpened()
    for frame in frames:
        writer.write(frame)
    writer.release()
    return path


def red_with_blue_sides() -> np.ndarray:
    """A frame (120, 160, 3) whose middle square is red."""
    frame = np.full((120, 160, 3), BLUE, np.uint8)
    frame[:, 20:140] = RED
    return frame


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A policy of random weights with the observations of checkpoints/pusht_image."""
    folder = tmp_path_factory.mktemp("policy")
    camera = {"width": 16, "levels": 1, "keypoints": 4, "features": 4}
    policy = small_policy(
        observation={"image": Feature((96, 96, 3), "image"), "agent_pos": (2,)},
        network={"name": "unet1d", "down_dims": [16], "n_groups": 4, "encoder": {"cameras": {"image": camera}}},
        scheduler={**DDPM_CONFIG, "num_train_timesteps": 3},
        control_hz=100,
    )
    save_policy(policy, folder)
    return folder


def test_a_frame_becomes_the_middle_in_red_green_blue() -> None:
    picture = usb_camera.to_picture(red_with_blue_sides(), (96, 96, 3))
    assert picture.shape == (96, 96, 3)
    assert (picture == (255, 0, 0)).all()
    tall = usb_camera.to_picture(red_with_blue_sides().swapaxes(0, 1).copy(), (96, 96, 3))
    assert (tall == (255, 0, 0)).all()
    assert (usb_camera.to_picture(red_with_blue_sides(), (60, 80, 3))[:, 0] == (0, 0, 255)).all()  # nothing to cut


class Clock:
    """The example's ``time``: an eighth of a second passes with each action; the camera's thread keeps up."""

    def __init__(self) -> None:
        self.now = self.until = 0.0
        self.changed = threading.Condition()

    def monotonic(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        with self.changed:
            self.until = self.now + seconds
            self.changed.wait_for(lambda: self.now >= self.until)

    def advance(self) -> None:
        with self.changed:
            self.now += 0.125
            self.changed.notify_all()
            while self.now >= self.until and any(thread.name == "camera" for thread in threading.enumerate()):
                self.changed.wait(0.001)


def test_actions_follow_the_video_and_are_held_when_it_ends(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write_video(tmp_path / "camera.avi", [red_with_blue_sides()] * 8)
    clock, seen, sent = Clock(), [], []
    controller = usb_camera.parapolicy.Controller
    act = controller.act
    monkeypatch.setattr(usb_camera, "time", clock)
    monkeypatch.setattr(usb_camera, "send", lambda action: (sent.append(action), clock.advance()))
    monkeypatch.setattr(controller, "act", lambda self, step: seen.append(step["image"]) or act(self, step))
    with pytest.raises(SystemExit, match=r"error: no new frame for 2\.1 s: stopped"):
        usb_camera.main(["--camera", str(path), "--checkpoint", str(checkpoint)])
    assert not seen.pop(0).any()  # before the loop; its action is not sent
    for picture in seen:
        np.testing.assert_allclose(picture[48, 48], (255, 0, 0), atol=8)  # JPEG
    held = capsys.readouterr().out.count("the action is held")
    assert len(seen) == 8 + 2  # until the last frame is too old
    assert held == 14
    assert len(sent) == len(seen) + held
    assert np.isfinite(sent).all()
    np.testing.assert_array_equal(sent[-held:], [sent[-held - 1]] * held)


def test_an_episode_begins_when_frames_come_again(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Frames from before the gap are not joined with those after it."""

    class Gap:
        """A camera whose frame is late for some steps."""

        def __init__(self, source: str) -> None:
            self.ages = iter([0.0, 0.0, 0.0, 1.0, 1.0, 0.0, 0.0])

        @property
        def newest(self) -> tuple[np.ndarray, float]:
            return red_with_blue_sides(), -next(self.ages)

    clock, steps = Clock(), []
    monkeypatch.setattr(usb_camera, "time", clock)
    monkeypatch.setattr(usb_camera, "Camera", Gap)
    controller = usb_camera.parapolicy.Controller
    act = controller.act

    def counted(self: parapolicy.Controller, step: dict[str, np.ndarray]) -> np.ndarray:
        action = act(self, step)
        steps.append(self.step)
        return action

    monkeypatch.setattr(controller, "act", counted)
    usb_camera.main(["--seconds", "0.07", "--checkpoint", str(checkpoint)])
    assert steps == [0, 0, 1, 2, 0, 1]


@pytest.mark.parametrize("content", [None, b"", b"no video"])
def test_a_camera_without_frames_is_an_error(checkpoint: Path, tmp_path: Path, content: bytes | None) -> None:
    path = tmp_path / "camera.avi"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(SystemExit, match=r"error: camera '.*camera.avi' gives no frame; is it plugged in"):
        usb_camera.main(["--camera", str(path), "--checkpoint", str(checkpoint)])
