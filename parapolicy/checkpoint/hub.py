"""Policies on the Hugging Face hub, named ``hf://owner/name`` or ``hf://owner/name@revision``.

huggingface_hub downloads into its own cache, which also works without a network. Only files that the folder readers
need are downloaded: no pickle, no script.
"""

import os
import re
from pathlib import Path

from parapolicy.errors import CheckpointError

SCHEME = "hf://"
PART = r"[A-Za-z0-9][A-Za-z0-9._-]{0,95}"
NAME = re.compile(rf"({PART}/{PART})(?:@([A-Za-z0-9][A-Za-z0-9._/-]{{0,199}}))?")
FILES = ("config.json", "model.safetensors", "policy_*.json", "policy_*.safetensors", "train_config.json")
FOLDERS = ("", "pretrained_model/", "pretrained_model_ema/")


def resolve(path: str | os.PathLike[str]) -> Path:
    """The folder of the files of a name on the hub; any other path is returned unchanged.

    Raises:
        CheckpointError: the name does not have the form ``hf://owner/name[@revision]``, or neither the hub nor the
            cache has it.
    """
    text = os.fspath(path)
    if not text.startswith(SCHEME):
        return Path(path)
    match = NAME.fullmatch(text[len(SCHEME) :])
    if match is None or ".." in text:
        raise CheckpointError(
            f"the policy's name is {text[:200]!r}, expected hf://owner/name or hf://owner/name@revision"
        )
    from huggingface_hub import snapshot_download  # slow to load

    repository, revision = match.groups()
    patterns = [folder + file for folder in FOLDERS for file in FILES]
    try:
        return Path(snapshot_download(repository, revision=revision, allow_patterns=patterns))
    except (OSError, ValueError, RuntimeError) as error:  # huggingface_hub's own errors derive from these
        raise CheckpointError(
            f"{text} is neither in the cache nor could it be downloaded ({type(error).__name__}: {error!s:.250}); "
            "check its name and revision, the network, and (for private ones) the login of huggingface_hub"
        ) from error
