"""The real-time loop around a policy."""

from parapolicy.control.controller import Controller, ControlRecord

__all__ = ["ControlRecord", "Controller"]
