"""Attention, and the only place that chooses its implementation.

XLA's attention is the reference and runs on every platform. For many queries in half precision a fused kernel is used
that never writes the scores to main memory: cuDNN's flash attention on NVIDIA GPUs (Ampere or later), splash attention
on TPUs. These kernels accept only two kinds of mask, "causal" and "these tokens are not padding". With any other mask,
and for the single queries of a decoding step, XLA's attention is used. On a mesh each device runs the kernel on its own
rows and heads. In this file, a *real* token is one that is not padding.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.sharding import AbstractDevice, AbstractMesh, PartitionSpec

from icet_jax.parallel.sharding import ROWS, row_shards
from icet_jax.parallel.topology import chip_of
from icet_jax.parallel.traced import mesh_of, target_device
from icet_jax.typing import Array, Bool, Float, Int

P = PartitionSpec
_MIN_QUERIES = 128  # with fewer queries XLA's attention is used
_TPU_LANES = 128  # tile sizes on a TPU are multiples of this
_SCORE_BYTES = 1 << 28  # most bytes of a row's scores that XLA's attention writes at a time, without mask or causality
_MAX_TILE = 512  # most queries or keys in a tile; float32 scores of 512 x 512 take 1 MiB of the chip's memory


def attention(
    q: Float[Array, "B T H D"],
    k: Float[Array, "B S K D"],
    v: Float[Array, "B S K D"],
    mask: Bool[Array, "..."] | None = None,
    *,
    real: Bool[Array, "B S"] | None = None,
    causal: bool = False,
    right_padded: bool = False,
) -> Float[Array, "B T HD"]:
    """Computes attention with scores scaled by `D^-0.5` and a float32 softmax.

    If K < H, groups of H / K query heads share a key head (grouped-query attention). Prefer `real` and `causal` to
    `mask`, because a fused kernel can only be used without `mask`.

    Args:
      q, k, v: queries, keys and values.
      mask: True where query t may attend to key s; broadcasts to `[B, H, T, S]`.
      real: True at keys that are not padding. The real keys of a row are contiguous; padding may be on either side.
      causal: if True, query t attends to no key after t; needs T == S.
      right_padded: whether all padding is known to be on the right, which saves cuDNN's kernel work.

    Returns:
      The outputs of the heads, concatenated: `[B, T, H * D]`. The output of a padding query, or of a query without any
      allowed key, is finite but meaningless. As long as the loss does not use such outputs, they add nothing to any
      gradient.
    """
    mesh = mesh_of(q, k, v)
    kernel = None if mask is not None else kernel_for(q, k, causal, mesh, target_device(q, k, v))
    if kernel is not None:
        if kernel is cudnn and right_padded:
            kernel = functools.partial(cudnn, right_padded=True)
        out = _on_each_device(functools.partial(kernel, causal=causal), mesh, q, k, v, real)
    elif mask is None and not causal:
        out = _in_parts(q, k, v, real)
    else:
        out = xla_attention(q, k, v, mask, real=real, causal=causal)
    return out.reshape(*out.shape[:2], -1)


def xla_attention(
    q: Float[Array, "B T H D"], k: Float[Array, "B S K D"], v: Float[Array, "B S K D"],
    mask: Bool[Array, "..."] | None = None, *, real: Bool[Array, "B S"] | None = None, causal: bool = False,
) -> Float[Array, "B T H D"]:  # fmt: skip
    """Computes attention with XLA, see `attention`; a query without any allowed key gets the mean of the values."""
    if causal:
        not_later = jnp.tril(jnp.ones((q.shape[1], k.shape[1]), bool))[None, None]
        mask = not_later if mask is None else mask & not_later
    if real is not None:
        mask = real[:, None, None, :] if mask is None else mask & real[:, None, None, :]
    return jax.nn.dot_product_attention(q, k, v, mask=mask)


def _in_parts(
    q: Float[Array, "B T H D"], k: Float[Array, "B S K D"], v: Float[Array, "B S K D"], real: Bool[Array, "B S"] | None
) -> Float[Array, "B T H D"]:
    """Computes attention with XLA, for as many queries at a time as `_SCORE_BYTES` allows.

    The scores of a large image's thousands of patches would otherwise fill the memory.
    """
    length = q.shape[1]
    query_bytes = 4 * q.shape[2] * k.shape[1]
    divisors = (parts for parts in range(1, length) if length % parts == 0)
    parts = next((parts for parts in divisors if length // parts * query_bytes <= _SCORE_BYTES), length)
    if parts == 1:
        return xla_attention(q, k, v, real=real)
    split = jnp.moveaxis(q.reshape(q.shape[0], parts, -1, *q.shape[2:]), 1, 0)
    out = jax.lax.map(lambda part: xla_attention(part, k, v, real=real), split)
    return jnp.moveaxis(out, 0, 1).reshape(q.shape)


Kernel = Callable[..., Float[Array, "B T H D"]]
"""Function of (q, k, v, real or None, causal=) that gives the same result as `xla_attention` at real queries."""


def kernel_for(
    q: Array, k: Array, causal: bool, mesh: AbstractMesh | None, device: AbstractDevice | None
) -> Kernel | None:  # fmt: skip
    """Returns the fused kernel for arrays of these shapes and dtypes, or None if XLA's attention must be used.

    Args:
      q, k: queries `[B, T, H, D]` and keys `[B, S, K, D]`.
      causal: whether the mask is causal.
      mesh: mesh of the arrays; None on one device.
      device: the kind of device for which the program is compiled; None for the default device.
    """
    length, heads, size = q.shape[1:]
    if length != k.shape[1] or length < _MIN_QUERIES:
        return None
    if mesh is not None and (
        q.shape[0] % row_shards(mesh) or heads % mesh.shape["tensor"] or k.shape[2] % mesh.shape["tensor"]
    ):
        return None
    platform = platform_of(device)
    # Splash attention is faster because it skips scores above the diagonal. Without causal mask (CLIP) XLA is as fast.
    if platform == "tpu" and causal and q.dtype == jnp.bfloat16 and size % 8 == 0 and size >= 64:
        # The kernel multiplies in bfloat16 and does not compile if a higher precision is requested.
        precision = getattr(jax.config, "jax_default_matmul_precision", None)
        return splash if precision in (None, "default", "bfloat16") else None
    if platform == "gpu" and q.dtype in (jnp.bfloat16, jnp.float16):
        capability = _compute_capability(device)
        if capability >= 8 and size % 8 == 0 and size <= (256 if capability >= 9 else 128):
            return cudnn
    return None


def platform_of(device: AbstractDevice | None) -> str:
    """Returns "cpu", "gpu" or "tpu", the platform of a kind of device; of the default device if it is None."""
    default = getattr(jax.config, "jax_default_device", None)
    if device is not None:
        platform = device.platform
    else:
        platform = getattr(default, "platform", default or jax.default_backend())
    return "gpu" if platform in ("cuda", "rocm") else str(platform)


def _compute_capability(device: AbstractDevice | None) -> float:
    """Returns the compute capability of a kind of device, 0 if it is not from NVIDIA (AMD devices report a name).

    The device need not be present. None is the default device.
    """
    local = jax.devices()[0]
    if device is not None and device.device_kind != local.device_kind:
        chip = chip_of(device.device_kind)
        return 0.0 if chip is None else chip.compute_capability
    try:
        return float(getattr(local, "compute_capability", 0))
    except ValueError:
        return 0.0


def _on_each_device(
    kernel: Kernel, mesh: AbstractMesh | None, q: Array, k: Array, v: Array, real: Array | None
) -> Array:
    """Runs a kernel on each device's rows and heads, because the compiler cannot partition a fused kernel itself."""
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
    """Computes attention with the splash kernel of TPUs, which skips tiles above the diagonal.

    Padding queries attend to padding keys; their results have no meaning.

    Args:
      q, k, v, real, causal: see `attention`.
      interpret: if True, emulates the kernel on any platform, which is slow.
    """
    # Imported here because Mosaic is not installed everywhere and takes long to import.
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as kernels
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

    length, heads, size = q.shape[1:]
    num_tiles = -(-length // _MAX_TILE)
    tile = -(-length // (num_tiles * _TPU_LANES)) * _TPU_LANES
    extra = num_tiles * tile - length
    shape = (num_tiles * tile, num_tiles * tile)
    mask = masks.MultiHeadMask([masks.CausalMask(shape) if causal else masks.FullMask(shape)] * heads)
    sizes = kernels.BlockSizes(
        block_q=tile, block_kv=tile, block_q_dkv=tile, block_kv_dkv=tile, block_q_dq=tile, block_kv_dq=tile
    )
    kernel = kernels.make_splash_mha(mask, block_sizes=sizes, head_shards=1, q_seq_shards=1, interpret=interpret)

    def pad_heads_first(x: Array) -> Array:
        return jnp.pad(x.swapaxes(1, 2), ((0, 0), (0, 0), (0, extra), (0, 0)))

    segments = None
    if real is not None or extra:
        segment_ids = jnp.ones(q.shape[:2], jnp.int32) if real is None else real.astype(jnp.int32)
        segment_ids = jnp.pad(segment_ids, ((0, 0), (0, extra)))
        segments = kernels.SegmentIds(segment_ids, segment_ids)
    out = jax.vmap(kernel)(pad_heads_first(q * size**-0.5), pad_heads_first(k), pad_heads_first(v), segments)
    return out[:, :, :length].swapaxes(1, 2)


def cudnn(
    q: Float[Array, "B T H D"], k: Float[Array, "B T K D"], v: Float[Array, "B T K D"],
    real: Bool[Array, "B T"] | None, *, causal: bool, right_padded: bool = False,
) -> Float[Array, "B T H D"]:  # fmt: skip
    """Computes attention with cuDNN's flash attention, see `attention`.

    The kernel supports padding only at the end of a row, so each row is rotated until its padding comes last, unless
    that is known of all rows (`right_padded`).
    """
    run = functools.partial(jax.nn.dot_product_attention, is_causal=causal, implementation="cudnn")
    length = q.shape[1]
    if length % 2:  # jax 0.10 cannot differentiate an odd number of queries
        real = jnp.ones(q.shape[:2], bool) if real is None else real
        q, k, v, real = (jnp.pad(x, [(0, 0), (0, 1)] + [(0, 0)] * (x.ndim - 2)) for x in (q, k, v, real))
    if real is None:
        return run(q, k, v)
    # A row of padding alone needs a valid length too; its result is not used.
    lengths = jnp.maximum(jnp.sum(real, axis=1, dtype=jnp.int32), 1)
    attend = functools.partial(run, query_seq_lengths=lengths, key_value_seq_lengths=lengths)
    if right_padded:
        out = attend(q, k, v)
    else:
        start = jnp.argmax(real, axis=1).astype(jnp.int32)
        out = rotate_rows(attend(*(rotate_rows(x, start) for x in (q, k, v))), -start)
    return jnp.where(real[:, :, None, None], out, 0)[:, :length]


@jax.custom_vjp
def rotate_rows(x: Float[Array, "B T H D"], start: Int[Array, " B"]) -> Float[Array, "B T H D"]:
    """Returns `x` with each row rotated along T so that its position `start` comes first.

    The gradient is defined as the rotation back, which is cheaper than the scatter that jax would derive.
    """
    source = (jnp.arange(x.shape[1]) + start[:, None]) % x.shape[1]
    return jnp.take_along_axis(x, source[:, :, None, None], axis=1)


rotate_rows.defvjp(lambda x, start: (rotate_rows(x, start), start), lambda start, dx: (rotate_rows(dx, -start), None))
