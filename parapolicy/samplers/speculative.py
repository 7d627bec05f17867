"""Speculative sampling: exact draws in fewer rounds, drafted by the policy itself (autospeculation).

De Bortoli et al., "Accelerated Diffusion Models via Speculative Sampling", ICML 2025; Hu et al., "Diffusion Models are
Secretly Exchangeable", ICML 2025.
"""

import dataclasses
import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from parapolicy.samplers.base import DenoiserLike, Sample, Sampler, check_count, root_mean_square
from parapolicy.samplers.window import WindowRounds
from parapolicy.schedule import Schedule

SMALLEST_BLOCK = 16


@dataclass(frozen=True)
class Speculative(Sampler):
    """Drafts a block of states with a constant estimate, evaluates the network at all of them, and keeps each drafted
    state with the probability that makes the kept states exact. The first rejected state is reflected and kept.

    The result follows the sequential sampler's distribution exactly, but is another draw than the sequential one with
    the same noise. It saves rounds only where steps add noise: a noiseless schedule is run step by step. A guess must
    not depend on the noise, so warm starts take fresh noise.

    Attributes:
        window: most states drafted per block; a block after a rejection is shorter.
        calls: network calls per block. 2: the draft uses the estimate at the block's first state, as published. 1: it
            uses the last estimate of the previous block, which depends on the past only and is therefore as exact.
    """

    reuses_noise: ClassVar[bool] = False

    window: int = 40
    calls: int = 1

    def __post_init__(self) -> None:
        check_count("window", self.window)
        if isinstance(self.calls, bool) or self.calls not in (1, 2):
            raise ValueError(f"calls is {self.calls!r}, expected 1 or 2")

    def rounds(self, schedule: Schedule, noise: Tensor, compiled: bool = False) -> "SpeculativeRounds":
        return SpeculativeRounds(self, schedule)


class SpeculativeRounds(WindowRounds):
    """Rounds of :class:`Speculative`.

    Attributes:
        start: (B,) number of verified states; the next draft begins there. The same as ``end``: nothing after it is
            kept.
        block: (B,) most states of each element's next draft.
        leading: whether the next call is the first of a block's two.
    """

    def __init__(self, sampler: Speculative, schedule: Schedule) -> None:
        super().__init__(schedule, sampler.window)
        self.sampler = sampler

    def begin(self, noise: Tensor, guess: Tensor | None) -> None:
        super().begin(noise, guess)
        self.end = self.start
        self.uniform = acceptance_uniforms(noise)  # (B, T)
        self.block, self.rejections = torch.full_like(self.start, self.sampler.window), torch.zeros_like(self.start)
        self.leading = self.sampler.calls == 2

    def advance(self, denoiser: DenoiserLike) -> None:
        x, u, z, schedule = self.x, self.u, self.z, self.schedule
        row = (self.start < self.steps).nonzero()  # (A, 1)
        element = row[:, 0]
        step = self.start[row] + self.offsets  # (A, W)
        valid = (step < self.steps) & (self.offsets < (1 if self.leading else self.block[row]))
        step = step.clamp(max=self.steps - 1)
        self.extrapolate(row, step[:, -1] + 1)
        elements, steps = row.expand_as(step)[valid], step[valid]
        drafted = u[row, step + 1]
        value = drafted.clone()
        value[valid] = denoiser(x[elements, steps], steps, elements)
        self.rounds[element] += 1
        self.evaluations[element] += valid.sum(1)

        # The means of the drafted and the true transition differ by the contributions of their estimates.
        before, still = u[row, step[:, :1]], torch.zeros_like(value)
        increment_p = schedule.increment(drafted, torch.cat((before, drafted[:, :-1]), 1), still, step)
        increment_q = schedule.increment(value, torch.cat((before, value[:, :-1]), 1), still, step)
        spread, used = schedule.S[step][..., None], z[row, step]
        shift = torch.where(spread > 0, (increment_p - increment_q) / spread, 0.0)
        accepted = self.uniform[row, step].log() <= log_acceptance(used, shift)
        accepted &= (spread[..., 0] > 0) | (increment_p == increment_q).all(-1)
        if self.leading:  # one true step; the draft is ignored
            accepted, shift = torch.zeros_like(accepted), torch.zeros_like(shift)
        kept = (accepted & valid).long().cumprod(1).sum(1)  # (A,)
        refused = kept < valid.sum(1)
        last = (kept - 1 + refused.long())[:, None]  # the block's last verified entry
        verified = self.offsets <= last
        u[row.expand_as(step)[verified], step[verified] + 1] = value[verified]
        now = step.gather(1, last)[:, 0]
        at = torch.arange(len(row), device=row.device), last[:, 0]
        corrected = schedule.A[now, None] * x[element, now] + increment_q[at]
        corrected = corrected + spread[at] * reflect(used[at], shift[at])
        x[element, now + 1] = torch.where(refused[:, None], corrected, x[element, now + 1])
        self.start[element] = now + 1
        if not self.leading:
            self.rejections[element] += refused.long()
            grown = torch.where(refused, 2 * kept, 2 * self.block[element])
            self.block[element] = grown.clamp(min(SMALLEST_BLOCK, self.sampler.window), self.sampler.window)
        self.leading = self.sampler.calls == 2 and not self.leading
        self.residual[element] = root_mean_square(u[element, now + 1] - before[:, 0])

    def result(self) -> Sample:
        self.residual[self.start >= self.steps] = 0.0
        return dataclasses.replace(super().result(), rejections=self.rejections)


def element_generators(noise: Tensor) -> Iterator[torch.Generator]:
    """One generator per element of noise (T + 1, B, S), seeded by a digest of the element's noise.

    So a sample stays a function of the sampler's arguments, and an element's numbers do not depend on the batch.
    """
    for element in noise.transpose(0, 1).contiguous().cpu():
        digest = hashlib.sha256(element.numpy().tobytes()).digest()
        yield torch.Generator().manual_seed(int.from_bytes(digest[:8], "little"))


def acceptance_uniforms(noise: Tensor) -> Tensor:
    """One uniform number per step, (B, T), on the noise's device, from noise (T + 1, B, S)."""
    uniforms = [torch.rand(len(noise) - 1, generator=generator) for generator in element_generators(noise)]
    return torch.stack(uniforms).to(noise.device)


def log_acceptance(z: Tensor, shift: Tensor) -> Tensor:
    """log of q/p at the drafted state; z and shift (…, S) -> (…).

    The draft is p = N(m_p, s²) and took m_p + s z; the target is q = N(m_q, s²); shift = (m_p - m_q) / s.
    """
    return -(z * shift + 0.5 * shift**2).sum(-1)


def reflect(z: Tensor, shift: Tensor) -> Tensor:
    """The noise of a rejected state's replacement m_q + s z': z mirrored across the plane between the means."""
    square = shift.square().sum(-1, keepdim=True).clamp(min=1e-30)
    return z - 2 * (z * shift).sum(-1, keepdim=True) / square * shift
