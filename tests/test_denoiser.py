import torch

from tests.helpers import bind, call_network, small_policy


def test_each_sample_gets_its_own_timestep_and_condition() -> None:
    policy = small_policy()
    condition = torch.randn(3, policy.spec.condition_dim)
    x = torch.randn(4, policy.spec.horizon, 2)
    step, element = torch.tensor([0, 5, 5, 19]), torch.tensor([2, 0, 1, 1])
    together = bind(policy, condition)(x.flatten(1), step, element)
    for i in range(4):
        one = slice(i, i + 1)
        timestep = policy.schedule.timesteps[step[one]]
        output = call_network(policy.network, x[one], timestep, condition[element[one]])
        expected = policy.schedule.estimate(output.flatten(1), x[one].flatten(1), step[one])
        torch.testing.assert_close(together[one], expected, rtol=0, atol=1e-5)


def test_reproducible_calls_have_padded_sizes_and_the_same_result() -> None:
    policy = small_policy()
    sizes = []
    policy.network.register_forward_pre_hook(lambda network, inputs: sizes.append([len(v) for v in inputs]))
    condition = torch.randn(5, policy.spec.condition_dim)
    # Later steps: at the first ones alpha is near 0, which magnifies roundings.
    x, step, element = torch.randn(5, policy.spec.horizon * 2), torch.arange(10, 15), torch.arange(5)
    plain = bind(policy, condition)(x, step, element)
    padded = bind(policy, condition, reproducible=True)(x, step, element)
    assert sizes == [[5, 20, 5, 5, 5], [16, 20, 5, 16, 16]]
    torch.testing.assert_close(plain, padded, rtol=0, atol=1e-5)
