"""One affine map per key: ``normalized = value * scale + offset`` (the published convention)."""

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor


class Affine(NamedTuple):
    """Scale and offset, both of the value's own shape."""

    scale: Tensor
    offset: Tensor


class Normalizer:
    """Maps each observation key and ``"action"`` to about [-1, 1] and back.

    Args:
        maps: one :class:`Affine` per key, float32.
    """

    def __init__(self, maps: Mapping[str, Affine]) -> None:
        for key, affine in maps.items():
            if not (torch.isfinite(affine.scale).all() and torch.isfinite(affine.offset).all()):
                raise ValueError(f"the normalizer of {key!r} holds a value that is not finite; fit it anew")
            if not affine.scale.all():
                raise ValueError(f"the normalizer of {key!r} has a scale of 0, which cannot be undone; fit it anew")
        self.maps = dict(maps)

    @classmethod
    def fit(cls, data: Mapping[str, Tensor], min_range: float = 1e-4) -> "Normalizer":
        """Map each element's minimum and maximum over the data to -1 and 1.

        Args:
            data: key -> (N, ...) float tensor.
            min_range: an element that varies less than this is only centred, not stretched.
        """
        maps = {}
        for key, values in data.items():
            low, high = values.amin(0).double(), values.amax(0).double()
            constant = high - low < min_range
            scale = torch.where(constant, 1.0, 2.0 / torch.where(constant, 1.0, high - low))
            offset = -scale * (low + high) / 2
            maps[key] = Affine(scale.float(), offset.float())
        return cls(maps)

    def normalize(self, key: str, value: Tensor) -> Tensor:
        """(..., *shape of the key) -> the same shape, normalized."""
        scale, offset = self.maps[key]
        return value * scale + offset

    def unnormalize(self, key: str, value: Tensor) -> Tensor:
        """The inverse of :meth:`normalize`."""
        scale, offset = self.maps[key]
        return (value - offset) / scale

    def to(self, device: torch.device) -> "Normalizer":
        return Normalizer({key: Affine(a.scale.to(device), a.offset.to(device)) for key, a in self.maps.items()})

    def state_dict(self) -> dict[str, Tensor]:
        """``{key}.scale`` and ``{key}.offset`` of every key."""
        return {f"{key}.{name}": value for key, a in self.maps.items() for name, value in a._asdict().items()}
