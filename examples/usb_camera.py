"""An image policy with a USB camera: newest frame in, one action out, at the policy's control rate.

    pip install opencv-python
    python examples/usb_camera.py [--camera 0 | --camera FILE.mp4] [--checkpoint checkpoints/pusht_image] [--seconds 60]

Replace ``read_state`` and ``send`` by your robot. Without new frames the last action is held, then the loop stops.
"""

import argparse
import threading
import time

import cv2
import numpy as np

import parapolicy

START_S, HOLD_S, STOP_S = 5.0, 0.3, 2.0  # without a new frame: wait for the first, hold the action, stop


def read_state() -> dict[str, np.ndarray]:
    """The policy's other observations; for the Push-T policy the agent's position, x and y from 0 to 512."""
    return {"agent_pos": np.array([256.0, 256.0])}


def send(action: np.ndarray) -> None:
    """Send the robot its target; for the Push-T policy, x and y from 0 to 512."""
    print("action", action.round(1), flush=True)


def to_picture(frame: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """The middle of OpenCV's BGR frame (h, w, 3) as the policy's RGB image (H, W, 3)."""
    (h, w), (height, width) = frame.shape[:2], shape[:2]
    cut_h, cut_w = min(h, w * height // width), min(w, h * width // height)
    top, left = (h - cut_h) // 2, (w - cut_w) // 2
    cut = frame[top : top + cut_h, left : left + cut_w]
    return cv2.cvtColor(cv2.resize(cut, (width, height), interpolation=cv2.INTER_AREA), cv2.COLOR_BGR2RGB)


class Camera:
    """Reads the newest frame in a thread: OpenCV's ``read`` returns the oldest frame, and blocks if a camera hangs."""

    def __init__(self, source: str) -> None:
        live = source.isdecimal()
        self._capture = cv2.VideoCapture(int(source) if live else source)
        self._period = 0.0 if live else 1 / (self._capture.get(cv2.CAP_PROP_FPS) or 30)  # a file does not wait
        self._first = threading.Event()
        threading.Thread(target=self._read, name="camera", daemon=True).start()
        if not self._first.wait(START_S if self._capture.isOpened() else 0):
            raise SystemExit(f"error: camera {source!r} gives no frame; is it plugged in, and free of other programs?")

    def _read(self) -> None:
        while (read := self._capture.read())[0]:
            self.newest = read[1], time.monotonic()  # (h, w, 3) and its time, together
            self._first.set()
            time.sleep(self._period)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--camera", default="0", help="number of a camera, or a video file")
    parser.add_argument("--checkpoint", default="checkpoints/pusht_image")
    parser.add_argument("--seconds", type=float, default=60.0)
    given = parser.parse_args(arguments)
    policy = parapolicy.load_policy(given.checkpoint)
    ((key, shape),) = [(key, f.shape) for key, f in policy.spec.observation.items() if f.kind == "image"]
    with parapolicy.Controller(policy, asynchronous=True) as controller:
        action = controller.act({key: np.zeros(shape, np.uint8), **read_state()})  # compiles; it is not sent
        camera, held = Camera(given.camera), True
        pacer = parapolicy.Pacer(controller.control_hz)
        for _ in range(round(given.seconds * controller.control_hz)):
            pacer.wait()
            frame, taken = camera.newest
            age = time.monotonic() - taken
            if age > STOP_S:
                raise SystemExit(f"error: no new frame for {age:.1f} s: stopped")
            if age > HOLD_S:
                print(f"no new frame for {age:.1f} s: the action is held", flush=True)
                held = True
            else:
                if held:  # earlier observations are too old
                    controller.reset()
                action, held = controller.act({key: to_picture(frame, shape), **read_state()}), False
            send(action)


if __name__ == "__main__":
    main()
