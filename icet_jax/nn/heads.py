"""Scalar heads on hidden states."""

import jax
import jax.numpy as jnp

from icet_jax.typing import Array, Float


def init_value_head(hidden_size: int) -> dict[str, Array]:
    """A linear value head that starts at zero, so that the first advantages are the rewards alone."""
    return {"kernel": jnp.zeros((hidden_size, 1), jnp.float32), "bias": jnp.zeros((1,), jnp.float32)}


def value(head: dict[str, Array], hidden: Float[Array, "*batch E"]) -> Float[Array, "*batch"]:
    """Float32 state values of hidden states taken after the decoder's final norm."""
    product = jnp.matmul(hidden.astype(jnp.float32), head["kernel"], precision=jax.lax.Precision.HIGHEST)
    return (product + head["bias"])[..., 0]
