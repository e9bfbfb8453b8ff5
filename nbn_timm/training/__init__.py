"""Training: the loop, checkpoints, logs, and several processes."""
