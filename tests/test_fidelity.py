from math import erf, exp, pi, sqrt

import numpy as np
import pytest

from parapolicy.evaluate.measure.fidelity import (
    draw_reference,
    energy_distance,
    measure_fidelity,
    paired_energy_distance,
)
from parapolicy.evaluate.run.variants import build_variants
from tests.helpers import small_policy, some_observation


def test_energy_distance_of_known_laws() -> None:
    """Unbiased around 0 for equal laws; for N(0, 1) and N(mu, 1) in one dimension the value is known in closed form."""
    rng = np.random.default_rng(0)
    same = [energy_distance(*rng.standard_normal((2, 100, 3))) for _ in range(200)]
    assert abs(np.mean(same)) < 4 * np.std(same) / 200**0.5
    shift = 1.5
    values = [energy_distance(rng.standard_normal((300, 1)), rng.standard_normal((300, 1)) + shift) for _ in range(50)]

    # E|N(m, 2)| = 2 / sqrt(pi) exp(-m^2 / 4) + m erf(m / 2)
    def mean_abs(m: float) -> float:
        return 2 / sqrt(pi) * exp(-(m**2) / 4) + m * erf(m / 2)

    expected = 2 * mean_abs(shift) - 2 * mean_abs(0)
    assert np.mean(values) == pytest.approx(expected, abs=4 * np.std(values) / 50**0.5)


def test_an_exact_sampler_is_as_near_as_resampling_and_a_wrong_one_is_not() -> None:
    policy = small_policy()
    variants = build_variants(
        policy,
        [
            {"name": "semi_implicit", "tolerance": 0.0, "label": "exact"},
            {"name": "sequential", "solver": "ddim", "steps": 2, "label": "short"},
        ],
    )
    observations = [some_observation(policy.spec, seed=i) for i in range(3)]
    sets: list[int] = []
    reference = draw_reference(policy, observations, 200, sets.append)
    exact, short = (
        measure_fidelity(variants[label].policy, reference, observations, progress=sets.append)
        for label in ("exact", "short")
    )
    assert len(reference.resampling) == 3
    assert sum(sets) == 3 * 4
    chance = max(map(abs, reference.resampling + exact[0]))
    assert chance < 0.05 * reference.spread
    assert min(short[0]) > 3 * chance
    assert max(map(abs, exact[1])) < 1e-4  # the same noise
    np.testing.assert_allclose(short[1], short[0], atol=3 * chance)


def test_a_warm_policy_starts_from_a_chunk_at_the_observation_before() -> None:
    policy = small_policy()
    warm = build_variants(policy, [{"name": "restart", "last": 1, "warm": True, "label": "rti"}])["rti"].policy
    here, before = (some_observation(policy.spec, seed=seed) for seed in (0, 1))
    reference = draw_reference(policy, [here], 50)
    paired = [measure_fidelity(warm, reference, [here], previous)[1][0] for previous in ([here], [before], None)]
    assert min(paired[:2]) > 0.05
    assert paired[0] != paired[1]
    assert abs(paired[2]) < 1e-4  # cold, it is sequential


def test_the_paired_estimate_is_zero_for_equal_sets_and_sees_a_shift() -> None:
    rng = np.random.default_rng(0)
    a = rng.normal(size=(60, 4))
    assert abs(paired_energy_distance(a, a)) < 1e-12
    independent = [energy_distance(rng.normal(size=(60, 4)), rng.normal(size=(60, 4))) for _ in range(10)]
    paired = [paired_energy_distance(a, a + 0.01 * rng.normal(size=a.shape)) for _ in range(10)]
    assert np.abs(paired).max() < 0.1 * np.std(independent)
    shifted = paired_energy_distance(a, a + 1.0)
    assert shifted == pytest.approx(energy_distance(a, a + 1.0), rel=0.2)
