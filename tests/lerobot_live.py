"""What real LeRobot does with and without acceleration, as JSON: run by LeRobot's own Python; see test_live_lerobot.py.

python tests/lerobot_live.py FOLDER
"""

import copy
import json
import sys
import warnings
from typing import Any

import numpy as np
import torch
from lerobot.policies.diffusion.modeling_diffusion import DiffusionPolicy

import parapolicy


def observe(policy: DiffusionPolicy, seed: int, batch: int = 1) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        key: torch.rand((batch, *feature.shape), generator=generator)
        for key, feature in policy.config.input_features.items()
    }


def act(policy: DiffusionPolicy, steps: int, batch: int = 1, seed: int = 0) -> np.ndarray:
    """Actions of an episode by ``select_action``, and one random number drawn after it."""
    policy.reset()
    torch.manual_seed(seed)
    actions = [policy.select_action(observe(policy, step, batch)).numpy() for step in range(steps)]
    return np.concatenate([np.stack(actions).ravel(), torch.rand(1).numpy()])


def difference(a: np.ndarray, b: np.ndarray) -> float:
    return float(np.abs(a - b).max())


@torch.no_grad()
def main(folder: str) -> dict[str, Any]:
    torch.set_num_threads(1)
    policy = DiffusionPolicy.from_pretrained(folder, local_files_only=True)
    policy.to("cpu").eval()
    steps = 2 * policy.config.n_action_steps + 1  # three chunks
    found: dict[str, Any] = {}
    own, before = act(policy, steps), dict(policy.state_dict())
    assert parapolicy.accelerate(policy, sampler="sequential", engine="eager") is policy
    found["sequential"] = difference(act(policy, steps), own)
    found["bit_equal"] = bool(np.array_equal(act(policy, steps), own))
    found["state_dict_kept"] = all(
        value is not None and torch.equal(value, before[k]) for k, value in policy.state_dict().items()
    )
    batch = parapolicy.restore(copy.deepcopy(policy))
    found["batch"] = difference(act(policy, 3, batch=3), act(batch, 3, batch=3))
    for sampler, settings in (("secant", {"tolerance": 1e-4}), ("paradigms", {"tolerance": 0.0})):
        parapolicy.accelerate(policy, sampler, "eager", **settings)
        found[sampler] = difference(act(policy, steps), own)
    found["rounds"] = int(policy.diffusion._parapolicy.recent[-1].rounds[0])
    parapolicy.accelerate(policy, "sequential", "auto")
    found["auto"] = difference(act(policy, steps), own)

    twin = copy.deepcopy(policy)  # whose weights then change: the original must not see them
    for parameter in twin.diffusion.unet.parameters():
        parameter.mul_(0.9)
    changed = act(twin, steps)
    found["copy_changed"] = difference(changed, own)
    found["copy_equals_its_original"] = difference(changed, act(parapolicy.restore(twin), steps))
    found["original_kept"] = difference(act(policy, steps), own)

    policy.diffusion.num_inference_steps = 10  # as a command-line override does
    ten = act(policy, steps)
    found["overridden"] = difference(ten, act(parapolicy.restore(copy.deepcopy(policy)), steps))
    policy.diffusion.num_inference_steps = 100

    policy.reset()
    torch.manual_seed(0)
    first = policy.predict_action_chunk(observe(policy, 0))
    policy.reset()
    torch.manual_seed(0)
    expected = torch.stack([policy.select_action(observe(policy, 0)) for _ in range(first.shape[1])], 1)
    found["chunk_of_empty_queues"] = difference(first.numpy(), expected.numpy())

    # Later, the present observation alone counts again, not that of the chunk before.
    policy.predict_action_chunk(observe(policy, 1))
    torch.manual_seed(0)
    again = policy.predict_action_chunk(observe(policy, 0))
    found["second_chunk_of_empty_queues"] = difference(again.numpy(), expected.numpy())

    parapolicy.accelerate(policy, "sequential", "eager", verify=True)
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        found["verified"] = difference(act(policy, steps), own)
    found["verified_warnings"] = [str(w.message) for w in warned if "parapolicy" in str(w.message)]
    parapolicy.accelerate(policy, "collocation", "eager", verify=True, nodes=2)  # which is far off
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        found["stepped_aside"] = difference(act(policy, steps), own)
    found["stepped_aside_warnings"] = [str(w.message) for w in warned if "uses its own sampling" in str(w.message)]

    parapolicy.restore(parapolicy.restore(policy))
    found["restored"] = bool(np.array_equal(act(policy, steps), own))
    found["instance_clean"] = not {"conditional_sample", "_parapolicy"} & set(vars(policy.diffusion))
    try:
        parapolicy.accelerate(torch.nn.Linear(1, 1))
    except TypeError as error:
        found["refused"] = str(error)
    return found


if __name__ == "__main__":
    print(json.dumps(main(sys.argv[1])))
