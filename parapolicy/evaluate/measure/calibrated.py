"""The distance of collocation from the whole schedule, on chunks that were not used for its calibration."""

import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from scipy.spatial.distance import pdist

from parapolicy.calibrate import attach, calibrate
from parapolicy.evaluate.measure.chunk_error import normalized_error
from parapolicy.evaluate.measure.fidelity import draw_chunks, paired_energy_distance
from parapolicy.evaluate.measure.statistics import mean_interval
from parapolicy.noise import mix_seeds
from parapolicy.observation import stack_observations
from parapolicy.policy import Policy
from parapolicy.schedule import Calibration

COUNTS = (12, 15, 19, 24, 32)  # measured numbers of nodes
RIVALS = (16,)  # steps of DDIM, measured for comparison
QUANTILES = {"median": 0.5, "p95": 0.95, "p99": 0.99, "max": 1.0}
SITUATIONS = 16  # held-out observations at which distributions are compared
HELD_OUT = 1 << 32  # first seed; calibration uses smaller ones


def measure_calibration(
    policy: Policy, observations: Sequence[Mapping[str, np.ndarray]], chunks: int, draws: int, keep: bool = False
) -> tuple[Calibration, list[dict[str, Any]]]:
    """Calibrate on the first half of the observations, and measure on the second.

    Args:
        policy: with the schedule to calibrate.
        observations: {key: (To, …)} each.
        chunks: number of chunks to calibrate on, and to measure errors on.
        draws: chunks per situation and set of the energy distances.
        keep: measure the policy's existing calibration instead, on all observations, none of which it has seen.

    Returns:
        The calibration, and a record per number of nodes: ``rounds`` and ``evaluations`` (means), ``error`` (quantiles
        of the largest absolute difference from the sequential chunk, normalised), ``energy`` (mean of the paired energy
        distance over situations), ``energy_ci95`` (its interval over situations), ``spread`` (mean distance between
        two sequential chunks), and how many ``situations`` and ``draws`` there were.

    Raises:
        ValueError: too few observations, or ``keep`` without a calibration.
    """
    half = 0 if keep else len(observations) // 2
    if keep and policy.schedule.calibration is None:
        raise ValueError("keep is set, but the policy has no calibration; calibrate it first")
    if len(observations) - half < 1 or (half < 1 and not keep):
        raise ValueError(f"there are {len(observations)} observations, expected at least 2: half are held out")
    if policy.schedule.calibration is not None and keep:
        calibration = policy.schedule.calibration
    else:
        calibration = calibrate(policy, observations[:half], chunks)
    held_out = observations[half:]
    calibrated = attach(policy, calibration)
    counts = {f"{count} nodes": count for count in COUNTS if count <= len(policy.schedule)}
    candidates = {label: calibrated.with_sampler("collocation", nodes=count) for label, count in counts.items()}
    for steps in (steps for steps in RIVALS if policy.schedule.solver == "ddpm" and steps < len(policy.schedule)):
        candidates[f"DDIM-{steps}"] = policy.with_schedule("ddim", steps).with_sampler("sequential")
    sequential = policy.with_sampler("sequential")

    batch = stack_observations([held_out[i % len(held_out)] for i in range(chunks)])
    seeds = [mix_seeds(HELD_OUT, i) for i in range(chunks)]
    reference = sequential.predict(batch, seed=seeds)
    energies: dict[str, list[float]] = {label: [] for label in candidates}
    spread = []
    for i, observation in enumerate(held_out[:: max(1, len(held_out) // SITUATIONS)][:SITUATIONS]):
        noise = [mix_seeds(HELD_OUT + i, k) for k in range(draws)]
        target = draw_chunks(sequential, observation, draws, noise)
        spread.append(float(pdist(target).mean()))
        for label, candidate in candidates.items():
            energies[label].append(paired_energy_distance(draw_chunks(candidate, observation, draws, noise), target))
    rows: list[dict[str, Any]] = []
    for label, candidate in candidates.items():
        chunk = candidate.predict(batch, seed=seeds)
        errors = normalized_error(policy, chunk.trajectory, reference.trajectory)
        rows.append(
            {
                "sampler": label,
                "rounds": float(chunk.stats.rounds.mean()),
                "evaluations": float(chunk.stats.evaluations.mean()),
                "error": {name: float(np.quantile(errors, q)) for name, q in QUANTILES.items()},
                "energy": float(np.mean(energies[label])),
                "energy_ci95": list(mean_interval(energies[label])),
                "spread": float(np.mean(spread)),
                "situations": len(spread),
                "draws": draws,
            }
        )
        if label in counts:
            rows[-1]["nodes"] = counts[label]
    return calibration, rows


def present(rows: Sequence[Mapping[str, Any]]) -> str:
    """The records as a table."""
    head = f"{'held-out chunks':<16}{'rounds':>8}{'evaluations':>13}{'error: median':>15}{'p95':>9}{'p99':>9}{'max':>9}"
    lines = [f"{head}{'energy distance':>33}"]
    for row in rows:
        error, (low, high) = row["error"], row["energy_ci95"]
        cells = "".join(f"{error[name]:>9.1e}" for name in ("p95", "p99", "max"))
        energy = f"{row['energy']:>11.1e} [{low:.1e}, {high:.1e}]"
        lines.append(
            f"{row['sampler']:<16}{row['rounds']:>8.1f}{row['evaluations']:>13.1f}{error['median']:>15.1e}{cells}{energy}"
        )
    return "\n".join(lines)


def read_observations(path: Path) -> list[dict[str, np.ndarray]]:
    """The observations of an ``.npz`` file of arrays {key: (N, To, …)}.

    Raises:
        ValueError: no such file, or arrays of different lengths.
    """
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = {key: file[key] for key in file.files}
    except (OSError, ValueError, zipfile.BadZipFile) as error:
        raise ValueError(
            f"{path} is not an .npz file of observations ({error}), expected arrays {{key: (N, To, …)}}"
        ) from error
    lengths = {len(value) for value in arrays.values()}
    if len(lengths) != 1:
        raise ValueError(f"{path} has arrays of lengths {sorted(lengths)}, expected equal lengths and at least one key")
    return [{key: value[i] for key, value in arrays.items()} for i in range(lengths.pop())]
