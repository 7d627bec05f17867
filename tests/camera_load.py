"""Robots with cameras at a policy server, as processes on this machine's loopback: errors, throughput and latency.

    python -m tests.camera_load [clients=4] [seconds=60] [control_hz=10] [engine=eager] [output=FILE.json]

Each client sends the present step of two cameras of 240 × 320 at every tick, first as arrays and then as JPEG files, to
a policy with a ResNet for each camera and made-up weights. Exits with 1 where something is not as promised: no error,
every answer a finite chunk of the same episode, and memory that grows by less than a tenth after the first quarter.
"""

import io
import itertools
import json
import sys
import tempfile
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from parapolicy.control import Pacer
from parapolicy.loading import save_policy
from parapolicy.policy import Policy
from parapolicy.serve.client import PolicyClient
from parapolicy.serve.wire import pack
from parapolicy.spec import Feature
from tests.helpers import DDPM_CONFIG, small_policy
from tests.server_load import command, memory

HEIGHT, WIDTH, QUALITY, FRAMES = 240, 320, 90, 20
CAMERAS = ("front", "wrist")


@dataclass
class Tally:
    """What the clients of one run saw."""

    seconds: list[float] = field(default_factory=list)  # of each answer
    errors: list[str] = field(default_factory=list)


def two_cameras() -> Policy:
    """A policy of 10 denoising steps, with a narrow ResNet18 for each camera."""
    camera = {"width": 16, "levels": 2, "keypoints": 16, "features": 16}
    return small_policy(
        observation={"position": (2,), **{key: Feature((HEIGHT, WIDTH, 3), "image") for key in CAMERAS}},
        horizon=16,
        n_action_steps=8,
        network={
            "name": "unet1d",
            "diffusion_step_embed_dim": 32,
            "down_dims": [32, 64],
            "encoder": {"cameras": dict.fromkeys(CAMERAS, camera)},
        },
        scheduler={**DDPM_CONFIG, "num_train_timesteps": 10},
    )


def scenes(seed: int) -> list[dict[str, np.ndarray]]:
    """Steps whose pictures are smooth with some noise, as a camera's are."""
    rng, steps = np.random.default_rng(seed), []
    for _ in range(FRAMES):
        step: dict[str, np.ndarray] = {"position": rng.uniform(0, 100, 2).astype(np.float32)}
        for key in CAMERAS:
            coarse = Image.fromarray(rng.integers(0, 256, (15, 20, 3), dtype=np.uint8))
            smooth = np.asarray(coarse.resize((WIDTH, HEIGHT), Image.Resampling.BICUBIC), np.float32)
            step[key] = (smooth + rng.normal(0, 4, smooth.shape)).clip(0, 255).astype(np.uint8)
        steps.append(step)
    return steps


def as_jpeg(pixels: np.ndarray) -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "JPEG", quality=QUALITY)
    return file.getvalue()


def drive(port: int, steps: list[dict[str, Any]], seconds: float, control_hz: float, tally: Tally) -> None:
    """One robot: the present step at every tick that it has not missed, joined with the one before."""
    try:
        with PolicyClient(f"ws://127.0.0.1:{port}", timeout=60) as client:
            client.infer(steps[-1])
            shape = client.metadata["action_horizon"], client.metadata["action_dim"]
            pacer, end = Pacer(control_hz), time.monotonic() + seconds
            for tick in itertools.count():
                pacer.wait()
                if time.monotonic() >= end:
                    break
                begin = time.perf_counter()
                answer = client.infer({**steps[tick % FRAMES], "executed": 1, "reset": False})
                tally.seconds.append(time.perf_counter() - begin)
                if answer["actions"].shape != shape or not np.isfinite(answer["actions"]).all():
                    tally.errors.append(f"actions of shape {answer['actions'].shape}")
                if answer["new_episode"]:
                    tally.errors.append(f"a new episode at tick {tick}")
    except Exception as error:
        tally.errors.append(f"{type(error).__name__}: {error}")


def load(port: int, process: Any, form: str, clients: int, seconds: float, control_hz: float) -> dict[str, Any]:
    """What came of one form of images."""
    every = [scenes(client) for client in range(clients)]
    if form == "jpeg":
        every = [[s | {key: as_jpeg(s[key]) for key in CAMERAS} for s in steps] for steps in every]
    message_bytes = len(pack(every[0][0]))
    tally = Tally()
    threads = [threading.Thread(target=drive, args=(port, steps, seconds, control_hz, tally)) for steps in every]
    begin, held = time.monotonic(), []
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads):
        held.append(memory(process))
        time.sleep(0.1)
    took = time.monotonic() - begin
    p50, p99 = np.percentile(tally.seconds or [np.nan], [50, 99]) * 1e3
    return {
        "answers": len(tally.seconds),
        "ticks": round(clients * seconds * control_hz),
        "per second": round(len(tally.seconds) / took, 1),
        "p50 ms": round(float(p50)),
        "p99 ms": round(float(p99)),
        "max ms": round(1e3 * max(tally.seconds, default=np.nan)),
        "kB per message": round(message_bytes / 1e3),
        "memory, first quarter and end, MiB": (round(max(held[: len(held) // 4 + 1])), round(held[-1])),
        "errors": tally.errors,
    }


def main(
    clients: str = "4", seconds: str = "60", control_hz: str = "10", engine: str = "eager", output: str = ""
) -> None:
    broken, results = [], {}
    with tempfile.TemporaryDirectory() as folder:
        save_policy(two_cameras(), folder)
        for form in ("arrays", "jpeg"):
            with command(folder, "sampler=sequential", f"engine={engine}") as (process, port):
                result = load(port, process, form, int(clients), float(seconds), float(control_hz))
            print(f"{form}:", result, flush=True)
            results[form] = result
            first, last = result["memory, first quarter and end, MiB"]
            if result["errors"] or not result["answers"] or last > 1.1 * first:
                broken.append(form)
    if output:
        Path(output).write_text(json.dumps(results, indent=2) + "\n")
    if broken:
        raise SystemExit(f"not as promised: {broken}")


if __name__ == "__main__":
    main(**dict(argument.split("=", 1) for argument in sys.argv[1:]))
