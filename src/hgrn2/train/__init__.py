"""Training: the loop, its settings, optimizers and schedules, checkpoints, records and pictures."""
