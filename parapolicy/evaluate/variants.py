"""The samplers of one evaluation, as a user lists them."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from parapolicy.policy import Policy
from parapolicy.samplers import Sequential

SCHEDULE_SETTINGS = ("solver", "steps", "eta", "order", "use_clipped_model_output")


def build_variants(policy: Policy, entries: Sequence[str | Mapping[str, Any]]) -> dict[str, Policy]:
    """Label -> policy for each entry.

    Args:
        policy: the weights, with their own schedule.
        entries: sampler names, or mappings with ``name``, optionally ``label``, ``warm: true`` to start each chunk
            from the one before, the sampler's parameters, and settings of :func:`parapolicy.schedule.make_schedule`.

    Raises:
        ValueError: no entries, a label twice, or an unknown name or parameter.
    """
    if not entries:
        raise ValueError("samplers is empty, expected at least one name, such as samplers=[sequential,semi_implicit]")
    variants: dict[str, Policy] = {}
    for entry in entries:
        parameters: dict[str, Any] = {"name": entry} if isinstance(entry, str) else dict(entry)
        if "name" not in parameters:
            raise ValueError(f"sampler entry {dict(parameters)} has no name; expected {{name: …, label: …, …}}")
        name = parameters.pop("name")
        label = str(parameters.pop("label", name))
        warm = parameters.pop("warm", False)
        schedule = {key: parameters.pop(key) for key in SCHEDULE_SETTINGS if key in parameters}
        if label in variants or not label or "/" in label:
            raise ValueError(f"label is {label!r}, expected a file name that no other entry has; set label: to one")
        base = policy.with_schedule(**schedule) if schedule else policy
        variants[label] = dataclasses.replace(base.with_sampler(name, **parameters), warm_start=bool(warm))
    return variants


def find_baseline(variants: Mapping[str, Policy]) -> str | None:
    """The first sequential sampler with the most steps: what the others are compared with."""
    sequential = [label for label, policy in variants.items() if isinstance(policy.sampler, Sequential)]
    return max(sequential, key=lambda label: len(variants[label].schedule), default=None)
