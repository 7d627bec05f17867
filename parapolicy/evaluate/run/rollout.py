"""Closed-loop episodes, many at a time. Batching does not change an environment's chunks."""

import dataclasses
import gc
from collections.abc import Callable, Container, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import gymnasium
import numpy as np

from parapolicy.episode import Episode, Request, group_requests, predict_together
from parapolicy.errors import ObservationError
from parapolicy.evaluate.run.motion import chunk_motion, jerks, seam_jumps
from parapolicy.evaluate.run.workers import EnvFailed, EnvHandle, LocalEnv, ProcessEnv, WorkerDied, execute, reset
from parapolicy.observation import copy_observation
from parapolicy.policy import Chunk, Policy


@dataclass
class EpisodeRecord:
    """One episode's record.

    Attributes:
        seed: of the initial state.
        rewards: one per control step.
        success: whether the environment reported success.
        rounds, evaluations: one per chunk.
        observations: {key: (To, …)}, the history that each chunk was computed from.
        frames: (H, W, 3) uint8, before the first and after every control step; empty unless filmed.
        seams: distance from the last action of a chunk to the first of the next, one per chunk except the first.
        motion: mean distance between successive actions inside a chunk, one per chunk with two actions or more.
        jerk: norms of the third differences of the executed actions.
        charged: simulated latency, seconds, one per chunk that was begun, including one cut off by the episode's end.
        error: why the episode was aborted; None if it was not.
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
    jerk: list[float] = field(default_factory=list)
    charged: list[float] = field(default_factory=list)
    error: str | None = None

    def fail(self, error: str) -> None:
        """Mark the episode as aborted; it counts as a failure."""
        self.success, self.error = False, f"{error}, after {len(self.rewards)} control steps"

    def measure(self, actions: Sequence[np.ndarray], chunks: Sequence[int]) -> None:
        """Record the smoothness of the executed actions (Da,), given the number of each action's chunk."""
        stacked = np.array(actions, np.float64)
        self.seams, self.motion = seam_jumps(stacked, chunks), chunk_motion(stacked, chunks)
        self.jerk = jerks(stacked)

    @property
    def max_reward(self) -> float:
        return max(self.rewards, default=0.0)

    @property
    def sum_reward(self) -> float:
        return sum(self.rewards)


class _Slot:
    """One environment and the episode that runs in it."""

    def __init__(self, make_handle: Callable[[], EnvHandle], policy: Policy, noise_seed: int) -> None:
        self.make_handle, self.env = make_handle, make_handle()
        self.policy, self.noise_seed = policy, noise_seed
        self.record: EpisodeRecord

    def begin(self, seed: int, film: bool) -> None:
        self.record, self.film, self.begun = EpisodeRecord(seed), film, False
        self.episode = Episode(self.policy.spec, (self.noise_seed, seed), self.policy.warm_start)
        self.submitted = np.empty((0, 0))  # actions of the present chunk
        self.executed: list[np.ndarray] = []  # actions of the episode, and their chunks' numbers
        self.chunks: list[int] = []
        self.env.submit(reset, seed, film)

    def submit(self, request: Request, chunk: Chunk) -> None:
        """Request the execution of a chunk's actions."""
        self.episode.accept(request, chunk)
        self.record.observations.append(copy_observation(request.observation))
        self.record.rounds.append(int(chunk.stats.rounds))
        self.record.evaluations.append(int(chunk.stats.evaluations))
        self.submitted = chunk.actions
        self.env.submit(execute, chunk.actions, self.film)

    def receive(self) -> bool:
        """Record the outcome of the last request; True if the episode is over."""
        transitions = self.env.receive()
        for transition in transitions:
            try:
                self.episode.push(transition.observation)
            except ObservationError as error:
                raise EnvFailed(f"the environment does not give the policy's observations: {error}") from error
            if transition.frame is not None:
                self.record.frames.append(transition.frame)
            if self.begun:
                self.record.rewards.append(transition.reward)
                self.record.success = self.record.success or transition.success
        if self.begun:
            self.executed.extend(self.submitted[: len(transitions)])
            self.chunks += [len(self.record.rounds)] * len(transitions)
            self.record.measure(self.executed, self.chunks)
        self.begun = True
        return transitions[-1].over

    def replace(self) -> None:
        """Replace an environment that failed."""
        self.env.close()
        self.env = self.make_handle()


def rollout(
    policy: Policy,
    make_env: Callable[[], gymnasium.Env],
    seeds: Sequence[int],
    noise_seed: int = 0,
    num_envs: int = 20,
    record: Container[int] = (),
    progress: Callable[[int], Any] = lambda steps: None,
    processes: bool = False,
    timeout: float | None = None,
) -> Iterator[EpisodeRecord]:
    """Run one episode per seed with a receding horizon, and yield each as it ends.

    All waiting environments share one ``predict`` call. An episode depends only on its seed and ``noise_seed``, not on
    ``num_envs``. With ``policy.warm_start`` every chunk except an episode's first starts from the previous one.

    Args:
        policy: runs with ``reproducible=True``.
        make_env: builds an environment whose observations fit the policy.
        seeds: of the episodes' initial states.
        noise_seed: of the sampling noise.
        num_envs: number of environments at a time.
        record: seeds whose episodes are filmed.
        progress: called with the number of control steps since the last call; it is negative when an episode restarts.
        processes: run each environment in its own process, all in parallel. If a process dies, its episode restarts
            once in a new process.
        timeout: seconds that an environment may take for the steps of one chunk, or for its start; needs
            ``processes``. None: no limit.

    If an environment fails, its episode ends without success and has an ``error``; the others continue. An environment
    fails if it raises an error, gives numbers that are not finite, takes too long, or dies twice.

    Raises:
        ValueError: ``num_envs`` below 1.
    """
    if num_envs < 1:
        raise ValueError(f"num_envs is {num_envs}, expected at least 1")
    policy = dataclasses.replace(policy, reproducible=True)
    waiting = list(reversed(seeds))
    make_handle = partial(ProcessEnv, make_env, timeout) if processes else partial(LocalEnv, make_env)
    slots = [_Slot(make_handle, policy, noise_seed) for _ in range(min(num_envs, len(seeds)))]
    restarted: set[int] = set()  # seeds
    try:
        for slot in slots:
            slot.begin(seed := waiting.pop(), seed in record)
        active = slots
        while active:
            _predict(policy, [slot for slot in active if slot.begun])
            remaining = []
            for slot in active:
                outcome = slot.record
                before = len(outcome.rewards)
                try:
                    over = slot.receive()
                except EnvFailed as failure:
                    slot.replace()
                    if isinstance(failure, WorkerDied) and outcome.seed not in restarted:
                        restarted.add(outcome.seed)
                        progress(-before)
                        slot.begin(outcome.seed, outcome.seed in record)
                        remaining.append(slot)
                        continue
                    over = True
                    outcome.fail(
                        f"{failure}, twice; the last time" if isinstance(failure, WorkerDied) else str(failure)
                    )
                if taken := len(outcome.rewards) - before:
                    progress(taken)
                if over:
                    yield outcome
                    if not waiting:
                        continue
                    slot.begin(seed := waiting.pop(), seed in record)
                remaining.append(slot)
            active = remaining
    finally:
        for slot in slots:
            slot.env.close()
        slots.clear()
        gc.collect()  # simulators are in reference cycles, and Python does not count their native memory


def _predict(policy: Policy, slots: Sequence[_Slot]) -> None:
    """Compute the next chunk of each slot and have it executed."""
    requests = [slot.episode.request() for slot in slots]
    for members in group_requests(requests):
        chunks = predict_together(policy, [requests[i] for i in members])
        for i, chunk in zip(members, chunks, strict=True):
            slots[i].submit(requests[i], chunk)
