"""Linear heads that map a hidden state to one number."""

import jax
import jax.numpy as jnp

from icet_jax.typing import Array, Float


def init_value_head(hidden_size: int) -> dict[str, Array]:
    """Returns the parameters of a linear value head, all zero so that the first advantages equal the rewards."""
    return {"kernel": jnp.zeros((hidden_size, 1), jnp.float32), "bias": jnp.zeros((1,), jnp.float32)}


def value(head: dict[str, Array], hidden: Float[Array, "*batch E"]) -> Float[Array, "*batch"]:
    """Returns the float32 values of hidden states taken after the decoder's final norm."""
    product = jnp.matmul(hidden.astype(jnp.float32), head["kernel"], precision=jax.lax.Precision.HIGHEST)
    return (product + head["bias"])[..., 0]
