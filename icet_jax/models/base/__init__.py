"""Code that the model families share: processors, image batches and the comparison with transformers."""
