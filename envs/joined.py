"""The observation of real-stanford's low-dimensional policies: several of the simulator's as one vector, ``obs``."""

import math
from collections.abc import Collection, Mapping, Sequence

from parapolicy.spec import PolicySpec

JOINED = "obs"


def parts_of(spec: PolicySpec, known: Collection[str]) -> list[str]:
    """The names of what a policy's ``obs`` consists of, in their order, as its checkpoint says.

    Args:
        known: names of the simulator's observations.

    Raises:
        ValueError: the checkpoint does not say it, or names what the simulator does not have.
    """
    parts = spec.provenance.get(JOINED)
    if not isinstance(parts, Sequence) or not parts:
        raise ValueError(
            f"the policy observes {JOINED!r}, but its checkpoint does not say of what it consists; expected a file of "
            f"real-stanford/diffusion_policy with its data set's settings, or a policy that observes {[*known]}"
        )
    if unknown := [name for name in parts if name not in known]:
        raise ValueError(f"the policy's {JOINED!r} consists of {[*parts]}, of which {unknown} are not among {[*known]}")
    return [*parts]


def joined_shape(parts: Sequence[str], shapes: Mapping[str, tuple[int, ...]]) -> tuple[int]:
    """The shape of ``obs``."""
    return (sum(math.prod(shapes[name]) for name in parts),)
