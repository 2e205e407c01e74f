"""Aligns whole sequences once for all layers of a decoder, where that saves work: on GPUs.

cuDNN's attention needs the padding of a row at its end, and matrix products of GPUs need a number of columns that is a
multiple of 8. Otherwise every layer would rotate and pad its operands.
"""

import dataclasses

import jax.numpy as jnp

from icet_jax.nn.attention import platform_of, rotate_rows
from icet_jax.parallel.traced import target_device
from icet_jax.typing import Array, Bool, Float, Int

_MULTIPLE = 8


@dataclasses.dataclass(frozen=True)
class Aligned:
    """Holds sequences whose rows may be rotated, with padding columns added behind.

    Attributes:
      embeddings: embeddings of the tokens, `[B, C, E]`.
      positions: positions of the tokens, `[*sections, B, C]`.
      mask: True at tokens that are not padding, `[B, C]`.
      columns: number of columns T of the original sequences, at most C.
      start: column at which each original row begins, `[B]`; None if the rows are the original ones.
    """

    embeddings: Array
    positions: Array
    mask: Array
    columns: int
    start: Array | None

    @property
    def right_padded(self) -> bool:
        """Whether all padding is known to be on the right."""
        return self.start is not None

    def restore(self, x: Float[Array, "B C E"]) -> Float[Array, "B T E"]:
        """Returns results of the aligned sequences in the columns of the original ones."""
        if self.start is None:
            return x
        return rotate_rows(x[:, :, None], -self.start)[:, : self.columns, 0]


def align(
    embeddings: Float[Array, "B T E"], positions: Int[Array, "*sections B T"], mask: Bool[Array, "B T"]
) -> Aligned:  # fmt: skip
    """Returns sequences with their padding on the right and a multiple of 8 columns, or as they are if not on a GPU.

    The real tokens of a row must be contiguous; padding may be on either side.
    """
    columns = mask.shape[1]
    if platform_of(target_device(embeddings)) != "gpu":
        return Aligned(embeddings, positions, mask, columns, None)
    extra = -columns % _MULTIPLE
    mask = jnp.pad(mask, ((0, 0), (0, extra)))
    positions = jnp.pad(positions, [(0, 0)] * (positions.ndim - 1) + [(0, extra)])
    embeddings = jnp.pad(embeddings, ((0, 0), (0, extra), (0, 0)))
    start = jnp.argmax(mask, axis=1).astype(jnp.int32)
    source = (jnp.arange(mask.shape[1]) + start[:, None]) % mask.shape[1]
    return Aligned(
        rotate_rows(embeddings[:, :, None], start)[:, :, 0],
        jnp.take_along_axis(positions, jnp.broadcast_to(source, positions.shape), axis=-1),
        jnp.take_along_axis(mask, source, axis=1),
        columns,
        start,
    )
