"""The samplers of one evaluation, from the entries of its configuration."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from parapolicy.control.seam import Seam
from parapolicy.evaluate.run.simulated_latency import SimulatedLatency
from parapolicy.policy import Policy

SCHEDULE_SETTINGS = ("solver", "steps", "eta", "order", "use_clipped_model_output")


@dataclasses.dataclass(frozen=True)
class Variant:
    """A sampler and its control loop.

    Attributes:
        policy: the weights with this sampler and schedule.
        asynchronous: each chunk is computed during the execution of the previous one.
        latency: simulated in closed loop, as text for :meth:`SimulatedLatency.parse`.
        seam: how chunks are joined; see :class:`parapolicy.control.seam.Seam`.
    """

    policy: Policy
    asynchronous: bool
    latency: str
    seam: str = "none"

    @property
    def needs_controller(self) -> bool:
        """Whether chunks are not simply executed one after the other."""
        return self.latency != "none" or self.asynchronous or self.seam != "none"


def build_variants(
    policy: Policy,
    entries: Sequence[str | Mapping[str, Any]],
    control: str = "sync",
    latency: str = "none",
    seam: str = "none",
) -> dict[str, Variant]:
    """Build a variant per entry, by label.

    Args:
        policy: the weights, with their own schedule.
        entries: sampler names, or mappings with ``name`` and, optionally, ``label``, ``warm: true`` to start each chunk
            from the previous one, ``control``, ``latency`` and ``seam`` of this entry, the sampler's parameters, and
            settings of :func:`parapolicy.schedule.make_schedule`.
        control: ``sync`` or ``async``, for entries without their own.
        latency: simulated latency, for entries without their own.
        seam: how chunks are joined, for entries without their own.

    Raises:
        ValueError: no entries, a label twice, an unknown name, parameter, control or latency, or a seam that does not
            fit.
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
        loop, simulated = parameters.pop("control", control), parameters.pop("latency", latency)
        if loop not in ("sync", "async"):
            raise ValueError(f"control is {loop!r}, expected sync or async")
        joined = parameters.pop("seam", seam)
        SimulatedLatency.parse(simulated)  # raises an error before the first episode
        Seam(joined, policy.spec, loop == "async")  # also raises
        schedule = {key: parameters.pop(key) for key in SCHEDULE_SETTINGS if key in parameters}
        if label in variants or not label or "/" in label:
            raise ValueError(
                f"label is {label!r}, expected a file name unique among the entries; set the entry's label"
            )
        base = policy.with_schedule(**schedule) if schedule else policy
        sampled = dataclasses.replace(base.with_sampler(name, **parameters), warm_start=bool(warm))
        variants[label] = Variant(sampled, loop == "async", simulated, joined)
    return variants


def entry_label(entry: str | Mapping[str, Any]) -> str:
    """The label of a sampler, from its entry in a configuration."""
    return entry if isinstance(entry, str) else str(entry.get("label", entry["name"]))


def find_baseline(policies: Mapping[str, Policy]) -> str | None:
    """Label of the sampler to compare with: the first sequential one with the most steps."""
    sequential = [label for label, policy in policies.items() if policy.sampler.is_reference]
    return max(sequential, key=lambda label: len(policies[label].schedule), default=None)
