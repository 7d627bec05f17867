"""Live policies with the loops of real-stanford and robomimic: ours in this process, the published ones beside it.

The published code is in no package. Its tests run where ``PARAPOLICY_STANFORD`` and ``PARAPOLICY_ROBOMIMIC`` name
checkouts of real-stanford/diffusion_policy and ARISE-Initiative/robomimic, in the environment of ``make lerobot``.
"""

import copy
import json
import os
import subprocess
from types import SimpleNamespace
from typing import Any

import diffusers
import pytest
import torch
from diffusers import DDIMScheduler
from torch import Tensor, nn

import parapolicy
from tests.conftest import PATIENCE, ROOT
from tests.live_loops import COSINE, Algo, LoopPolicy
from tests.test_live_lerobot import PYTHON, environment

CLOSE = 1e-5  # float32 rounding, along a chunk


def seeded(policy: Any) -> Tensor:
    """A chunk, and the random number that would be drawn next."""
    torch.manual_seed(1)
    with torch.no_grad():
        return torch.cat([policy.sample().flatten(), torch.rand(1)])


def difference(a: Tensor, b: Tensor) -> float:
    return float((a - b).abs().max())


@pytest.mark.parametrize(
    "make",
    [
        lambda: LoopPolicy("global"),
        lambda: LoopPolicy("local"),
        lambda: LoopPolicy("inpaint"),
        lambda: LoopPolicy("global", steps=5),
        lambda: LoopPolicy("global", DDIMScheduler(**COSINE), steps=4),
        lambda: LoopPolicy("global", DDIMScheduler(**COSINE), steps=4, eta=0.7),
        lambda: Algo(averaged=True),
        lambda: Algo(averaged=False),
    ],
)
def test_chunks_are_those_of_the_loop_with_the_same_seed(make: Any) -> None:
    policy = make()
    own = seeded(policy)
    assert parapolicy.accelerate(policy, "sequential", "eager") is policy
    assert difference(seeded(policy), own) < CLOSE
    parapolicy.accelerate(policy, "paradigms", "eager", tolerance=0.0)
    assert difference(seeded(policy), own) < CLOSE
    accelerated = policy._parapolicy
    assert 0 < accelerated.recent[-1].rounds[0] < accelerated.recent[-1].evaluations[0]
    assert torch.equal(seeded(parapolicy.restore(policy)), own)
    assert not {"conditional_sample", "_get_action_trajectory", "_parapolicy"} & set(vars(policy))


def test_a_generator_is_drawn_from_as_by_the_loop() -> None:
    policy = LoopPolicy()
    with torch.no_grad():
        own = policy.sample(torch.Generator().manual_seed(5))
        parapolicy.accelerate(policy, "sequential", "eager", verify=True)
        for _ in range(2):
            generator = torch.Generator().manual_seed(5)
            assert difference(policy.sample(generator), own) < CLOSE


def test_weights_steps_and_copies_are_those_of_the_moment() -> None:
    policy = parapolicy.accelerate(LoopPolicy(), "sequential", "eager")
    before = seeded(policy)
    twin = copy.deepcopy(policy)
    for value in twin.model.parameters():
        value.data.mul_(1.1)
    twin.num_inference_steps = 6
    changed = seeded(twin)
    assert difference(changed, before) > 0.01
    assert difference(changed, seeded(parapolicy.restore(copy.deepcopy(twin)))) < CLOSE
    assert torch.equal(seeded(policy), before)


def test_a_rollout_policy_is_taken_for_what_is_in_it() -> None:
    algo = Algo(averaged=True)
    rollout = SimpleNamespace(policy=algo)
    assert parapolicy.accelerate(rollout, "sequential", "eager") is rollout
    assert "_get_action_trajectory" in vars(algo)
    parapolicy.restore(rollout)
    assert "_get_action_trajectory" not in vars(algo)


@pytest.mark.parametrize("make", [LoopPolicy, lambda: Algo(averaged=True)])
def test_a_policy_that_does_not_agree_samples_by_itself(make: Any) -> None:
    policy = make()
    own = seeded(policy)
    parapolicy.accelerate(policy, "collocation", "eager", verify=True, nodes=1)  # which is far off
    with pytest.warns(UserWarning, match="parapolicy's first chunk differs"):
        assert torch.equal(seeded(policy), own)
    assert torch.equal(seeded(policy), own)


class Guided(LoopPolicy):
    def between_steps(self, state: Tensor) -> Tensor:
        return state - 0.01 * state


class Doubled(LoopPolicy):
    """Two network calls per step, as of classifier-free guidance."""

    def conditional_sample(self, *args: Any, **kwargs: Any) -> Tensor:
        network = self.model
        doubled = SimpleNamespace(model=lambda *a, **k: network(*a, **k) + network(*a, **k))
        vars(doubled).update(noise_scheduler=self.noise_scheduler, num_inference_steps=2, between_steps=lambda x: x)
        return LoopPolicy.conditional_sample(doubled, *args, **kwargs)  # type: ignore[arg-type]


class DDPMScheduler(diffusers.DDPMScheduler):
    """Of the published name, with a step of its own."""

    def step(self, model_output: Tensor, *args: Any, **kwargs: Any) -> Any:
        return super().step(1.01 * model_output, *args, **kwargs)


def with_silu() -> LoopPolicy:
    policy = LoopPolicy()
    policy.model.mid_modules[0].blocks[0].block[2] = nn.SiLU()  # type: ignore[index, union-attr]
    return policy


def with_another_network() -> LoopPolicy:
    policy = LoopPolicy()
    policy.model = SampleNetwork()  # type: ignore[assignment]
    return policy


class SampleNetwork(nn.Module):
    def forward(self, sample: Tensor, timestep: Tensor, local_cond: Tensor, global_cond: Tensor) -> Tensor:
        return sample


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (Guided, "loop over denoising steps does more"),
        (Doubled, "loop over denoising steps does more"),
        (lambda: LoopPolicy(scheduler=DDPMScheduler(**COSINE)), "DDPMScheduler at 10 differs from its config"),
        (lambda: LoopPolicy(scheduler=diffusers.EulerDiscreteScheduler()), "solver is None .*EulerDiscreteScheduler"),
        (lambda: LoopPolicy(return_dict=True), "'return_dict'., which are not supported"),
        (lambda: LoopPolicy().double(), "published unet1d with its settings in float32: .'diffusion_step_encoder"),
        (with_silu, "ConditionalUnet1D differs from the published network"),
        (with_another_network, "the network is a SampleNetwork, expected one of"),
    ],
)
def test_what_is_not_the_published_loop_is_refused(make: Any, message: str) -> None:
    policy = parapolicy.accelerate(make(), "sequential", "eager")
    with pytest.raises(ValueError, match=message):
        seeded(policy)


def test_known_entries_that_are_not_observed_first_steps_are_refused() -> None:
    policy = parapolicy.accelerate(LoopPolicy("inpaint"), "sequential", "eager")
    data = torch.zeros(1, 8, 5)
    mask = torch.zeros_like(data, dtype=torch.bool)
    mask[:, 0, 0] = True
    with pytest.raises(ValueError, match="condition_mask is not supported, expected the mask of observed first steps"):
        policy.conditional_sample(data, mask)
    mask = torch.zeros_like(mask)
    mask[:, :2, 2:] = True
    with pytest.raises(ValueError, match=r"conditioned by .'condition_data', 'global_cond'., expected one of"):
        policy.conditional_sample(data, mask, global_cond=torch.zeros(1, 6))


def published(variable: str, script: str) -> dict[str, Any]:
    """What a script finds, by the published code that a variable names."""
    checkout = os.environ.get(variable)
    if not checkout or not PYTHON.exists():
        pytest.skip(
            f"{variable} names no checkout of the published code, or no environment of make lerobot at {PYTHON}"
        )
    settings = {**environment(), "PYTHONPATH": os.pathsep.join((str(ROOT), checkout))}
    command = [str(PYTHON), str(ROOT / "tests" / script)]
    done = subprocess.run(command, env=settings, capture_output=True, text=True, timeout=PATIENCE)
    assert done.returncode == 0, done.stderr
    values: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return values


def test_real_stanford_s_own_policies() -> None:
    found = published("PARAPOLICY_STANFORD", "stanford_live.py")
    assert len(found["sequential"]) == 13
    assert max(found["sequential"].values()) < 5e-5  # of the actions' and observations' units
    assert max(found["secant"].values()) < 5e-3  # asked for 1e-4, which is an estimate
    assert found["auto"] < 0.05
    assert found["state_dict_kept"]
    assert found["copy_changed"] > 0.1
    assert found["copy_equals_its_original"] < 0.05
    assert found["overridden"] < 0.05
    assert found["verified"] < 5e-5
    assert found["verified_warnings"] == []
    assert found["stepped_aside"] == 0.0
    assert len(found["stepped_aside_warnings"]) == 1
    assert found["instance_clean"]
    for name, message in {
        "guided": "loop over denoising steps does more",
        "double": "in float32",
        "training": "TransformerForDiffusion differs from the published network",
        "option": "'return_dict'",
        "scheduler": "differs from its config",
        "network": "ConditionalUnet1D differs from the published network",
    }.items():
        assert message in found["refused"][name]


def test_robomimic_s_own_policies() -> None:
    found = published("PARAPOLICY_ROBOMIMIC", "robomimic_live.py")
    assert max(found["sequential"].values()) < 5e-5
    assert max(found["secant"].values()) < 5e-3
    assert found["clean"]
