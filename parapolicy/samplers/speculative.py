"""Speculative sampling: exact draws in fewer rounds, drafted by the policy itself (autospeculation).

De Bortoli et al., "Accelerated Diffusion Models via Speculative Sampling", ICML 2025; Hu et al., "Diffusion Models are
Secretly Exchangeable", ICML 2025.
"""

import dataclasses
import hashlib
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from parapolicy.samplers.base import DenoiserLike, Sample, never, root_mean_square
from parapolicy.samplers.window import SlidingWindows, check_window
from parapolicy.schedule import Schedule

SMALLEST_BLOCK = 16


@dataclass(frozen=True)
class Speculative:
    """Drafts a block of states with the estimate held, evaluates the network at all of them, and keeps each drafted
    state with the probability that makes the kept ones exact; the first refused one is reflected and kept too.

    The result follows the sequential sampler's distribution exactly, but is another draw than the sequential one with
    the same noise. It can only win where steps add noise: a noiseless schedule is run step by step. A guess must not
    depend on the noise, so warm starts take fresh noise.

    Attributes:
        window: most states drafted per block; a block after a rejection is shorter.
        calls: network calls per block. 2: the block's draft holds the estimate at its own first state, as published.
            1: it holds the last estimate of the block before, which depends on the past only and so is as exact.
    """

    window: int = 40
    calls: int = 1

    def __post_init__(self) -> None:
        check_window(self.window, 0.0)
        if self.calls not in (1, 2):
            raise ValueError(f"calls is {self.calls!r}, expected 1 or 2")

    def sample(
        self,
        denoiser: DenoiserLike,
        schedule: Schedule,
        noise: Tensor,
        stop: Callable[[], bool] = never,
        guess: Tensor | None = None,
    ) -> Sample:
        windows = SlidingWindows(schedule, noise, self.window, guess)
        x, u, z, steps = windows.x, windows.u, windows.z, windows.steps
        position = windows.end  # (B,) verified states; a draft begins there
        uniform = acceptance_uniforms(noise)  # (B, T)
        block, rejections = torch.full_like(position, self.window), torch.zeros_like(position)
        leading = False  # whether the next call is the published form's first one

        while len(row := (position < steps).nonzero()):
            element = row[:, 0]
            leading = self.calls == 2 and not leading
            step = position[row] + windows.offsets  # (A, W)
            valid = (step < steps) & (windows.offsets < (1 if leading else block[row]))
            step = step.clamp(max=steps - 1)
            windows.extrapolate(row, step[:, -1] + 1)
            drafted = u[row, step + 1]
            value = drafted.clone()
            value[valid] = denoiser(x[row, step][valid], step[valid], row.expand_as(step)[valid])
            windows.rounds[element] += 1
            windows.evaluations[element] += valid.sum(1)

            # Means of the drafted and of the true transition differ by what their estimates contribute.
            before, still = u[row, step[:, :1]], torch.zeros_like(value)
            drive_p = schedule.drive(drafted, torch.cat((before, drafted[:, :-1]), 1), still, step)
            drive_q = schedule.drive(value, torch.cat((before, value[:, :-1]), 1), still, step)
            spread, used = schedule.S[step][..., None, None], z[row, step]
            shift = torch.where(spread > 0, (drive_p - drive_q) / spread, 0.0)
            accepted = uniform[row, step].log() <= log_acceptance(used, shift)
            accepted &= (spread[..., 0, 0] > 0) | (drive_p == drive_q).all(-1).all(-1)
            if leading:  # one true step, whatever the draft
                accepted, shift = torch.zeros_like(accepted), torch.zeros_like(shift)
            kept = (accepted & valid).long().cumprod(1).sum(1)  # (A,)
            refused = kept < valid.sum(1)
            last = (kept - 1 + refused.long())[:, None]  # the block's last verified entry
            verified = windows.offsets <= last
            u[row.expand_as(step)[verified], step[verified] + 1] = value[verified]
            now = step.gather(1, last)[:, 0]
            at = torch.arange(len(row), device=row.device), last[:, 0]
            state = x[element, now]
            corrected = schedule.A[now, None, None] * state + drive_q[at] + spread[at] * reflect(used[at], shift[at])
            x[element, now + 1] = torch.where(refused[:, None, None], corrected, x[element, now + 1])
            position[element] = now + 1
            if not leading:
                rejections[element] += refused.long()
                grown = torch.where(refused, 2 * kept, 2 * block[element])
                block[element] = grown.clamp(min(SMALLEST_BLOCK, self.window), self.window)
            windows.residual[element] = root_mean_square(u[element, now + 1] - before[:, 0])
            if stop():
                break
        windows.start.copy_(position)
        windows.residual[position >= steps] = 0.0
        return dataclasses.replace(windows.result(), rejections=rejections)


def acceptance_uniforms(noise: Tensor) -> Tensor:
    """One uniform number per step, (B, T), on the noise's device, from noise (T + 1, B, H, D).

    Seeded by a digest of each element's noise: the sampler stays a function of its arguments, and an element's numbers
    do not depend on the batch.
    """
    rows = []
    for element in noise.transpose(0, 1).contiguous().cpu():
        digest = hashlib.sha256(element.numpy().tobytes()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little"))
        rows.append(torch.rand(len(element) - 1, generator=generator))
    return torch.stack(rows).to(noise.device)


def log_acceptance(z: Tensor, shift: Tensor) -> Tensor:
    """log of q/p at the drafted state; z and shift (…, H, D) -> (…).

    The draft is p = N(m_p, s²) and took m_p + s z; the target is q = N(m_q, s²); shift = (m_p - m_q) / s.
    """
    return -(z * shift + 0.5 * shift**2).sum((-2, -1))


def reflect(z: Tensor, shift: Tensor) -> Tensor:
    """The noise with which a refused state is made anew from m_q: z mirrored across the plane between the means."""
    square = shift.square().sum((-2, -1), keepdim=True).clamp(min=1e-30)
    return z - 2 * (z * shift).sum((-2, -1), keepdim=True) / square * shift
