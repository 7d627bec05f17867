"""The secant sampler's stopping rule: by the error of the final sample, and hard to fool."""

import dataclasses
import math
import time
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import parapolicy
from parapolicy.evaluate.measure.chunk_error import measure_errors
from parapolicy.evaluate.run.results import summarize_errors
from parapolicy.samplers import Secant, SemiImplicit, Sequential
from parapolicy.samplers.secant import SecantRounds
from parapolicy.samplers.secant_model import eliminate
from parapolicy.schedule import Schedule, make_schedule
from tests.helpers import DDPM_CONFIG, Waits, run_sampler, small_policy, some_observation

COUNT = 200


def twelve_modes(schedule: Schedule, width: float = 0.05) -> Any:
    """The exact denoiser of twelve straight paths (H = 16) from the origin, one per hour of a clock."""
    angle = torch.arange(12) * math.pi / 6
    directions = torch.stack((angle.cos(), angle.sin()), 1)  # (12, 2)
    centres = (0.9 * torch.linspace(0, 1, 16)[None, :, None] * directions[:, None]).flatten(1)  # (12, 32)

    def denoiser(x: Tensor, step: Tensor, element: Tensor) -> Tensor:
        alpha, sigma = schedule.alpha[step][:, None], schedule.sigma[step][:, None]
        variance = alpha**2 * width**2 + sigma**2
        # Of |x - alpha * centre|², the part that is the same for all centres does not change the weights.
        weight = (alpha * (2 * x @ centres.T - alpha * centres.square().sum(1)) / (2 * variance)).softmax(1)
        gain = alpha * width**2 / variance
        return (1 - alpha * gain) * (weight @ centres) + gain * x

    return denoiser


@pytest.mark.parametrize("start", ["cold", "wrong mode"])
def test_it_is_not_fooled_between_modes(start: str) -> None:
    """Where a plain rule ends in the wrong mode for every tenth sample, this one does for at most one in a hundred."""
    schedule = make_schedule({**DDPM_CONFIG, "num_train_timesteps": 100, "prediction_type": "sample"}, "ddpm")
    denoiser = twelve_modes(schedule)
    noise = torch.randn(101, COUNT, 32)
    expected = run_sampler(Sequential(), denoiser, schedule, noise)
    guess = None if start == "cold" else expected.u.roll(1, 0)

    def wrong(sampler: Any) -> int:
        sample = run_sampler(sampler, denoiser, schedule, noise, guess=guess)
        return int(((sample.x - expected.x).abs().amax(1) > 0.1).sum())

    assert wrong(SemiImplicit(window=20, tolerance=0.1)) > 0.05 * COUNT  # the problem is a hard one
    assert wrong(Secant(window=40)) < 0.03 * COUNT
    assert wrong(Secant(window=40, tolerance=0.003)) <= 0.01 * COUNT
    assert wrong(Secant(window=40, tolerance=0.0)) == 0


def observations(policy: parapolicy.Policy, batch: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    shapes = [(key, feature.shape) for key, feature in policy.spec.observation.items()]
    return {key: rng.uniform(150, 350, (batch, 2, *shape)).astype(np.float32) for key, shape in shapes}


@pytest.mark.parametrize("tolerance", [0.001, 0.01, 0.05])
def test_the_error_asked_for_is_the_error_obtained(shipped: parapolicy.Policy, tolerance: float) -> None:
    policy = shipped.with_sampler("secant", tolerance=tolerance)
    chunk = policy.predict(observations(policy, 12))
    exact = shipped.with_sampler("sequential").predict(observations(policy, 12))
    assert (chunk.stats.error <= tolerance).all()
    scale = policy.normalizer.maps["action"].scale.numpy()
    error = np.abs((chunk.trajectory - exact.trajectory) * scale).max((1, 2))
    assert np.median(error) <= tolerance
    assert error.max() <= 10 * tolerance


def test_nothing_is_known_before_the_last_step_is_reached(shipped: parapolicy.Policy) -> None:
    policy = shipped.with_sampler("secant")
    early = policy.predict(observations(policy, 2), deadline=time.monotonic())
    assert np.isinf(early.stats.error).all()
    assert not early.stats.complete.any()
    assert policy.with_sampler("semi_implicit").predict(observations(policy, 2)).stats.error is None


def test_errors_are_measured_along_episodes() -> None:
    """The exact sampler has none, cold or warm; a loose one has; repeats of an episode take other noise."""
    policy = small_policy().with_sampler("secant", tolerance=0.0)
    loose = policy.with_sampler("paradigms", tolerance=30.0)
    warm = dataclasses.replace(policy, warm_start=True)
    episodes = [
        [some_observation(policy.spec, seed=10 * i + j) for j in range(length)] for i, length in ((0, 3), (1, 2))
    ]
    counted: list[int] = []
    results = measure_errors({"exact": policy, "loose": loose, "warm": warm}, episodes, 5, progress=counted.append)
    assert [len(row.errors) for row in results.values()] == [6, 6, 6]  # 2 + 1 chunks per repeat, first ones left out
    assert sum(counted) == 18
    assert max(results["exact"].errors) < 1e-4
    assert max(results["warm"].errors) < 1e-4
    assert min(results["loose"].errors) > 1e-3
    assert len(set(results["loose"].errors)) >= 5  # two may sit on the bounds
    summary = summarize_errors(results["loose"], tolerance=1e-4)
    assert summary["exceeding_10_tolerances"] == 6
    assert summary["action_error"]["max"] > summary["error"]["max"]
    with pytest.raises(ValueError, match="two chunks"):
        measure_errors({"exact": policy}, [episodes[0][:1]], 5)


@pytest.mark.parametrize("solver", ["ddpm", "ddim", "dpmsolver++"])
@pytest.mark.parametrize("window", [6, 40])
def test_a_round_of_fixed_shape_waits_for_nothing(solver: str, window: int) -> None:
    """Rounds as a CUDA graph captures them: on the same memory, chunk after chunk, no value looked at."""
    schedule = make_schedule({**DDPM_CONFIG, "num_train_timesteps": 20, "prediction_type": "sample"}, solver)
    denoiser, sampler = twelve_modes(schedule), Secant(window)
    kept = SecantRounds(sampler, schedule, torch.zeros(21, 3, 32))
    kept.sparse = False
    guess = None
    for seed in range(3):
        noise = torch.randn(21, 3, 32, generator=torch.Generator().manual_seed(seed))
        expected = run_sampler(sampler, denoiser, schedule, noise, guess=guess)
        kept.begin(noise, guess)
        while not kept.done:
            with Waits():
                kept.advance(denoiser)
        found = kept.result()
        for name in ("x", "u", "error", "residual"):
            torch.testing.assert_close(getattr(found, name), getattr(expected, name), rtol=1e-3, atol=1e-4)
        assert found.rounds.tolist() == expected.rounds.tolist()
        assert found.evaluations.tolist() == expected.evaluations.tolist()
        guess = expected.u.roll(1, 2)


def test_elimination_solves_and_waits_for_nothing() -> None:
    factor = torch.randn(2, 5, 9, 12)
    matrix, right = factor @ factor.mT + torch.eye(9), torch.randn(2, 5, 9, 32)
    with Waits():
        found = eliminate(matrix, right)
    torch.testing.assert_close(found, torch.linalg.solve(matrix, right), rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(matrix @ found, right, rtol=1e-3, atol=1e-3)


def test_waiting_is_seen() -> None:
    values = torch.arange(3)
    for wait in (lambda: values[values > 1], lambda: values.sum().item(), lambda: bool(values[0])):
        with pytest.raises(AssertionError, match="waits for a value"), Waits():
            wait()
