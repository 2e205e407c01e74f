"""Reads the rows of data sets and brings them, with their images and prompts, to the model in batches."""
