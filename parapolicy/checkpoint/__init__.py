"""Checkpoint readers, tried in order. Each module reads one format and recognises it.

Other packages add theirs under the entry point ``parapolicy.readers``: an object with the methods of :class:`Reader`.
"""

import os
from importlib.metadata import entry_points
from pathlib import Path
from typing import NamedTuple, Protocol

from parapolicy.checkpoint import hub, lerobot_folder, native, robomimic_pth, stanford_ckpt
from parapolicy.checkpoint.pickles import refuse_unknown
from parapolicy.networks import Network
from parapolicy.normalizer import Normalizer
from parapolicy.spec import PolicySpec


class Loaded(NamedTuple):
    """A policy's parts, on the CPU."""

    spec: PolicySpec
    network: Network
    normalizer: Normalizer


class Reader(Protocol):
    """One checkpoint format, such as the module :mod:`parapolicy.checkpoint.native`."""

    def recognises(self, path: Path) -> bool:
        """Whether a file or folder is of this format, by its content."""
        ...

    def read(self, path: Path) -> tuple[PolicySpec, Network, Normalizer]:
        """Read the policy; raise :class:`parapolicy.CheckpointError` if a file is damaged or inconsistent."""
        ...


# The last recognises any config.json.
READERS: tuple[Reader, ...] = (lerobot_folder, robomimic_pth, stanford_ckpt, native)


def read_checkpoint(path: str | os.PathLike[str], ema: bool = False) -> Loaded:
    """Read a checkpoint by the first reader that recognises it.

    Args:
        path: of a file or folder, or ``hf://owner/name[@revision]``.
        ema: read the averaged weights that LeRobot saves beside the policy's folder, in ``pretrained_model_ema``.

    Raises:
        CheckpointError: not a checkpoint, damaged, or not matching its configuration.
    """
    path = hub.resolve(path)
    path = lerobot_folder.find_ema(path) if ema else path
    installed = [entry.load() for entry in entry_points(group="parapolicy.readers")]
    found = [reader for reader in (*READERS, *installed) if reader.recognises(path)]
    if not found and path.is_file():
        refuse_unknown(path)
    return Loaded(*(found[0] if found else native).read(path))  # the native reader's error names what is missing
