"""Sampling inside the published loop over denoising steps, which runs its own code.

The policies of real-stanford and robomimic sample with a loop: draw a state; at each timestep call the network and then
the scheduler's step. Here the loop gets a :class:`ChunkInLoop` instead of its network and scheduler. It still draws the
first state, encodes, conditions and slices. It must do nothing else between the steps; this is checked, because a
guided or constrained step would be another step.
"""

from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from parapolicy.adapters.live import (
    CONDITION,
    WAY_OUT,
    Accelerated,
    Built,
    adopt,
    arguments_of,
    draw_noise_after,
    read_schedule,
)
from parapolicy.adapters.live_networks import describe_network
from parapolicy.networks import Network
from parapolicy.spec import Feature, PolicySpec

CLOSE = 1e-3  # largest difference between our network and the live one, relative to the output
KINDS = {"global_cond": "global", "local_cond": "local", "cond": "cross"}  # argument's name -> kind of condition


class Inpainted(NamedTuple):
    """Known entries of the sample (Janner et al., ICML 2022).

    Attributes:
        mask, values: which entries are known, and their values, (B, H, D).
    """

    mask: Tensor
    values: Tensor

    def observed(self) -> Tensor:
        """The observed steps (B, To, Do): the last columns of the first steps.

        Raises:
            ValueError: other entries are known.
        """
        first = self.mask[0]
        steps, columns = int(first.any(1).sum()), int(first.any(0).sum())
        expected = torch.zeros_like(self.mask)
        expected[:, :steps, self.mask.shape[2] - columns :] = True
        if not torch.equal(expected, self.mask) or columns == self.mask.shape[2]:
            raise ValueError(f"condition_mask is not supported, expected the mask of observed first steps; {WAY_OUT}")
        return self.values[:, :steps, self.mask.shape[2] - columns :]


class View:
    """An object with some of its attributes replaced; the object itself does not change."""

    def __init__(self, of: Any, **replaced: Any) -> None:
        vars(self).update(replaced, _of=of)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._of, name)


class ChunkInLoop:
    """Replaces a loop's scheduler and, by :meth:`predict`, its network, for one chunk.

    Args:
        accelerated: how chunks are sampled.
        network, scheduler: the loop's own.
        inpainted: the known entries of the sample.
    """

    def __init__(
        self, accelerated: Accelerated, network: nn.Module, scheduler: Any, inpainted: Inpainted | None = None
    ) -> None:
        self._accelerated, self._scheduler, self._inpainted = accelerated, scheduler, inpainted
        self._network = getattr(network, "_orig_mod", network)  # the module inside torch.compile
        self._count = self._calls = self._steps = 0
        self._chunk: Tensor | None = None
        self._state: Tensor | None = None
        self._condition: dict[str, Any] = {}
        self.timesteps = torch.zeros(0)

    def set_timesteps(self, count: int, *args: Any, **kwargs: Any) -> None:
        """As the scheduler's method, but keeps only the first and the last timestep."""
        self._scheduler.set_timesteps(count, *args, **kwargs)
        self._count = int(count)
        self.timesteps = self._scheduler.timesteps[[0, -1]]

    def predict(self, *args: Any, **kwargs: Any) -> Tensor:
        """Record the network's arguments for :meth:`step`; returns the first argument."""
        self._condition = arguments_of(self._network.forward, *args, **kwargs)
        state = self._condition.pop("sample")
        self._condition.pop("timestep")
        if self._chunk is not None and not torch.equal(state, self._chunk):
            raise self._other_loop()
        self._state = state
        self._calls += 1
        return state

    def step(
        self, model_output: Tensor, timestep: Tensor, sample: Tensor, generator: Any = None, **options: Any
    ) -> SimpleNamespace:
        """The whole chunk as ``prev_sample``: sampled at the first call, repeated at the second."""
        self._steps += 1
        if self._calls != self._steps or model_output is not self._state or sample is not self._state:
            raise self._other_loop()
        if self._chunk is None:
            chunk = self._sample(sample, generator, options)
            if self._inpainted is not None:
                chunk[self._inpainted.mask] = self._inpainted.values[self._inpainted.mask]
            self._chunk = chunk
        return SimpleNamespace(prev_sample=self._chunk.clone())

    def finish(self) -> None:
        """Raise ``ValueError`` unless the loop ran like the published one."""
        if self._steps != 2:
            raise self._other_loop()

    def _other_loop(self) -> ValueError:
        return ValueError(
            "the policy's loop over denoising steps does more than call its network and its scheduler once per step, "
            f"which is not supported; {WAY_OUT}"
        )

    def _sample(self, first: Tensor, generator: torch.Generator | None, options: dict[str, Any]) -> Tensor:
        kind, condition = self._find_condition()
        scheduler = self._scheduler
        settings = type(scheduler), sorted(map(str, scheduler.config.items())), self._count, sorted(options.items())
        key = settings, kind, condition.shape[1:], first.shape[1:], first.device
        with self._accelerated.built(key, self._network, lambda: self._build(kind, condition, first, options)) as built:
            noise = draw_noise_after(first.float(), built.draws, generator)
            return self._accelerated.sample(built.policy, condition, noise).to(first.dtype)

    def _find_condition(self) -> tuple[str, Tensor]:
        """The kind of the condition, and the condition (B, To, C)."""
        given = dict(self._condition)
        if self._inpainted is not None:
            observed = self._inpainted.observed()
            given["condition_data"] = observed
        if len(given) != 1 or not given.keys() <= {*KINDS, "condition_data"}:
            raise ValueError(
                f"the network is conditioned by {sorted(given)}, expected one of {[*KINDS]} or observed first steps; "
                f"{WAY_OUT}"
            )
        ((name, value),) = given.items()
        return KINDS.get(name, "inpaint"), (value[:, None] if name == "global_cond" else value).detach()

    def _build(self, kind: str, condition: Tensor, first: Tensor, options: dict[str, Any]) -> Built:
        steps, width = condition.shape[1:]
        shape = first.shape[1], first.shape[2]
        config, schedule, draws = read_schedule(self._scheduler, self._count, shape, options)
        network, tensors = describe_network(self._network, kind, shape[0])
        spec = PolicySpec(
            observation={CONDITION: Feature((width,))},
            n_obs_steps=steps,
            horizon=shape[0],
            n_action_steps=1,
            action_dim=shape[1] - width * (kind == "inpaint"),
            network=network,
            scheduler=config,
            control_hz=None,
            first_action=0,
            observed_dim=width * (kind == "inpaint"),
            inference={"steps": self._count, "spacing": "diffusers", **options},
        )
        adopted = adopt(spec, tensors)
        self._compare(adopted, condition, first)
        return Built(self._accelerated.make_policy(spec, adopted, schedule, first.device), draws)

    @torch.inference_mode()
    def _compare(self, network: Network, condition: Tensor, first: Tensor) -> None:
        """Raise ``ValueError`` if our network and the live one differ, at the loop's two timesteps."""
        for timestep in self.timesteps.to(first.device):
            with torch.autocast(first.device.type, enabled=False):
                expected = self._network(first, timestep, **self._condition)
                found = network.predict(first, timestep.expand(len(first)), {CONDITION: condition})
            if not (found - expected).abs().amax() <= CLOSE * expected.abs().amax():
                raise ValueError(
                    f"{type(self._network).__name__} differs from the published network with its settings (in training "
                    f"mode, its dropout is on); {WAY_OUT}"
                )
