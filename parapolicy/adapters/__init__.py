"""Live objects of other libraries. They keep their interface, and this library samples their chunks."""

import types
from typing import Any, TypeVar

from parapolicy.adapters.live import ATTRIBUTE, Accelerated, Method, remove

__all__ = ["accelerate", "restore"]

P = TypeVar("P")


def accelerate(policy: P, sampler: str = "auto", engine: str = "auto", verify: bool = False, **parameters: Any) -> P:
    """Let this library sample the chunks of a live policy of LeRobot, real-stanford/diffusion_policy or robomimic.

    Nothing else of the policy changes, nor do its random numbers: with ``sampler="sequential"`` the chunks are the
    policy's own of the same seed.

    Args:
        policy: a ``DiffusionPolicy`` of LeRobot 0.3 or newer, a policy of real-stanford with a UNet or a transformer, a
            ``DiffusionPolicyUNet`` of robomimic, or the ``RolloutPolicy`` around it, with float32 weights.
        sampler: as in :func:`parapolicy.load_policy`, with its ``parameters``. ``auto`` measures at the first chunk, in
            seconds, which sampler is fastest here.
        engine: one of :data:`parapolicy.engine.ENGINES`.
        verify: compare the first chunk with the policy's own. If they differ, warn and restore the policy's own
            sampling.

    Returns:
        The same object.

    Raises:
        TypeError: not such a policy.
        ValueError: an unknown sampler, parameter or engine. At the first chunk: a network, scheduler or loop over
            denoising steps that differs from the published ones.
    """
    methods = _methods(policy)
    setattr(methods[0].owner, ATTRIBUTE, Accelerated(sampler, engine, verify, parameters))
    for owner, name, replacement in methods:
        setattr(owner, name, types.MethodType(replacement, owner))
    return policy


def restore(policy: P) -> P:
    """Restore a policy's own sampling. A policy that was not accelerated stays unchanged.

    Returns:
        The same object.

    Raises:
        TypeError: not a policy that :func:`accelerate` supports.
    """
    remove(*_methods(policy))
    return policy


def _methods(policy: Any) -> list[Method]:
    """The methods to replace. The first one's owner stores the :class:`Accelerated`."""
    # Imported here, because torch.compiler, which they use, takes a second to import.
    from parapolicy.adapters import live_lerobot, live_robomimic, live_stanford

    for library in (live_lerobot, live_stanford, live_robomimic):
        if methods := library.methods(policy):
            return methods
    raise TypeError(
        f"policy is of type {type(policy).__name__}, expected a diffusion policy of LeRobot, "
        "real-stanford/diffusion_policy or robomimic"
    )
