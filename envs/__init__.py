"""Simulated environments by name. The library never imports them."""

from collections.abc import Mapping
from importlib import import_module
from importlib.metadata import entry_points
from typing import Any

import gymnasium

from parapolicy.spec import PolicySpec

# name -> module, class, and the class's options for this name
ENVS: Mapping[str, tuple[str, str, Mapping[str, Any]]] = {
    "pusht": ("envs.pusht", "PushT", {}),
    "lift": ("envs.robomimic", "Robomimic", {"task": "lift"}),
    "can": ("envs.robomimic", "Robomimic", {"task": "can"}),
    "square": ("envs.robomimic", "Robomimic", {"task": "square"}),
    "tool_hang": ("envs.robomimic", "Robomimic", {"task": "tool_hang"}),
    "transport": ("envs.robomimic", "Robomimic", {"task": "transport"}),
}


def make_env(name: str, spec: PolicySpec, **options: Any) -> gymnasium.Env:
    """An environment whose observation dictionary has exactly the policy's keys, one control step per ``step``.

    An installed package adds environments by entry points of the group ``parapolicy.envs``. Each is a callable
    ``(spec, **options)`` that returns a ``gymnasium.Env``.

    Args:
        name: one of ``ENVS`` or of the entry points.
        spec: what the policy observes and does.
        options: of the environment; see its class.

    Raises:
        ValueError: an unknown name, or the environment does not give the policy's observations.
    """
    if name in ENVS:
        module, attribute, fixed = ENVS[name]
        env: gymnasium.Env = getattr(import_module(module), attribute)(spec, **fixed, **options)
        return env
    plugins = {entry.name: entry for entry in entry_points(group="parapolicy.envs")}
    if name not in plugins:
        raise ValueError(f"env is {name!r}, expected one of {[*ENVS, *plugins]}")
    env = plugins[name].load()(spec, **options)
    return env
