"""HF checkpoints in and out through one invertible key table per family; run state in between."""
