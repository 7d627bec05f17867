"""The image features of recent frames, kept for the next chunk."""

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

    Each frame is encoded by itself, so its features are the same to the bit whether they are cached or computed. Frames
    are told apart by their content. Use an object from one thread at a time, with one network whose weights do not
    change.
    """

    def __init__(self) -> None:
        self._kept: dict[str, dict[bytes, Tensor]] = {}  # camera -> digest of a frame -> its features (1, 1, F)

    def encode(self, network: Network, key: str, pictures: Tensor, frames: np.ndarray) -> Tensor | None:
        """Features (To, F) of one camera's pictures; None if the network does not encode frame by frame.

        Args:
            network: encodes the new frames.
            key: of the camera.
            pictures: (To, C, H, W), as the network takes them.
            frames: (To, …), the same frames as they were observed.
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
    """Inputs {key: (B, To, …)} with images replaced by features (B, To, F), using ``features[b]`` for element b.

    Args:
        network: encodes the new frames.
        inputs: normalised.
        observation: {key: (B, To, …)}, from which the inputs were made.
        features: those of each element's episode.

    Raises:
        ValueError: the number of features differs from the batch size.
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
