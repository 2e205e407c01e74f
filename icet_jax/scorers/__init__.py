"""Scorers map prompts and responses to scores; every score carries the name of the scorer that computed it."""
