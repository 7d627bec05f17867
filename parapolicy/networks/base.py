"""The interface of networks: work at three rates."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from parapolicy.spec import PolicySpec

# What a network computes ahead of its forward pass: tensors whose first axis is the step or the batch element.
Embedding = Tensor | tuple[Tensor, ...]


class Network(nn.Module):
    """Predicts noise (or sample, or velocity) from noisy samples, their steps and an observation.

    The work is split by rate: once per schedule, once per chunk, and in every round.
    """

    @classmethod
    def build(cls, spec: PolicySpec, **arguments: Any) -> "Network":
        """A network for a policy, with new weights, on torch's current default device.

        Args:
            spec: the policy's observations, actions and sizes.
            arguments: those of ``spec.network``.

        Raises:
            ValueError, TypeError: arguments or a spec that this network does not support.
        """
        raise NotImplementedError

    def embed_steps(self, timesteps: Tensor) -> Embedding:
        """Compute what depends on the timestep alone, once per schedule: (T,) -> (T, …)."""
        raise NotImplementedError

    def encode_images(self, observation: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """The observation with features (B, To, F) in place of those images that are encoded frame by frame.

        The observation may have any subset of the keys. :meth:`embed_condition` and :meth:`predict` accept images as
        well as features.
        """
        return observation

    @property
    def image_margins(self) -> dict[str, tuple[int, int]]:
        """The most pixels, down and across, by which training may shift each image without showing its edge."""
        return {}

    def embed_condition(self, observation: Mapping[str, Tensor]) -> Embedding:
        """Compute what depends on the observation alone, once per chunk: {key: (B, To, …)}, normalised -> (B, …).

        Images are (B, To, C, H, W), or features from :meth:`encode_images`.
        """
        raise NotImplementedError

    def forward(self, x: Tensor, steps: Embedding, condition: Embedding, step: Tensor, element: Tensor) -> Tensor:
        """The prediction at N noisy samples (N, *sample_shape), of the same shape.

        Args:
            x: noisy samples.
            steps: from :meth:`embed_steps`, (T, …).
            condition: from :meth:`embed_condition`, (B, …).
            step: (N,) int64, each sample's index into ``steps``.
            element: (N,) int64, each sample's index into ``condition``.
        """
        raise NotImplementedError

    def predict(self, x: Tensor, timesteps: Tensor, observation: Mapping[str, Tensor]) -> Tensor:
        """The prediction at B noisy samples (B, …), each with its own timestep (B,) and observation.

        Training and the published samplers call a network in this way.
        """
        entry = torch.arange(x.shape[0], device=x.device)  # unlike len(x), shape[0] stays symbolic in an export
        prediction: Tensor = self(x, self.embed_steps(timesteps), self.embed_condition(observation), entry, entry)
        return prediction


def flatten_observation(observation: Mapping[str, Tensor]) -> Tensor:
    """{key: (B, To, …)} -> (B, To · D): ordered by step, then by key in the mapping's order."""
    parts = [value.flatten(2) if value.ndim > 2 else value[..., None] for value in observation.values()]
    return torch.cat(parts, dim=2).flatten(1)


def flatten_keys(observation: Mapping[str, Tensor]) -> Tensor:
    """{key: (B, To, …)} -> (B, C): ordered by key in the mapping's order, then by step."""
    return torch.cat([value.flatten(1) for value in observation.values()], dim=1)


def overwrite_observed(x: Tensor, observed: Tensor) -> Tensor:
    """x (N, H, Da + Do) with the last Do columns of its first To steps replaced by the observation (N, To, Do)."""
    steps, actions = observed.shape[1], x.shape[2] - observed.shape[2]
    return torch.cat((torch.cat((x[:, :steps, :actions], observed), 2), x[:, steps:]), 1)


def check_condition(spec: PolicySpec, observed: int, condition: Any) -> None:
    """Raise ``ValueError`` unless the spec fits the way in which a network is conditioned.

    Args:
        spec: of the policy.
        observed: numbers of one observed step, Do.
        condition: ``inpaint``: the network overwrites Do columns, which are sampled together with the actions.
            ``local``: it sees observed step i at step i of the sequence. Any other: neither.
    """
    expected = observed if condition == "inpaint" else 0
    if spec.observed_dim != expected:
        raise ValueError(f"observed_dim is {spec.observed_dim}, expected {expected} for condition {condition!r}")
    if condition in ("inpaint", "local") and spec.n_obs_steps > spec.horizon:
        raise ValueError(f"n_obs_steps is {spec.n_obs_steps}, expected at most the horizon, {spec.horizon}")


def embedding_tensors(embedding: Embedding) -> tuple[Tensor, ...]:
    """The embedding's tensors, as a tuple also for a single one."""
    return embedding if isinstance(embedding, tuple) else (embedding,)


def map_embedding(function: Callable[[Tensor], Tensor], embedding: Embedding) -> Embedding:
    """Apply ``function`` to each tensor of an embedding."""
    return tuple(map(function, embedding)) if isinstance(embedding, tuple) else function(embedding)
