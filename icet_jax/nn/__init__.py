"""Building blocks and shared networks on arrays; only jax, flax, optax and numpy."""
