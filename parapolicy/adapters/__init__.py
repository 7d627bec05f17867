"""Live objects of other libraries, which keep their interface and are sampled by this one."""

from parapolicy.adapters.live_lerobot import accelerate, restore

__all__ = ["accelerate", "restore"]
