"""The start of a run: weights and normalizers of other policies, and targets of its cameras."""

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from parapolicy.checkpoint import read_checkpoint
from parapolicy.errors import DataError
from parapolicy.networks import Network
from parapolicy.normalizer import Affine, Normalizer
from parapolicy.spec import PolicySpec
from parapolicy.train.data import Demonstrations


def begin_from(
    init: str | None, initial_weights: str | None, spec: PolicySpec, network: Network
) -> Mapping[str, Affine]:
    """Copy a trained policy's weights into a run's network.

    Args:
        init: a policy of the same kind, copied completely; None: none.
        initial_weights: a policy of any kind, of which each tensor of the same name and shape is copied; None: none.
        spec: of the run's policy.
        network: of the run.

    Returns:
        The maps of that policy's normalizer, which belong to its weights.

    Raises:
        ValueError: ``init`` is of another kind, or no tensor of ``initial_weights`` fits.
        CheckpointError: the policy cannot be read.
    """
    if init is not None:
        other, trained, normalizer = read_checkpoint(init)
        for name in ("observation", "action_dim", "n_obs_steps", "horizon", "network", "scheduler"):
            here, there = getattr(spec, name), getattr(other, name)
            if here != there:
                raise ValueError(
                    f"the policy at {init!r} has the {name} {there}, but this run has {here}; make them equal"
                )
        network.load_state_dict(trained.state_dict())
        return normalizer.maps
    if initial_weights is None:
        return {}
    _, trained, normalizer = read_checkpoint(initial_weights)
    own = network.state_dict()
    fitting = {k: value for k, value in trained.state_dict().items() if k in own and own[k].shape == value.shape}
    if not fitting:
        raise ValueError(
            f"the policy at {initial_weights!r} has no tensor with the name and shape of one in this run; train "
            "without initial_weights"
        )
    network.load_state_dict({**own, **fitting})
    print(f"{len(fitting)} of {len(own)} tensors are copied from {initial_weights}")
    return normalizer.maps


def fit_normalizer(spec: PolicySpec, states: Mapping[str, Tensor], taken_over: Mapping[str, Affine]) -> Normalizer:
    """The normalizer of states (n, ...) and images: ``taken_over`` for keys of the same shape, otherwise fitted.

    Image values from 0 to 1 are mapped to -1 to 1.
    """
    maps = Normalizer.fit(states).maps
    for key, feature in spec.observation.items():
        if feature.kind == "image":
            scale = torch.full(feature.normalizer_shape, 2.0)
            maps[key] = Affine(scale, torch.full_like(scale, -1.0))
    fitting = {k: taken_over[k] for k in maps if k in taken_over and taken_over[k].scale.shape == maps[k].scale.shape}
    return Normalizer({**maps, **fitting})


def check_targets(
    targets: Mapping[str, str], spec: PolicySpec, network: Network, data: Demonstrations, target_steps: int
) -> None:
    """Check that the cameras' features can be trained on the targets.

    Raises:
        DataError: the data lacks a target.
        ValueError: a target is also observed; its camera is not encoded frame by frame, or has another number of
            features; or ``target_steps`` is set without targets.
    """
    if target_steps and not targets:
        raise ValueError(
            f"target_steps is {target_steps}, but the data has no targets; set it to 0, or set data.targets"
        )
    device = next(network.parameters()).device
    blank = {key: torch.zeros(1, *shape, device=device) for key, shape in spec.obs_shapes.items()}
    with torch.no_grad():
        encoded = network.encode_images(blank) if targets else {}
    for key, camera in targets.items():
        if key not in data.arrays:
            raise DataError(f"the data has no target {key!r}, expected one of {list(data.arrays)}")
        if key in spec.normalizer_shapes:
            raise ValueError(
                f"the target {key!r} is also an observation or action of the policy; remove it from one of the two"
            )
        if camera not in spec.observation or spec.observation[camera].kind != "image" or encoded[camera].ndim != 3:
            raise ValueError(f"the target {key!r} is for the camera {camera!r}, expected an image of the policy")
        count, features = math.prod(data.arrays[key].shape[1:]), encoded[camera].shape[2]
        if features != count:
            raise ValueError(
                f"the target {key!r} has {count} numbers, but the camera {camera!r} has {features} features; set its "
                f"encoder's features to {count}"
            )
