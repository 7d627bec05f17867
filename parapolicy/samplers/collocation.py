"""Collocation: ask the network at a few steps of the schedule, and interpolate its estimates in between.

The estimate u of the clean sample is smooth along a path in s = log(alpha² / sigma²), and the schedule is linear in u
and in noise that is known beforehand. The network is asked for u at some steps, the nodes. Between them, u is
interpolated in s, while state and noise are carried through every step exactly. A state of DDPM remembers about one
unit of s, so interpolation errors in early steps are forgotten. Nodes are therefore sparse early and dense at the end.

Where a policy's mean response to its state is known (:class:`parapolicy.schedule.Calibration`), it is subtracted before
interpolating: in modes v = Q^T x, d_j = Q^T u_j - kappa_j v_j is smoother than u_j.
"""

import warnings
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from parapolicy.samplers.base import DenoiserLike, Rounds, Sample, Sampler, check_count, root_mean_square
from parapolicy.schedule import Schedule

NODES = 24
BOUND = 0.01  # largest distance from the policy's distribution, relative to the mean distance between two chunks
ROUNDS = 4  # per node, at most: near a bifurcation a state may oscillate
LOG_SNR = 14.0  # bound of |s|; beyond it nothing changes
EARLY = -7.0  # log-SNR below which a state is noise and the network predicts the mean
# Density of default nodes in s: rising from DENSITY[0] to the sum around s = DENSITY[2], as calibrated nodes lie.
DENSITY = 0.2, 2.0, 1.5


@dataclass(frozen=True)
class Collocation(Sampler):
    """The distribution of the whole schedule from 15 to 40 network evaluations.

    A sample is a draw of the full schedule, up to the interpolation error: close to the sequential chunk of the same
    noise (on Push-T about 1e-3), except where the policy decides between modes. There it may take another mode than the
    sequential sampler. No estimate of a chunk's error is known, so there is no tolerance.

    Attributes:
        nodes: number of steps at which the network is asked, or these steps, increasing and ending with the last one.
            ``auto``: the fewest that keep the policy's distribution, as its calibration has measured.
        window: most nodes asked per round. 1: one node after the other. A few more halve the rounds for a few more
            evaluations; many save rounds where a batch costs little more than one sample.
        settle: a node is asked again when its state has moved since by more than this many standard deviations of the
            noise there.
    """

    uses_calibration: ClassVar[bool] = True

    nodes: int | str | tuple[int, ...] = NODES
    window: int = 3
    settle: float = 0.15

    def __post_init__(self) -> None:
        if isinstance(self.nodes, int):
            check_count("nodes", self.nodes)
        elif self.nodes != "auto":
            nodes: tuple[Any, ...] = tuple(self.nodes)
            whole = all(isinstance(n, int) and not isinstance(n, bool) and n >= 0 for n in nodes)
            if not nodes or not whole or list(nodes) != sorted(set(nodes)):
                raise ValueError(f"nodes is {self.nodes!r}, expected 'auto', their number, or increasing steps from 0")
            object.__setattr__(self, "nodes", nodes)  # lists from a configuration cannot be hashed
        check_count("window", self.window)
        if isinstance(self.settle, bool) or not isinstance(self.settle, int | float) or not 0 < self.settle < 100:
            raise ValueError(f"settle is {self.settle!r}, expected a number above 0, such as 0.15")

    def rounds(self, schedule: Schedule, noise: Tensor, compiled: bool = False) -> "CollocationRounds":
        """The rounds of a batch.

        Raises:
            ValueError: nodes that are not steps of the schedule, or do not end with its last one; ``auto`` without a
                calibration that has measured a number of nodes to keep the distribution.
        """
        return CollocationRounds(self, self.tables(schedule), noise)

    def tables(self, schedule: Schedule) -> "Tables":
        """The tables of a schedule at this sampler's nodes; raises as :meth:`rounds` does."""
        return make_tables(schedule, self._nodes(schedule))

    def _nodes(self, schedule: Schedule) -> tuple[int, ...]:
        steps, calibration, nodes = len(schedule), schedule.calibration, self.nodes
        if isinstance(nodes, str):
            nodes = (calibration and calibration.fewest_nodes(BOUND)) or 0
            if not nodes:
                raise ValueError(
                    "nodes is 'auto', but no number of nodes was measured to keep this policy's distribution; "
                    "run parapolicy calibrate on it, or give a number"
                )
        if isinstance(nodes, int):
            calibrated = {} if calibration is None else calibration.nodes
            return calibrated.get(nodes) or default_nodes(schedule, min(nodes, steps))
        if nodes[-1] != steps - 1:
            raise ValueError(f"nodes end at {nodes[-1]}, expected the schedule's last step, {steps - 1}")
        return nodes


class Tables(NamedTuple):
    """A schedule between nodes: K nodes, T steps, and M modes (S of them, or 1 if all numbers are treated alike).

    Attributes:
        nodes: (K,) int64.
        modes: (S, S), or None if all numbers are treated alike.
        kappa: (K, M) response of u to the state at a node.
        kept: (K, M) 1 - alpha kappa, the factor of a constant u in d.
        response: (K, K, M) what d at node k adds to the state at node n. Lower triangular with a diagonal, because u
            just before a node is interpolated towards that node.
        first: (K, M) what the first state adds to the state at a node.
        noise: (K, T, M) what each step's noise adds to the state at a node.
        sigma: (K,) noise level.
        interpolation: (T, K, M) from d at the nodes to d at every step.
        last: A, B and S of the last step.
    """

    nodes: Tensor
    modes: Tensor | None
    kappa: Tensor
    kept: Tensor
    response: Tensor
    first: Tensor
    noise: Tensor
    sigma: Tensor
    interpolation: Tensor
    last: tuple[float, float, float]


def log_snr(schedule: Schedule) -> Tensor:
    """s = log(alpha² / sigma²) at each step, (T,) float64, within bounds."""
    s = 2 * (schedule.alpha.double().log() - schedule.sigma.double().log())
    return s.clamp(-LOG_SNR, LOG_SNR)


def default_nodes(schedule: Schedule, count: int) -> tuple[int, ...]:
    """Nodes from the log-SNR alone: each new node halves the gap that is widest in units of the target density."""
    s, steps = log_snr(schedule).cpu(), len(schedule)
    level, rise, centre = DENSITY
    s = s.clamp(min=EARLY)
    place = level * s + rise * torch.nn.functional.softplus(s - centre)  # the integral of the density
    first = int((s <= EARLY).sum().clamp(max=steps - 1))
    nodes = [steps - 1] if count == 1 else sorted({first, steps - 1})
    while len(nodes) < count:
        ahead = [-1, *nodes]  # the gap before the first node is filled last
        gaps = [(b - a > 1, float(place[b] - place[max(a, 0)]), a, b) for a, b in zip(ahead, nodes, strict=False)]
        _, _, a, b = max(gaps)
        middle = (place[b] + place[max(a, 0)]) / 2
        nodes = sorted([*nodes, a + 1 + int((place[a + 1 : b] - middle).abs().argmin())])
    return tuple(nodes)


@lru_cache(maxsize=8)
def make_tables(schedule: Schedule, nodes: tuple[int, ...]) -> Tables:
    """The tables of a schedule at these nodes, on the schedule's device."""
    steps, device = len(schedule), schedule.A.device
    A, B, C, S = (table.double().cpu() for table in (schedule.A, schedule.B, schedule.C, schedule.S))
    calibration = None if schedule.multistep else schedule.calibration
    if schedule.calibration is None and len(nodes) < steps:
        warnings.warn(
            f"collocation asks {len(nodes)} of {steps} steps of a schedule without a calibration, so the distance of "
            "its chunks from the policy is unknown; parapolicy.calibrate.with_calibration(policy) measures one",
            stacklevel=2,
        )
    follow = torch.zeros(steps, 1, dtype=torch.float64)
    if calibration is not None:
        follow = calibration.response.double().cpu()
    kappa = torch.where(follow > 0, follow / schedule.alpha.double().cpu()[:, None], 0.0)
    kept = 1 - follow

    weights = torch.zeros(steps, len(nodes), follow.shape[1], dtype=torch.float64)
    s = log_snr(schedule).cpu()
    for j in range(steps):
        k = sum(node <= j for node in nodes) - 1  # the node before or at j
        if k < 0 or k == len(nodes) - 1:
            weights[j, max(k, 0)] = kept[j] / kept[nodes[max(k, 0)]]
            continue
        here, there = nodes[k], nodes[k + 1]
        along = (s[j] - s[here]) / (s[there] - s[here]) if s[there] > s[here] else s.new_zeros(())
        weights[j, k] = (1 - along) * kept[j] / kept[here]
        weights[j, k + 1] = along * kept[j] / kept[there]

    # What a unit added after step j, and a unit of the first state, contribute to the state before step n.
    gain = A[:, None] + B[:, None] * kappa
    added, first = (torch.zeros(steps + 1, steps, gain.shape[1], dtype=torch.float64), torch.ones_like(gain[:1]))
    firsts = [first[0]]
    for j in range(steps):
        added[j + 1] = gain[j] * added[j]
        added[j + 1, j] = 1.0
        firsts.append(gain[j] * firsts[-1])
    of_estimate = added[:steps] * B[:, None]
    of_estimate[:, :-1] += added[:steps, 1:] * C[1:, None]
    at_nodes = list(nodes)
    tables = Tables(
        nodes=torch.tensor(at_nodes),
        modes=None if calibration is None else calibration.modes,
        kappa=kappa[at_nodes],
        kept=kept[at_nodes],
        response=torch.einsum("ntm,tkm->nkm", of_estimate[at_nodes], weights),
        first=torch.stack(firsts)[at_nodes],
        noise=added[at_nodes] * S[:, None],
        sigma=schedule.sigma[at_nodes],
        interpolation=weights,
        last=(float(A[-1]), float(B[-1]), float(S[-1])),
    )
    moved: dict[str, Any] = {
        name: value.to(device, torch.float32 if value.is_floating_point() else value.dtype)
        for name, value in tables._asdict().items()
        if isinstance(value, Tensor)
    }
    return tables._replace(**moved)


class CollocationRounds(Rounds):
    """Rounds of :class:`Collocation` on memory of fixed shapes. A guess saves nothing here and is ignored.

    Args:
        sampler: its parameters.
        tables: of the schedule.
        noise: (T + 1, B, S), for its shape and device.
    """

    fixed_shapes: ClassVar[bool] = True

    def __init__(self, sampler: Collocation, tables: Tables, noise: Tensor) -> None:
        self.settle, self.tables = sampler.settle, tables
        batch, size, count = noise.shape[1], noise.shape[2], len(tables.nodes)
        self.window, self.most = min(sampler.window, count), ROUNDS * count
        self.element = torch.arange(batch, device=noise.device)[:, None]
        self.order = torch.arange(count, 0, -1, device=noise.device)
        # In modes: states from noise alone, current states, states when the network was asked, and d.
        self.free, self.v, self.v_asked, self.d = (noise.new_zeros(batch, count, size) for _ in range(4))
        self.asked = torch.zeros(batch, count, dtype=torch.bool, device=noise.device)
        self.pending = torch.zeros_like(self.asked)
        self.rounds, self.evaluations = (torch.zeros_like(self.element[:, 0]) for _ in range(2))
        self.last_noise, self.final = noise.new_zeros(batch, size), noise.new_zeros(batch, size)
        self.residual = noise.new_zeros(batch)
        self.sparse = not noise.is_cuda  # see SecantRounds

    @property
    def done(self) -> Tensor:
        return ~self.pending.any()

    def begin(self, noise: Tensor, guess: Tensor | None) -> None:
        z = noise if self.tables.modes is None else noise @ self.tables.modes
        self.last_noise.copy_(noise[-1])
        first = self.tables.first * z[0][:, None]
        self.free.copy_(first + _apply(self.tables.noise, z[1:].transpose(0, 1)))
        self.v.copy_(self.free)
        for value in (self.v_asked, self.d, self.rounds, self.evaluations, self.final, self.residual, self.asked):
            value.zero_()
        self.pending.fill_(True)

    def advance(self, denoiser: DenoiserLike) -> None:
        tables, element = self.tables, self.element
        live = self.pending.any(1)
        # The first pending nodes. For an element with fewer, other nodes fill the window and stay unchanged.
        node = (self.pending * self.order).topk(self.window, 1).indices
        chosen = self.pending.gather(1, node)
        v = self.v[element, node]
        u = self._ask(denoiser, v, node, chosen)
        d = u - tables.kappa[node] * v
        keep = chosen[..., None]
        self.d[element, node] = torch.where(keep, d, self.d[element, node])
        self.v_asked[element, node] = torch.where(keep, v, self.v_asked[element, node])
        self.asked[element, node] |= chosen

        # Nodes that were not asked yet hold the mean of the last node that was.
        last = (self.asked * (len(self.order) + 1 - self.order)).amax(1, keepdim=True) - 1
        held = self.d[element, last] / tables.kept[last]
        self.d.copy_(torch.where(self.asked[..., None], self.d, tables.kept * held))
        self.v.copy_(self.free + _apply(tables.response, self.d))
        final = self._final()
        self.residual.copy_(torch.where(live, root_mean_square(final - self.final), self.residual))
        self.final.copy_(final)
        self.rounds.add_(live)
        self.evaluations.add_(chosen.sum(1))
        moved = (self.v - self.v_asked).abs().amax(2) > self.settle * tables.sigma
        self.pending.copy_((moved | ~self.asked) & (self.rounds < self.most)[:, None])

    def result(self) -> Sample:
        complete = ~self.pending.any(1)
        u = _apply(self.tables.interpolation, self.d)
        costs = self.rounds.clone(), self.evaluations.clone(), self.residual.clone()
        return Sample(self.final.clone(), self._from_modes(u), *costs, complete)

    def _ask(self, denoiser: DenoiserLike, v: Tensor, node: Tensor, chosen: Tensor) -> Tensor:
        """u (B, W, S) at states v (B, W, S), both in modes. On a CPU, nodes not chosen are not evaluated and give 0."""
        x = self._from_modes(v).flatten(0, 1)
        # Contiguous: torch.compile would compile again for an expanded tensor.
        step, element = self.tables.nodes[node].flatten(), self.element.expand_as(node).flatten().contiguous()
        if not self.sparse or chosen.all():
            u = denoiser(x, step, element)
        else:
            inside = chosen.flatten().nonzero()[:, 0]
            u = torch.zeros_like(x)
            u[inside] = denoiser(x[inside], step[inside], element[inside])
        return (u if self.tables.modes is None else u @ self.tables.modes).view_as(v)

    def _final(self) -> Tensor:
        """The state after the last step."""
        v = self.v[:, -1]
        u = self.d[:, -1] + self.tables.kappa[-1] * v
        a, b, s = self.tables.last
        return self._from_modes(a * v + b * u) + s * self.last_noise

    def _from_modes(self, v: Tensor) -> Tensor:
        return v if self.tables.modes is None else v @ self.tables.modes.T


def _apply(table: Tensor, values: Tensor) -> Tensor:
    """(N, K, M) and (B, K, S) -> (B, N, S), mode by mode."""
    if table.shape[2] == 1:
        return table[..., 0] @ values
    return torch.einsum("nkm,bkm->bnm", table, values)
