"""Drive Push-T through a policy server with the public openpi-client, several clients at a time.

    parapolicy serve checkpoint=checkpoints/pusht_lowdim port=8000
    python examples/serve_client.py [port=8000] [clients=8] [seconds=10]

Needs openpi-client (pip install openpi-client) and nothing of parapolicy. Prints throughput and latency.
"""

import sys
import threading
import time

import numpy as np
from openpi_client.websocket_client_policy import WebsocketClientPolicy


def play(port: int, seconds: float, client: int, latencies: list[float], errors: list[str]) -> None:
    """One robot: requests a chunk, and the next one as soon as it has arrived."""
    try:
        policy = WebsocketClientPolicy("127.0.0.1", port)
        metadata = policy.get_server_metadata()
        rng = np.random.default_rng(client)
        steps = metadata["obs_steps"]  # a single step would be repeated for all of them
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            observation = {
                key: rng.uniform(150, 350, (steps[key], *shape)).astype(np.float32)
                for key, shape in metadata["observation"].items()
            }
            begin = time.perf_counter()
            actions = policy.infer(observation)["actions"]
            latencies.append(time.perf_counter() - begin)
            if actions.shape != (metadata["action_horizon"], metadata["action_dim"]) or not np.isfinite(actions).all():
                errors.append(f"actions of shape {actions.shape}")
    except Exception as error:
        errors.append(f"{type(error).__name__}: {error}")


def main(port: str = "8000", clients: str = "8", seconds: str = "10") -> None:
    latencies: list[float] = []
    errors: list[str] = []
    threads = [
        threading.Thread(target=play, args=(int(port), float(seconds), client, latencies, errors))
        for client in range(int(clients))
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    p50, p95, p99 = np.percentile(np.asarray(latencies) * 1e3, [50, 95, 99])
    rate = len(latencies) / float(seconds)
    print(f"{clients} clients: {len(latencies)} chunks, {rate:.1f} per second, {len(errors)} errors {errors[:3]}")
    print(f"latency ms: p50 {p50:.0f}, p95 {p95:.0f}, p99 {p99:.0f}, max {1e3 * max(latencies):.0f}")


if __name__ == "__main__":
    main(**dict(argument.split("=", 1) for argument in sys.argv[1:]))
