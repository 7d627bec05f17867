"""Networks by name. Other packages add theirs under the entry point ``parapolicy.networks``."""

from importlib.metadata import entry_points
from typing import Any

from parapolicy.networks.base import Embedding, Network, embedding_tensors, flatten_observation, map_embedding
from parapolicy.networks.transformer1d import TransformerForDiffusion
from parapolicy.networks.unet1d import ConditionalUnet1D
from parapolicy.spec import PolicySpec

NETWORKS: dict[str, type[Network]] = {"unet1d": ConditionalUnet1D, "transformer1d": TransformerForDiffusion}

__all__ = [
    "NETWORKS",
    "Embedding",
    "Network",
    "build_network",
    "embedding_tensors",
    "flatten_observation",
    "map_embedding",
]


def build_network(spec: PolicySpec) -> Network:
    """The network named in ``spec.network``, with new weights, on torch's current default device.

    Raises:
        ValueError: an unknown name or argument, or a spec that this network does not support.
    """
    arguments: dict[str, Any] = dict(spec.network)
    name = arguments.pop("name", None)
    try:
        return _find(name).build(spec, **arguments)
    except TypeError as error:
        raise ValueError(f"network arguments {arguments} do not fit {name!r}: {error}") from error


def _find(name: Any) -> type[Network]:
    if name in NETWORKS:
        return NETWORKS[name]
    installed = {entry.name: entry for entry in entry_points(group="parapolicy.networks")}
    if name not in installed:
        raise ValueError(f"network name is {name!r}, expected one of {sorted({*NETWORKS, *installed})}")
    found: type[Network] = installed[name].load()
    return found
