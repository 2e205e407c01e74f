"""Keys and values of the tokens that a decoder has seen, and attention to them for one new token of each row.

Heads come before columns, so that what one token attends to is contiguous, and each layer has arrays of its own: a
decoding step writes them in place and copies nothing.
"""

from typing import Any

import flax
import jax
import jax.numpy as jnp

from icet_jax.typing import Array, Bool, Float, Int


@flax.struct.dataclass
class KVCache:
    """A row's token t stands in column t, whatever the padding of its prompt was.

    Attributes:
      k, v: for each layer `[B, K, S, D]`; what stands beyond a row's length is meaningless.
      length: tokens of each row, which is the column and the position of its next one, `[B]`.
    """

    # Not annotated with shapes: jax also fills pytrees with what are no arrays (jit(...).lower does).
    k: tuple[Any, ...]
    v: tuple[Any, ...]
    length: Any

    @property
    def columns(self) -> int:
        """S, the most tokens of a row."""
        return self.k[0].shape[2]

    def with_room(self, columns: int) -> "KVCache":
        """The same tokens with room for `columns` more in each row."""
        pad = [(0, 0), (0, 0), (0, columns), (0, 0)]
        k, v = jax.tree.map(lambda leaf: jnp.pad(leaf, pad), (self.k, self.v))
        return self.replace(k=k, v=v)  # type: ignore[attr-defined]

    def trimmed(self, columns: int) -> "KVCache":
        """The first `columns` columns."""
        k, v = jax.tree.map(lambda leaf: leaf[:, :, :columns], (self.k, self.v))
        return self.replace(k=k, v=v)  # type: ignore[attr-defined]

    def put(self, slots: Int[Array, "R"], rows: "KVCache") -> "KVCache":
        """Rows of another cache, none longer than S, in place of the rows `slots`; numbers beyond B are left out."""
        rows = rows.trimmed(self.columns)

        def write(mine: Array, theirs: Array) -> Array:
            return mine.at[slots, :, : rows.columns].set(theirs.astype(mine.dtype), mode="drop")

        k, v = jax.tree.map(write, (self.k, self.v), (rows.k, rows.v))
        return KVCache(k=k, v=v, length=self.length.at[slots].set(rows.length, mode="drop"))

    def joined(self, layer: int, k: Float[Array, "B K T D"], v: Float[Array, "B K T D"]) -> tuple[Array, Array]:
        """One layer's keys and values with those of the tokens that follow, each row's at its own length."""
        return write_columns(self.k[layer], k, self.length), write_columns(self.v[layer], v, self.length)

    def seen(self) -> Bool[Array, "B S"]:
        """Columns that a row's next token attends to: those of the tokens before it, and its own."""
        return jnp.arange(self.columns) <= self.length[:, None]


def write_columns(
    rows: Float[Array, "B K S D"], new: Float[Array, "B K T D"], starts: Int[Array, "B"]
) -> Float[Array, "B K S D"]:
    """Writes each row's new columns from its start on (not beyond the last column)."""
    return jax.vmap(lambda row, part, start: jax.lax.dynamic_update_slice_in_dim(row, part, start, axis=1))(
        rows, new.astype(rows.dtype), starts
    )


def attend(
    q: Float[Array, "B H D"], k: Float[Array, "B K S D"], v: Float[Array, "B K S D"], allowed: Bool[Array, "B S"]
) -> Float[Array, "B HD"]:
    """Attention of one token per row to cached ones: as `layers.attention`, on the cache's layout."""
    batch, heads, size = q.shape
    grouped = q.reshape(batch, k.shape[1], heads // k.shape[1], size)
    scores = jnp.einsum("bkgd,bksd->bkgs", grouped, k, preferred_element_type=jnp.float32) * size**-0.5
    scores = jnp.where(allowed[:, None, None], scores, jnp.finfo(jnp.float32).min)
    weights = jax.nn.softmax(scores, axis=-1).astype(v.dtype)
    return jnp.einsum("bkgs,bksd->bkgd", weights, v).reshape(batch, heads * size)
