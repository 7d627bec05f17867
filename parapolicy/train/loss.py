"""The loss of one training step, and of held-out demonstrations."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from parapolicy.compiling import Compiling
from parapolicy.networks import Network
from parapolicy.noise import mix_seeds
from parapolicy.normalizer import Normalizer
from parapolicy.schedule import make_scheduler
from parapolicy.spec import PolicySpec

HELD_OUT = 2**32  # step numbers of held-out batches, beyond any of training


class Loss:
    """The mean squared error of the network's prediction on a step's batch, plus that of camera features on targets.

    Args:
        spec: of the policy.
        network: in training, on ``device``.
        normalizer: of the observed and target keys and ``"action"``.
        arrays: key -> (N, ...), in the environment's units; images (N, H, W, C) uint8.
        targets: key of recorded numbers -> camera whose features are trained to equal them, normalised.
        seed: of every draw.
        batch_size: windows per step.
        compile: compile everything after the cameras' encoders with ``torch.compile``.
        bfloat16: use autocast to bfloat16.
        target_weight: weight of the targets' error.
        device: of the network.
    """

    def __init__(
        self,
        spec: PolicySpec,
        network: Network,
        normalizer: Normalizer,
        arrays: Mapping[str, Tensor],
        *,
        targets: Mapping[str, str],
        seed: int,
        batch_size: int,
        compile: bool,
        bfloat16: bool,
        target_weight: float,
        device: torch.device,
    ) -> None:
        self.spec, self.network, self.device = spec, network, device
        self.targets, self.target_weight = targets, target_weight
        self.seed, self.batch_size, self.bfloat16 = seed, batch_size, bfloat16
        self.scheduler = make_scheduler(spec.scheduler, "ddpm")
        self.predict = Compiling(network.predict) if compile else network.predict
        self.margins = network.image_margins
        self.normalizer = normalizer.to(device)
        # Images stay in their file, as bytes; everything else is small.
        self.images = {key: arrays[key] for key, feature in spec.observation.items() if feature.kind == "image"}
        self.states = {
            key: normalizer.normalize(key, arrays[key]).to(device)
            for key in [*spec.observation, *targets, "action"]
            if key not in self.images
        }

    def __call__(self, step: int, windows: Tensor, targets_alone: bool = False) -> dict[str, Tensor]:
        """The terms of the loss of one step: ``loss``, their sum, ``noise`` and ``target``.

        Args:
            step: number of the step, which seeds the draws.
            windows: (M, H) indices of steps, from :meth:`parapolicy.train.data.Demonstrations.windows`.
            targets_alone: train only the cameras, on the targets and a window's newest step.
        """
        generator = torch.Generator().manual_seed(mix_seeds(self.seed, step))
        batch = torch.randint(len(windows), (self.batch_size,), generator=generator)
        rows = windows[batch]  # (B, H)
        action = self.states["action"][rows.to(self.device)]
        noise = torch.randn(action.shape, generator=generator).to(self.device)
        count = self.scheduler.config.num_train_timesteps
        timestep = torch.randint(count, (len(action),), generator=generator).to(self.device)
        now = self.spec.n_obs_steps
        newest = rows[:, now - 1 : now]  # a window's frames are similar: one is enough for the targets
        observation = {
            key: self._observed(
                key, newest if targets_alone else rows[:, now - self.spec.obs_steps(key) : now], generator
            )
            for key in self.spec.observation
        }
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.bfloat16):
            encoded = self.network.encode_images(observation)
        terms = {}
        if self.targets:
            errors = [self._target_error(key, encoded[camera], rows) for key, camera in self.targets.items()]
            terms["target"] = self.target_weight * torch.stack(errors).mean()
        if not targets_alone:
            noisy = self.scheduler.add_noise(action, noise, timestep)
            with torch.autocast(self.device.type, torch.bfloat16, enabled=self.bfloat16):
                prediction = self.predict(noisy, timestep, dict(encoded))
            terms["denoising"] = functional.mse_loss(prediction.float(), self._wanted(action, noise, timestep))
        return {"loss": torch.stack([*terms.values()]).sum() if len(terms) > 1 else next(iter(terms.values())), **terms}

    @torch.no_grad()
    def held_out(self, windows: Tensor, batches: int) -> dict[str, float]:
        """The mean of each term over ``batches`` fixed batches, with images as at evaluation."""
        margins, self.margins = self.margins, {}
        try:
            terms = [self(HELD_OUT + i, windows) for i in range(batches)]
        finally:
            self.margins = margins
        return {name: float(np.mean([term[name].item() for term in terms])) for name in terms[0]}

    def _observed(self, key: str, rows: Tensor, generator: torch.Generator) -> Tensor:
        """The network's input of one key at steps (B, To)."""
        if key not in self.images:
            return self.states[key][rows.to(self.device)]
        pictures = self.images[key][rows]  # (B, To, H, W, C)
        if margin := self.margins.get(key):
            pictures = shift(pictures, margin, generator)
        return self.normalizer.normalize(key, pictures.to(self.device).movedim(-1, -3) / 255)

    def _target_error(self, key: str, features: Tensor, rows: Tensor) -> Tensor:
        now = self.spec.n_obs_steps
        wanted = self.states[key][rows[:, now - features.shape[1] : now].to(self.device)].flatten(2)
        return functional.mse_loss(features.float(), wanted)

    def _wanted(self, action: Tensor, noise: Tensor, timestep: Tensor) -> Any:
        match self.scheduler.config.prediction_type:
            case "epsilon":
                return noise
            case "sample":
                return action
            case _:
                return self.scheduler.get_velocity(action, noise, timestep)


def shift(pictures: Tensor, margin: tuple[int, int], generator: torch.Generator) -> Tensor:
    """Shift images (B, To, H, W, C) by up to ``margin`` pixels down and across, equally within a window.

    Edges are repeated where nothing moves in. A centre crop that leaves this margin does not see them: it becomes a
    crop at a random place.
    """
    batch, _, height, width, _ = pictures.shape
    down, across = (torch.randint(-most, most + 1, (batch, 1), generator=generator) for most in margin)
    y = (torch.arange(height) + down).clamp(0, height - 1)  # (B, H)
    x = (torch.arange(width) + across).clamp(0, width - 1)
    window = torch.arange(batch)[:, None, None, None]
    step = torch.arange(pictures.shape[1])[None, :, None, None]
    return pictures[window, step, y[:, None, :, None], x[:, None, None, :]]
