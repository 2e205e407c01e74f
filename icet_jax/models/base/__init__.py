"""What the model families share: processors, image batches and the reference of transformers."""
