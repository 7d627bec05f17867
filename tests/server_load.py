"""A policy server under hostile load and at its end, as processes on this machine's loopback: counts and times.

    python -m tests.server_load [malformed=12000] [giant=16] [connections=500] [checkpoint=FOLDER]

While malformed and giant messages come in, and hundreds of connections stand open, some of whose clients never read,
/healthz is asked all the time, and one client asks for the same chunk again and again. Then the server is told to end
while requests wait. Exits with 1 where something is not as promised: an answer to /healthz within 250 ms, memory within
1.5 times the idle server's, equal chunks to the bit, the batch at hand delivered, and the end within 5 s and a batch.
"""

import contextlib
import multiprocessing
import re
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from websockets.exceptions import ConnectionClosed
from websockets.sync.client import ClientConnection, connect

from parapolicy.loading import save_policy
from parapolicy.serve.wire import pack, unpack
from tests.fuzzing.wire import mutated
from tests.helpers import small_policy
from tests.serving import infer, silent_client

GIANT = 16 * 2**20


@contextlib.contextmanager
def command(checkpoint: str, *settings: str) -> Iterator[tuple[subprocess.Popen[str], int]]:
    """``parapolicy serve`` and its port."""
    arguments = [sys.executable, "-m", "parapolicy.cli", "serve", f"checkpoint={checkpoint}", "port=0", *settings]
    with tempfile.TemporaryFile("w+") as log:
        process = subprocess.Popen(arguments, stdout=subprocess.PIPE, stderr=log, text=True)
        try:
            assert process.stdout is not None
            found = re.search(r"ws://127.0.0.1:(\d+)", process.stdout.readline())
            assert found, log.seek(0) or log.read()
            yield process, int(found[1])
        finally:
            process.kill()
            process.wait()


@contextlib.contextmanager
def open_client(port: int) -> Iterator[tuple[ClientConnection, dict[str, Any]]]:
    """A client and a good message, stacked."""
    with connect(f"ws://127.0.0.1:{port}", compression=None, max_size=None, open_timeout=60) as client:
        described = unpack(client.recv(timeout=60))
        steps, rng = described["n_obs_steps"], np.random.default_rng(0)
        shapes = described["observation"].items()
        yield client, {key: rng.uniform(100, 400, (steps, *shape)).astype(np.float32) for key, shape in shapes}


def ask_health(port: int, stop: Any, times: Any) -> None:
    """Milliseconds of each answer, from a process of its own."""
    while not stop.is_set():
        begin = time.perf_counter()
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/healthz", timeout=60) as response:
            assert response.read() == b"OK\n"
        times.append(1e3 * (time.perf_counter() - begin))
        time.sleep(0.02)


def send_malformed(port: int, seed: int, count: int, results: Counter[str]) -> None:
    rng = np.random.default_rng(seed)
    with open_client(port) as (client, message):
        good = pack(message)
        for _ in range(count):
            client.send(mutated(rng, good))
            results["refused" if isinstance(client.recv(timeout=60), str) else "answered"] += 1


def send_giant(port: int, number: int, results: Counter[str]) -> None:
    """16 MiB of empty lists or maps, of nested lists, or of zeros."""
    leaf = [b"\x90", b"\x80", b"\x91", b"\x00"][number % 4]
    with open_client(port) as (client, _):
        try:
            client.send(b"\xdd" + GIANT.to_bytes(4, "big") + leaf * GIANT)
            client.recv(timeout=60)
            results["giant taken"] += 1
        except ConnectionClosed:
            results["giant refused"] += 1


def stand_open(port: int, number: int) -> socket.socket:
    """A client that is silent, sends without reading, sends half a message, or half a handshake."""
    if number % 4 == 3:
        client = socket.create_connection(("127.0.0.1", port), timeout=60)
        client.sendall(b"GET / HTTP/1.1\r\nHost: localhost\r\n")
        return client
    client = silent_client(port)
    if number % 4 == 1:
        client.setblocking(False)
        with contextlib.suppress(OSError):  # its buffers are full, or it was cut off
            for _ in range(200):
                client.send(b"\x82\x83\x00\x00\x00\x00bad" * 100)
    if number % 4 == 2:
        client.sendall(b"\x82\xfe\xff\x00\x00\x00\x00\x00" + bytes(1000))
    return client


def memory(process: subprocess.Popen[str]) -> float:
    """Resident MiB."""
    found = re.search(r"VmRSS:\s+(\d+) kB", Path(f"/proc/{process.pid}/status").read_text())
    assert found
    return int(found[1]) / 1024


def load(checkpoint: str, malformed: int, giant: int, connections: int) -> dict[str, Any]:
    """What a server did under load."""
    context = multiprocessing.get_context("spawn")
    results: Counter[str] = Counter(answered=0)
    with command(checkpoint, f"max_connections={connections + 64}") as (process, port), context.Manager() as manager:
        with open_client(port) as (client, message):
            message["reset"] = True
            expected = infer(client, message)["actions"]
            for _ in range(5):
                infer(client, message)
            idle = peak = memory(process)
            stop, times = manager.Event(), manager.list()
            health = context.Process(target=ask_health, args=(port, stop, times))
            health.start()
            while len(times) < 50 and health.is_alive():
                time.sleep(0.05)
            before = max(times, default=0.0)
            open_ones = [stand_open(port, number) for number in range(connections)]
            threads = [
                threading.Thread(target=send_malformed, args=(port, seed, malformed // 4, results)) for seed in range(4)
            ] + [threading.Thread(target=send_giant, args=(port, number, results)) for number in range(giant)]
            for thread in threads:
                thread.start()
            while any(thread.is_alive() for thread in threads):
                peak = max(peak, memory(process))
                equal = np.array_equal(infer(client, message)["actions"], expected)
                results["good equal" if equal else "good different"] += 1
            results["good equal"] += int(np.array_equal(infer(client, message)["actions"], expected))
            stop.set()
            health.join()
            for each in open_ones:
                each.close()
        slowest = np.sort(times)
        return {
            **dict(results),
            "health asked": len(slowest),
            "health failed": int(health.exitcode != 0),
            "health max ms before": round(before, 1),
            "health p50 ms": round(float(np.median(slowest)), 1),
            "health max ms": round(float(slowest[-1]), 1),
            "memory idle MiB": round(idle),
            "memory peak / idle": round(peak / idle, 2),
        }


def end(checkpoint: str, waiting: int = 10) -> dict[str, Any]:
    """What a server did that was told to end while one batch was computed and ``waiting`` requests waited: each is a
    batch of its own, and the first answer says that the second one is being computed. The slowest engine leaves the
    server time to read the others."""
    with contextlib.ExitStack() as stack:
        process, port = stack.enter_context(command(checkpoint, "max_batch=1", "sampler=sequential", "engine=eager"))
        clients = [stack.enter_context(open_client(port)) for _ in range(waiting + 2)]
        begin = time.monotonic()
        infer(*clients[0])
        batch_s = time.monotonic() - begin
        for client, message in clients:
            client.send(pack(message))
        answered = clients.pop(0)[0].recv(timeout=60)
        begin = time.monotonic()
        process.send_signal(signal.SIGTERM)
        assert isinstance(answered, bytes), answered
        results: Counter[str] = Counter()
        for client, _ in clients:
            try:
                results["delivered" if isinstance(client.recv(timeout=60), bytes) else "other"] += 1
            except ConnectionClosed as closed:
                results["dropped" if closed.rcvd is not None and closed.rcvd.code == 1001 else "other"] += 1
        code = process.wait(60)
        seconds = time.monotonic() - begin
    return {**dict(results), "exit code": code, "batch s": round(batch_s, 2), "gone after s": round(seconds, 2)}


def main(malformed: str = "12000", giant: str = "16", connections: str = "500", checkpoint: str = "") -> None:
    with tempfile.TemporaryDirectory() as folder:
        if not checkpoint:
            save_policy(small_policy(), folder)
        loaded = load(checkpoint or folder, int(malformed), int(giant), int(connections))
        print("under load:", loaded, flush=True)
        ended = end(checkpoint or folder)
        print("at its end:", ended)
    promised = {
        "health": loaded["health max ms"] < 250 and not loaded["health failed"],
        "memory": loaded["memory peak / idle"] < 1.5,
        "malformed": loaded["refused"] + loaded["answered"] == int(malformed) // 4 * 4,
        "equal": "good different" not in loaded,
        "giant": "giant taken" not in loaded,
        "delivered": ended.get("delivered", 0) >= 1 and ended.get("dropped", 0) >= 1 and "other" not in ended,
        "gone": ended["exit code"] == 0 and ended["gone after s"] < 5 + ended["batch s"],
    }
    broken = [name for name, kept in promised.items() if not kept]
    if broken:
        raise SystemExit(f"not as promised: {broken}")


if __name__ == "__main__":
    main(**dict(argument.split("=", 1) for argument in sys.argv[1:]))
