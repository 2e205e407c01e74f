"""Rows, images and prompts on their way to the model."""
