"""A 100 Hz robot loop around a policy: the loop's thread never waits for the network.

    python examples/control_loop.py [checkpoint=checkpoints/pusht_lowdim] [seconds=10]

The "robot" here is a point that follows its target; put your drivers in place of ``Robot``. The policy speaks at its
own 10 Hz; between two of its control steps the fast loop sends the robot towards the last action.
"""

import sys

import numpy as np

import parapolicy

FAST_HZ = 100


class Robot:
    """A stand-in with a driver's two calls, for the keys of the Push-T policy."""

    def __init__(self, spec: parapolicy.PolicySpec) -> None:
        rng = np.random.default_rng(0)
        self.observation = {
            key: rng.uniform(150, 350, shape).astype(np.float32) for key, shape in spec.observation.items()
        }
        self.position = self.observation["agent_pos"]

    def observe(self) -> dict[str, np.ndarray]:
        return self.observation

    def send(self, target: np.ndarray) -> None:
        self.position += 0.2 * (target - self.position)


def main(checkpoint: str = "checkpoints/pusht_lowdim", seconds: str = "10") -> None:
    policy = parapolicy.load_policy(checkpoint)
    robot = Robot(policy.spec)
    every = round(FAST_HZ / policy.spec.control_hz)
    with parapolicy.Controller(policy, asynchronous=True, deadline_ms=500) as controller:
        controller.reset(seed=0)
        target = controller.act(robot.observe())  # the first chunk is waited for, with the robot at rest
        pacer = parapolicy.Pacer(FAST_HZ)
        for tick in range(round(float(seconds) * FAST_HZ)):
            pacer.wait()
            if tick % every == 0:
                target = controller.act(robot.observe())
            robot.send(target)
        times = controller.latency["times"]
        print(f"{pacer.missed} ticks missed of {tick + 1}")
        for stage in ("act", "chunk", "jitter"):
            print(stage, {name: round(value, 3) for name, value in times[stage].items()})


if __name__ == "__main__":
    main(**dict(argument.split("=", 1) for argument in sys.argv[1:]))
