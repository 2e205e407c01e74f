"""The building blocks and the networks that several model families share; they need only jax, flax, optax and numpy."""
