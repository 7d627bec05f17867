"""Live objects of other libraries, which keep their interface and are sampled by this one."""

import types
from typing import Any, TypeVar

from parapolicy.adapters.live import ATTRIBUTE, Accelerated, Method, remove

__all__ = ["accelerate", "restore"]

P = TypeVar("P")


def accelerate(policy: P, sampler: str = "auto", engine: str = "auto", verify: bool = False, **parameters: Any) -> P:
    """Sample a live policy of LeRobot, real-stanford/diffusion_policy or robomimic by this library from now on.

    Everything else of the policy stays as it is, and so do its random numbers: with ``sampler="sequential"`` the chunks
    are the policy's own of the same seed.

    Args:
        policy: a ``DiffusionPolicy`` of LeRobot 0.3 or newer, a policy of real-stanford with a UNet or a transformer, a
            ``DiffusionPolicyUNet`` of robomimic, or the ``RolloutPolicy`` around it; its weights in float32.
        sampler: as of :func:`parapolicy.load_policy`, with its ``parameters``. ``auto`` measures at the first chunk, in
            seconds, which one is fastest here.
        engine: one of :data:`parapolicy.engine.ENGINES`.
        verify: sample the first chunk by the policy itself, too; where the two differ, warn and leave the sampling to
            the policy.

    Returns:
        The same object.

    Raises:
        TypeError: not such a policy.
        ValueError: an unknown sampler, parameter or engine. At the first chunk: a network, scheduler or loop over
            denoising steps that the published policies do not have.
    """
    methods = _methods(policy)
    setattr(methods[0].owner, ATTRIBUTE, Accelerated(sampler, engine, verify, parameters))
    for owner, name, replacement in methods:
        setattr(owner, name, types.MethodType(replacement, owner))
    return policy


def restore(policy: P) -> P:
    """Give a policy back its own sampling; nothing happens to one that has it.

    Returns:
        The same object.

    Raises:
        TypeError: not a policy that :func:`accelerate` takes.
    """
    remove(*_methods(policy))
    return policy


def _methods(policy: Any) -> list[Method]:
    """The methods to replace; the first one's owner remembers how it is sampled."""
    # Here, since torch.compiler, which they use, takes a second to import.
    from parapolicy.adapters import live_lerobot, live_robomimic, live_stanford

    for library in (live_lerobot, live_stanford, live_robomimic):
        if methods := library.methods(policy):
            return methods
    raise TypeError(
        f"{type(policy).__name__} is no diffusion policy of LeRobot, real-stanford/diffusion_policy or robomimic"
    )
