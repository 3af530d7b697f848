"""Training: the stream of tasks, the loop over them, metrics and checkpoints."""
