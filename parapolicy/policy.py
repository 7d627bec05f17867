"""From an observation to an action chunk."""

import dataclasses
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from numbers import Real
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

LONGEST_PAST, LONGEST_AHEAD = 60.0, 86400.0  # seconds; a deadline beyond is one of another clock


@dataclass(frozen=True)
class ChunkStats:
    """The cost of a chunk. All but ``seconds`` are scalars for one observation and arrays (B,) for a batch.

    Attributes:
        rounds: successive batched network calls.
        evaluations: network evaluations.
        residual: root mean square change of the normalised trajectory in its last round.
        complete: False where a deadline ended sampling early.
        error: estimated largest absolute error of the normalised trajectory; None for samplers that do not estimate it.
        rejections: drafted states that a speculative sampler refused; None for the others.
        stages: wall time, in seconds, of ``encode`` (observation and noise to the device, image encoder), ``sample``
            and ``post`` (to actions on the CPU).
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
        """The costs of one element of a batch, as scalars."""
        arrays = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return ChunkStats(**{k: v[element].item() if isinstance(v, np.ndarray) else v for k, v in arrays.items()})


@dataclass(frozen=True)
class Chunk:
    """A predicted action chunk, float32, in the environment's units.

    Attributes:
        actions: the actions to execute, (n_action_steps, Da) or (B, n_action_steps, Da). If ``spec.action_parts`` has
            rotations, they are converted, and Da is smaller.
        trajectory: the whole predicted horizon, (H, Da) or (B, H, Da).
        stats: its cost.
        warm_state: start value for the next ``predict`` of the same episode; the caller keeps it or drops it.
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
        spec: its observations, actions and sizes.
        network, normalizer, schedule: on ``device``.
        sampler: the algorithm that runs the schedule.
        reproducible: make an element's result independent, to the bit on a CPU, of the rest of its batch; pads every
            network call to a multiple of 16 rows.
        max_batch: most states (of all windows together) per network call; None: no limit. Bounds memory.
        engine: how the network is computed.
        warm_start: tells a control loop to pass each chunk's ``warm_state`` to the next one. ``predict`` itself
            starts warm whenever it is given a state.
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

        Without arguments: the schedule that the policy was published with.
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
            noise: (T + 1, B, *spec.sample_shape) from :func:`parapolicy.draw_noise`; None: drawn from ``seed``.
            seed: see :func:`parapolicy.draw_noise`.
            deadline: a time of ``time.monotonic()``, or a function that returns True when time is up. It is checked
                after each round. Once it has passed, the best estimate so far is returned, with its residual. At least
                one round is always run.
            warm: ``warm_state`` of the previous chunk. It saves rounds; the chunk is still a draw for this observation
                alone.
            shift_noise: with a warm state and no ``noise``, keep that state's noise for the control steps where the
                two chunks overlap and draw the rest from ``seed``. Successive chunks then agree where the observations
                do, and need fewer rounds. Each chunk's noise is still N(0, I). False: all noise is fresh, as always
                for samplers that do not reuse noise, such as the speculative one.
            executed: control steps since the observation of the warm state's chunk; None: ``n_action_steps``.
            hold: actions that are known beforehand. The chunk is sampled to fit them and is then not a draw from the
                policy's distribution; see :class:`parapolicy.hold.Hold`. Actions of weight 1 are returned unchanged.
            features: cached features of frames that earlier chunks of the same episodes have seen, one per batch
                element; updated. Cached frames are not encoded again, and each new frame is encoded by itself, also
                in a batch.

        Raises:
            ObservationError: a missing or unknown key, a wrong shape, or a value that is not finite.
            ValueError: noise, seeds, features, a warm state or a hold that do not fit the batch, or ``executed`` beyond
                the horizon.
            FloatingPointError: the computed chunk, in the environment's units, is not finite.
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
                raise ValueError(
                    f"executed is {executed}, expected 0 to {self.spec.horizon - 1}: the chunks must overlap"
                )
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
        if hold is not None:  # exactly, without rounding errors or a schedule's final noise
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
        """A hold in the samplers' form, normalised.

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
        beside = 0, self.spec.observed_dim  # the sample's observed numbers are free
        part, free = functional.pad(value * weight, beside), functional.pad(1 - weight, beside, value=1.0)
        return HeldNumbers(*(numbers.expand(batch, -1, -1).flatten(1) for numbers in (part, free)))

    def _clock(self) -> float:
        """The time after the device has finished its work, seconds."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()


def _stop_function(deadline: float | Callable[[], bool] | None) -> Callable[[], bool] | None:
    if deadline is None:
        return None
    if callable(deadline):
        return deadline
    if isinstance(deadline, bool) or not isinstance(deadline, Real):
        raise ValueError(f"deadline is {deadline!r}, expected a time of time.monotonic(), a function or None")
    left = deadline - time.monotonic()
    if math.isnan(left) or (math.isfinite(left) and not -LONGEST_PAST <= left <= LONGEST_AHEAD):
        raise ValueError(
            f"deadline is {deadline!r}, {left:.0f} s from now; expected a time of time.monotonic(), such as "
            "time.monotonic() + 0.05, at most a minute past or a day ahead, or a function"
        )
    return Deadline(deadline)
