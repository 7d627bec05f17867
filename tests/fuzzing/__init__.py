"""Random damage to what is read: checkpoints, messages, run folders and schedules of the controller."""
