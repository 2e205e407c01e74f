"""Reads and writes HF checkpoints through one invertible key table per family, and saves the state of runs."""
