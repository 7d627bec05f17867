"""Measuring a policy's calibration from its own sequential chunks; see :class:`parapolicy.schedule.Calibration`.

It is stored beside the weights, or in the user's cache.
"""

import contextlib
import dataclasses
import json
import math
import os
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from parapolicy.digest import digest
from parapolicy.files import cache_folder, replacing
from parapolicy.observation import stack_observations
from parapolicy.planner import made_up_observations
from parapolicy.policy import Policy
from parapolicy.samplers.base import check_count
from parapolicy.samplers.collocation import log_snr
from parapolicy.schedule import Calibration, Schedule

CHUNKS, BATCH = 60, 30  # sequential chunks measured, and how many per batch
COUNTS = range(8, 41)  # node counts whose nodes are chosen
MODES_FROM, RESPONSE_FROM = 2.4, -0.7  # log-SNR from which modes, and responses, rise above the noise
PAIRS = 3  # earlier steps that each step is compared with
SIGNIFICANT = 2.0  # standard errors
MOST_RESPONSE = 0.98
LONGEST = 0.4  # block between nodes, as a fraction of the schedule
MOST_STEPS = 200  # schedules with more steps do not get nodes by dynamic programming
STATE = 0.05  # weight of a state's error, in standard deviations of its noise, relative to the final sample's
FILE = "calibration.safetensors"
MOST_BYTES = 2**28  # of a calibration's file
ALIKE = 1e-3, 1e-5  # relative and absolute difference up to which two schedules have the same calibration
LEAST_SITUATIONS, LEAST_DRAWS = 8, 32  # of a distance that decides which sampler a policy gets


def with_calibration(policy: Policy, folder: str | os.PathLike[str] | None = None, measure: bool = True) -> Policy:
    """The policy with a calibration: the one beside its weights, else the one in the user's cache, else a new one.

    Args:
        policy: its weights and schedule decide whether a stored calibration fits.
        folder: of the weights; None: look in the cache only.
        measure: False: use only a calibration beside the weights, and otherwise return the policy unchanged.
    """
    beside = None if folder is None else Path(folder) / FILE
    if not measure and (beside is None or not beside.is_file()):
        return policy  # saves the digest, which reads all weights
    of = _key(policy)
    if beside is not None and (found := _read(beside, policy, of)) is not None:
        return attach(policy, found)
    if not measure:
        return policy
    try:
        remembered = cache_folder() / f"calibration-{of[:16]}.safetensors"
    except RuntimeError:  # the user has no home folder
        return attach(policy, calibrate(policy))
    if (found := _read(remembered, policy, of)) is not None:
        return attach(policy, found)
    calibration = calibrate(policy)
    with contextlib.suppress(OSError):  # without a cache, it is measured again next time
        remembered.parent.mkdir(parents=True, exist_ok=True)
        _write(remembered, policy, of, calibration, {})
    return attach(policy, calibration)


def attach(policy: Policy, calibration: Calibration) -> Policy:
    """The policy with this calibration in its schedule."""
    return dataclasses.replace(policy, schedule=dataclasses.replace(policy.schedule, calibration=calibration))


def write_calibration(path: Path, policy: Policy, calibration: Calibration, measured: Mapping[str, Any]) -> None:
    """Write a calibration file, whole or not at all.

    Args:
        policy: the calibrated policy; its weights and schedule are compared at loading.
        measured: results on held-out chunks. ``rows`` give the distances of node counts, unless ``made_up`` says that
            the observations were not recorded; the rest is for people.
    """
    _write(path, policy, _key(policy), calibration, measured)


def _write(path: Path, policy: Policy, of: str, calibration: Calibration, measured: Mapping[str, Any]) -> None:
    about = {"of": of, "nodes": json.dumps(dict(calibration.nodes)), "measured": json.dumps(measured)}
    tensors = {"modes": calibration.modes, "response": calibration.response, "schedule": _tables(policy.schedule)}
    with replacing(path, uuid.uuid4().hex) as partial:
        save_file({name: value.cpu().contiguous() for name, value in tensors.items()}, partial, about)


def _read(path: Path, policy: Policy, of: str) -> Calibration | None:
    """The calibration in a file; None if it is damaged or belongs to other weights or another schedule."""
    try:
        if path.stat().st_size > MOST_BYTES:
            return None
        with safe_open(path, "pt") as file:
            about = file.metadata() or {}
            if about.get("of") != of:
                return None
            nodes = {int(count): tuple(steps) for count, steps in json.loads(about["nodes"]).items()}
            modes, response, tables = (file.get_tensor(name).clone() for name in ("modes", "response", "schedule"))
            found = Calibration(modes, response, nodes, _distances(json.loads(about.get("measured", "{}"))))
    except (
        SafetensorError,
        OSError,
        ValueError,
        KeyError,
        TypeError,
        AttributeError,
        ArithmeticError,
        RecursionError,
        IndexError,
    ):
        return None
    expected, own = (len(policy.schedule), int(np.prod(policy.spec.sample_shape))), _tables(policy.schedule)
    if tuple(found.response.shape) != expected or tables.shape != own.shape or not torch.allclose(tables, own, *ALIKE):
        return None
    return found.to(policy.device)


def _distances(measured: Mapping[str, Any]) -> dict[int, float]:
    """Number of nodes -> upper end of the energy distance over the spread.

    Measurements on made-up observations, in few situations or with few draws do not count.
    """
    if measured.get("made_up", True):
        return {}
    rows = [
        row
        for row in measured.get("rows", ())
        if "nodes" in row and row["situations"] >= LEAST_SITUATIONS and row["draws"] >= LEAST_DRAWS
    ]
    found = {int(row["nodes"]): float(row["energy_ci95"][1]) / float(row["spread"]) for row in rows}
    return {count: distance for count, distance in found.items() if math.isfinite(distance)}


def _key(policy: Policy) -> str:
    """A digest of everything that a calibration depends on, except for the schedule's tables."""
    schedule = policy.schedule
    about = [schedule.prediction, schedule.solver, len(schedule)]
    return digest([policy.network.state_dict(), policy.normalizer.state_dict(), about])


def _tables(schedule: Schedule) -> Tensor:
    """The tables that a calibration depends on, (7, T) float32: equal to some roundings on other processors."""
    names = ("timesteps", "A", "B", "C", "S", "alpha", "sigma")
    return torch.stack([getattr(schedule, name).float().cpu() for name in names])


def calibrate(
    policy: Policy, observations: Sequence[Mapping[str, Any]] | None = None, chunks: int = CHUNKS, seed: int = 0
) -> Calibration:
    """Measure the calibration of a policy on its schedule.

    Args:
        policy: its sampler is ignored.
        observations: {key: (To, …)} each; None: made up around the middle of the training data.
        chunks: number of sequential chunks to draw, over the observations in turn.
        seed: of their noise.

    Raises:
        ValueError: no observation, or ``chunks`` is no count.
    """
    check_count("chunks", chunks)
    given = list(observations) if observations is not None else made_up_observations(policy, chunks)
    if not given:
        raise ValueError("observations is empty, expected at least one observation, or None for made-up ones")
    sequential, states, estimates = policy.with_sampler("sequential"), [], []
    for begin in range(0, chunks, BATCH):
        numbers = range(begin, min(begin + BATCH, chunks))
        batch = stack_observations([given[i % len(given)] for i in numbers])
        chunk = sequential.predict(batch, seed=[seed + i for i in numbers])
        noise, u = chunk.warm_state.noise.flatten(2), chunk.warm_state.estimates.flatten(2)
        estimates.append(u)
        states.append(_path(policy.schedule, noise, u))
    x, u = torch.cat(states).double().cpu(), torch.cat(estimates).double().cpu()
    schedule = dataclasses.replace(policy.schedule.to("cpu"), calibration=None)
    modes, response = _responses(schedule, x, u)
    nodes = {}
    if len(schedule) <= MOST_STEPS:
        cost, first = _block_costs(schedule, modes, response, x, u)
        nodes = {count: _choose(cost, first, count) for count in COUNTS if count <= len(schedule)}
    return Calibration(modes.float(), response.float(), nodes).to(policy.device)


def _path(schedule: Schedule, noise: Tensor, u: Tensor) -> Tensor:
    """The states x_0 … x_{T-1}, (N, T, S), from noise (T + 1, N, S) and estimates u (N, T, S)."""
    x, previous, states = noise[0], torch.zeros_like(noise[0]), []
    for j in range(len(schedule)):
        states.append(x)
        step = torch.full((len(x),), j, device=x.device)
        x, previous = schedule.step(x, u[:, j], previous, noise[j + 1], step), u[:, j]
    return torch.stack(states, 1)


def _responses(schedule: Schedule, x: Tensor, u: Tensor) -> tuple[Tensor, Tensor]:
    """Modes (S, S) and responses (T, S).

    DDPM is Euler's scheme in y = x alpha / sigma², lambda = alpha² / sigma², along which u is a martingale: from step i
    to j, u moves by Sigma_j (y_j - y_i - (lambda_j - lambda_i) u_i), Sigma_j the posterior's covariance. (Stochastic
    localisation; El Alaoui and Montanari, 2022.) Without noise there is nothing to regress on, so responses are 0.
    """
    steps, size = u.shape[1:]
    none = torch.eye(size, dtype=u.dtype), torch.zeros(steps, size, dtype=u.dtype)
    if not schedule.S[:-1].all() or schedule.multistep:
        return none
    alpha, sigma, s = schedule.alpha.double(), schedule.sigma.double(), log_snr(schedule)
    snr = (alpha / sigma) ** 2
    y = x * (alpha / sigma**2)[:, None]

    def changes(j: int) -> tuple[Tensor, Tensor]:
        """Changes of state and estimate up to step j, from each of the ``PAIRS`` steps before it, (n, S) each."""
        moved, followed = [], []
        for i in range(max(0, j - PAIRS), j):
            added = snr[j] - snr[i]
            moved.append((y[:, j] - y[:, i] - added * u[:, i]) / added.sqrt())
            followed.append((u[:, j] - u[:, i]) / added.sqrt())
        return torch.cat(moved), torch.cat(followed)

    total = torch.zeros(size, size, dtype=u.dtype)
    for j in (late := (s >= MODES_FROM).nonzero().flatten().tolist()):
        moved, followed = changes(j)
        products = moved.T @ moved
        ridge = 0.1 * products.diagonal().mean() * torch.eye(size, dtype=u.dtype)
        covariance = torch.linalg.solve(products + ridge, moved.T @ followed)
        total += snr[j] * (covariance + covariance.T) / 2
    if not late:
        return none
    modes = torch.linalg.eigh(total).eigenvectors
    response = none[1]
    for j in (s >= RESPONSE_FROM).nonzero().flatten().tolist():
        moved, followed = (value @ modes for value in changes(j))
        power = moved.square().sum(0)
        slope = (moved * followed).sum(0) / power
        doubt = ((followed - slope * moved).square().sum(0) / power / len(moved) * PAIRS).sqrt()
        response[j] = torch.where(slope > SIGNIFICANT * doubt, slope * snr[j], 0.0).clamp(0, MOST_RESPONSE)
    return modes, response


def _block_costs(schedule: Schedule, modes: Tensor, response: Tensor, x: Tensor, u: Tensor) -> tuple[Tensor, Tensor]:
    """The cost of interpolating between steps a and b, (T, T), and of holding a constant before step n, (T,).

    The cost is the mean squared error of the final sample, by the mean response, plus that of the state at the end of
    the block.
    """
    steps = len(schedule)
    alpha, sigma, s = schedule.alpha.double(), schedule.sigma.double(), log_snr(schedule)
    A, B = schedule.A.double(), schedule.B.double()
    kappa, kept = response / alpha[:, None], 1 - response
    held = ((u @ modes) - kappa * (x @ modes)) / kept  # constant under exact interpolation
    gain = A[:, None] + B[:, None] * kappa
    influence = torch.ones_like(kappa)  # of a state's error on the last step's estimate
    for j in range(steps - 2, -1, -1):
        influence[j] = gain[j] * influence[j + 1]
    influence = influence * kappa[-1]

    def score(n: int, error: Tensor) -> Tensor:
        return (influence[n] * error).square().sum(1).mean() + (STATE * error / sigma[n]).square().mean()

    cost, first = torch.full((steps, steps), torch.inf, dtype=u.dtype), torch.zeros(steps, dtype=u.dtype)
    for a in range(steps - 1):
        # All ends of the block at once: (ends, N, S).
        ends = torch.arange(a + 1, min(a + int(LONGEST * steps), steps - 1) + 1)
        error = torch.zeros(len(ends), *held[:, 0].shape, dtype=u.dtype)
        for j in range(a, int(ends[-1])):
            open_ = ends > j
            along = ((s[j] - s[a]) / (s[ends[open_]] - s[a]))[:, None, None]
            missed = (1 - along) * held[:, a] + along * held[:, ends[open_]].transpose(0, 1) - held[:, j]
            error[open_] = gain[j] * error[open_] + B[j] * kept[j] * missed
        for i, b in enumerate(ends.tolist()):
            cost[a, b] = score(b, error[i])
    for n in range(steps):
        error = torch.zeros_like(held[:, 0])
        for j in range(n):
            error = gain[j] * error + B[j] * kept[j] * (held[:, n] - held[:, j])
        first[n] = score(n, error)
    return cost, first


def _choose(cost: Tensor, first: Tensor, count: int) -> tuple[int, ...]:
    """The ``count`` nodes of least total cost, by dynamic programming."""
    best, before = first, []
    for _ in range(count - 1):
        best, argument = (best[:, None] + cost).min(0)
        before.append(argument)
    nodes = [len(first) - 1]
    for argument in reversed(before):
        nodes.append(int(argument[nodes[-1]]))
    return tuple(reversed(nodes))
