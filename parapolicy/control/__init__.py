"""The real-time loop around a policy."""

from parapolicy.control.clock import Pacer, SimulatedClock
from parapolicy.control.controller import Controller
from parapolicy.control.latency import ChunkRecord, ControlRecord, Histogram

__all__ = ["ChunkRecord", "ControlRecord", "Controller", "Histogram", "Pacer", "SimulatedClock"]
