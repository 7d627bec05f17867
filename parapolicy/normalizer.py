"""One affine map per key: ``normalized = value * scale + offset`` (the published convention).

Some published policies subtract a centre first. For a number that hardly moves in the data, the scale is large, and
subtracting the centre first keeps the number's digits.
"""

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

# Powers of two: multiplying and dividing by them does not round.
STILL_ACTION = 2.0**-20  # smallest range, in the action's units, to which -1 and 1 are mapped
STILL_SCALE = 2.0**-14  # of an observation that never moves


class Affine(NamedTuple):
    """``normalized = (value - centre) * scale + offset``, each of the value's shape. A centre of None is 0."""

    scale: Tensor
    offset: Tensor
    centre: Tensor | None = None


class Normalizer:
    """Maps each observation key and ``"action"`` to about [-1, 1] and back.

    Args:
        maps: one :class:`Affine` per key, float32.
    """

    def __init__(self, maps: Mapping[str, Affine]) -> None:
        for key, affine in maps.items():
            if not all(torch.isfinite(part).all() for part in affine if part is not None):
                raise ValueError(f"the normalizer of {key!r} holds a value that is not finite; fit it again")
            if not affine.scale.all():
                raise ValueError(f"the normalizer of {key!r} has a scale of 0, which cannot be inverted; fit it again")
        self.maps = dict(maps)

    @classmethod
    def fit(cls, data: Mapping[str, Tensor], min_range: float = 1e-4) -> "Normalizer":
        """Map each number's minimum and maximum over the data to -1 and 1.

        Numbers that never move carry no information, so the network must not depend on them. The scale of such an
        action becomes so large that any output of the network is mapped to the constant. The scale of such an
        observation becomes so small that the network hardly sees it.

        Args:
            data: key -> (N, ...) float tensor.
            min_range: an observed number that varies less than this, or than a few rounding errors, counts as constant.
        """
        maps = {}
        for key, values in data.items():
            low, high = values.amin(0).double(), values.amax(0).double()
            size = high - low
            if key == "action":
                scale = 2 / size.clamp(min=STILL_ACTION)
            else:
                roundings = 8 * torch.finfo(torch.float32).eps * torch.maximum(low.abs(), high.abs())
                still = size < roundings.clamp(min=min_range)
                scale = torch.where(still, STILL_SCALE, 2 / torch.where(still, 1.0, size))
            offset = -scale * (low + high) / 2
            maps[key] = Affine(scale.float(), offset.float())
        return cls(maps)

    def normalize(self, key: str, value: Tensor) -> Tensor:
        """(..., *shape of the key) -> the same shape, normalized."""
        scale, offset, centre = self.maps[key]
        return (value if centre is None else value - centre) * scale + offset

    def unnormalize(self, key: str, value: Tensor) -> Tensor:
        """The inverse of :meth:`normalize`."""
        scale, offset, centre = self.maps[key]
        value = (value - offset) / scale
        return value if centre is None else value + centre

    def to(self, device: torch.device) -> "Normalizer":
        def moved(a: Affine) -> Affine:
            centre = None if a.centre is None else a.centre.to(device)
            return Affine(a.scale.to(device), a.offset.to(device), centre)

        return Normalizer({key: moved(affine) for key, affine in self.maps.items()})

    def state_dict(self) -> dict[str, Tensor]:
        """``{key}.scale`` and ``{key}.offset`` of every key, and ``{key}.centre`` where there is one."""
        named = {f"{key}.{name}": value for key, a in self.maps.items() for name, value in a._asdict().items()}
        return {name: value for name, value in named.items() if value is not None}
