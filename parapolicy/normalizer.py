"""One affine map per key: ``normalized = value * scale + offset`` (the published convention).

Some published policies subtract a centre first. Where a number hardly moves in the data, its scale is large, and only
that order of the operations keeps its digits.
"""

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

# Powers of two, by which a constant is multiplied and divided without rounding.
STILL_ACTION = 2.0**-20  # smallest range, in the action's units, to which -1 and 1 are mapped
STILL_SCALE = 2.0**-14  # of an observation that never moves


class Affine(NamedTuple):
    """``normalized = (value - centre) * scale + offset``, each of the value's own shape; no centre: 0."""

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
                raise ValueError(f"the normalizer of {key!r} holds a value that is not finite; fit it anew")
            if not affine.scale.all():
                raise ValueError(f"the normalizer of {key!r} has a scale of 0, which cannot be undone; fit it anew")
        self.maps = dict(maps)

    @classmethod
    def fit(cls, data: Mapping[str, Tensor], min_range: float = 1e-4) -> "Normalizer":
        """Map each element's minimum and maximum over the data to -1 and 1.

        An element that never moves teaches nothing, so the network must not matter for it. An action's scale becomes so
        large that whatever the network says comes out as the constant. An observation's becomes so small that the
        network hardly sees it, whatever the sensor says.

        Args:
            data: key -> (N, ...) float tensor.
            min_range: an observed element that varies less than this, or than a few roundings, never moves.
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
