"""Schedules: the noise levels and solver of a policy as tables, linear in the state plus a network term."""

from parapolicy.schedule.calibration import Calibration
from parapolicy.schedule.levels import SOLVERS, Levels, make_scheduler
from parapolicy.schedule.schedule import Schedule, make_schedule

__all__ = ["SOLVERS", "Calibration", "Levels", "Schedule", "make_schedule", "make_scheduler"]
