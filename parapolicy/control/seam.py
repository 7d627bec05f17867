"""The seam between two chunks: how the actions of one follow those of the previous one."""

import math
from collections import deque
from dataclasses import dataclass

import numpy as np

from parapolicy.control.latency import ChunkRecord
from parapolicy.episode import Request
from parapolicy.policy import Chunk
from parapolicy.spec import PolicySpec

SEAMS = ("none", "hold", "hold_soft", "blend", "ensemble")
HOLDS = ("hold", "hold_soft")
DECAY = 0.01  # per chunk, of the weights of temporal ensembling, as published


@dataclass
class Execution:
    """A chunk and the control steps at which it is executed."""

    record: ChunkRecord
    request: Request
    chunk: Chunk
    actions: np.ndarray  # (n, Da), the first for the control step ``record.begin``
    taken_at: int = -1  # the control step at which it replaced the previous chunk

    @property
    def end(self) -> int:
        """The control step after its last action."""
        return self.record.begin + len(self.actions)

    def action(self, step: int) -> np.ndarray:
        """The action for a control step; beyond the end, the last action."""
        return self.actions[min(step - self.record.begin, len(self.actions) - 1)]


class Seam:
    """Makes actions from the newest chunk and, depending on the kind, the overlapping previous ones.

    * ``none``: a new chunk's actions replace the old one's.
    * ``hold``: the same, but the new chunk was sampled with the actions held that the old chunk executes meanwhile.
    * ``hold_soft``: as ``hold``, and also drawn towards the rest of the old chunk, less and less with time.
    * ``blend``: the old actions fade into the new ones over the control steps where the two chunks overlap.
    * ``ensemble``: the mean of all chunks' actions for a control step, weighted exp(-0.01 i) with i = 0 for the oldest
      (temporal ensembling of ACT; Zhao et al., RSS 2023).

    Args:
        kind: one of these.
        spec: the policy's.
        asynchronous: the robot executes the old chunk while a new one is computed.
        blend_steps: for ``blend``: fade over this many control steps, even if the old chunk ends earlier; 0: over the
            overlap.

    Raises:
        ValueError: an unknown kind, or one that has no effect in this control loop.
    """

    def __init__(self, kind: str, spec: PolicySpec, asynchronous: bool, blend_steps: int = 0) -> None:
        if kind not in SEAMS:
            raise ValueError(f"seam is {kind!r}, expected one of {SEAMS}")
        if blend_steps < 0:
            raise ValueError(f"blend_steps is {blend_steps}, expected at least 0")
        if blend_steps and kind not in ("none", "blend"):
            raise ValueError(f"blend_steps is {blend_steps}, which seam {kind!r} does not use; take seam='blend'")
        if kind == "hold" and not asynchronous:
            raise ValueError(
                "seam is 'hold', which holds the actions executed while a chunk is computed, but a synchronous robot "
                "waits; take asynchronous control, or seam 'hold_soft'"
            )
        shared = spec.horizon - spec.executed.stop
        if shared == 0 and kind in ("hold_soft", "blend", "ensemble") and not blend_steps:
            raise ValueError(
                f"seam is {kind!r}, which needs overlapping chunks, but the policy executes all {spec.n_action_steps} "
                "actions of a chunk before the next; set fewer n_action_steps in its spec"
            )
        self.kind = "blend" if blend_steps else kind
        self.blend_steps = blend_steps
        self._plans: deque[Execution] = deque()  # oldest first

    @property
    def holds(self) -> bool:
        """Whether chunks are sampled with actions of the previous chunk held."""
        return self.kind in HOLDS

    @property
    def soft(self) -> bool:
        return self.kind == "hold_soft"

    def take(self, plan: Execution) -> None:
        """Execute ``plan`` from ``plan.taken_at`` on."""
        if self.kind not in ("blend", "ensemble"):
            self._plans.clear()
        self._plans.append(plan)

    def action(self, step: int) -> np.ndarray:
        """The action of a control step, (Da,); at least one chunk was taken."""
        newest = self._plans[-1]
        if self.kind == "ensemble":
            while self._plans[0] is not newest and self._plans[0].end <= step:
                self._plans.popleft()
            weights = np.exp(-DECAY * np.arange(len(self._plans)))
            mean = np.average([plan.action(step) for plan in self._plans], axis=0, weights=weights)
            return mean.astype(newest.actions.dtype)
        for number in range(len(self._plans) - 1, 0, -1):  # chunks before one with share 1 no longer count
            if self._share(number, step) >= 1:
                for _ in range(number):
                    self._plans.popleft()
                break
        action = self._plans[0].action(step).copy()
        for number in range(1, len(self._plans)):
            share = self._share(number, step)
            action = (share * self._plans[number].action(step) + (1 - share) * action).astype(action.dtype)
        return action

    def _share(self, number: int, step: int) -> float:
        """A chunk's share of the action. It rises to 1 from a value above 0 at the step where the chunk was taken."""
        plan = self._plans[number]
        steps = self.blend_steps or max(0, self._plans[number - 1].end - plan.taken_at)
        return (step - plan.taken_at + 1) / (steps + 1)


def steps_of(seconds: float, control_hz: float, rounding: float) -> int:
    """Number of control steps that begin within ``seconds`` from the beginning of one, including that one."""
    return math.ceil(seconds * control_hz * (1 - rounding))
