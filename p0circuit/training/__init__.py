"""Training: small models, their checkpoints, and the sink measured along a training run."""
