import numpy as np
import pytest
import torch

import parapolicy
from tests.helpers import DDPM_CONFIG, small_policy

make = parapolicy.schedule.make_schedule


def test_an_element_draws_the_same_whatever_the_batch() -> None:
    schedule = small_policy().schedule
    one, four = (parapolicy.draw_noise(schedule, batch, seed=3) for batch in (1, 4))
    assert one.shape == (21, 1, 8, 2)
    assert one.dtype == torch.float32
    assert torch.equal(one[:, 0], four[:, 0])
    assert not torch.equal(four[:, 0], four[:, 1])
    assert torch.equal(parapolicy.draw_noise(schedule), parapolicy.draw_noise(schedule, 1, seed=0))


def test_a_seed_per_element_is_each_seed_alone() -> None:
    schedule = small_policy().schedule
    together = parapolicy.draw_noise(schedule, seed=[7, 5, 2**62])
    for b, seed in enumerate([7, 5, 2**62]):
        assert torch.equal(together[:, b], parapolicy.draw_noise(schedule, 1, seed)[:, 0])


def test_the_first_state_does_not_depend_on_the_number_of_steps() -> None:
    policy = small_policy()
    few = policy.with_schedule("ddim", 5)
    assert torch.equal(parapolicy.draw_noise(policy.schedule)[0], parapolicy.draw_noise(few.schedule)[0])


def test_it_is_standard_normal() -> None:
    noise = parapolicy.draw_noise(make(DDPM_CONFIG), batch=50, seed=1, sample_shape=(16, 2)).flatten().double()
    assert abs(float(noise.mean())) < 5 / noise.numel() ** 0.5
    assert abs(float(noise.var()) - 1) < 5 * (2 / noise.numel()) ** 0.5


def test_states_steps_and_elements_are_independent() -> None:
    """No two of x_T and the z_j of four elements are correlated: a number used twice would stand out."""
    noise = parapolicy.draw_noise(small_policy().schedule, batch=4, seed=2, sample_shape=(64, 16))
    correlation = np.corrcoef(noise.flatten(0, 1).flatten(1).double().numpy())  # (21 * 4, 21 * 4)
    off = correlation[np.triu_indices(len(correlation), 1)] * 1024**0.5
    assert abs(off).max() < 6


def test_missing_shape_and_negative_seed_are_named() -> None:
    with pytest.raises(ValueError, match="sample_shape"):
        parapolicy.draw_noise(make(DDPM_CONFIG))
    with pytest.raises(ValueError, match="seed is -1"):
        parapolicy.draw_noise(small_policy().schedule, seed=-1)
