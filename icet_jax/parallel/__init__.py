"""The device mesh and the table that places every array on it."""
