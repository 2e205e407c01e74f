"""Measurements: sweeps over exits, utility, geometry of the features, and the statistics of their numbers."""
