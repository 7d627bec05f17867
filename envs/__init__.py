"""Simulated environments by name. The library never imports them."""

import inspect
from collections.abc import Mapping
from importlib import import_module
from importlib.metadata import entry_points
from typing import Any

import gymnasium

from parapolicy.spec import PolicySpec

# name -> module in this package, class, and the class's options for this name
ENVS: Mapping[str, tuple[str, str, Mapping[str, Any]]] = {
    "pusht": (".pusht", "PushT", {}),
    "pusht_image": (".pusht", "PushT", {}),  # the same: the policy determines the observations
    "lift": (".robomimic", "Robomimic", {"task": "lift"}),
    "can": (".robomimic", "Robomimic", {"task": "can"}),
    "square": (".robomimic", "Robomimic", {"task": "square"}),
    "tool_hang": (".robomimic", "Robomimic", {"task": "tool_hang"}),
    "transport": (".robomimic", "Robomimic", {"task": "transport"}),
    "lift_image": (".robomimic", "Robomimic", {"task": "lift"}),  # the same
    "can_image": (".robomimic", "Robomimic", {"task": "can"}),
    "square_image": (".robomimic", "Robomimic", {"task": "square"}),
    "metaworld": (".metaworld", "MetaWorld", {}),  # any of its tasks: options.task
    "metaworld_assembly": (".metaworld", "MetaWorld", {"task": "assembly"}),
    "metaworld_peg_insert_side": (".metaworld", "MetaWorld", {"task": "peg-insert-side"}),
    "metaworld_push_wall": (".metaworld", "MetaWorld", {"task": "push-wall"}),
    "kitchen": (".kitchen", "Kitchen", {}),
}


def make_env(name: str, spec: PolicySpec, **options: Any) -> gymnasium.Env:
    """An environment whose observation dictionary has exactly the policy's keys, one control step per ``step``.

    An installed package adds environments by entry points of the group ``parapolicy.envs``. Each is a callable
    ``(spec, **options)`` that returns a ``gymnasium.Env``.

    Args:
        name: one of ``ENVS`` or of the entry points.
        spec: the policy's observations and actions.
        options: of the environment; see its class.

    Raises:
        ValueError: an unknown name or option, or the environment does not give the policy's observations.
    """
    if name in ENVS:
        module, attribute, fixed = ENVS[name]
        build = getattr(import_module(module, __name__), attribute)
    else:
        plugins = {entry.name: entry for entry in entry_points(group="parapolicy.envs")}
        if name not in plugins:
            raise ValueError(f"env is {name!r}, expected one of {[*ENVS, *plugins]}")
        build, fixed = plugins[name].load(), {}
    try:
        inspect.signature(build).bind(spec, **fixed, **options)
    except TypeError as error:
        known = [option for option in list(inspect.signature(build).parameters)[1:] if option not in fixed]
        raise ValueError(
            f"env {name} does not have the options {options} ({error}), expected some of {known}"
        ) from error
    steps = options.get("max_episode_steps")
    if steps is not None and not (isinstance(steps, int) and steps >= 1):
        raise ValueError(f"max_episode_steps is {steps!r}, expected a whole number, at least 1")
    env: gymnasium.Env = build(spec, **fixed, **options)
    return env
