"""Run an evaluation: episodes in closed loop, into a folder."""
