"""One digest of nested values, to tell whether two runs have the same settings."""

import hashlib
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor


def digest(value: Any) -> str:
    """SHA-256, in hexadecimal, of mappings, lists, tensors, arrays, numbers and texts; the same on every device."""
    hashed = hashlib.sha256()
    _add(hashed, value)
    return hashed.hexdigest()


def _add(hashed: Any, value: Any) -> None:
    if isinstance(value, Mapping):
        hashed.update(f"map {len(value)};".encode())
        for key in sorted(value, key=repr):
            _add(hashed, key)
            _add(hashed, value[key])
    elif isinstance(value, list | tuple):
        hashed.update(f"list {len(value)};".encode())
        for inner in value:
            _add(hashed, inner)
    elif isinstance(value, Tensor | np.ndarray):
        tensor = torch.as_tensor(value).detach().cpu().contiguous()
        hashed.update(f"{tensor.dtype} {tuple(tensor.shape)};".encode())
        hashed.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    else:
        hashed.update(f"{type(value).__name__} {value!r};".encode())
