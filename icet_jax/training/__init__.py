"""The training loop, its checkpoints and metrics, and the training of reward models."""
