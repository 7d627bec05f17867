"""Closed-loop episodes, many at a time: each environment gets the chunk it would get if it ran alone."""

import dataclasses
import gc
from collections.abc import Callable, Container, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import gymnasium
import numpy as np

from parapolicy.evaluate.workers import Here, Place, Worker, WorkerDied, execute, reset
from parapolicy.noise import mix_seeds
from parapolicy.observation import ObservationHistory
from parapolicy.policy import Policy
from parapolicy.warm import WarmState


@dataclass
class Episode:
    """One episode's record.

    Attributes:
        seed: of the initial state.
        rewards: one per control step.
        success: whether the environment reported success.
        rounds, evaluations: one per chunk.
        observations: the history each chunk was computed from.
        frames: rendered before the first and after every control step, where asked for.
        seams: distance from the last action of a chunk to the first of the next, one per chunk but the first.
        motion: mean distance between successive actions inside a chunk, one per chunk with two actions or more.
        error: why it was given up before its end; None: it was not.
    """

    seed: int
    rewards: list[float] = field(default_factory=list)
    success: bool = False
    rounds: list[int] = field(default_factory=list)
    evaluations: list[int] = field(default_factory=list)
    observations: list[dict[str, np.ndarray]] = field(default_factory=list)
    frames: list[np.ndarray] = field(default_factory=list)
    seams: list[float] = field(default_factory=list)
    motion: list[float] = field(default_factory=list)
    error: str | None = None

    @property
    def max_reward(self) -> float:
        return max(self.rewards, default=0.0)

    @property
    def sum_reward(self) -> float:
        return sum(self.rewards)


class _Seat:
    """One environment and the episode that runs in it."""

    def __init__(self, make_place: Callable[[], Place], policy: Policy) -> None:
        self.make_place, self.place = make_place, make_place()
        self.history = ObservationHistory(policy.spec)
        self.episode: Episode

    def begin(self, seed: int, record: bool) -> None:
        self.episode, self.record, self.begun = Episode(seed), record, False
        self.warm: WarmState | None = None
        self.submitted = self.executed = np.empty((0, 0))  # actions: of this chunk, of the one before as far as it got
        self.history.reset()
        self.place.submit(reset, seed, record)

    def submit(self, actions: np.ndarray) -> None:
        """Have a chunk's actions (n, Da) executed."""
        self.submitted = actions
        self.place.submit(execute, actions, self.record)

    def receive(self) -> bool:
        """Take what was submitted last; True when the episode is over."""
        transitions = self.place.receive()
        for transition in transitions:
            self.history.push(transition.observation)
            if transition.frame is not None:
                self.episode.frames.append(transition.frame)
            if self.begun:
                self.episode.rewards.append(transition.reward)
                self.episode.success = self.episode.success or transition.success
        if self.begun:
            self._measure(self.submitted[: len(transitions)])
        self.begun = True
        return transitions[-1].over

    def _measure(self, actions: np.ndarray) -> None:
        """Note how far the actions that were executed (n, Da) lie apart, and from those before."""
        if len(self.executed):
            self.episode.seams.append(float(np.linalg.norm(actions[0] - self.executed[-1])))
        if len(actions) > 1:
            self.episode.motion.append(float(np.linalg.norm(np.diff(actions, axis=0), axis=1).mean()))
        self.executed = actions

    def replace(self) -> None:
        """A new place for one that is gone."""
        self.place.close()
        self.place = self.make_place()


def chunk_seed(noise_seed: int, episode_seed: int, chunk: int) -> int:
    """The seed of one chunk's noise: the same for every sampler, different for every chunk of every episode."""
    return mix_seeds(noise_seed, episode_seed, chunk)


def rollout(
    policy: Policy,
    make_env: Callable[[], gymnasium.Env],
    seeds: Sequence[int],
    noise_seed: int = 0,
    num_envs: int = 20,
    record: Container[int] = (),
    progress: Callable[[int], Any] = lambda steps: None,
    processes: bool = False,
) -> Iterator[Episode]:
    """Run one episode per seed with a receding horizon, yielding each as it ends.

    All waiting environments share one ``predict`` call. An episode depends on its seed and ``noise_seed`` only, not
    on ``num_envs``. With ``policy.warm_start`` every chunk but an episode's first starts from the one before.

    Args:
        policy: the policy; it is run with ``reproducible=True``.
        make_env: builds an environment whose observations fit the policy.
        seeds: of the episodes' initial states.
        noise_seed: of the sampling noise.
        num_envs: how many environments run at a time.
        record: seeds whose episodes are filmed.
        progress: called with the number of control steps taken since the last call; less than 0 when an episode is
            begun again.
        processes: run each environment in a process of its own, all at the same time. An episode whose process dies is
            run once more in a new one; if that dies too, the episode ends there, without success, and has an ``error``.
    """
    if num_envs < 1:
        raise ValueError(f"num_envs is {num_envs}, expected at least 1")
    policy = dataclasses.replace(policy, reproducible=True)
    waiting = list(reversed(seeds))
    seats = [_Seat(partial(Worker if processes else Here, make_env), policy) for _ in range(min(num_envs, len(seeds)))]
    died: set[int] = set()  # seeds of episodes that were begun again
    try:
        for seat in seats:
            seat.begin(seed := waiting.pop(), seed in record)
        active = seats
        while active:
            ready = [seat for seat in active if seat.begun]
            actions: dict[_Seat, np.ndarray] = {}
            for group in ([s for s in ready if s.warm is None], [s for s in ready if s.warm is not None]):
                if group:
                    actions |= _predict(policy, group, noise_seed)
            for seat, chunk in actions.items():
                seat.submit(chunk)
            remaining = []
            for seat in active:
                episode = seat.episode
                before = len(episode.rewards)
                try:
                    over = seat.receive()
                except WorkerDied as death:
                    seat.replace()
                    if episode.seed not in died:
                        died.add(episode.seed)
                        progress(-before)
                        seat.begin(episode.seed, episode.seed in record)
                        remaining.append(seat)
                        continue
                    over = True
                    episode.success = False
                    episode.error = f"{death}, twice; the last time after {before} control steps"
                if taken := len(episode.rewards) - before:
                    progress(taken)
                if over:
                    yield episode
                    if not waiting:
                        continue
                    seat.begin(seed := waiting.pop(), seed in record)
                remaining.append(seat)
            active = remaining
    finally:
        for seat in seats:
            seat.place.close()
        seats.clear()
        gc.collect()  # simulators lie in reference cycles that weigh little to Python, and much to the machine


def _predict(policy: Policy, seats: Sequence[_Seat], noise_seed: int) -> dict[_Seat, np.ndarray]:
    """One ``predict`` for seats that all start cold or all start warm: the actions of each, and its records."""
    histories = [seat.history.stacked() for seat in seats]
    observation = {key: np.stack([history[key] for history in histories]) for key in policy.spec.observation}
    noise_seeds = [chunk_seed(noise_seed, seat.episode.seed, len(seat.episode.rounds)) for seat in seats]
    states = [seat.warm for seat in seats if seat.warm is not None]
    chunk = policy.predict(observation, seed=noise_seeds, warm=WarmState.stack(states) if states else None)
    for i, seat in enumerate(seats):
        seat.episode.observations.append(histories[i])
        seat.episode.rounds.append(int(chunk.stats.rounds[i]))
        seat.episode.evaluations.append(int(chunk.stats.evaluations[i]))
        seat.warm = chunk.warm_state[i] if policy.warm_start else None
    return dict(zip(seats, chunk.actions, strict=True))
