"""The source of a key's values in a data set."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from parapolicy.errors import DataError
from parapolicy.rotation import to_rotation_6d
from parapolicy.spec import KINDS


@dataclass(frozen=True)
class Source:
    """Where to find a key's values in a data set.

    Attributes:
        array: name of the array.
        columns: indices to use of a step's first axis; None: all.
        rotation_6d: convert absolute actions with axis-angle, as in robomimic, to six numbers per rotation
            (:func:`parapolicy.rotation.to_rotation_6d`).
        shape: shape of a step's value, to which it is reshaped; None: the array's.
        kind: ``state``, or ``image``: images of ``shape`` (H, W, C), used unchanged.
    """

    array: str
    columns: Sequence[int] | None = None
    rotation_6d: bool = False
    shape: Sequence[int] | None = None
    kind: str = "state"

    @classmethod
    def parse(cls, key: str, given: "str | Mapping[str, Any]") -> "Source":
        """Make a source from an array's name, or from a mapping of this class's fields.

        Raises:
            DataError: unknown fields, no array, or fields that do not go together.
        """
        fields = {"array": given} if isinstance(given, str) else dict(given)
        unknown = sorted(set(fields) - set(cls.__dataclass_fields__))
        if unknown or not isinstance(fields.get("array"), str):
            raise DataError(
                f"the source of {key!r} is {fields}, with unknown keys {unknown}; expected array: NAME and, "
                f"optionally, {', '.join(list(cls.__dataclass_fields__)[1:])}"
            )
        source = cls(**fields)
        if source.kind not in KINDS:
            raise DataError(f"the source of {key!r} has the kind {source.kind!r}, expected one of {KINDS}")
        if source.kind == "image" and (source.shape is None or source.columns is not None or source.rotation_6d):
            raise DataError(f"the source of the image {key!r} is {fields}, expected only an array and its shape")
        return source

    def take(self, values: Any, where: str) -> np.ndarray:
        """The key's values (N, ...), float32, from an array (N, ...).

        Raises:
            DataError: not real numbers, no such columns, or an unexpected shape.
        """
        values = np.asarray(values)
        if values.dtype.kind not in "biuf" or values.ndim < 1:
            raise DataError(f"{where} holds {values.dtype}, expected real numbers, one record per step")
        if self.columns is not None:
            try:
                values = values[:, list(self.columns)]
            except (IndexError, TypeError) as error:
                raise DataError(
                    f"{where} has shape {values.shape}, but columns asks for {list(self.columns)}"
                ) from error
        if self.rotation_6d:
            try:
                values = to_rotation_6d(values)
            except (ValueError, IndexError) as error:
                raise DataError(
                    f"{where} has shape {values.shape}, which rotation_6d cannot convert: {error}"
                ) from error
        if self.shape is not None:
            shape = tuple(self.shape)
            if math.prod(values.shape[1:]) != math.prod(shape):
                raise DataError(
                    f"{where} has the shape {values.shape[1:]} per step{' in these columns' if self.columns else ''}, "
                    f"expected {shape} from the configuration; correct it, or select numbers by columns"
                )
            values = values.reshape(len(values), *shape)
        with np.errstate(over="ignore"):  # values too large for float32 become infinite, which is reported
            return values.astype(np.float32)
