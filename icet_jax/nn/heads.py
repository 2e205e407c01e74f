"""The value head: a linear layer from a hidden state to the value of that state."""

import jax
import jax.numpy as jnp

from icet_jax.typing import Array, Float


def init_value_head(hidden_size: int) -> dict[str, Array]:
    """Returns the parameters of a new value head, all zero, so that every value is 0 at first.

    Args:
      hidden_size: width E of the hidden states.
    """
    return {"kernel": jnp.zeros((hidden_size, 1), jnp.float32), "bias": jnp.zeros((1,), jnp.float32)}


def value(head: dict[str, Array], hidden: Float[Array, "*batch E"]) -> Float[Array, "*batch"]:
    """Returns the float32 values that a value head gives to hidden states after the decoder's final norm."""
    product = jnp.matmul(hidden.astype(jnp.float32), head["kernel"], precision=jax.lax.Precision.HIGHEST)
    return (product + head["bias"])[..., 0]
