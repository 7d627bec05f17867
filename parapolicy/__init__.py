"""parapolicy: a trained Diffusion Policy in real time, all denoising steps in parallel."""

from parapolicy.checkpoint.spec import PolicySpec
from parapolicy.control import Controller, ControlRecord, Pacer
from parapolicy.errors import CheckpointError, DataError, ObservationError
from parapolicy.noise import draw_noise
from parapolicy.observation import ObservationHistory
from parapolicy.planner import Plan, explain, make_plan
from parapolicy.policy import Chunk, ChunkStats, Policy, load_policy, save_policy
from parapolicy.samplers import list_samplers
from parapolicy.warm import WarmState

__all__ = [
    "CheckpointError",
    "Chunk",
    "ChunkStats",
    "ControlRecord",
    "Controller",
    "DataError",
    "ObservationError",
    "ObservationHistory",
    "Pacer",
    "Plan",
    "Policy",
    "PolicySpec",
    "WarmState",
    "draw_noise",
    "explain",
    "list_samplers",
    "load_policy",
    "make_plan",
    "save_policy",
]
