"""What a policy is, apart from its weights."""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from parapolicy.networks import ConditionalUnet1D

NETWORKS = {"unet1d": ConditionalUnet1D}
MAX_HORIZON = 10_000  # no weight's shape depends on the horizon, so nothing else bounds what a damaged config asks for


@dataclass(frozen=True)
class PolicySpec:
    """Everything that is needed to build a policy and feed it.

    Attributes:
        observation: key -> shape of one control step's value. Their order is the order in the condition vector.
        n_obs_steps: control steps of observation history (To).
        horizon: actions predicted per chunk (H).
        n_action_steps: actions of a chunk that are executed, from index ``n_obs_steps - 1`` on.
        action_dim: length of one action (Da).
        network: ``name`` (one of ``NETWORKS``) and that class's keyword arguments.
        scheduler: the config of the diffusers scheduler that the network was trained with.
        control_hz: control rate of the demonstrations, Hz.
        provenance: where the policy comes from; free-form.

    Raises:
        ValueError: a count is not positive, or the executed actions do not fit into the horizon.
    """

    observation: Mapping[str, tuple[int, ...]]
    n_obs_steps: int
    horizon: int
    n_action_steps: int
    action_dim: int
    network: Mapping[str, Any]
    scheduler: Mapping[str, Any]
    control_hz: float
    provenance: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in ("n_obs_steps", "horizon", "n_action_steps", "action_dim"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ValueError(f"{name} is {value!r}, expected a positive whole number")
        if not isinstance(self.control_hz, int | float) or not self.control_hz > 0:
            raise ValueError(f"control_hz is {self.control_hz!r}, expected a positive rate in Hz")
        if self.horizon > MAX_HORIZON:
            raise ValueError(f"horizon is {self.horizon}, expected at most {MAX_HORIZON}")
        most = self.horizon - (self.n_obs_steps - 1)
        if self.n_action_steps > most:
            raise ValueError(
                f"n_action_steps is {self.n_action_steps}, expected at most {most}: they begin "
                f"{self.n_obs_steps - 1} steps into the horizon of {self.horizon}"
            )
        if not self.observation or "action" in self.observation:
            raise ValueError(f"observation keys are {list(self.observation)}, expected some, none named 'action'")
        shapes = {key: tuple(int(size) for size in shape) for key, shape in self.observation.items()}
        if any(size < 1 for shape in shapes.values() for size in shape):
            raise ValueError(f"observation shapes are {shapes}, expected positive sizes")
        object.__setattr__(self, "observation", shapes)

    @property
    def condition_dim(self) -> int:
        """Length C of the condition vector: all observation values of all steps."""
        return self.n_obs_steps * sum(torch.Size(shape).numel() for shape in self.observation.values())

    def to_dict(self) -> dict[str, Any]:
        return {f.name: _plain(getattr(self, f.name)) for f in dataclasses.fields(self)}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "PolicySpec":
        """The inverse of :meth:`to_dict`; unknown and missing names are errors."""
        names = {f.name for f in dataclasses.fields(cls)}
        unknown, missing = sorted(set(values) - names), sorted(names - set(values) - {"provenance"})
        if unknown or missing:
            raise ValueError(f"policy spec has unknown keys {unknown} and lacks {missing}; expected {sorted(names)}")
        return cls(**values)

    def build_network(self) -> ConditionalUnet1D:
        """The network with fresh weights, on torch's current default device.

        Raises:
            ValueError: unknown network name or argument, or a horizon that the network cannot halve.
        """
        arguments = dict(self.network)
        name = arguments.pop("name", None)
        if name not in NETWORKS:
            raise ValueError(f"network name is {name!r}, expected one of {sorted(NETWORKS)}")
        try:
            network = NETWORKS[name](input_dim=self.action_dim, global_cond_dim=self.condition_dim, **arguments)
        except TypeError as error:
            raise ValueError(f"network arguments {arguments} do not fit {name!r}: {error}") from error
        if self.horizon % network.horizon_multiple:
            raise ValueError(f"horizon is {self.horizon}, {name!r} takes multiples of {network.horizon_multiple}")
        return network


def _plain(value: Any) -> Any:
    """Mappings and tuples as the dicts and lists of JSON."""
    if isinstance(value, Mapping):
        return {key: _plain(inner) for key, inner in value.items()}
    return [_plain(inner) for inner in value] if isinstance(value, list | tuple) else value
