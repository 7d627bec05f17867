"""Simulated environments, by name. The library never imports them."""

from typing import Any

import gymnasium

from parapolicy.checkpoint.spec import PolicySpec

ENVS = ("pusht", "lift", "can", "square", "tool_hang", "transport")


def make_env(name: str, spec: PolicySpec, **options: Any) -> gymnasium.Env:
    """An environment whose observation dictionary has exactly the policy's keys, one control step per ``step``.

    Args:
        name: one of ``ENVS``.
        spec: what the policy observes and does.
        options: the environment's own; see its class.

    Raises:
        ValueError: an unknown name, or observations that this environment does not give.
    """
    if name == "pusht":
        from envs.pusht import PushT

        return PushT(spec, **options)
    if name in ENVS:
        from envs.robomimic import Robomimic

        return Robomimic(spec, name, **options)
    raise ValueError(f"env is {name!r}, expected one of {list(ENVS)}")
