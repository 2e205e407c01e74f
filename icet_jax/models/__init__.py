"""Networks as `flax.nnx` modules on arrays: no files, no tokenizers, no flags."""
