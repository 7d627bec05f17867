"""The C interface of plan files, as a program without Python calls it."""

import ctypes
import dataclasses
import os
import struct
import zlib
from pathlib import Path

import numpy as np

import parapolicy
from parapolicy import export
from parapolicy.engine import make_engine, native_library

OK, NO_FILE, NO_PLAN, OTHER_VERSION, DAMAGED, NO_MEMORY, BAD_ARGUMENT, BAD_OBSERVATION, BAD_RESULT = range(9)


class Sizes(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_int64) for name in ("obs_steps", "observed", "horizon", "action_dim", "first_action")),
        *((name, ctypes.c_int64) for name in ("action_steps", "steps", "noise")),
        ("control_hz", ctypes.c_double),
    )


class Options(ctypes.Structure):
    _fields_ = (("threads", ctypes.c_int64), ("seconds", ctypes.c_double))


class Stats(ctypes.Structure):
    _fields_ = (("rounds", ctypes.c_int64), ("evaluations", ctypes.c_int64), ("complete", ctypes.c_int32))


class Embedded:
    """The C interface, as a program without Python calls it."""

    def __init__(self) -> None:
        self.library = native_library.load_library()
        self.library.parapolicy_message.restype = ctypes.c_char_p
        self.library.parapolicy_free.argtypes = [ctypes.c_void_p]
        self.policy, self.sizes, self.stats = ctypes.c_void_p(), Sizes(), Stats()

    def load(self, path: Path) -> int:
        self.library.parapolicy_free(self.policy)
        code: int = self.library.parapolicy_load(os.fsencode(path), ctypes.byref(self.policy))
        if code == OK:
            assert self.library.parapolicy_get_sizes(self.policy, ctypes.byref(self.sizes)) == OK
        return code

    def sample(
        self, observation: np.ndarray, noise: np.ndarray, normalised: bool = False, options: Options | None = None
    ) -> tuple[int, np.ndarray]:
        sizes = self.sizes
        assert (observation.dtype, observation.shape) == (np.float32, (sizes.obs_steps, sizes.observed))
        assert (noise.dtype, noise.size) == (np.float32, sizes.noise)
        trajectory = np.zeros((sizes.horizon, sizes.action_dim), np.float32)
        function = self.library.parapolicy_sample_normalised if normalised else self.library.parapolicy_sample
        arrays = [ctypes.c_void_p(np.ascontiguousarray(value).ctypes.data) for value in (observation, noise)]
        given = None if options is None else ctypes.byref(options)
        out = ctypes.c_void_p(trajectory.ctypes.data)
        return function(self.policy, *arrays, given, out, ctypes.byref(self.stats)), trajectory


def flat(spec: parapolicy.PolicySpec, observation: dict[str, np.ndarray]) -> np.ndarray:
    """{key: (To, …)} -> (To, numbers of a step)."""
    parts = [observation[key].reshape(spec.n_obs_steps, -1) for key in spec.observation]
    return np.concatenate(parts, 1).astype(np.float32)


def native(policy: parapolicy.Policy, engine: str = "fused") -> parapolicy.Policy:
    return dataclasses.replace(policy, engine=make_engine(engine, policy.device))


def sealed(content: bytes | bytearray) -> bytes:
    """With the digest that goes with it."""
    content = bytearray(content)
    content[export.CHECKSUM_AT : export.CHECKSUM_AT + 4] = bytes(4)
    struct.pack_into("<I", content, export.CHECKSUM_AT, zlib.crc32(content))
    return bytes(content)
