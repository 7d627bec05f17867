"""Speculative draws follow the sequential sampler's distribution, and a wrong rule would show."""

from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats
from torch import Tensor

import parapolicy
from parapolicy.samplers import Sequential, Speculative, speculative
from parapolicy.schedule import Schedule, make_schedule
from tests.helpers import DDPM_CONFIG, run_sampler, small_policy, some_observation

COUNT = 6000
CENTRES = torch.tensor([[-0.8, 0.1], [0.5, 0.6], [0.3, -0.7]])
WEIGHTS = torch.tensor([0.5, 0.3, 0.2])
WIDTH = 0.05
MIRROR = speculative.reflect


def toy_schedule(solver: str = "ddpm", **settings: Any) -> Schedule:
    config = {**DDPM_CONFIG, "num_train_timesteps": 40, "prediction_type": "sample", "clip_sample": False}
    return make_schedule(config, solver, **settings)


def mixture(schedule: Schedule) -> Any:
    """The exact denoiser of a mixture of three Gaussians in the plane, for x (N, 2)."""

    def denoiser(x: Tensor, step: Tensor, element: Tensor) -> Tensor:
        alpha, sigma = schedule.alpha[step][:, None], schedule.sigma[step][:, None]
        variance = alpha**2 * WIDTH**2 + sigma**2  # (N, 1)
        offset = x[:, None] - alpha[..., None] * CENTRES  # (N, 3, 2)
        weight = (WEIGHTS.log() - offset.square().sum(-1) / (2 * variance)).softmax(1)
        each = CENTRES + (alpha * WIDTH**2 / variance)[..., None] * offset
        return (weight[..., None] * each).sum(1)

    return denoiser


def draw(sampler: Any, schedule: Schedule, seed: int, guess: Tensor | None = None) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(len(schedule) + 1, COUNT, 2, generator=generator)
    return run_sampler(sampler, mixture(schedule), schedule, noise, guess=guess).x


def pvalue(one: Tensor, other: Tensor) -> float:
    """The smallest of the two-sample tests along six directions, and of the two clouds' distances from the origin."""
    angles = torch.arange(6) * torch.pi / 6
    features = torch.stack((angles.cos(), angles.sin()))
    pairs = [*zip((one @ features).T, (other @ features).T, strict=True), (one.norm(dim=1), other.norm(dim=1))]
    return min(float(stats.ks_2samp(a.numpy(), b.numpy()).pvalue) for a, b in pairs)


@pytest.mark.parametrize("calls", [1, 2])
@pytest.mark.parametrize(("solver", "settings"), [("ddpm", {}), ("ddim", {"eta": 0.7, "steps": 20})])
def test_draws_are_exact(calls: int, solver: str, settings: dict) -> None:
    schedule = toy_schedule(solver, **settings)
    expected = draw(Sequential(), schedule, seed=1)
    assert pvalue(draw(Sequential(), schedule, seed=2), expected) > 1e-3  # the test itself is fair
    assert pvalue(draw(Speculative(window=20, calls=calls), schedule, seed=3), expected) > 1e-3


def test_the_known_answer_is_met() -> None:
    """Mixture weights and centres of the draws, not only their likeness to the sequential ones."""
    points = draw(Speculative(window=40), toy_schedule(), seed=4)
    nearest = torch.cdist(points, CENTRES).argmin(1)
    share = torch.bincount(nearest, minlength=3) / COUNT
    assert (share - WEIGHTS).abs().max() < 4 * (0.25 / COUNT) ** 0.5 + 0.01  # 40 steps are not the continuum
    for k in range(3):
        cluster = points[nearest == k]
        assert (cluster.mean(0) - CENTRES[k]).abs().max() < 0.01


def test_a_bad_guess_changes_the_cost_and_not_the_draws() -> None:
    schedule = toy_schedule()
    guess = torch.randn(COUNT, len(schedule), 2)
    assert pvalue(draw(Speculative(window=20), schedule, 3, guess), draw(Sequential(), schedule, 1)) > 1e-3


@pytest.mark.parametrize(
    ("function", "wrong"),
    [
        ("reflect", lambda z, shift: z),  # keep the refused noise
        ("reflect", lambda z, shift: z - 0.5 * (z - MIRROR(z, shift))),  # project onto the plane
        ("reflect", lambda z, shift: torch.randn_like(z)),  # a fresh draw instead of the residual distribution's
        ("log_acceptance", lambda z, shift: torch.zeros(z.shape[:-1])),  # accept everything
        ("log_acceptance", lambda z, shift: -(0.5 * shift**2).sum(-1)),
        ("log_acceptance", lambda z, shift: (z * shift - 0.5 * shift**2).sum(-1)),
    ],
)
def test_a_wrong_rule_would_show(monkeypatch: pytest.MonkeyPatch, function: str, wrong: Any) -> None:
    schedule = toy_schedule()
    monkeypatch.setattr(speculative, function, wrong)
    assert pvalue(draw(Speculative(window=20), schedule, seed=3), draw(Sequential(), schedule, seed=1)) < 1e-6


def test_one_step_is_drawn_from_the_target() -> None:
    """Maximal coupling by itself: q's draws from p's, in the plane, with the acceptance rate known in closed form."""
    z, shift = torch.randn(20000, 2), torch.tensor([0.8, -0.5])
    accepted = torch.rand(20000).log() <= speculative.log_acceptance(z, shift.expand_as(z))
    # In units of s around m_q: the draft is z + shift.
    points = torch.where(accepted[:, None], z + shift, speculative.reflect(z, shift.expand_as(z)))
    for values in (*points.T, points @ torch.tensor([0.6, 0.8])):
        assert stats.kstest(values.numpy(), "norm").pvalue > 1e-3
    expected = 2 * stats.norm.cdf(-float(shift.norm()) / 2)
    assert abs(float(accepted.float().mean()) - expected) < 5 * (0.25 / 20000) ** 0.5


@pytest.mark.parametrize("solver", ["ddim", "dpmsolver++"])
def test_without_noise_it_is_sequential(solver: str) -> None:
    schedule = toy_schedule(solver, steps=10)
    torch.testing.assert_close(draw(Speculative(), schedule, 1), draw(Sequential(), schedule, 1), rtol=0, atol=1e-5)


@pytest.mark.parametrize("calls", [1, 2])
def test_costs_are_what_happened_and_elements_are_alone(calls: int) -> None:
    schedule, sampler = toy_schedule(), Speculative(window=12, calls=calls)
    noise = torch.randn(len(schedule) + 1, 5, 2)
    log: list[Tensor] = []

    def counted(x: Tensor, step: Tensor, element: Tensor) -> Tensor:
        log.append(element)
        return mixture(schedule)(x, step, element)

    together = run_sampler(sampler, counted, schedule, noise)
    assert together.rejections is not None
    for b in range(5):
        assert together.rounds[b] == sum(bool((elements == b).any()) for elements in log)
        assert together.evaluations[b] == sum(int((elements == b).sum()) for elements in log)
        alone = run_sampler(sampler, mixture(schedule), schedule, noise[:, b : b + 1])
        assert alone.rejections is not None
        torch.testing.assert_close(alone.x[0], together.x[b])
        assert (alone.rounds[0], alone.rejections[0]) == (together.rounds[b], together.rejections[b])
    assert all(len(elements) <= 12 * 5 for elements in log)


@pytest.mark.parametrize("budget", [0, 1, 3, 1000])
@pytest.mark.parametrize("calls", [1, 2])
def test_stopping_early_keeps_the_verified_part(budget: int, calls: int) -> None:
    schedule, sampler = toy_schedule(), Speculative(window=12, calls=calls)
    noise = torch.randn(len(schedule) + 1, 3, 2)
    asked = iter(range(1, 1001))
    early = run_sampler(sampler, mixture(schedule), schedule, noise, lambda: next(asked) >= budget)
    whole = run_sampler(sampler, mixture(schedule), schedule, noise)
    assert torch.equal(early.rounds, whole.rounds.clamp(max=max(1, budget)))
    assert torch.equal(early.complete, whole.rounds <= max(1, budget))
    assert torch.equal(early.x[early.complete], whole.x[early.complete])
    assert torch.isfinite(early.x).all()


def test_a_policy_reports_its_rejections_and_starts_warm_on_fresh_noise() -> None:
    policy = small_policy("speculative")
    observation = some_observation(policy.spec)
    first = policy.predict(observation, seed=1)
    assert first.stats.rejections >= 0
    warm = policy.predict(observation, seed=2, warm=first.warm_state)
    assert torch.equal(warm.warm_state.noise, parapolicy.draw_noise(policy.schedule, 1, 2))
    assert policy.with_sampler("sequential").predict(observation).stats.rejections is None


@pytest.mark.parametrize("calls", [1, 2])
def test_every_refused_draft_is_a_rejection(calls: int) -> None:
    """The estimate is constant but for its jumps, each inside a block: the draft is right everywhere else."""
    schedule = toy_schedule()
    jumps = torch.stack([torch.arange(40) >= step for step in (10, 25)]).sum(0)  # so far, per step

    def denoiser(x: Tensor, step: Tensor, element: Tensor) -> Tensor:
        height = 1000.0 * torch.minimum(jumps[step], element)  # element b takes the first b jumps
        return height.view(-1, *[1] * (x.ndim - 1)).expand_as(x)

    sample = run_sampler(Speculative(window=40, calls=calls), denoiser, schedule, torch.randn(41, 3, 2))
    assert sample.rejections is not None
    assert sample.rejections.tolist() == [0, 1, 2]
    assert (sample.rounds > sample.rejections).all()  # more blocks than rejections


def test_on_the_shipped_policy_rounds_are_saved(shipped: parapolicy.Policy) -> None:
    policy = shipped.with_sampler("speculative")
    rng = np.random.default_rng(0)
    shapes = [(key, feature.shape) for key, feature in policy.spec.observation.items()]
    observation = {key: rng.uniform(150, 350, (4, 2, *shape)).astype(np.float32) for key, shape in shapes}
    chunk = policy.predict(observation)
    assert chunk.stats.rounds.max() < len(policy.schedule) / 3
    assert np.isfinite(chunk.actions).all()
