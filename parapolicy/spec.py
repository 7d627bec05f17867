"""The description of a policy, without its weights."""

import dataclasses
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from parapolicy.action_parts import check_parts

KINDS = ("state", "image")
MAX_HORIZON = 10_000  # no weight's shape depends on the horizon, so nothing else bounds it in a damaged config
MIN_HZ = 1e-6
OPTIONAL = {"provenance", "first_action", "observed_dim", "inference", "action_parts"}
MAX_DEPTH = 8  # axes of a shape, and nesting of the free-form parts
MAX_KEY, MAX_TEXT = 100, 2**18  # characters of an observation's key, and of each free-form part as JSON


class Feature(NamedTuple):
    """One observation key.

    Attributes:
        shape: of one control step's value; (H, W, C) for an image.
        kind: ``state``, numbers in the environment's units, or ``image``, uint8 as cameras give them.
        steps: control steps of history of this key, at most the policy's ``n_obs_steps``; None: ``n_obs_steps``.
    """

    shape: tuple[int, ...]
    kind: str = "state"
    steps: int | None = None

    @property
    def tensor_shape(self) -> tuple[int, ...]:
        """Shape of the network's input of one control step: (C, H, W) for images."""
        return (self.shape[2], *self.shape[:2]) if self.kind == "image" else self.shape

    @property
    def normalizer_shape(self) -> tuple[int, ...]:
        """Shape of scale and offset: one pair per number of a state, one per channel of an image."""
        return (self.shape[2], 1, 1) if self.kind == "image" else self.shape


@dataclass(frozen=True)
class PolicySpec:
    """Everything needed to build a policy and to feed it.

    Attributes:
        observation: key -> :class:`Feature`; a plain shape stands for a state. Their order is the order in the
            condition vector.
        n_obs_steps: control steps of observation history (To) of keys without their own number.
        horizon: actions predicted per chunk (H).
        n_action_steps: actions of a chunk that are executed.
        action_dim: length of one action (Da).
        network: ``name`` (see :func:`parapolicy.networks.build_network`) and that network's own arguments.
        scheduler: the config of the diffusers scheduler that the network was trained with.
        control_hz: control rate of the demonstrations, Hz; None: the checkpoint does not say.
        provenance: where the policy comes from; free-form.
        first_action: index in the horizon of the first executed action; None: ``n_obs_steps - 1``, the present.
        observed_dim: observed numbers that are sampled together with each action, for policies conditioned by
            inpainting (Janner et al., ICML 2022).
        inference: the published way to sample the policy: arguments of :func:`parapolicy.schedule.make_schedule`.
        action_parts: the parts of an action, if some of them are rotations that are converted for the robot; see
            :func:`parapolicy.action_parts.check_parts`.

    Raises:
        ValueError: a count is not positive, a feature is malformed, the executed actions exceed the horizon, or the
            free-form parts hold values that JSON does not have.
    """

    observation: Mapping[str, Feature]
    n_obs_steps: int
    horizon: int
    n_action_steps: int
    action_dim: int
    network: Mapping[str, Any]
    scheduler: Mapping[str, Any]
    control_hz: float | None
    provenance: Mapping[str, Any] = field(default_factory=dict)
    first_action: int | None = None
    observed_dim: int = 0
    inference: Mapping[str, Any] = field(default_factory=dict)
    action_parts: Sequence[Mapping[str, Any]] = ()

    def __post_init__(self) -> None:
        for name in ("n_obs_steps", "horizon", "n_action_steps", "action_dim"):
            if not _is_count(getattr(self, name)):
                raise ValueError(f"{name} is {getattr(self, name)!r}, expected a positive whole number")
        for name in ("first_action", "observed_dim"):
            value = getattr(self, name)
            if not (_is_count(value) or (type(value) is int and value == 0) or (name, value) == ("first_action", None)):
                raise ValueError(f"{name} is {value!r}, expected a whole number of at least 0")
        rate = self.control_hz
        number = isinstance(rate, int | float) and not isinstance(rate, bool) and MIN_HZ <= rate <= 1 / MIN_HZ
        if not number and rate is not None:
            raise ValueError(f"control_hz is {rate!r}, expected a rate in Hz from {MIN_HZ:g} to {1 / MIN_HZ:g}")
        if self.horizon > MAX_HORIZON:
            raise ValueError(f"horizon is {self.horizon}, expected at most {MAX_HORIZON}")
        first = self.executed.start
        if self.n_action_steps > self.horizon - first:
            raise ValueError(
                f"n_action_steps is {self.n_action_steps}, expected at most {self.horizon - first}: they begin {first} "
                f"steps into the horizon of {self.horizon}"
            )
        if not isinstance(self.observation, Mapping) or not self.observation or "action" in self.observation:
            raise ValueError(f"observation is {self.observation!r}, expected keys and shapes, none named 'action'")
        features = {key: _feature(key, value, self.n_obs_steps) for key, value in self.observation.items()}
        object.__setattr__(self, "observation", features)
        object.__setattr__(self, "action_parts", check_parts(self.action_parts, self.action_dim))
        for name in ("network", "scheduler", "provenance", "inference"):
            object.__setattr__(self, name, _json_map(name, getattr(self, name)))

    @property
    def sample_shape(self) -> tuple[int, int]:
        """Shape of what is sampled, (H, Da + observed_dim)."""
        return self.horizon, self.action_dim + self.observed_dim

    @property
    def executed(self) -> slice:
        """Which actions of the horizon are executed."""
        first = self.n_obs_steps - 1 if self.first_action is None else self.first_action
        return slice(first, first + self.n_action_steps)

    def require_control_hz(self) -> float:
        """The control rate, Hz; raises ValueError if the checkpoint does not say it."""
        if self.control_hz is None:
            raise ValueError(
                "control_hz is unknown: the checkpoint does not say it. Give the rate of its demonstrations with "
                "control_hz=… of Controller or parapolicy serve, or with parapolicy convert --control-hz"
            )
        return self.control_hz

    def with_control_hz(self, rate: float) -> "PolicySpec":
        """The spec with the control rate, Hz, of its demonstrations; raises ValueError if it has another one."""
        if self.control_hz not in (None, rate):
            raise ValueError(f"control_hz is {rate:g}, but the file says {self.control_hz:g}; leave it out")
        return dataclasses.replace(self, control_hz=rate)

    @property
    def condition_dim(self) -> int:
        """Length C of the condition vector: all observed numbers of all steps."""
        return sum(self.obs_steps(key) * math.prod(feature.shape) for key, feature in self.observation.items())

    def obs_steps(self, key: str) -> int:
        """Control steps of history of one key."""
        steps = self.observation[key].steps
        return self.n_obs_steps if steps is None else steps

    @property
    def obs_shapes(self) -> dict[str, tuple[int, ...]]:
        """Shape (To, …) of the network's input of each key; (To, C, H, W) for images."""
        return {key: (self.obs_steps(key), *feature.tensor_shape) for key, feature in self.observation.items()}

    @property
    def normalizer_shapes(self) -> dict[str, tuple[int, ...]]:
        """Shape of scale and offset of each observation key and of ``"action"``."""
        shapes = {key: feature.normalizer_shape for key, feature in self.observation.items()}
        return {**shapes, "action": (self.action_dim,)}

    def to_dict(self) -> dict[str, Any]:
        """As a dictionary for JSON. Observations are a list, because the keys of a JSON map have no order.

        Rarely used values are left out if they have their default, as in older files.
        """
        features = [
            {"key": k, "shape": list(f.shape), "kind": f.kind} | ({} if f.steps is None else {"steps": f.steps})
            for k, f in self.observation.items()
        ]
        rare: dict[str, Any] = {"first_action": None, "observed_dim": 0, "inference": {}, "action_parts": ()}
        values = {k: v for k, v in dataclasses.asdict(self).items() if k not in rare or v != rare[k]}
        return {**values, "observation": features}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "PolicySpec":
        """The inverse of :meth:`to_dict`; also reads observations as a map of key to shape, as older files have them.

        Raises:
            ValueError: an unknown or missing name, or a value that does not fit.
        """
        names = {f.name for f in dataclasses.fields(cls)}
        unknown, missing = sorted(set(values) - names), sorted(names - set(values) - OPTIONAL)
        if unknown or missing:
            raise ValueError(f"policy spec has unknown keys {unknown} and lacks {missing}; expected {sorted(names)}")
        observation = values["observation"]
        if isinstance(observation, list):
            observation = _features_by_key(observation)
        return cls(**{**values, "observation": observation})


def _features_by_key(entries: Sequence[Any]) -> dict[str, Feature]:
    features: dict[str, Feature] = {}
    for entry in entries:
        known = isinstance(entry, Mapping) and set(entry) - {"steps"} == {"key", "shape", "kind"}
        if not known or not isinstance(entry["key"], str) or entry["key"] in features:
            raise ValueError(f"observation entry is {entry!r}, expected one key, shape and kind for each key")
        features[entry["key"]] = Feature(entry["shape"], entry["kind"], entry.get("steps"))
    return features


def _feature(key: str, value: Any, n_obs_steps: int) -> Feature:
    """A checked feature, from a feature or from the plain shape of a state."""
    shape, kind, steps = value if isinstance(value, Feature) else Feature(value)
    if not isinstance(key, str) or not 1 <= len(key) <= MAX_KEY:
        raise ValueError(f"an observation key is {key!r}, expected text of 1 to {MAX_KEY} characters")
    if kind not in KINDS:
        raise ValueError(f"the kind of observation {key!r} is {kind!r}, expected one of {KINDS}")
    if not isinstance(shape, list | tuple) or len(shape) > MAX_DEPTH or not all(map(_is_count, shape)):
        raise ValueError(f"observation {key!r} has shape {shape!r}, expected at most {MAX_DEPTH} positive sizes")
    if kind == "image" and len(shape) != 3:
        raise ValueError(f"the image {key!r} has shape {shape!r}, expected (height, width, channels)")
    if steps is not None and not (_is_count(steps) and steps <= n_obs_steps):
        raise ValueError(f"observation {key!r} has {steps!r} steps, expected 1 to {n_obs_steps}, n_obs_steps")
    return Feature(tuple(shape), kind, None if steps == n_obs_steps else steps)


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def _json_map(name: str, value: Any) -> dict[str, Any]:
    """A copy with JSON's types: tuples become lists, and diffusers' minus infinity for "no bound" is dropped."""
    if not isinstance(value, Mapping):
        raise ValueError(f"{name} is {value!r}, expected a map")
    plain: dict[str, Any] = _plain(
        name, {k: v for k, v in value.items() if k != "lambda_min_clipped" or v != -math.inf}
    )
    if len(json.dumps(plain)) > MAX_TEXT:
        raise ValueError(f"{name} is longer than {MAX_TEXT} characters of JSON; shorten it")
    return plain


def _plain(name: str, value: Any, depth: int = 0) -> Any:
    if depth > MAX_DEPTH:
        raise ValueError(f"{name} is nested more than {MAX_DEPTH} levels deep; flatten it")
    if isinstance(value, Mapping) and all(isinstance(key, str) for key in value):
        return {key: _plain(name, inner, depth + 1) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(name, inner, depth + 1) for inner in value]
    if value is None or isinstance(value, str | int) or (isinstance(value, float) and math.isfinite(value)):
        return value
    raise ValueError(f"{name} holds {value!r}, expected JSON values: maps, lists, texts, finite numbers, booleans")
