"""Finding the fastest sampler for one policy on one device by measuring, and remembering the result."""

import contextlib
import dataclasses
import json
import math
import statistics
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from parapolicy.digest import digest
from parapolicy.files import cache_folder, replacing
from parapolicy.observation import stack_observations
from parapolicy.policy import Policy
from parapolicy.samplers import Collocation, Sampler, Secant, Sequential, make_sampler
from parapolicy.samplers.base import check_count
from parapolicy.samplers.collocation import BOUND, NODES
from parapolicy.spec import Feature

WINDOWS = (16, 24, 40, 100)
NODE_WINDOWS = (1, 3, 6, 12)  # of collocation
UNMEASURED_NODES = 32  # if no distance from the policy's distribution was measured
FIDELITIES = ("seed", "distribution")
TOLERANCE = 0.015  # on Push-T, the 95th percentile of the chunks' error was within it


@dataclass(frozen=True)
class Plan:
    """The measurements and the choice that follows from them.

    Attributes:
        milliseconds: candidate -> median time of a call; ``sequential``, ``window N`` of the secant sampler, and
            ``collocation N/M`` with N nodes and window M.
        rounds: candidate -> mean rounds.
        tolerance: of the secant sampler when it was measured.
        fidelity, bound: what the candidates preserve; see :func:`make_plan`.
        batch: observations per call.
    """

    milliseconds: dict[str, float]
    rounds: dict[str, float]
    tolerance: float
    fidelity: str = "seed"
    bound: float = BOUND
    batch: int = 1

    @property
    def choice(self) -> str:
        """The candidate with the smallest median."""
        return min(self.milliseconds, key=lambda candidate: self.milliseconds[candidate])

    def apply(self, policy: Policy) -> Policy:
        """The policy with the chosen sampler."""
        candidates = _samplers(policy, self.tolerance, self.fidelity, self.bound)
        return dataclasses.replace(policy, sampler=candidates[self.choice])

    def __str__(self) -> str:
        measured = f"batch {self.batch}, tolerance {self.tolerance:g}"
        lines = [f"{self.choice} is the fastest of what was measured here ({measured}):"]
        for candidate in sorted(self.milliseconds, key=lambda candidate: self.milliseconds[candidate]):
            spent, rounds = self.milliseconds[candidate], self.rounds[candidate]
            lines.append(f"  {candidate:<16} {spent:8.1f} ms  {rounds:6.1f} rounds of {spent / rounds:.1f} ms")
        return "\n".join(lines)


def make_first_sampler(name: str, **parameters: Any) -> Sampler:
    """As :func:`parapolicy.samplers.make_sampler`; for ``auto``, a sampler to use until a plan is made.

    Raises:
        ValueError: an unknown sampler or parameter; ``auto`` takes ``tolerance``, ``fidelity`` and ``bound``.
    """
    if name != "auto":
        return make_sampler(name, **parameters)
    if unknown := sorted(set(parameters) - {"tolerance", "fidelity", "bound"}):
        raise ValueError(f"sampler 'auto' has no parameters {unknown}, only tolerance, fidelity and bound")
    return Secant()


def make_plan(
    policy: Policy,
    observations: Sequence[Mapping[str, Any]] | None = None,
    tolerance: float = TOLERANCE,
    cache: Path | None = None,
    fidelity: str | None = None,
    bound: float = BOUND,
    batch: int = 1,
) -> Plan:
    """Time the sequential sampler and the candidates at several windows, or read the remembered times.

    Args:
        policy: with its engine and device.
        observations: {key: (To, ...)} each; None: made up around the middle of the training data.
        tolerance: of the secant sampler.
        cache: folder of remembered plans, by device, weights, schedule, engine, threads and version of torch; None:
            ``$PARAPOLICY_CACHE`` or else ``~/.cache/parapolicy``. A damaged entry is measured again.
        fidelity: ``distribution``: candidates follow the policy's distribution, but may differ from the sequential
            chunk of the given noise; ``collocation`` is a candidate. ``seed``: candidates give the sequential chunk of
            the given noise, to the tolerance. None: ``distribution`` if the calibration has measured that it is kept
            within the bound, otherwise ``seed``.
        bound: for ``distribution``, the largest energy distance from the policy, relative to the mean distance between
            two of its chunks; see :func:`find_nodes`.
        batch: observations per call, for example robots that are served together.

    Raises:
        ValueError: an unknown fidelity, or a bound or batch out of range.
    """
    if fidelity is not None and fidelity not in FIDELITIES:
        raise ValueError(f"fidelity is {fidelity!r}, expected one of {FIDELITIES}")
    if not 0 < bound < math.inf:
        raise ValueError(f"bound is {bound!r}, expected a number above 0, such as {BOUND}")
    check_count("batch", batch)
    if fidelity is None:
        calibration = policy.schedule.calibration
        kept = calibration is not None and calibration.fewest_nodes(bound) is not None
        fidelity = "distribution" if kept else "seed"
    settings = tolerance, fidelity, float(bound), batch

    def measure() -> Plan:
        return _measure(policy, observations or made_up_observations(policy, 9), *settings)

    try:
        folder = cache or cache_folder()
    except RuntimeError:  # the user has no home folder: nothing is remembered
        return measure()
    path = folder / f"plan-{_key(policy, observations, *settings)}.json"
    try:
        return _read(path, policy, *settings)
    except (OSError, ValueError, TypeError, OverflowError, RecursionError):
        pass
    plan = measure()
    with contextlib.suppress(OSError):  # without a cache, it is measured again next time
        _write(path, plan)
    return plan


def find_nodes(policy: Policy, bound: float = BOUND) -> int | None:
    """The fewest nodes of ``collocation`` that keep the policy's distribution.

    The calibration measures this on held-out chunks: the upper end of the energy distance's interval must be within
    the bound. Without measurements, the result is a cautious number. None: no number of nodes is within the bound.
    """
    calibration = policy.schedule.calibration
    if calibration is None or not calibration.distances:
        return min(UNMEASURED_NODES, len(policy.schedule))
    return calibration.fewest_nodes(bound)


def default_sampler(policy: Policy) -> Sampler:
    """The sampler of a policy that was loaded without a sampler's name.

    It is ``collocation`` if the policy's calibration has measured that its default number of nodes keeps the
    distribution (within :data:`BOUND`), and otherwise ``secant``.
    """
    calibration = policy.schedule.calibration
    measured = {} if calibration is None else calibration.distances
    return Collocation() if measured.get(NODES, math.inf) <= BOUND else Secant()


def _read(path: Path, policy: Policy, tolerance: float, fidelity: str, bound: float, batch: int) -> Plan:
    """A remembered plan; raises ``ValueError`` or ``TypeError`` if its values cannot be measurements."""
    plan = Plan(**json.loads(path.read_text()))
    for values in (plan.milliseconds, plan.rounds):
        if not isinstance(values, dict) or set(values) != set(_samplers(policy, tolerance, fidelity, bound)):
            raise ValueError(f"the plan holds {values!r}, expected a number for each candidate")
        for value in values.values():
            if type(value) not in (int, float) or not 0 < float(value) < math.inf:
                raise ValueError(f"the plan holds {value!r}, expected a positive number")
    found, asked = (plan.tolerance, plan.fidelity, plan.bound, plan.batch), (tolerance, fidelity, bound, batch)
    if found != asked:
        raise ValueError(f"the plan is for {found!r}, expected {asked!r}")
    return dataclasses.replace(plan, tolerance=tolerance)


def _write(path: Path, plan: Plan) -> None:
    """Write a plan whole or not at all: other processes read and write the same entry."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path, uuid.uuid4().hex) as partial:
        partial.write_text(json.dumps(dataclasses.asdict(plan)))


def explain(policy: Policy, tolerance: float = TOLERANCE, fidelity: str | None = None, bound: float = BOUND) -> None:
    """Print which sampler ``load_policy(sampler="auto")`` takes here, and the measurements behind the choice."""
    print(make_plan(policy, tolerance=tolerance, fidelity=fidelity, bound=bound))


def made_up_observations(policy: Policy, count: int) -> list[dict[str, np.ndarray]]:
    """Observations {key: (To, ...)} scattered around the middle of the policy's training data."""
    generator = torch.Generator().manual_seed(0)
    return [
        {key: _made_up(policy, key, feature, generator) for key, feature in policy.spec.observation.items()}
        for _ in range(count)
    ]


def _made_up(policy: Policy, key: str, feature: Feature, generator: torch.Generator) -> np.ndarray:
    shape = policy.spec.obs_steps(key), *feature.shape
    if feature.kind == "image":
        return torch.randint(256, shape, generator=generator, dtype=torch.uint8).numpy()
    normal = 0.3 * torch.randn(shape, generator=generator).to(policy.device)
    return policy.normalizer.unnormalize(key, normal).cpu().numpy()


def _samplers(policy: Policy, tolerance: float, fidelity: str, bound: float) -> dict[str, Sampler]:
    """The candidates; each of them keeps the distribution."""
    steps = len(policy.schedule)
    candidates: dict[str, Sampler] = {"sequential": Sequential()}
    for window in [*(w for w in WINDOWS if w < steps), steps]:
        candidates[f"window {window}"] = Secant(window, tolerance)
    if fidelity == "distribution" and (nodes := find_nodes(policy, bound)) is not None:
        windows = dict.fromkeys(min(window, nodes) for window in NODE_WINDOWS)
        candidates |= {f"collocation {nodes}/{window}": Collocation(nodes, window) for window in windows}
    return candidates


def _measure(
    policy: Policy,
    observations: Sequence[Mapping[str, Any]],
    tolerance: float,
    fidelity: str = "seed",
    bound: float = BOUND,
    batch: int = 1,
) -> Plan:
    samplers = _samplers(policy, tolerance, fidelity, bound)
    candidates = {name: dataclasses.replace(policy, sampler=sampler) for name, sampler in samplers.items()}
    together = [
        stack_observations([observations[(i + k) % len(observations)] for k in range(batch)])
        for i in range(len(observations))
    ]
    for candidate in candidates.values():
        candidate.predict(together[0])
    seconds: dict[str, list[float]] = {name: [] for name in candidates}
    rounds: dict[str, list[float]] = {name: [] for name in candidates}
    for seed, observation in enumerate(together):
        for name, candidate in candidates.items():
            stats = candidate.predict(observation, seed=seed).stats
            seconds[name].append(stats.seconds)
            rounds[name].append(float(stats.rounds.max()))
    milliseconds = {name: 1e3 * statistics.median(values) for name, values in seconds.items()}
    mean = {name: statistics.fmean(values) for name, values in rounds.items()}
    return Plan(milliseconds, mean, tolerance, fidelity, bound, batch)


def _key(
    policy: Policy,
    observations: Sequence[Mapping[str, Any]] | None,
    tolerance: float,
    fidelity: str,
    bound: float,
    batch: int,
) -> str:
    """A digest of everything that a plan depends on."""
    device = torch.cuda.get_device_name(policy.device) if policy.device.type == "cuda" else str(policy.device)
    machine = (device, torch.__version__, torch.get_num_threads())
    solved = (policy.schedule.solver, policy.schedule.timesteps, policy.engine.name, tolerance, fidelity, bound, batch)
    calibration = policy.schedule.calibration if fidelity == "distribution" else None
    kept = [] if calibration is None else [calibration.modes, calibration.response, dict(calibration.nodes)]
    return digest([machine, solved, policy.network.state_dict(), list(observations or ()), kept])[:16]
