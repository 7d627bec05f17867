"""A 100 Hz robot loop around a policy: the loop's thread never waits for the network.

    python examples/control_loop.py [checkpoint=checkpoints/pusht_lowdim] [seconds=10] [control_hz=10] [engine=eager]

The "robot" here is a point that follows its target; replace ``Robot`` by your drivers. The policy runs at its 10 Hz;
between two of its control steps the fast loop sends the robot towards the last action. For a soak test: ``seconds=1800
control_hz=50 engine=auto``, where a chunk of 8 actions lasts only 160 ms.
"""

import ctypes
import gc
import os
import resource
import sys
import time

import numpy as np
import torch

import parapolicy

FAST_HZ = 100


class Robot:
    """A stand-in with a driver's two calls, for the keys of the Push-T policy."""

    def __init__(self, spec: parapolicy.PolicySpec) -> None:
        rng = np.random.default_rng(0)
        self.observation = {
            key: rng.uniform(150, 350, feature.shape).astype(np.float32) for key, feature in spec.observation.items()
        }
        self.position = self.observation["agent_pos"]

    def observe(self) -> dict[str, np.ndarray]:
        return self.observation

    def send(self, target: np.ndarray) -> None:
        self.position += 0.2 * (target - self.position)


def main(
    checkpoint: str = "checkpoints/pusht_lowdim", seconds: str = "10", control_hz: str = "10", engine: str = "eager"
) -> None:
    torch.set_num_threads(max(1, torch.get_num_threads() - 1))  # leave a core for this loop
    set_priority(10)  # also for the policy's thread, which must not wait for a core while it holds Python's lock
    policy = parapolicy.load_policy(checkpoint, engine=engine)
    robot = Robot(policy.spec)
    every = round(FAST_HZ / float(control_hz))
    history = parapolicy.ObservationHistory(policy.spec)
    history.push(robot.observe())
    for seed in range(30):  # compiling and preparing for every call size would delay the loop
        policy.predict(history.stacked(), seed=seed)
    with parapolicy.Controller(policy, float(control_hz), asynchronous=True, deadline_ms=500) as controller:
        controller.reset(seed=0)
        target = controller.act(robot.observe())  # waits for the first chunk, with the robot at rest
        gc.collect()
        gc.freeze()  # exclude loaded objects: a full collection would stop every thread for some 60 ms
        lock_memory()
        sys.setswitchinterval(0.0005)  # seconds that the policy's thread may keep Python's lock while this one waits
        set_priority(20)
        pacer, missed = parapolicy.Pacer(FAST_HZ), 0
        worked, (waited, faults) = 0.0, waits()
        for tick in range(round(float(seconds) * FAST_HZ)):
            pacer.wait()
            begin, waited_by, faults_by = time.monotonic(), waited, faults
            waited, faults = waits()
            if pacer.missed > missed:
                print(f"{time.strftime('%H:%M:%S')}, tick {tick}: {pacer.missed - missed} missed. The work before took")
                print(f"  {1e3 * worked:.1f} ms. Since then this thread waited {waited - waited_by:.1f} ms for a core")
                print(f"  and {faults - faults_by} times for a page of memory.", flush=True)
                missed = pacer.missed
            if tick % every == 0:
                target = controller.act(robot.observe())
            robot.send(target)
            worked = time.monotonic() - begin
            if tick in (999, 10_000):  # after the first allocations
                print(f"{tick + 1} ticks: {memory():.0f} MB at most")
        latency = controller.latency
        print(f"{tick + 1} ticks: {memory():.0f} MB at most, {pacer.missed} ticks missed")
        print({name: latency[name] for name in ("steps", "misses", "failures", "late", "stale", "continued", "held")})
        for stage in ("act", "chunk", "jitter"):
            print(stage, {name: round(value, 3) for name, value in latency["times"][stage].items()})


def set_priority(priority: int) -> None:
    """Give this thread, and those it starts from now on, real-time priority, if the system allows it (Linux: as root,
    or with ``rtprio`` in limits.conf)."""
    try:
        os.sched_setscheduler(0, os.SCHED_FIFO, os.sched_param(priority))
    except (AttributeError, PermissionError) as error:
        print(f"no real-time priority ({error}): other programs can make this loop late")


def lock_memory() -> None:
    """Keep this program's memory from being paged out, if the system allows it (Linux: as root, or with ``memlock`` in
    limits.conf): reading a dropped page again takes milliseconds."""
    current, future, on_fault = 1, 2, 4
    try:
        if ctypes.CDLL(None, use_errno=True).mlockall(current | future | on_fault):
            raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    except (AttributeError, OSError) as error:
        print(f"memory is not locked ({error}): a page that the system drops can make this loop late")


def waits() -> tuple[float, int]:
    """How long this thread was ready to run but had no core, ms, and how often it waited for a page of memory to be
    read; nan and 0 if the system does not tell."""
    try:
        faults = resource.getrusage(resource.RUSAGE_THREAD).ru_majflt
        with open("/proc/thread-self/schedstat") as counts:
            return int(counts.read().split()[1]) / 1e6, faults
    except (AttributeError, OSError):
        return float("nan"), 0


def memory() -> float:
    """Peak memory of this process, MB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


if __name__ == "__main__":
    main(**dict(argument.split("=", 1) for argument in sys.argv[1:]))
