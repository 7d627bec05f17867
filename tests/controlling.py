"""Controllers on a clock that only the test moves."""

from typing import Any

import numpy as np

from parapolicy import Controller
from parapolicy.policy import Chunk, Policy
from tests.helpers import Later, some_observation

EXECUTED = 4  # n_action_steps of the small policy; its horizon is 8, of which 7 actions are from now on


class Timed:
    """A real policy on a made-up clock: every call takes ``seconds`` and every look at the clock ``tick``."""

    def __init__(self, policy: Policy) -> None:
        self.policy, self.spec = policy, policy.spec
        self.now, self.seconds, self.tick = 0.0, 0.01, 0.0
        self.calls: list[dict[str, Any]] = []
        self.failures: dict[int, Exception] = {}  # by number of the call

    def clock(self) -> float:
        self.now += self.tick
        return self.now

    def predict(self, observation: Any, **options: Any) -> Chunk:
        self.calls.append({"observation": observation, **options})
        if failure := self.failures.get(len(self.calls) - 1):
            raise failure
        self.now += self.seconds
        return self.policy.predict(observation, **options)


def step(policy: Timed, seed: int) -> dict[str, np.ndarray]:
    """One control step's observation."""
    return {key: value[0] for key, value in some_observation(policy.spec, seed=seed).items()}


def act(controller: Controller, policy: Timed, count: int) -> list[np.ndarray]:
    return [controller.act(step(policy, controller.step + 1)) for _ in range(count)]


def start_async(policy: Timed, **options: Any) -> tuple[Controller, Later]:
    """A controller whose second chunk has just been asked for, at step 3."""
    executor = Later()
    controller = Controller(
        policy, 10, asynchronous=True, clock=policy.clock, executor=executor, warm_start=True, **options
    )
    act(controller, policy, EXECUTED - 1)
    assert not executor.waiting
    act(controller, policy, 1)
    assert len(executor.waiting) == 1
    return controller, executor
