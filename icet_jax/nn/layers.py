"""Building blocks shared by every network: projections with LoRA, norms, rotary embedding, attention.

Weights of equal layers are stacked along a leading axis and scanned; kernels are stored `[in, out]`. Each module keeps
its compute dtype; norms, softmax and the rotary angles are float32 whatever it is.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import flax
import jax
import jax.numpy as jnp
from flax import nnx

from icet_jax.nn.attention import attention as attention
from icet_jax.typing import Array, Bool, Float, Int


@flax.struct.dataclass
class Lora:
    """Low-rank updates of decoder projections, stacked over layers.

    Attributes:
      weights: for each target, e.g. `"q_proj"`, float32 `{"a": [L, in, r], "b": [L, r, out]}`.
      scale: alpha / r, static.
    """

    # Arrays; not annotated so, because jax also fills pytrees with what are none (jit(...).lower does).
    weights: Mapping[str, Mapping[str, Any]]
    scale: float = flax.struct.field(pytree_node=False)


def normal(rngs: nnx.Rngs, shape: Sequence[int], stddev: float, dtype: Any) -> nnx.Param:
    """A parameter drawn from N(0, stddev^2) in float32, stored as `dtype`."""
    return nnx.Param((stddev * jax.random.normal(rngs.params(), tuple(shape), jnp.float32)).astype(dtype))


class Linear(nnx.Module):
    """`y = x @ kernel (+ bias)`, optionally plus a LoRA update; `layers` stacks that many of them."""

    def __init__(
        self, size_in: int, size_out: int, *, rngs: nnx.Rngs, use_bias: bool, dtype: Any, param_dtype: Any,
        layers: int | None = None, stddev: float | None = None,
    ):  # fmt: skip
        stack = () if layers is None else (layers,)
        self.dtype = dtype
        self.kernel = normal(rngs, (*stack, size_in, size_out), stddev or size_in**-0.5, param_dtype)
        self.bias = nnx.Param(jnp.zeros((*stack, size_out), param_dtype)) if use_bias else None

    def __call__(
        self, x: Float[Array, "*batch size_in"], lora: Mapping[str, Array] | None = None, scale: float = 1.0
    ) -> Float[Array, "*batch size_out"]:
        """Projects the last axis; `lora` holds one layer's `a [in, r]` and `b [r, out]`."""
        x = x.astype(self.dtype)
        y = x @ self.kernel[...].astype(self.dtype)
        if lora is not None:
            y = y + (x @ lora["a"].astype(self.dtype)) @ lora["b"].astype(self.dtype) * scale
        return y if self.bias is None else y + self.bias[...].astype(self.dtype)


class LayerNorm(nnx.Module):
    """LayerNorm with biased two-pass variance in float32 (`torch.nn.LayerNorm`)."""

    def __init__(self, size: int, *, epsilon: float, param_dtype: Any, layers: int | None = None):
        stack = () if layers is None else (layers,)
        self.epsilon = epsilon
        self.scale = nnx.Param(jnp.ones((*stack, size), param_dtype))
        self.bias = nnx.Param(jnp.zeros((*stack, size), param_dtype))

    def __call__(self, x: Float[Array, "*batch D"]) -> Float[Array, "*batch D"]:
        """Normalises the last axis; the result has the dtype of `x`."""
        x32 = x.astype(jnp.float32)
        centred = x32 - x32.mean(-1, keepdims=True)
        normed = centred * jax.lax.rsqrt(jnp.square(centred).mean(-1, keepdims=True) + self.epsilon)
        y = normed * self.scale[...].astype(jnp.float32) + self.bias[...].astype(jnp.float32)
        return y.astype(x.dtype)


class RMSNorm(nnx.Module):
    """RMSNorm that casts back before it applies the scale (`LlamaRMSNorm`)."""

    def __init__(self, size: int, *, epsilon: float, param_dtype: Any, layers: int | None = None):
        stack = () if layers is None else (layers,)
        self.epsilon = epsilon
        self.scale = nnx.Param(jnp.ones((*stack, size), param_dtype))

    def __call__(self, x: Float[Array, "*batch D"]) -> Float[Array, "*batch D"]:
        """Normalises the last axis; the result has the dtype of `x`."""
        x32 = x.astype(jnp.float32)
        normed = x32 * jax.lax.rsqrt(jnp.square(x32).mean(-1, keepdims=True) + self.epsilon)
        return normed.astype(x.dtype) * self.scale[...].astype(x.dtype)


def quick_gelu(x: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    """`x * sigmoid(1.702 x)` (HF `QuickGELUActivation`)."""
    return x * jax.nn.sigmoid(1.702 * x)


def gelu_erf(x: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    """The exact GELU, `0.5 x (1 + erf(x / sqrt 2))` (HF `gelu`)."""
    return jax.nn.gelu(x, approximate=False)


def gelu_tanh(x: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    """The tanh approximation of GELU (HF `gelu_new`)."""
    return jax.nn.gelu(x, approximate=True)


ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "quick_gelu": quick_gelu,
    "gelu": gelu_erf,
    "gelu_new": gelu_tanh,
    "gelu_pytorch_tanh": gelu_tanh,
    "silu": jax.nn.silu,
}
"""Activations under the names that HF configs use."""


def split_heads(x: Float[Array, "B T D"], heads: int) -> Float[Array, "B T heads size"]:
    """Cuts the last axis into `heads` contiguous blocks."""
    return x.reshape(*x.shape[:-1], heads, x.shape[-1] // heads)


def rotary_angles(
    positions: Int[Array, "B T"], inverse_frequencies: Float[Array, "half"]
) -> tuple[Float[Array, "B T 1 D"], Float[Array, "B T 1 D"]]:
    """cos and sin of `position * frequency`, repeated for both halves of a head (HF `LlamaRotaryEmbedding`)."""
    angles = positions[..., None].astype(jnp.float32) * inverse_frequencies
    angles = jnp.concatenate([angles, angles], axis=-1)[:, :, None, :]
    return jnp.cos(angles), jnp.sin(angles)


def rotate(
    x: Float[Array, "B T H D"], cos: Float[Array, "B T 1 D"], sin: Float[Array, "B T 1 D"]
) -> Float[Array, "B T H D"]:
    """Rotate-half rotary embedding: `x cos + [-x2, x1] sin` (HF `apply_rotary_pos_emb`)."""
    first, second = jnp.split(x, 2, axis=-1)
    turned = jnp.concatenate([-second, first], axis=-1)
    return x * cos.astype(x.dtype) + turned * sin.astype(x.dtype)


def positions_from_mask(mask: Bool[Array, "B T"]) -> Int[Array, "B T"]:
    """Position of each token among its row's real tokens; padding gets 0 or repeats (HF `generate`)."""
    return jnp.maximum(jnp.cumsum(mask.astype(jnp.int32), axis=1) - 1, 0)


def depth_scaled(stddev: float, layers: int) -> float:
    """Standard deviation for projections that write to the residual stream of a `layers`-deep network."""
    return stddev / math.sqrt(2 * layers)


REMAT_POLICIES: dict[str, Callable[..., Any] | None] = {
    "none": None,
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    "full": jax.checkpoint_policies.nothing_saveable,
}
"""What the backward pass keeps of each layer: everything, matrix products only, or nothing but the input."""


def rematerialise(body: Callable[..., Any], remat: str) -> Callable[..., Any]:
    """Wraps the body of a layer scan in the remat policy of that name."""
    if remat not in REMAT_POLICIES:
        raise ValueError(f"remat '{remat}' is not one of {', '.join(REMAT_POLICIES)}")
    policy = REMAT_POLICIES[remat]
    return body if policy is None else jax.checkpoint(body, policy=policy, prevent_cse=False)
