"""Training: configuration, schedule, loss, loop, metrics, checkpoints and the finished model's directory."""
