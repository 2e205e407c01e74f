"""Attention's one door, and the only place that decides what runs behind it.

XLA's own attention is the reference and runs everywhere. Where scores are many and in half precision, a kernel that
keeps them on the chip takes over: cuDNN's flash attention on NVIDIA (Ampere and later), splash attention on TPUs. Both
need to be told what a mask means (causal, which tokens are real), so a mask of any other form is XLA's, and so are the
single queries of decoding. On a mesh every device runs the kernel on its own rows and heads.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, PartitionSpec

from icet_jax.parallel.sharding import ROWS, row_shards
from icet_jax.parallel.traced import mesh_of
from icet_jax.typing import Array, Bool, Float, Int

P = PartitionSpec
_LEAST = 128  # queries below which no kernel runs
_LANES = 128  # of a TPU: tiles are multiples of it
_BLOCK = 512  # queries and keys of a tile at most: its scores, float32, take 1 MiB of the chip's memory


def attention(
    q: Float[Array, "B T H D"],
    k: Float[Array, "B S K D"],
    v: Float[Array, "B S K D"],
    mask: Bool[Array, "..."] | None = None,
    *,
    real: Bool[Array, "B S"] | None = None,
    causal: bool = False,
) -> Float[Array, "B T HD"]:
    """Attention scaled by `D^-0.5`, float32 softmax, GQA when K < H (K divides H).

    Say what is masked by `real` and `causal` wherever they suffice: only then may a kernel run.

    Args:
      mask: True where query t may attend to key s; broadcasts to `[B, H, T, S]`.
      real: keys that are no padding; of each row one run, padding may stand on either side.
      causal: query t attends to no key after t; T == S.

    Returns:
      The heads' outputs, concatenated: `[B, T, H * D]`. A query without any allowed key, or at a place that is itself
      padding, gets something finite, and its gradients are zero where nothing is made of it.
    """
    mesh = mesh_of(q, k, v)
    kernel = None if mask is not None else kernel_for(q, k, causal, mesh)
    if kernel is not None:
        out = _on_each_device(functools.partial(kernel, causal=causal), mesh, q, k, v, real)
    else:
        out = plain(q, k, v, mask, real=real, causal=causal)
    return out.reshape(*out.shape[:2], -1)


def plain(
    q: Float[Array, "B T H D"], k: Float[Array, "B S K D"], v: Float[Array, "B S K D"],
    mask: Bool[Array, "..."] | None = None, *, real: Bool[Array, "B S"] | None = None, causal: bool = False,
) -> Float[Array, "B T H D"]:  # fmt: skip
    """XLA's attention; a query without any allowed key gets the mean of the values."""
    if causal:
        below = jnp.tril(jnp.ones((q.shape[1], k.shape[1]), bool))[None, None]
        mask = below if mask is None else mask & below
    if real is not None:
        mask = real[:, None, None, :] if mask is None else mask & real[:, None, None, :]
    return jax.nn.dot_product_attention(q, k, v, mask=mask)


Kernel = Callable[..., Float[Array, "B T H D"]]
"""(q, k, v, real or None, causal=) -> what `plain` gives at real queries."""


def kernel_for(q: Array, k: Array, causal: bool, mesh: AbstractMesh | None) -> Kernel | None:
    """The kernel for these arrays where they lie; None is XLA."""
    length, heads, size = q.shape[1:]
    if length != k.shape[1] or length < _LEAST:
        return None
    if mesh is not None and (
        q.shape[0] % row_shards(mesh) or heads % mesh.shape["tensor"] or k.shape[2] % mesh.shape["tensor"]
    ):
        return None
    platform = _platform(mesh)
    # Without a causal half to skip, XLA for TPUs reads and writes hardly more than the kernel (CLIP's 577 tokens).
    if platform == "tpu" and causal and q.dtype == jnp.bfloat16 and size % 8 == 0 and size >= 64:
        # Its products are of bfloat16 as they are, and do not compile where more is asked for.
        precision = getattr(jax.config, "jax_default_matmul_precision", None)
        return splash if precision in (None, "default", "bfloat16") else None
    if platform in ("gpu", "cuda") and q.dtype in (jnp.bfloat16, jnp.float16):
        capability = _compute_capability()
        if capability >= 8 and size % 8 == 0 and size <= (256 if capability >= 9 else 128):
            return cudnn
    return None


def _platform(mesh: AbstractMesh | None) -> str:
    """Of the devices that the program is compiled for; a mesh may be of chips that are not here."""
    if mesh is not None and mesh.abstract_device is not None:
        return str(mesh.abstract_device.platform)
    device = getattr(jax.config, "jax_default_device", None)
    return str(getattr(device, "platform", device or jax.default_backend()))


def _compute_capability() -> float:
    """Of the first device if it is NVIDIA's, else 0; AMD's report names."""
    try:
        return float(getattr(jax.devices()[0], "compute_capability", 0))
    except ValueError:
        return 0.0


def _on_each_device(kernel: Kernel, mesh: AbstractMesh | None, q: Array, k: Array, v: Array, real: Any) -> Array:
    """Runs a kernel on the rows and heads of each device; compilers cannot cut it up themselves."""
    if mesh is None:
        return kernel(q, k, v, real)
    heads = P(ROWS, None, "tensor", None)
    return jax.shard_map(
        kernel, mesh=mesh, in_specs=(heads, heads, heads, None if real is None else P(ROWS, None)), out_specs=heads,
        check_vma=False,
    )(q, k, v, real)  # fmt: skip


def splash(
    q: Float[Array, "B T H D"], k: Float[Array, "B T K D"], v: Float[Array, "B T K D"],
    real: Bool[Array, "B T"] | None, *, causal: bool, interpret: bool = False,
) -> Float[Array, "B T H D"]:  # fmt: skip
    """Splash attention on a TPU: tiles above the diagonal are skipped; padding attends to padding.

    Args:
      interpret: runs it anywhere, slowly.
    """
    # Mosaic is not everywhere, and imports slowly.
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as kernels
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

    length, heads, size = q.shape[1:]
    count = -(-length // _BLOCK)
    block = -(-length // (count * _LANES)) * _LANES
    added = count * block - length
    shape = (count * block, count * block)
    mask = masks.MultiHeadMask([masks.CausalMask(shape) if causal else masks.FullMask(shape)] * heads)
    sizes = kernels.BlockSizes(
        block_q=block, block_kv=block, block_q_dkv=block, block_kv_dkv=block, block_q_dq=block, block_kv_dq=block
    )
    kernel = kernels.make_splash_mha(mask, block_sizes=sizes, head_shards=1, q_seq_shards=1, interpret=interpret)

    def by_head(x: Array) -> Array:
        return jnp.pad(x.swapaxes(1, 2), ((0, 0), (0, 0), (0, added), (0, 0)))

    segments = None
    if real is not None or added:
        kinds = jnp.ones(q.shape[:2], jnp.int32) if real is None else real.astype(jnp.int32)
        kinds = jnp.pad(kinds, ((0, 0), (0, added)))
        segments = kernels.SegmentIds(kinds, kinds)
    out = jax.vmap(kernel)(by_head(q * size**-0.5), by_head(k), by_head(v), segments)
    return out[:, :, :length].swapaxes(1, 2)


def cudnn(
    q: Float[Array, "B T H D"], k: Float[Array, "B T K D"], v: Float[Array, "B T K D"],
    real: Bool[Array, "B T"] | None, *, causal: bool,
) -> Float[Array, "B T H D"]:  # fmt: skip
    """cuDNN's flash attention. It knows padding only behind a row's tokens, so rows are turned until it is there."""
    run = functools.partial(jax.nn.dot_product_attention, is_causal=causal, implementation="cudnn")
    length = q.shape[1]
    if length % 2:  # jax 0.10 refuses to differentiate an odd number
        real = jnp.ones(q.shape[:2], bool) if real is None else real
        q, k, v, real = (jnp.pad(x, [(0, 0), (0, 1)] + [(0, 0)] * (x.ndim - 2)) for x in (q, k, v, real))
    if real is None:
        return run(q, k, v)
    start = jnp.argmax(real, axis=1).astype(jnp.int32)
    lengths = jnp.maximum(jnp.sum(real, axis=1, dtype=jnp.int32), 1)  # a row of padding alone: what is ignored anyway
    q, k, v = (turned(x, start) for x in (q, k, v))
    out = run(q, k, v, query_seq_lengths=lengths, key_value_seq_lengths=lengths)
    return jnp.where(real[:, :, None, None], turned(out, -start), 0)[:, :length]


@jax.custom_vjp
def turned(x: Float[Array, "B T H D"], start: Int[Array, " B"]) -> Float[Array, "B T H D"]:
    """Each row turned so that its place `start` comes first; the gradient is turned back, without any scatter."""
    places = (jnp.arange(x.shape[1]) + start[:, None]) % x.shape[1]
    return jnp.take_along_axis(x, places[:, :, None, None], axis=1)


turned.defvjp(lambda x, start: (turned(x, start), start), lambda start, dx: (turned(dx, -start), None))
