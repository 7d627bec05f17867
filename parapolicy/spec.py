"""What a policy is, apart from its weights."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

KINDS = ("state", "image")
MAX_HORIZON = 10_000  # no weight's shape depends on the horizon, so nothing else bounds what a damaged config asks for


class Feature(NamedTuple):
    """One observation key.

    Attributes:
        shape: of one control step's value; (H, W, C) for an image.
        kind: ``state``, numbers in the environment's units, or ``image``, uint8 as cameras give them.
    """

    shape: tuple[int, ...]
    kind: str = "state"

    @property
    def tensor_shape(self) -> tuple[int, ...]:
        """Shape of what the network sees of one control step: images come as (C, H, W)."""
        return (self.shape[2], *self.shape[:2]) if self.kind == "image" else self.shape

    @property
    def normalizer_shape(self) -> tuple[int, ...]:
        """Shape of scale and offset: one pair per number of a state, one per channel of an image."""
        return (self.shape[2], 1, 1) if self.kind == "image" else self.shape


@dataclass(frozen=True)
class PolicySpec:
    """Everything that is needed to build a policy and feed it.

    Attributes:
        observation: key -> :class:`Feature`; a plain shape stands for a state. Their order is the order in the
            condition vector.
        n_obs_steps: control steps of observation history (To).
        horizon: actions predicted per chunk (H).
        n_action_steps: actions of a chunk that are executed, from index ``n_obs_steps - 1`` on.
        action_dim: length of one action (Da).
        network: ``name`` (see :func:`parapolicy.networks.build_network`) and that network's own arguments.
        scheduler: the config of the diffusers scheduler that the network was trained with.
        control_hz: control rate of the demonstrations, Hz.
        provenance: where the policy comes from; free-form.

    Raises:
        ValueError: a count is not positive, a feature is malformed, or the executed actions exceed the horizon.
    """

    observation: Mapping[str, Feature]
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
        features = {key: _feature(key, value) for key, value in self.observation.items()}
        object.__setattr__(self, "observation", features)

    @property
    def sample_shape(self) -> tuple[int, int]:
        """Shape of what is sampled, (H, Da)."""
        return self.horizon, self.action_dim

    @property
    def condition_dim(self) -> int:
        """Length C of the vector of all observed numbers of all steps."""
        return self.n_obs_steps * sum(math.prod(feature.shape) for feature in self.observation.values())

    @property
    def normalizer_shapes(self) -> dict[str, tuple[int, ...]]:
        """Shape of scale and offset of each observation key and of ``"action"``."""
        shapes = {key: feature.normalizer_shape for key, feature in self.observation.items()}
        return {**shapes, "action": (self.action_dim,)}

    def to_dict(self) -> dict[str, Any]:
        """As JSON has it. Observations are a list, because the keys of a JSON map have no order."""
        features = [{"key": k, "shape": list(f.shape), "kind": f.kind} for k, f in self.observation.items()]
        values = {f.name: _plain(getattr(self, f.name)) for f in dataclasses.fields(self) if f.name != "observation"}
        return {"observation": features, **values}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "PolicySpec":
        """The inverse of :meth:`to_dict`; also reads observations as a map of key to shape, as older files have them.

        Raises:
            ValueError: an unknown or missing name, or a value that does not fit.
        """
        names = {f.name for f in dataclasses.fields(cls)}
        unknown, missing = sorted(set(values) - names), sorted(names - set(values) - {"provenance"})
        if unknown or missing:
            raise ValueError(f"policy spec has unknown keys {unknown} and lacks {missing}; expected {sorted(names)}")
        observation = values["observation"]
        if isinstance(observation, list):
            observation = _features_by_key(observation)
        return cls(**{**values, "observation": observation})


def _features_by_key(entries: Sequence[Any]) -> dict[str, Feature]:
    features: dict[str, Feature] = {}
    for entry in entries:
        if not isinstance(entry, Mapping) or set(entry) != {"key", "shape", "kind"} or entry["key"] in features:
            raise ValueError(f"observation entry is {entry!r}, expected one key, shape and kind for each key")
        features[str(entry["key"])] = Feature(entry["shape"], entry["kind"])
    return features


def _feature(key: str, value: Any) -> Feature:
    """A checked feature from one, or from the plain shape of a state."""
    shape, kind = value if isinstance(value, Feature) else (value, "state")
    if kind not in KINDS:
        raise ValueError(f"the kind of observation {key!r} is {kind!r}, expected one of {KINDS}")
    feature = Feature(tuple(int(size) for size in shape), kind)
    if any(size < 1 for size in feature.shape):
        raise ValueError(f"observation {key!r} has shape {feature.shape}, expected positive sizes")
    if kind == "image" and len(feature.shape) != 3:
        raise ValueError(f"the image {key!r} has shape {feature.shape}, expected (height, width, channels)")
    return feature


def _plain(value: Any) -> Any:
    """Mappings and tuples as the dicts and lists of JSON."""
    if isinstance(value, Mapping):
        return {key: _plain(inner) for key, inner in value.items()}
    return [_plain(inner) for inner in value] if isinstance(value, list | tuple) else value
