"""Building blocks of all networks: projections with LoRA, norms, rotary embeddings and attention.

Layers of the same shape are one module, whose weights have a leading axis of layers; `jax.lax.scan` runs them one after
another. The weight matrix of a projection is called `kernel`, as in Flax, and has the shape `[in, out]`. Each module
has a compute dtype; norms, softmax and rotary angles are always computed in float32.
"""

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import flax
import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from icet_jax.nn.attention import attention as attention
from icet_jax.typing import Array, Bool, DType, Float, Int

_OUTPUT, _INNER = "projection", "adapter"  # names by which remat saves `y` and `x @ a` of a `Linear`


@flax.struct.dataclass
class Lora:
    """Holds LoRA adapters of decoder projections, stacked over layers.

    Attributes:
      weights: {projection, for example "q_proj": float32 {"a": [L, in, r], "b": [L, r, out]}}.
      scale: alpha / r, static.
    """

    # Not annotated as arrays: jax also builds this pytree with other leaves, for example in jit(...).lower.
    weights: Mapping[str, Mapping[str, Any]]
    scale: float = flax.struct.field(pytree_node=False)


def normal(rngs: nnx.Rngs, shape: Sequence[int], stddev: float, dtype: DType) -> nnx.Param:
    """Returns a parameter that is sampled from N(0, stddev^2) in float32 and stored as `dtype`."""
    return nnx.Param(_normal(rngs.params(), tuple(shape), stddev, dtype))


@functools.partial(jax.jit, static_argnames=("shape", "dtype"))
def _normal(key: Array, shape: tuple[int, ...], stddev: Float[Array, ""], dtype: DType) -> Array:
    """Returns the values of `normal`: one program for each shape, where three took longer to compile."""
    return (stddev * jax.random.normal(key, shape, jnp.float32)).astype(dtype)


class Linear(nnx.Module):
    """Computes `y = x @ kernel (+ bias)`, optionally with a LoRA adapter.

    With the argument `layers` it holds the weights of that many projections, stacked along their first axis.
    """

    def __init__(
        self, size_in: int, size_out: int, *, rngs: nnx.Rngs, use_bias: bool, dtype: DType, param_dtype: DType,
        layers: int | None = None, stddev: float | None = None,
    ):  # fmt: skip
        stack = () if layers is None else (layers,)
        self.dtype = dtype
        self.kernel = normal(rngs, (*stack, size_in, size_out), stddev or size_in**-0.5, param_dtype)
        self.bias = nnx.Param(jnp.zeros((*stack, size_out), param_dtype)) if use_bias else None

    def __call__(
        self, x: Float[Array, "*batch size_in"], lora: Mapping[str, Array] | None = None, scale: float = 1.0
    ) -> Float[Array, "*batch size_out"]:
        """Projects the last axis, and adds `scale * x @ a @ b` for `lora = {"a": [in, r], "b": [r, out]}`."""
        x = x.astype(self.dtype)
        y = x @ self.kernel[...].astype(self.dtype)
        if lora is not None:
            # `scale` multiplies `b`, which is much smaller than the result.
            inner = checkpoint_name(x @ lora["a"].astype(self.dtype), _INNER)
            y = y + inner @ (lora["b"] * scale).astype(self.dtype)
        return checkpoint_name(y if self.bias is None else y + self.bias[...].astype(self.dtype), _OUTPUT)


class LayerNorm(nnx.Module):
    """Computes LayerNorm with the biased two-pass variance in float32 (`torch.nn.LayerNorm`)."""

    def __init__(self, size: int, *, epsilon: float, param_dtype: DType, layers: int | None = None):
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
    """Computes RMSNorm, casting back to the dtype of `x` before the scale is applied (HF `LlamaRMSNorm`)."""

    def __init__(self, size: int, *, epsilon: float, param_dtype: DType, layers: int | None = None):
        stack = () if layers is None else (layers,)
        self.epsilon = epsilon
        self.scale = nnx.Param(jnp.ones((*stack, size), param_dtype))

    def __call__(self, x: Float[Array, "*batch D"]) -> Float[Array, "*batch D"]:
        """Normalises the last axis; the result has the dtype of `x`."""
        return rms_norm(x, self.scale[...], self.epsilon)


def rms_norm(x: Float[Array, "*batch D"], scale: Float[Array, "D"], epsilon: float) -> Float[Array, "*batch D"]:
    """Computes `RMSNorm` with the given scale."""
    x32 = x.astype(jnp.float32)
    normed = x32 * jax.lax.rsqrt(jnp.square(x32).mean(-1, keepdims=True) + epsilon)
    return normed.astype(x.dtype) * scale.astype(x.dtype)


def quick_gelu(x: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    """Computes `x * sigmoid(1.702 x)` (HF `QuickGELUActivation`)."""
    return x * jax.nn.sigmoid(1.702 * x)


def gelu_erf(x: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    """Computes the exact GELU, `0.5 x (1 + erf(x / sqrt 2))` (HF `gelu`)."""
    return jax.nn.gelu(x, approximate=False)


def gelu_tanh(x: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    """Computes the tanh approximation of GELU (HF `gelu_new`)."""
    return jax.nn.gelu(x, approximate=True)


ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "quick_gelu": quick_gelu,
    "gelu": gelu_erf,
    "gelu_new": gelu_tanh,
    "gelu_pytorch_tanh": gelu_tanh,
    "silu": jax.nn.silu,
}
"""Activation functions by the names that HF configs use."""


def split_heads(x: Float[Array, "B T D"], heads: int) -> Float[Array, "B T heads size"]:
    """Returns `x` with the last axis split into attention heads; each head is a contiguous block of that axis."""
    return x.reshape(*x.shape[:-1], heads, x.shape[-1] // heads)


def rotary_angles(
    positions: Int[Array, "B T P"], inverse_frequencies: Float[Array, "half"]
) -> tuple[Float[Array, "B T 1 D"], Float[Array, "B T 1 D"]]:
    """Returns cos and sin of `position * frequency`, repeated for both halves of a head (HF `LlamaRotaryEmbedding`).

    The last axis of `positions` has one position for all frequencies, or one for each.
    """
    angles = positions.astype(jnp.float32) * inverse_frequencies
    angles = jnp.concatenate([angles, angles], axis=-1)[:, :, None, :]
    return jnp.cos(angles), jnp.sin(angles)


def rotate(
    x: Float[Array, "B T H D"], cos: Float[Array, "B T 1 D"], sin: Float[Array, "B T 1 D"]
) -> Float[Array, "B T H D"]:
    """Applies rotary embedding to queries or keys: `x cos + [-x2, x1] sin`, where x1 and x2 are the halves of a head.

    Source: HF `apply_rotary_pos_emb`.
    """
    first, second = jnp.split(x, 2, axis=-1)
    rotated = jnp.concatenate([-second, first], axis=-1)
    return x * cos.astype(x.dtype) + rotated * sin.astype(x.dtype)


def positions_from_mask(mask: Bool[Array, "B T"]) -> Int[Array, "B T"]:
    """Returns each token's position, from 0, among the tokens of its row that are not padding (HF `generate`).

    Padding before the tokens gets 0; padding after them gets the last token's position.
    """
    return jnp.maximum(jnp.cumsum(mask.astype(jnp.int32), axis=1) - 1, 0)


def depth_scaled(stddev: float, layers: int) -> float:
    """Returns `stddev / sqrt(2 layers)`: the initial scale of projections whose outputs are added to the residual."""
    return stddev / math.sqrt(2 * layers)


REMAT_POLICIES: dict[str, Callable[..., Any] | None] = {
    "none": None,
    "dots": jax.checkpoint_policies.save_only_these_names(_OUTPUT, _INNER),
    "full": jax.checkpoint_policies.nothing_saveable,
}
"""Which activations of a layer are stored for the backward pass: "none" recomputes none and stores all, "dots" stores
the outputs of all projections (once, with bias and adapter added), "full" stores only the layer's input."""


def rematerialise(body: Callable[..., Any], remat: str) -> Callable[..., Any]:
    """Returns the function `body` of a scan over layers, changed to store only the activations that `remat` names.

    `remat` is a key of `REMAT_POLICIES`; any other value raises a ValueError.
    """
    if remat not in REMAT_POLICIES:
        raise ValueError(f"remat '{remat}' is not one of {', '.join(REMAT_POLICIES)}")
    remat_policy = REMAT_POLICIES[remat]
    return body if remat_policy is None else jax.checkpoint(body, policy=remat_policy, prevent_cse=False)
