"""Measuring: sweeps over exits, utility, geometry of the features, and the statistics under their numbers."""
