"""Training: settings, the learner over TRL, checkpoints that resume, metrics."""
