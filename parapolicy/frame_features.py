"""What a network's cameras have made of the frames that the next chunk may see again."""

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from parapolicy.networks import Network
from parapolicy.networks.vision import IMAGE_NDIM

ENCODED_NDIM = 3  # (B, To, F)


class FrameFeatures:
    """The features of one episode's newest frames.

    Each frame is encoded by itself, so that its features are the same to the bit whether they are found here or
    computed. Frames are told apart by their content. One thread at a time may use it, with one network whose weights
    do not change.
    """

    def __init__(self) -> None:
        self._kept: dict[str, dict[bytes, Tensor]] = {}  # camera -> digest of a frame -> its features (1, 1, F)

    def encode(self, network: Network, key: str, pictures: Tensor, frames: np.ndarray) -> Tensor | None:
        """Features (To, F) of one camera's pictures; None: the network does not encode it frame by frame.

        Args:
            network: that encodes what is new.
            key: of the camera.
            pictures: (To, C, H, W), as the network takes them.
            frames: (To, …), the same as they came.
        """
        kept = self._kept.get(key, {})
        used: dict[bytes, Tensor] = {}
        names = [hashlib.sha256(np.ascontiguousarray(frame).data).digest() for frame in frames]
        for name, picture in zip(names, pictures, strict=True):
            if name in used:
                continue
            features = kept.get(name)
            if features is None:
                features = network.encode_images({key: picture[None, None]})[key]
                if features.ndim != ENCODED_NDIM:
                    return None
            used[name] = features
        self._kept[key] = used
        return torch.cat([used[name][0] for name in names])


def encode_frames(
    network: Network,
    inputs: Mapping[str, Tensor],
    observation: Mapping[str, Any],
    features: Sequence[FrameFeatures],
) -> dict[str, Tensor]:
    """Inputs {key: (B, To, …)} with features (B, To, F) in place of images, those of element b from ``features[b]``.

    Args:
        network: that encodes frames which are new.
        inputs: normalised.
        observation: {key: (B, To, …)}, what the inputs were made of.
        features: of each element's episode.

    Raises:
        ValueError: not one for each element.
    """
    encoded = dict(inputs)
    for key, pictures in inputs.items():
        if len(features) != len(pictures):
            raise ValueError(f"features are given for {len(features)} episodes, expected {len(pictures)}, one each")
        if pictures.ndim == IMAGE_NDIM:
            elements = zip(features, pictures, observation[key], strict=True)
            each = [kept.encode(network, key, picture, np.asarray(frames)) for kept, picture, frames in elements]
            if all(one is not None for one in each):
                encoded[key] = torch.stack([one for one in each if one is not None])
    return encoded
