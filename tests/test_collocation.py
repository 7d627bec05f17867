"""Collocation: exact where every step is a node, near the sequential chunk with few, and calibrated by the policy."""

import dataclasses
import itertools
import warnings
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import parapolicy
from parapolicy.calibrate import calibrate
from parapolicy.episode import Request
from parapolicy.launch import start_workers
from parapolicy.observation import stack_observations
from parapolicy.planner import made_up_observations
from parapolicy.policy import Chunk
from parapolicy.samplers import Collocation, Sequential, make_sampler
from parapolicy.samplers.collocation import default_nodes, log_snr, make_tables
from parapolicy.schedule import Calibration, Schedule, make_schedule
from parapolicy.serve.server import PolicyServer
from parapolicy.serve.settings import ServeConfig
from tests.conftest import SHIPPED
from tests.helpers import DDPM_CONFIG, Waits, flat_noise, run_sampler, some_observation
from tests.serving import infer, running, served_policy

SCHEDULE = make_schedule(DDPM_CONFIG)


def responding(schedule: Schedule, gain: Tensor) -> Any:
    """u at a state of a linear Gaussian world: the posterior mean, where the data have the variances ``gain`` (S,)."""

    def denoise(x: Tensor, step: Tensor, element: Tensor) -> Tensor:
        alpha, sigma = schedule.alpha[step][:, None], schedule.sigma[step][:, None]
        return alpha * gain * x / (alpha**2 * gain + sigma**2)

    return denoise


@pytest.fixture(scope="module")
def calibrated(shipped: parapolicy.Policy) -> parapolicy.Policy:
    found = calibrate(shipped, chunks=30)
    return dataclasses.replace(shipped, schedule=dataclasses.replace(shipped.schedule, calibration=found))


@pytest.mark.parametrize("window", [1, 4, 100])
@pytest.mark.parametrize("solver", ["ddpm", "ddim", "dpmsolver++", "sde-dpmsolver++"])
def test_with_every_step_a_node_it_is_sequential(window: int, solver: str) -> None:
    schedule = make_schedule(DDPM_CONFIG, solver, 30)
    denoise = responding(schedule, torch.tensor([0.04, 0.3, 1.0]))
    noise = flat_noise(schedule, 2, seed=1, shape=(3,))
    expected = run_sampler(Sequential(), denoise, schedule, noise)
    sample = run_sampler(Collocation(30, window, 1e-6), denoise, schedule, noise)
    torch.testing.assert_close(sample.x, expected.x, rtol=0, atol=2e-6)
    torch.testing.assert_close(sample.u, expected.u, rtol=0, atol=2e-5)
    assert sample.complete.all()


def test_a_schedule_that_has_lost_its_calibration_is_warned_of() -> None:
    policy = parapolicy.load_policy(SHIPPED, engine="eager")
    assert isinstance(policy.sampler, Collocation)
    observation = some_observation(policy.spec)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        policy.predict(observation)
        policy.with_schedule("ddim", steps=10).predict(observation)  # every step is a node
    with pytest.warns(UserWarning, match="24 of 50 steps of a schedule without a calibration"):
        policy.with_schedule(steps=50).predict(observation)


def test_few_nodes_come_near_and_a_known_response_nearer() -> None:
    variances = torch.tensor([0.02, 0.05, 0.1, 0.2])
    turn = torch.linalg.qr(torch.randn(4, 4, generator=torch.Generator().manual_seed(0))).Q
    plain = responding(SCHEDULE, variances)

    def denoise(x: Tensor, step: Tensor, element: Tensor) -> Tensor:
        return plain(x @ turn, step, element) @ turn.T

    alpha, sigma = SCHEDULE.alpha[:, None], SCHEDULE.sigma[:, None]
    response = alpha**2 * variances / (alpha**2 * variances + sigma**2)  # of u to x / alpha
    known = dataclasses.replace(SCHEDULE, calibration=Calibration(turn, response.clamp(max=0.999), {}))
    noise = flat_noise(SCHEDULE, 16, seed=2, shape=(4,))
    expected = run_sampler(Sequential(), denoise, SCHEDULE, noise).x
    errors = [
        float((run_sampler(Collocation(12, 2, 0.05), denoise, schedule, noise).x - expected).abs().max())
        for schedule in (SCHEDULE, known)
    ]
    assert errors[0] < 0.3
    assert errors[1] < 0.05 * errors[0]  # a linear world leaves nothing to interpolate


def test_a_round_asks_a_window_of_nodes_and_a_settled_node_is_left_alone() -> None:
    denoise, asked = responding(SCHEDULE, torch.tensor([0.1])), []

    def watched(x: Tensor, step: Tensor, element: Tensor) -> Tensor:
        asked.append(step.tolist())
        return denoise(x, step, element)

    nodes = (20, 60, 80, 90, 99)
    sample = run_sampler(Collocation(nodes, 2, 50.0), watched, SCHEDULE, flat_noise(SCHEDULE, 1, shape=(1,)))
    assert asked == [[20, 60], [80, 90], [99]]  # nothing moves by 50 deviations
    assert (sample.rounds.tolist(), sample.evaluations.tolist()) == ([3], [5])


def test_elements_of_a_batch_are_as_alone() -> None:
    denoise, sampler = responding(SCHEDULE, torch.tensor([0.1, 0.5])), Collocation(15, 3)
    noise = flat_noise(SCHEDULE, 5, seed=3, shape=(2,))
    together = run_sampler(sampler, denoise, SCHEDULE, noise)
    for i in range(5):
        alone = run_sampler(sampler, denoise, SCHEDULE, noise[:, i : i + 1])
        torch.testing.assert_close(together.x[i], alone.x[0], rtol=0, atol=1e-6)
        assert together.evaluations[i] == alone.evaluations[0]


def test_stopped_early_it_gives_its_estimate() -> None:
    denoise = responding(SCHEDULE, torch.tensor([0.1, 0.5]))
    noise = flat_noise(SCHEDULE, 2, seed=3, shape=(2,))
    exact = run_sampler(Sequential(), denoise, SCHEDULE, noise).x
    distances = []
    for most in (1, 4, 100):
        calls = iter(range(most))
        sample = run_sampler(
            Collocation(15, 3), denoise, SCHEDULE, noise, stop=lambda calls=calls: next(calls, None) is None
        )
        distances.append(float((sample.x - exact).abs().max()))
        assert bool(sample.complete.all()) == (most == 100)
    assert distances[0] > distances[1] > distances[2]


@pytest.mark.parametrize("count", [1, 2, 15, 40, 99, 100])
def test_default_nodes_are_steps_denser_towards_the_end(count: int) -> None:
    nodes = default_nodes(SCHEDULE, count)
    assert len(set(nodes)) == count
    assert list(nodes) == sorted(nodes)
    assert nodes[-1] == 99
    if count == 15:
        assert np.diff(nodes).max() > 20
        assert nodes[-5:] == (95, 96, 97, 98, 99)


def test_default_nodes_work_without_signal_at_the_first_step() -> None:
    schedule = make_schedule({"_class_name": "FlowMatchEulerDiscreteScheduler", "num_train_timesteps": 100}, steps=20)
    assert torch.isfinite(log_snr(schedule)).all()
    sample = run_sampler(
        Collocation(10, 3), lambda x, step, element: 0.5 * x.clamp(-1, 1), schedule, flat_noise(schedule, 1, shape=(2,))
    )
    assert torch.isfinite(sample.x).all()


@pytest.mark.parametrize(
    ("nodes", "message"),
    [((3, 50), "nodes end at 50, expected the schedule's last step, 99"), ((5, 120), "nodes end at 120")],
)
def test_nodes_that_are_no_steps_are_named(nodes: tuple[int, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_sampler("collocation", nodes=nodes).rounds(SCHEDULE, flat_noise(SCHEDULE, 1, shape=(2,)))


def test_a_calibration_that_cannot_be_is_refused() -> None:
    modes, response = torch.eye(2), torch.zeros(4, 2)
    with pytest.raises(ValueError, match="modes have shape"):
        Calibration(torch.eye(3), response, {})
    with pytest.raises(ValueError, match="responses from 0 to below 1"):
        Calibration(modes, torch.ones(4, 2), {})
    with pytest.raises(ValueError, match="expected 2 increasing steps up to 3"):
        Calibration(modes, response, {2: (0, 2)})


def test_calibration_finds_the_response_of_a_gaussian_world() -> None:
    from parapolicy.calibrate import _path, _responses

    variances = torch.tensor([0.05, 0.3])
    noise = flat_noise(SCHEDULE, 400, seed=5, shape=(2,))
    u = run_sampler(Sequential(), responding(SCHEDULE, variances), SCHEDULE, noise).u
    modes, response = _responses(SCHEDULE, _path(SCHEDULE, noise, u).double(), u.double())
    alpha, sigma = SCHEDULE.alpha.double()[:, None], SCHEDULE.sigma.double()[:, None]
    expected = alpha**2 * variances / (alpha**2 * variances + sigma**2)
    assert (modes.abs().amax(0) > 0.99).all()  # the axes, in some order
    order = modes.abs().argmax(0)
    for j in (60, 80, 90):
        np.testing.assert_allclose(response[j], expected[j, order], atol=0.1)


def test_a_calibration_needs_chunks_and_observations(shipped: parapolicy.Policy) -> None:
    with pytest.raises(ValueError, match="chunks is 0"):
        calibrate(shipped, chunks=0)
    with pytest.raises(ValueError, match="observations is empty"):
        calibrate(shipped, [])


def test_a_calibrated_policy_stays_near_its_sequential_chunks(calibrated: parapolicy.Policy) -> None:
    observations = made_up_observations(calibrated, 12)
    batch = {key: np.stack([observation[key] for observation in observations]) for key in observations[0]}
    seeds = list(range(700, 712))
    expected = calibrated.with_sampler("sequential").predict(batch, seed=seeds).trajectory
    scale = calibrated.normalizer.maps["action"].scale.numpy()
    errors = {}
    for label, policy in {"plain": calibrated.with_schedule(), "calibrated": calibrated}.items():
        chunk = policy.with_sampler("collocation", nodes=15, window=3, settle=0.15).predict(batch, seed=seeds)
        errors[label] = np.median(np.abs((chunk.trajectory - expected) * scale).max((1, 2)))
        assert chunk.stats.evaluations.mean() < 25
        assert chunk.stats.rounds.mean() < 10
    assert errors["calibrated"] < 0.5 * errors["plain"] < 0.05


def test_a_schedule_without_noise_gets_nodes_and_no_response(shipped: parapolicy.Policy) -> None:
    found = calibrate(shipped.with_schedule("ddim", 30), chunks=8)
    assert not found.response.any()
    assert found.nodes[12][-1] == 29
    assert make_tables(dataclasses.replace(SCHEDULE, calibration=None), (50, 99)).modes is None


@pytest.mark.parametrize("calibration", [None, Calibration(torch.eye(3), torch.full((100, 3), 0.2), {})])
def test_a_round_waits_for_nothing(calibration: Calibration | None) -> None:
    """Rounds as a CUDA graph captures them: on the same memory, chunk after chunk, no value looked at."""
    schedule = dataclasses.replace(SCHEDULE, calibration=calibration)
    denoise, sampler = responding(schedule, torch.tensor([0.04, 0.3, 1.0])), Collocation(15, 4)
    kept = sampler.rounds(schedule, flat_noise(schedule, 3, shape=(3,)))
    kept.sparse = False
    for seed in range(3):
        noise = flat_noise(schedule, 3, seed=seed, shape=(3,))
        expected = run_sampler(sampler, denoise, schedule, noise)
        kept.begin(noise, None)
        while not kept.done:
            with Waits():
                kept.advance(denoise)
        found = kept.result()
        torch.testing.assert_close(found.x, expected.x, rtol=0, atol=1e-6)
        assert found.rounds.tolist() == expected.rounds.tolist()
        assert found.evaluations.tolist() == expected.evaluations.tolist()


def batch_of(policy: parapolicy.Policy, count: int) -> dict[str, np.ndarray]:
    return stack_observations(made_up_observations(policy, count))


def test_two_processes_share_its_rounds(calibrated: parapolicy.Policy) -> None:
    with start_workers(SHIPPED, 2) as joined:
        for window, batch in itertools.product((3, 12), (1, 3)):
            alone = calibrated.with_sampler("collocation", nodes=15, window=window)
            ours = dataclasses.replace(alone, engine=joined.engine)
            chunk, expected = (policy.predict(batch_of(alone, batch), seed=4) for policy in (ours, alone))
            np.testing.assert_array_equal(chunk.stats.evaluations, expected.stats.evaluations)
            np.testing.assert_allclose(chunk.trajectory, expected.trajectory, rtol=0, atol=0.1)  # of 499


def test_robots_that_are_served_together_get_their_own_chunks() -> None:
    policy = served_policy().with_sampler("collocation", nodes=12, window=4)
    histories = [some_observation(policy.spec, seed=i) for i in range(6)]
    requests = [Request(history, number=0, seed=i, begin=0) for i, history in enumerate(histories)]
    outcomes = PolicyServer(policy, ServeConfig()).batcher._compute(requests)
    for i, (outcome, history) in enumerate(zip(outcomes, histories, strict=True)):
        assert isinstance(outcome, Chunk)
        alone = policy.predict(history, seed=i)
        np.testing.assert_allclose(outcome.actions, alone.actions, rtol=1e-5, atol=1e-3)
        assert outcome.stats.evaluations == alone.stats.evaluations


def test_a_server_s_deadline_gives_the_estimate_so_far() -> None:
    policy = served_policy().with_sampler("collocation", nodes=12, window=4)
    with running(policy, deadline_ms=0.001) as server, server.connect() as client:
        client.recv()
        answer = infer(client, some_observation(policy.spec))
    assert (answer["rounds"], answer["complete"]) == (1, False)
    assert np.isfinite(answer["actions"]).all()


def test_many_robots_cost_fewer_evaluations_than_secant(calibrated: parapolicy.Policy) -> None:
    observation = batch_of(calibrated, 16)
    spent = {
        name: calibrated.with_sampler(name).predict(observation, seed=1).stats.evaluations.sum()
        for name in ("collocation", "secant")
    }
    assert spent["secant"] > 4 * spent["collocation"]


def test_a_network_gets_plain_tensors_so_that_a_compiler_compiles_once() -> None:
    strides = set()

    def denoise(x: Tensor, step: Tensor, element: Tensor) -> Tensor:
        strides.update((value.is_contiguous(), len(x)) for value in (x, step, element))
        return 0.5 * x.clamp(-1, 1)

    run_sampler(Collocation(10, 3), denoise, SCHEDULE, flat_noise(SCHEDULE, 1, shape=(2,)))
    assert {contiguous for contiguous, _ in strides} == {True}
    assert max(count for _, count in strides) == 3
