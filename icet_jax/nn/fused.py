"""Decoder layers for decoding steps on GPUs, in which projections of the same input are one matrix product.

A step over few rows takes as long as its kernels take to start and to read the weights. With q, k and v joined, gate
and up joined, and the adapters as more rows of the kernels, a layer needs less than half of the kernels.
"""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import flax
import jax
import jax.numpy as jnp
from flax import nnx

from icet_jax.nn import layers
from icet_jax.nn.attention import platform_of
from icet_jax.parallel.traced import mesh_of, target_device
from icet_jax.typing import Array, DType, Float, PyTree

if TYPE_CHECKING:
    from icet_jax.nn.llama import LlamaConfig


def for_steps(
    weights: Any, adapters: Mapping[str, Any], scale: float, config: "LlamaConfig", dtype: DType
) -> tuple[Any, Mapping[str, Any]]:  # fmt: skip
    """Returns (weights, adapters) of one layer for `UnstackedLayers`, with joined projections where they pay.

    `weights` are the `nnx.State` of one layer of `LlamaBlocks`; for the other arguments see `fuse`.
    """
    if not joins_projections(weights):
        return weights, adapters
    return fuse(nnx.to_pure_dict(weights), adapters, scale, config, dtype), {}


def layer_for_step(graph: nnx.GraphDef, weights: Any) -> Any:
    """Returns the layer that runs with weights from `for_steps`; `graph` is the structure of one `LlamaBlocks`."""
    return weights if isinstance(weights, FusedLayer) else nnx.merge(graph, weights)


def joins_projections(weights: PyTree) -> bool:
    """Returns whether decoding steps with these weights use `FusedLayer`: on GPUs, each of which has all weights."""
    leaves = jax.tree.leaves(weights)
    mesh = mesh_of(*leaves)
    if mesh is not None and mesh.shape["fsdp"] * mesh.shape["tensor"] > 1:
        return False
    return platform_of(target_device(*leaves)) == "gpu"


@flax.struct.dataclass
class JoinedLinear:
    """Computes several projections of the same input, with their adapters, as `[x, x @ a] @ kernel + bias`.

    Attributes:
      kernel: the projections' weight matrices side by side and, below each, the `scale * b` of its adapter,
        `[in + r, out]`; r is the sum of the adapters' ranks.
      a: the adapters' matrices `a` side by side, `[in, r]`; None without adapters.
      bias: the biases one after another, `[out]`; None without biases.
    """

    # Not annotated as arrays: jax also builds this pytree with other leaves, for example in jit(...).lower.
    kernel: Any
    a: Any
    bias: Any

    def __call__(self, x: Float[Array, "*batch size_in"]) -> Float[Array, "*batch size_out"]:
        """Returns the outputs of all projections, concatenated."""
        if self.a is not None:
            x = jnp.concatenate([x, x @ self.a], axis=-1)
        y = x @ self.kernel
        return y if self.bias is None else y + self.bias


@flax.struct.dataclass
class FusedLayer:
    """Runs one decoder layer as `llama.LlamaBlocks` does, with joined projections.

    The arguments `lora` and `scale` of its methods are those of `LlamaBlocks` and are not used, because the adapters
    are part of the projections.

    Attributes:
      attention_in, attention_out, gate_up, down: the projections; the first one is of q, k and v.
      norms: scales of the norms before attention and before the MLP.
      head_norms: scales of the norms of each head's queries and keys; None if the decoder has none.
      config: sizes of the decoder, static.
    """

    attention_in: JoinedLinear
    attention_out: JoinedLinear
    gate_up: JoinedLinear
    down: JoinedLinear
    norms: tuple[Any, Any]
    head_norms: tuple[Any, Any] | None
    config: "LlamaConfig" = flax.struct.field(pytree_node=False)

    def qkv(self, x: Float[Array, "B T E"], angles: Any, lora: Any, scale: float) -> tuple[Array, Array, Array]:
        """Returns queries and keys, both with rotary embedding, and values."""
        heads, kv_heads = self.config.num_attention_heads, self.config.num_key_value_heads
        normed = layers.rms_norm(x, self.norms[0], self.config.rms_norm_eps)
        y = layers.split_heads(self.attention_in(normed), heads + 2 * kv_heads)
        queries_keys = y[:, :, : heads + kv_heads]
        if self.head_norms is not None:
            parts = zip(jnp.split(queries_keys, [heads], axis=2), self.head_norms, strict=True)
            normed_parts = [layers.rms_norm(part, scales, self.config.rms_norm_eps) for part, scales in parts]
            queries_keys = jnp.concatenate(normed_parts, axis=2)
        rotated = layers.rotate(queries_keys, *angles)
        return rotated[:, :, :heads], rotated[:, :, heads:], y[:, :, heads + kv_heads :]

    def after_attention(
        self, x: Float[Array, "B T E"], attended: Float[Array, "B T HD"], lora: Any, scale: float
    ) -> Float[Array, "B T E"]:
        """Returns the output of the layer from its input x and the concatenated outputs of its attention heads."""
        x = x + self.attention_out(attended)
        gate, up = jnp.split(self.gate_up(layers.rms_norm(x, self.norms[1], self.config.rms_norm_eps)), 2, axis=-1)
        return x + self.down(jax.nn.silu(gate) * up)


def fuse(
    weights: Mapping[str, Any], adapters: Mapping[str, Any], scale: float, config: "LlamaConfig", dtype: DType
) -> FusedLayer:  # fmt: skip
    """Returns a layer with joined projections.

    Args:
      weights: the layer's weights, {projection or norm: {"kernel", "bias" or "scale": array}}.
      adapters: the layer's LoRA adapters, {projection: {"a": [in, r], "b": [r, out]}}.
      scale: scale of the adapters.
      config: sizes of the decoder.
      dtype: compute dtype.
    """

    def joined(*names: str) -> JoinedLinear:
        return _join(weights, adapters, scale, names, dtype)

    return FusedLayer(
        attention_in=joined("q_proj", "k_proj", "v_proj"),
        attention_out=joined("o_proj"),
        gate_up=joined("gate_proj", "up_proj"),
        down=joined("down_proj"),
        norms=(weights["input_layernorm"]["scale"], weights["post_attention_layernorm"]["scale"]),
        head_norms=(weights["q_norm"]["scale"], weights["k_norm"]["scale"]) if config.qk_norm else None,
        config=config,
    )


def _join(
    weights: Mapping[str, Any], adapters: Mapping[str, Any], scale: float, names: Sequence[str], dtype: DType
) -> JoinedLinear:  # fmt: skip
    """Returns the projections `names` as one; for the other arguments see `fuse`."""
    kernels = [weights[name]["kernel"].astype(dtype) for name in names]
    rows = [jnp.concatenate(kernels, axis=1)]
    adapted = [name for name in names if name in adapters]
    for name in adapted:
        b = (adapters[name]["b"] * scale).astype(dtype)
        columns = [
            b if other == name else jnp.zeros((b.shape[0], kernel.shape[1]), dtype)
            for other, kernel in zip(names, kernels, strict=True)
        ]
        rows.append(jnp.concatenate(columns, axis=1))
    a = jnp.concatenate([adapters[name]["a"].astype(dtype) for name in adapted], axis=1) if adapted else None
    biases = [
        weights[name].get("bias", jnp.zeros(kernel.shape[1], dtype)).astype(dtype)
        for name, kernel in zip(names, kernels, strict=True)
    ]
    has_bias = any("bias" in weights[name] for name in names)
    return JoinedLinear(jnp.concatenate(rows, axis=0), a, jnp.concatenate(biases) if has_bias else None)
