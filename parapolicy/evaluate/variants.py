"""The samplers of one evaluation, as a user lists them."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from parapolicy.evaluate.charged import Latency
from parapolicy.policy import Policy
from parapolicy.samplers import Sequential

SCHEDULE_SETTINGS = ("solver", "steps", "eta", "order", "use_clipped_model_output")


@dataclasses.dataclass(frozen=True)
class Variant:
    """A sampler and the loop around it.

    Attributes:
        policy: the weights with this sampler and schedule.
        asynchronous: each chunk is computed while the one before is executed.
        latency: that is charged in closed loop; see :meth:`parapolicy.evaluate.charged.Latency.parse`.
    """

    policy: Policy
    asynchronous: bool
    latency: str


def build_variants(
    policy: Policy, entries: Sequence[str | Mapping[str, Any]], control: str = "sync", latency: str = "none"
) -> dict[str, Variant]:
    """Label -> variant for each entry.

    Args:
        policy: the weights, with their own schedule.
        entries: sampler names, or mappings with ``name``, optionally ``label``, ``warm: true`` to start each chunk
            from the one before, ``control`` and ``latency`` of this entry, the sampler's parameters, and settings of
            :func:`parapolicy.schedule.make_schedule`.
        control: ``sync`` or ``async``.
        latency: that is charged.

    Raises:
        ValueError: no entries, a label twice, or an unknown name, parameter, control or latency.
    """
    if not entries:
        raise ValueError("samplers is empty, expected at least one name, such as samplers=[sequential,semi_implicit]")
    variants: dict[str, Variant] = {}
    for entry in entries:
        parameters: dict[str, Any] = {"name": entry} if isinstance(entry, str) else dict(entry)
        if "name" not in parameters:
            raise ValueError(f"sampler entry {dict(parameters)} has no name; expected {{name: …, label: …, …}}")
        name = parameters.pop("name")
        label = str(parameters.pop("label", name))
        warm = parameters.pop("warm", False)
        loop, charged = parameters.pop("control", control), parameters.pop("latency", latency)
        if loop not in ("sync", "async"):
            raise ValueError(f"control is {loop!r}, expected sync or async")
        Latency.parse(charged)  # what is wrong with it is said now
        schedule = {key: parameters.pop(key) for key in SCHEDULE_SETTINGS if key in parameters}
        if label in variants or not label or "/" in label:
            raise ValueError(f"label is {label!r}, expected a file name that no other entry has; set label: to one")
        base = policy.with_schedule(**schedule) if schedule else policy
        sampled = dataclasses.replace(base.with_sampler(name, **parameters), warm_start=bool(warm))
        variants[label] = Variant(sampled, loop == "async", charged)
    return variants


def find_baseline(policies: Mapping[str, Policy]) -> str | None:
    """The first sequential sampler with the most steps: what the others are compared with."""
    sequential = [label for label, policy in policies.items() if isinstance(policy.sampler, Sequential)]
    return max(sequential, key=lambda label: len(policies[label].schedule), default=None)
