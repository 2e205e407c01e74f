"""Checks whether a run fits on machines that are not present."""
