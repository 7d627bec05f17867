"""Closed-loop episodes, many at a time: each environment gets the chunk it would get if it ran alone."""

import dataclasses
from collections.abc import Callable, Container, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import gymnasium
import numpy as np

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
    """

    seed: int
    rewards: list[float] = field(default_factory=list)
    success: bool = False
    rounds: list[int] = field(default_factory=list)
    evaluations: list[int] = field(default_factory=list)
    observations: list[dict[str, np.ndarray]] = field(default_factory=list)
    frames: list[np.ndarray] = field(default_factory=list)

    @property
    def max_reward(self) -> float:
        return max(self.rewards)

    @property
    def sum_reward(self) -> float:
        return sum(self.rewards)


class _Seat:
    """One environment and the episode that runs in it."""

    def __init__(self, env: gymnasium.Env, policy: Policy) -> None:
        self.env = env
        self.history = ObservationHistory(policy.spec)
        self.episode: Episode

    def begin(self, seed: int, record: bool) -> None:
        observation, _ = self.env.reset(seed=seed)
        self.episode = Episode(seed)
        self.warm: WarmState | None = None
        self.record = record
        self.history.reset()
        self.history.push(observation)
        self._film()

    def execute(self, actions: np.ndarray) -> bool:
        """Run a chunk's actions (n, Da) one by one; True when the episode is over."""
        for action in actions:
            observation, reward, terminated, truncated, info = self.env.step(action)
            self.episode.rewards.append(float(reward))
            self.episode.success = self.episode.success or bool(info.get("is_success", False))
            self.history.push(observation)
            self._film()
            if terminated or truncated:
                return True
        return False

    def _film(self) -> None:
        if self.record:
            self.episode.frames.append(np.asarray(self.env.render()))


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
        progress: called with the number of control steps taken since the last call.
    """
    if num_envs < 1:
        raise ValueError(f"num_envs is {num_envs}, expected at least 1")
    policy = dataclasses.replace(policy, reproducible=True)
    waiting = list(reversed(seeds))
    seats = [_Seat(make_env(), policy) for _ in range(min(num_envs, len(seeds)))]
    try:
        for seat in seats:
            seat.begin(seed := waiting.pop(), seed in record)
        active = seats
        while active:
            actions: dict[_Seat, np.ndarray] = {}
            for group in ([s for s in active if s.warm is None], [s for s in active if s.warm is not None]):
                if group:
                    actions |= _predict(policy, group, noise_seed)
            remaining = []
            for seat in active:
                episode = seat.episode
                before = len(episode.rewards)
                over = seat.execute(actions[seat])
                progress(len(episode.rewards) - before)
                if over:
                    yield episode
                    if not waiting:
                        continue
                    seat.begin(seed := waiting.pop(), seed in record)
                remaining.append(seat)
            active = remaining
    finally:
        for seat in seats:
            seat.env.close()


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
