"""Scorers: text in, numbers out. Every number carries the name of the scorer that gave it."""
