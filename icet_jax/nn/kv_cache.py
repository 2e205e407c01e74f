"""The cache of keys and values of a decoder, and attention of one new token per row to it.

The axis of heads comes before the axis of tokens, so that the keys which one token attends to are contiguous in memory.
Each layer has separate arrays, so that a decoding step writes them in place and copies nothing.
"""

from typing import Any

import flax
import jax
import jax.numpy as jnp

from icet_jax.typing import Array, Bool, Float, Int


@flax.struct.dataclass
class KVCache:
    """Holds the keys and values of all tokens that a decoder has processed; token t of a row is in column t of S.

    Padding of the prompts is not stored.

    Attributes:
      k, v: one array per layer, `[B, K, S, D]`; columns at or beyond a row's length have no meaning.
      length: number of tokens of each row, `[B]`; this is also the column of its next token.
      next_position: rotary position of each row's next token, `[B]`; less than its column where image tokens share
        positions (multimodal rotary embedding).
    """

    # Not annotated as arrays: jax also builds this pytree with other leaves, for example in jit(...).lower.
    k: tuple[Any, ...]
    v: tuple[Any, ...]
    length: Any
    next_position: Any

    @property
    def columns(self) -> int:
        """Returns the number of columns S, the largest number of tokens that a row can have."""
        return self.k[0].shape[2]

    def with_room(self, columns: int) -> "KVCache":
        """Returns a cache with the same tokens and `columns` more columns."""
        pad = [(0, 0), (0, 0), (0, columns), (0, 0)]
        k, v = jax.tree.map(lambda leaf: jnp.pad(leaf, pad), (self.k, self.v))
        return self.replace(k=k, v=v)  # type: ignore[attr-defined]

    def trim(self, columns: int) -> "KVCache":
        """Returns a cache with only the first `columns` columns."""
        k, v = jax.tree.map(lambda leaf: leaf[:, :, :columns], (self.k, self.v))
        return self.replace(k=k, v=v)  # type: ignore[attr-defined]

    def replace_rows(self, slots: Int[Array, "R"], rows: "KVCache") -> "KVCache":
        """Returns a cache in which some rows are replaced.

        Args:
          slots: indices of the rows to replace; indices outside the batch are ignored.
          rows: a cache with the new rows, each of at most S tokens.
        """
        rows = rows.trim(self.columns)

        def write(old: Array, new: Array) -> Array:
            return old.at[slots, :, : rows.columns].set(new.astype(old.dtype), mode="drop")

        k, v = jax.tree.map(write, (self.k, self.v), (rows.k, rows.v))
        length, next_position = (
            old.at[slots].set(new, mode="drop")
            for old, new in ((self.length, rows.length), (self.next_position, rows.next_position))
        )
        return KVCache(k=k, v=v, length=length, next_position=next_position)

    def append_to_layer(
        self, layer: int, k: Float[Array, "B K T D"], v: Float[Array, "B K T D"]
    ) -> tuple[Array, Array]:
        """Returns one layer's cached keys and values with those of T new tokens written after each row's last token."""
        return write_columns(self.k[layer], k, self.length), write_columns(self.v[layer], v, self.length)

    def visible_columns(self) -> Bool[Array, "B S"]:
        """Returns which columns each row's next token attends to: those of the earlier tokens and its own."""
        return jnp.arange(self.columns) <= self.length[:, None]


def write_columns(
    rows: Float[Array, "B K S D"], new: Float[Array, "B K T D"], starts: Int[Array, "B"]
) -> Float[Array, "B K S D"]:
    """Returns `rows` with T new columns written to each row from column `starts` on; they must fit into S columns."""
    return jax.vmap(lambda row, part, start: jax.lax.dynamic_update_slice_in_dim(row, part, start, axis=1))(
        rows, new.astype(rows.dtype), starts
    )


def attend(
    q: Float[Array, "B H D"], k: Float[Array, "B K S D"], v: Float[Array, "B K S D"], allowed: Bool[Array, "B S"]
) -> Float[Array, "B HD"]:
    """Computes attention of one token per row to the columns of a cache where `allowed` is True."""
    batch, heads, size = q.shape
    grouped = q.reshape(batch, k.shape[1], heads // k.shape[1], size)
    scores = jnp.einsum("bkgd,bksd->bkgs", grouped, k, preferred_element_type=jnp.float32) * size**-0.5
    scores = jnp.where(allowed[:, None, None], scores, jnp.finfo(jnp.float32).min)
    weights = jax.nn.softmax(scores, axis=-1).astype(v.dtype)
    return jnp.einsum("bkgs,bksd->bkgd", weights, v).reshape(batch, heads * size)
