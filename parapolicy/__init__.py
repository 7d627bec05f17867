"""parapolicy: a trained Diffusion Policy in real time, all denoising steps in parallel."""

from parapolicy.adapters import accelerate, restore
from parapolicy.control import Controller, ControlRecord, Pacer
from parapolicy.errors import CheckpointError, DataError, ObservationError
from parapolicy.loading import load_policy, save_policy
from parapolicy.noise import draw_noise
from parapolicy.observation import ObservationHistory
from parapolicy.planner import Plan, explain, make_plan
from parapolicy.policy import Chunk, ChunkStats, Policy
from parapolicy.samplers import list_samplers
from parapolicy.spec import Feature, PolicySpec
from parapolicy.warm import WarmState

__all__ = [
    "CheckpointError",
    "Chunk",
    "ChunkStats",
    "ControlRecord",
    "Controller",
    "DataError",
    "Feature",
    "ObservationError",
    "ObservationHistory",
    "Pacer",
    "Plan",
    "Policy",
    "PolicySpec",
    "WarmState",
    "accelerate",
    "draw_noise",
    "explain",
    "list_samplers",
    "load_policy",
    "make_plan",
    "restore",
    "save_policy",
]
