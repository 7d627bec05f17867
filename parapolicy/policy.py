"""From an observation to an action chunk."""

import dataclasses
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from parapolicy.action_parts import convert_actions
from parapolicy.denoiser import Denoiser, check_finite, fill_rows
from parapolicy.engine import Deadline, Eager, Engine
from parapolicy.frame_features import FrameFeatures, encode_frames
from parapolicy.hold import HeldNumbers, Hold
from parapolicy.networks import Network
from parapolicy.noise import draw_noise
from parapolicy.normalizer import Normalizer
from parapolicy.observation import normalize_observation
from parapolicy.samplers import Sampler, make_sampler
from parapolicy.schedule import Schedule, make_schedule
from parapolicy.spec import PolicySpec
from parapolicy.warm import WarmState


@dataclass(frozen=True)
class ChunkStats:
    """What a chunk cost. Each is a scalar for one observation and an array (B,) for a batch, but ``seconds``.

    Attributes:
        rounds: batched network calls, one after the other.
        evaluations: network evaluations.
        residual: root mean square change of the normalised trajectory in its last round.
        complete: False where a deadline ended sampling early.
        error: estimated largest absolute error of the normalised trajectory; None for samplers that do not estimate it.
        rejections: drafted states that a speculative sampler refused; None for the others.
        stages: wall time, in seconds, of ``encode`` (observation and noise to the device), ``sample`` and ``post`` (to
            actions on the CPU).
        seconds: wall time of the whole call.
    """

    rounds: Any
    evaluations: Any
    residual: Any
    complete: Any
    error: Any
    rejections: Any
    stages: dict[str, float]
    seconds: float

    def __getitem__(self, element: int) -> "ChunkStats":
        """One element's costs, of a batch's, as scalars."""
        arrays = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return ChunkStats(**{k: v[element].item() if isinstance(v, np.ndarray) else v for k, v in arrays.items()})


@dataclass(frozen=True)
class Chunk:
    """A predicted action chunk, float32, in the environment's units.

    Attributes:
        actions: those to execute, (n_action_steps, Da) or (B, n_action_steps, Da). Where ``spec.action_parts`` says
            so, their rotations are converted, and Da is less.
        trajectory: the whole predicted horizon, (H, Da) or (B, H, Da).
        stats: what it cost.
        warm_state: what the next ``predict`` of the same episode may start from; the caller keeps it or drops it.
    """

    actions: np.ndarray
    trajectory: np.ndarray
    stats: ChunkStats
    warm_state: WarmState

    def __getitem__(self, element: int) -> "Chunk":
        """One element of a batch, without its batch axis."""
        state = self.warm_state[element]
        return Chunk(self.actions[element], self.trajectory[element], self.stats[element], state)


@dataclass(frozen=True)
class Policy:
    """A trained Diffusion Policy (Chi et al., RSS 2023) with a schedule and a sampler.

    Attributes:
        spec: what it takes and gives.
        network, normalizer, schedule: on ``device``.
        sampler: how the schedule is run.
        reproducible: make an element's result independent, to the bit on a CPU, of the batch it is computed in; fills
            every network call up to a multiple of 16 rows.
        max_batch: most states (of all windows together) per network call; None: no limit. Bounds memory.
        engine: how the network is computed.
        warm_start: a control loop should hand each chunk's ``warm_state`` to the next one. ``predict`` itself
            starts warm wherever it is given a state.
    """

    spec: PolicySpec
    network: Network
    normalizer: Normalizer
    schedule: Schedule
    sampler: Sampler
    device: torch.device
    reproducible: bool = False
    max_batch: int | None = None
    engine: Engine = field(default_factory=Eager)
    warm_start: bool = False

    def __post_init__(self) -> None:
        if self.max_batch is not None and self.max_batch < 1:
            raise ValueError(f"max_batch is {self.max_batch}, expected at least 1, or None for no limit")

    def with_sampler(self, name: str, **parameters: Any) -> "Policy":
        """The same weights with another sampler; see :func:`parapolicy.samplers.make_sampler`."""
        return dataclasses.replace(self, sampler=make_sampler(name, **parameters))

    def with_schedule(self, solver: str | None = None, steps: int | None = None, **settings: Any) -> "Policy":
        """The same weights with another solver or number of steps; see :func:`parapolicy.schedule.make_schedule`.

        Without arguments, the schedule that the policy was published with.
        """
        given = {k: v for k, v in {"solver": solver, "steps": steps, **settings}.items() if v is not None}
        settings = given or dict(self.spec.inference)
        schedule = make_schedule(self.spec.scheduler, sample_shape=self.spec.sample_shape, **settings)
        return dataclasses.replace(self, schedule=schedule.to(self.device))

    @torch.inference_mode()
    def predict(
        self,
        observation: Mapping[str, Any],
        noise: Tensor | np.ndarray | None = None,
        seed: int | Sequence[int] = 0,
        deadline: float | Callable[[], bool] | None = None,
        warm: WarmState | None = None,
        shift_noise: bool = True,
        executed: int | None = None,
        hold: Hold | None = None,
        features: Sequence[FrameFeatures] | None = None,
    ) -> Chunk:
        """Sample one action chunk per observation history.

        Args:
            observation: {key: (To, ...)} or {key: (B, To, ...)}: states in the environment's units; images as uint8
                (…, height, width, channels), or as floats from 0 to 1 (…, channels, height, width).
            noise: (T + 1, B, *spec.sample_shape) as :func:`parapolicy.draw_noise` gives it; None: drawn from ``seed``.
            seed: see :func:`parapolicy.draw_noise`.
            deadline: a time of ``time.monotonic()``, or a function that returns True when time is up. It is looked at
                after each round; when it has passed, the best estimate so far is returned, with its residual. One
                round is always run, however late it is.
            warm: ``warm_state`` of the chunk before. It saves rounds; the chunk is still a draw for this observation
                alone.
            shift_noise: with a warm state and no ``noise``, keep that state's noise for the control steps where the
                two chunks overlap and draw the rest from ``seed``: consecutive chunks then agree where the observations
                do, and need fewer rounds. Each chunk's noise is still N(0, I). False: all noise is fresh, as it always
                is for samplers that do not reuse noise, such as the speculative one.
            executed: control steps since the observation of the warm state's chunk; None: ``n_action_steps``.
            hold: actions that are known beforehand. The chunk is then sampled beside them, and no longer a draw from
                the policy's distribution; see :class:`parapolicy.hold.Hold`. Those of weight 1 come out as they are.
            features: of the frames that earlier chunks of the same episodes have seen, one per batch element; changed.
                Frames found there are not encoded again, and each of the others is encoded by itself, in a batch, too.

        Raises:
            ObservationError: a missing or unknown key, a wrong shape, or a value that is not finite.
            ValueError: noise, seeds, a warm state or a hold that do not fit the batch, or ``executed`` beyond the
                horizon.
            FloatingPointError: the computed chunk is not finite, in the environment's units.
        """
        begin = time.perf_counter()
        inputs, batched = normalize_observation(self.spec, self.normalizer, observation)
        batch = len(next(iter(inputs.values())))
        expected = (len(self.schedule) + 1, batch, *self.spec.sample_shape)
        executed = self.spec.n_action_steps if executed is None else executed
        if warm is not None:
            if not isinstance(warm, WarmState):
                raise ValueError(f"warm is a {type(warm).__name__}, expected the chunk's warm_state, or None")
            warm.check(expected)
            if not 0 <= executed < self.spec.horizon:
                raise ValueError(f"executed is {executed}, expected 0 to {self.spec.horizon - 1}: the chunks overlap")
        if noise is None:
            noise = draw_noise(self.schedule, batch, seed)
            if noise.shape[1] != batch:
                raise ValueError(f"there are {noise.shape[1]} seeds, expected one, or {batch}: one per observation")
            if warm is not None and shift_noise and self.sampler.reuses_noise:
                noise = warm.shift_noise(noise, executed)
        noise = torch.as_tensor(noise)
        if tuple(noise.shape) != expected:
            raise ValueError(f"noise has shape {tuple(noise.shape)}, expected {expected}: (T + 1, B, *sample_shape)")
        if features is not None:
            frames = observation if batched else {key: value[None] for key, value in observation.items()}
            inputs = encode_frames(self.network, inputs, frames, features)
        if self.reproducible:
            inputs = {key: fill_rows(value) for key, value in inputs.items()}
        guess = None if warm is None else warm.guess(executed).to(self.device).flatten(2)
        noise = noise.to(self.device, torch.float32)
        used, held = noise.flatten(2), None if hold is None or hold.empty else self._held_numbers(hold, batch)
        if held is not None:
            used = torch.cat((held.first_state(used[0], self.schedule)[None], used[1:]))
        stop = _stop_function(deadline)
        with self.engine.exclusive():
            evaluate = self.engine.bind(self.network, self.schedule.timesteps, inputs)
            shape = self.spec.sample_shape
            denoiser = Denoiser(evaluate, self.schedule, shape, self.reproducible, self.max_batch, held)
            encoded = self._clock()
            sample = self.engine.run(self.sampler, denoiser, used, stop, guess)
            sampled = self._clock()

        actions_normalised = sample.x.unflatten(1, self.spec.sample_shape)[..., : self.spec.action_dim]
        actions_in_units = self.normalizer.unnormalize("action", actions_normalised)
        check_finite(actions_in_units, "action chunk")
        trajectory = actions_in_units.cpu().numpy()
        if hold is not None:  # free of roundings, and of the noise that some schedules end with
            trajectory = np.where((hold.weights == 1)[..., None], hold.actions, trajectory)
        actions = convert_actions(self.spec.action_parts, trajectory[:, self.spec.executed])
        names = ("rounds", "evaluations", "residual", "complete", "error", "rejections")
        costs = {k: None if (cost := getattr(sample, k)) is None else cost.cpu().numpy() for k in names}
        state = WarmState(sample.u.unflatten(2, self.spec.sample_shape), noise)
        end = time.perf_counter()
        stages = {"encode": encoded - begin, "sample": sampled - encoded, "post": end - sampled}
        stats = ChunkStats(**costs, stages=stages, seconds=end - begin)
        chunk = Chunk(actions, trajectory, stats, state)
        return chunk if batched else chunk[0]

    def _held_numbers(self, hold: Hold, batch: int) -> HeldNumbers:
        """A hold as samplers see it.

        Raises:
            ValueError: it does not fit the batch.
        """
        expected = self.spec.horizon, self.spec.action_dim
        if hold.actions.shape not in (expected, (batch, *expected)):
            raise ValueError(f"held actions have shape {hold.actions.shape}, expected {expected} or {batch} of them")
        value = self.normalizer.normalize("action", torch.tensor(hold.actions, device=self.device))
        if self.schedule.clip is not None:
            value = value.clamp(-self.schedule.clip, self.schedule.clip)
        weight = torch.tensor(hold.weights, device=self.device)[..., None].expand_as(value)
        beside = 0, self.spec.observed_dim  # observed numbers of the sample are free
        part, free = functional.pad(value * weight, beside), functional.pad(1 - weight, beside, value=1.0)
        return HeldNumbers(*(numbers.expand(batch, -1, -1).flatten(1) for numbers in (part, free)))

    def _clock(self) -> float:
        """Now, with the device's work done."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()


def _stop_function(deadline: float | Callable[[], bool] | None) -> Callable[[], bool] | None:
    if deadline is None:
        return None
    if callable(deadline):
        return deadline
    if math.isnan(deadline):
        raise ValueError("deadline is nan, expected a time of time.monotonic() or a function")
    return Deadline(deadline)
