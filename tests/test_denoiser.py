import torch

from parapolicy.denoiser import Denoiser
from parapolicy.engine import Eager
from tests.helpers import small_policy


def test_each_row_gets_its_own_timestep_and_condition() -> None:
    policy = small_policy()
    condition = torch.randn(3, policy.spec.condition_dim)
    denoiser = Denoiser(Eager(policy.network).bind(policy.schedule.timesteps, condition), policy.schedule)
    x = torch.randn(4, policy.spec.horizon, 2)
    step, element = torch.tensor([0, 5, 5, 19]), torch.tensor([2, 0, 1, 1])
    together = denoiser(x, step, element)
    for i in range(4):
        output = policy.network(x[i : i + 1], policy.schedule.timesteps[step[i : i + 1]], condition[element[i], None])
        expected = policy.schedule.estimate(output, x[i : i + 1], step[i : i + 1])
        torch.testing.assert_close(together[i : i + 1], expected, rtol=0, atol=1e-5)


def test_reproducible_calls_have_padded_sizes_and_the_same_result() -> None:
    policy = small_policy()
    sizes = []

    def network(x: torch.Tensor, timestep: torch.Tensor, condition: torch.Tensor) -> torch.Tensor:
        sizes.append((len(x), len(timestep), len(condition)))
        return policy.network(x, timestep, condition)

    condition = torch.randn(5, policy.spec.condition_dim)
    x, step, element = torch.randn(5, policy.spec.horizon, 2), torch.arange(5), torch.arange(5)
    plain = Denoiser(Eager(network).bind(policy.schedule.timesteps, condition), policy.schedule)(x, step, element)
    padded = Denoiser(Eager(network).bind(policy.schedule.timesteps, condition), policy.schedule, reproducible=True)(
        x, step, element
    )
    assert sizes == [(5, 5, 5), (8, 8, 8)]
    torch.testing.assert_close(plain, padded, rtol=0, atol=1e-5)
