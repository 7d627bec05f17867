"""All the randomness of a chunk, drawn before sampling starts."""

from collections.abc import Sequence
from operator import index

import numpy as np
import torch
from torch import Tensor

from parapolicy.schedule import Schedule


def mix_seeds(*seeds: int) -> int:
    """One 63-bit seed from several; different tuples give unrelated seeds."""
    return int(np.random.SeedSequence(seeds).generate_state(1, np.uint64)[0]) >> 1


def draw_noise(
    schedule: Schedule,
    batch: int = 1,
    seed: int | Sequence[int] = 0,
    sample_shape: tuple[int, ...] | None = None,
) -> Tensor:
    """Standard normal noise for a batch of chunks, (T + 1, B, H, Da), float32, on the CPU.

    [0] is x_T and [j + 1] is z_j. Each element has its own generator, so its numbers depend neither on the batch size
    nor on the device. x_T does not depend on the number of steps.

    Args:
        schedule: gives T, and (H, Da) if it belongs to a policy.
        batch: number of elements B; ignored if ``seed`` is a sequence.
        seed: one seed for the batch (element b draws from (seed, b)), or one per element (element b draws the noise
            that ``seed=seeds[b]`` gives for a batch of one).
        sample_shape: (H, Da), or the shape of any other sample, for a schedule without a policy.

    Raises:
        ValueError: no shape is known, or a seed is negative or no whole number.
    """
    shape = sample_shape or schedule.sample_shape
    if shape is None:
        raise ValueError("the schedule belongs to no policy; give sample_shape=(horizon, action_dim)")
    try:
        if isinstance(seed, int | np.integer):
            entropies = [(int(seed), b) for b in range(batch)]
        else:
            entropies = [(index(s), 0) for s in seed]
    except TypeError as error:
        raise ValueError(f"seed is {seed!r}, expected a whole number, or one per element of the batch") from error
    if any(entropy[0] < 0 for entropy in entropies):
        raise ValueError(f"seed is {seed}, expected at least 0")
    noise = torch.empty(len(schedule) + 1, len(entropies), *shape)
    for b, entropy in enumerate(entropies):
        generator = torch.Generator().manual_seed(mix_seeds(*entropy))
        noise[0, b] = torch.randn(shape, generator=generator)
        noise[1:, b] = torch.randn((len(schedule), *shape), generator=generator)
    return noise
