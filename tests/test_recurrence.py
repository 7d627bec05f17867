"""A schedule as a linear recurrence: states of any shape, transitions, and the propagators that unroll it."""

from typing import Any

import pytest
import torch

from parapolicy.schedule import Schedule, make_schedule
from tests.helpers import DDPM_CONFIG, FLOW_CONFIG


def random_terms(schedule: Schedule, *shape: int) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(0)
    step = torch.randint(len(schedule), shape, generator=generator)
    return (step, *torch.randn(4, *shape, 5, generator=generator))


SOLVER_CASES = [
    ("ddpm", DDPM_CONFIG, {}),
    ("ddim", DDPM_CONFIG, {"eta": 0.5}),
    ("dpmsolver++", DDPM_CONFIG, {}),
    ("sde-dpmsolver++", DDPM_CONFIG, {}),
    ("flow", FLOW_CONFIG, {"order": 2}),
]


@pytest.mark.parametrize(("solver", "config", "settings"), SOLVER_CASES)
def test_states_of_any_leading_shape_take_the_same_steps(
    solver: str, config: dict[str, Any], settings: dict[str, Any]
) -> None:
    schedule = make_schedule(config, solver, steps=12, **settings)
    step, x, u, previous, z = random_terms(schedule, 2, 3)
    together = schedule.step(x, schedule.estimate(u, x, step), previous, z, step)
    for a in range(2):
        for w in range(3):
            j = step[a, w]
            alone = schedule.estimate(u[a, w], x[a, w], j)
            assert torch.equal(schedule.step(x[a, w], alone, previous[a, w], z[a, w], j), together[a, w])


@pytest.mark.parametrize(("solver", "config", "settings"), SOLVER_CASES)
def test_transitions_are_steps_to_the_bit(solver: str, config: dict[str, Any], settings: dict[str, Any]) -> None:
    schedule = make_schedule(config, solver, steps=12, **settings)
    step, x, u, previous, z = random_terms(schedule, 2, 3)
    move = schedule.transitions(step, z)
    for k in range(3):
        expected = schedule.step(x[:, k], u[:, k], previous[:, k], z[:, k], step[:, k])
        assert torch.equal(move(k, x[:, k], u[:, k], previous[:, k]), expected)


@pytest.mark.parametrize(("solver", "config", "settings"), SOLVER_CASES)
def test_propagators_unroll_the_recurrence(solver: str, config: dict[str, Any], settings: dict[str, Any]) -> None:
    schedule = make_schedule(config, solver, steps=12, **settings)
    estimates, noise = torch.randn(2, 12, 5, generator=torch.Generator().manual_seed(0))
    x, states = torch.zeros(5), []
    for j in range(12):
        previous = estimates[j - 1] if j else torch.zeros(5)
        x = schedule.step(x, estimates[j], previous, noise[j], torch.tensor(j))
        states.append(x)
    of_increment, of_estimate = schedule.propagators
    unrolled = of_increment @ (schedule.S[:, None] * noise) + of_estimate @ estimates
    torch.testing.assert_close(unrolled, torch.stack(states), rtol=1e-4, atol=1e-4)


def test_a_moved_schedule_takes_the_same_steps() -> None:
    schedule = make_schedule(DDPM_CONFIG, "dpmsolver++", steps=12, sample_shape=(2, 3, 4))
    moved = schedule.to("cpu")
    step, x, u, previous, z = random_terms(schedule, 4)
    assert torch.equal(moved.step(x, u, previous, z, step), schedule.step(x, u, previous, z, step))
    assert moved.sample_shape == (2, 3, 4)
