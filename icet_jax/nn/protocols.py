"""What every model family offers to the rest of the house.

Everything outside models/, checkpoints/ and data/ is written against this file. Exits are numbered 1..num_exits, as
in the paper; exit l feeds the projector the output of the l-th block of the image encoder.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, Protocol, runtime_checkable

import flax
import jax
import jax.numpy as jnp

from icet_jax.errors import UserError
from icet_jax.nn.layers import Lora
from icet_jax.typing import Array, Bool, Float, Int, Key, Shaped

Visual = Any
"""Opaque pytree that the decoder takes; every leaf is row-aligned, its first axis is the batch."""

Cache = Any
"""What a decoder keeps of the tokens that it has seen: a pytree with the methods `with_room`, `trimmed`, `put` and
the property `columns` of `nn.kv_cache.KVCache`; the first axis of every leaf is the batch."""


@flax.struct.dataclass
class Images:
    """Preprocessed images of a batch whose rows may have 0..n of them.

    Attributes:
      pixels: Float[I, C, H, W], normalised. I is B * M where every row has a place for each of its images, filled up
        where there are fewer: place m of row r is number r * M + m, so that rows and their images are split over
        devices alike. Where I is smaller, images stand in HF's order: by row, then by position in the row.
      rows: Int[I], row of each image; that of filler images, which without places stand at the end, is `num_rows`.
      num_rows: static number of rows B of the batch.
      per_row: static upper bound M of images in one row.
      layout: what else the family's network needs to know about them, made by its processor; None where nothing.
    """

    # Not annotated with shapes: jax also fills pytrees with what are no arrays (jit(...).lower does).
    pixels: Any
    rows: Any
    num_rows: int = flax.struct.field(pytree_node=False)
    per_row: int = flax.struct.field(pytree_node=False, default=1)
    layout: Any = None

    def index(self, rows: Int[Array, "R"] | None = None) -> Int[Array, "R M"]:
        """Numbers of each row's images, -1 where it has fewer than `per_row`; of all rows in order if None."""
        wanted = jnp.arange(self.num_rows) if rows is None else rows
        if self.placed:
            number = wanted[:, None] * self.per_row + jnp.arange(self.per_row)
            row = self.rows.reshape(number.shape) if rows is None else self.rows[number]
            return jnp.where(row == wanted[:, None], number, -1)
        first, end = (jnp.searchsorted(self.rows, wanted, side=side)[:, None] for side in ("left", "right"))
        number = first + jnp.arange(self.per_row)
        return jnp.where(number < end, number, -1)

    @property
    def placed(self) -> bool:
        """Whether every row has a place for each of its images."""
        return self.rows.shape[0] == self.num_rows * self.per_row

    def exits_of(
        self, exits: Int[Array, "..."], rows: Int[Array, "R"] | None = None
    ) -> tuple[Int[Array, "N"], Int[Array, "N"] | None]:
        """(exit, number) of the images whose features are wanted: the R * M of `index(rows)`, or (exit, None) of all.

        `exits`: one for all rows, or one each. `parallel.traced.taken` takes them.
        """
        if rows is not None:
            index = self.index(rows)
            per_row = jnp.broadcast_to(jnp.asarray(exits, jnp.int32), index.shape[:1])
            return jnp.repeat(per_row, self.per_row), index.reshape(-1)
        per_row = jnp.broadcast_to(jnp.asarray(exits, jnp.int32), (self.num_rows,))
        if self.placed:
            return jnp.repeat(per_row, self.per_row), None
        return per_row[jnp.minimum(self.rows, self.num_rows - 1)], None

    def by_row(self, features: Shaped[Array, "N ..."], rows: Int[Array, "R"] | None = None) -> Shaped[Array, "R M ..."]:
        """What belongs to the images of `exits_of`, by row; zeros (False) where a row has fewer."""
        index = self.index(rows)
        scattered = rows is None and not self.placed
        aligned = features[index] if scattered else features.reshape(*index.shape, *features.shape[1:])
        there = (index >= 0).reshape(*index.shape, *[1] * (features.ndim - 1))
        return jnp.where(there, aligned, jnp.zeros((), aligned.dtype))


def one_image_per_row(pixels: Float[Array, "B C H W"]) -> Images:
    """The usual case: row i has exactly image i."""
    return Images(pixels=pixels, rows=jnp.arange(pixels.shape[0]), num_rows=pixels.shape[0], per_row=1)


class Operations(NamedTuple):
    """Floating-point operations of the parts of an answer, see `VisionLanguageModel.operations`.

    Attributes:
      encode: of one image, for all exits.
      visual: of one image at one exit: from the encoder's state to what the decoder takes.
      prefill: of one row's prompt at one exit, and the logits of its last position.
      step: of one new token of one row.
      forward: of all positions of one row through every decoder layer, each compared with the cached places; no logits.
    """

    encode: int
    visual: int
    prefill: int
    step: int
    forward: int


@runtime_checkable
class LanguageModel(Protocol):
    """What generation needs of a network: it decodes tokens, with a cache or without."""

    @property
    def vocab_size(self) -> int:
        """Columns of the logits."""
        ...

    @property
    def hidden_size(self) -> int:
        """Width of the decoder."""
        ...

    def decode(
        self,
        tokens: Int[Array, "B T"],
        positions: Int[Array, "B T"],
        mask: Bool[Array, "B T"],
        visual: Visual | None = None,
        lora: Lora | None = None,
    ) -> Float[Array, "B T E"]:
        """Hidden states after the final norm of whole sequences; padding may stand on either side."""
        ...

    def prefill(
        self,
        tokens: Int[Array, "B T"],
        mask: Bool[Array, "B T"],
        visual: Visual | None = None,
        prefix: Cache | None = None,
        lora: Lora | None = None,
    ) -> tuple[Float[Array, "B E"], Cache]:
        """State of each row's last token and the cache of its tokens, which are padded on the right.

        With a `prefix`, a cache of as many rows, the tokens follow what it holds and have no images of their own.
        """
        ...

    def apart(self, lora: Lora | None = None) -> Any:
        """The decoder's layers one by one, with their adapters: a pytree for `step`, made once for many steps."""
        ...

    def step(
        self, tokens: Int[Array, "B"], active: Bool[Array, "B"], cache: Cache, apart: Any
    ) -> tuple[Float[Array, "B E"], Cache]:
        """State of one more token of each row, and the cache with it; rows that are not active do not move on."""
        ...

    def logits(self, hidden: Float[Array, "*batch E"], head: Array | None = None) -> Float[Array, "*batch V"]:
        """Float32 next-token logits; `head` is that of `head_for`, if at hand."""
        ...

    def head_for(self, hidden: Float[Array, "B *rest E"]) -> Float[Array, "E V"]:
        """The head's kernel for `logits` of parts of `hidden`, one after the other: it travels once for all."""
        ...


@runtime_checkable
class VisionLanguageModel(LanguageModel, Protocol):
    """A language model with an image encoder whose every layer is an exit."""

    exit_definition: str

    @property
    def num_exits(self) -> int:
        """Number of exits."""
        ...

    @property
    def default_exit(self) -> int:
        """The exit that the model was trained on."""
        ...

    @property
    def image_token_index(self) -> int:
        """Token id whose positions are overwritten by image features."""
        ...

    def lora_shapes(self) -> Mapping[str, tuple[int, int, int]]:
        """`(layers, in, out)` of every decoder projection that LoRA can adapt, by its key in `Lora.weights`."""
        ...

    def encode(self, images: Images, upto: int | None = None) -> Any:
        """Runs the image encoder once; the result serves every exit (every exit <= upto, when given)."""
        ...

    def visual(self, encoded: Any, exits: Int[Array, "..."], rows: Int[Array, "R"] | None = None) -> Visual:
        """What the decoder needs of the images at traced `exits`: one for all rows, or one each.

        `rows` are the rows of the batch that are wanted, in any order and any number of times; None is each once.
        """
        ...

    def image_features(
        self, encoded: Any, exits: Int[Array, "..."]
    ) -> tuple[Float[Array, "B N E"], Bool[Array, "B N"]]:
        """Features of each row's images at traced `exits`, and which of the N are there for the decoder to see."""
        ...

    def hidden_states(self, images: Images) -> Float[Array, "X I P D"]:
        """Every hidden state of the image encoder, index 0 being the input of its first block."""
        ...

    def operations(self, length: int, cached: int, per_row: int) -> Operations:
        """What rows of `per_row` images and `length` positions take, and then steps on `cached` places."""
        ...


def check_exit(exit_layer: int, num_exits: int, field: str) -> int:
    """`exit_layer` itself if it is one of 1..num_exits.

    Raises:
      UserError: it is not; the message names `field`.
    """
    if not 1 <= exit_layer <= num_exits:
        raise UserError(f"{field}: exit {exit_layer} is out of range; this model has exits 1..{num_exits}")
    return exit_layer


POLICY_ROOT = "language_model"
"""Top-level name under which every family keeps the weights that L-PPO may train; encoder and projector are frozen."""


def lora_key(path: str) -> str | None:
    """Key in `Lora.weights` of the adapter of the parameter at `path`; None where it is no kernel of a decoder layer.

    A projection of the stack `layers` goes by its own name, one of another stack by both: "q_proj",
    "cross_layers/q_proj".
    """
    parts = path.split("/")
    if len(parts) != 4 or parts[0] != POLICY_ROOT or not parts[1].endswith("layers") or parts[3] != "kernel":
        return None
    return parts[2] if parts[1] == "layers" else f"{parts[1]}/{parts[2]}"


def init_lora(
    shapes: Mapping[str, tuple[int, int, int]], *, rank: int, alpha: float, targets: Sequence[str],
    key: Key[Array, ""],
) -> Lora:  # fmt: skip
    """Fresh adapters: `a` Kaiming-uniform (bound `1/sqrt(in)`), `b` zero, so that they change nothing yet (PEFT).

    Args:
      shapes: the model's `lora_shapes()`.
      rank: r.
      alpha: of the updates' scale, alpha / r.
      targets: projections ("q_proj"), each in every stack of layers that has it.
      key: of the random numbers.

    Raises:
      ValueError: a target is not a projection of the decoder, or the rank is not positive.
    """
    names = {name: name.rpartition("/")[2] for name in shapes}
    unknown = sorted(set(targets) - set(names.values()))
    if unknown or rank < 1 or not targets:
        known = ", ".join(dict.fromkeys(names.values()))
        raise ValueError(f"LoRA needs rank >= 1 and targets among {known}; got rank {rank}, {unknown}")
    chosen = sorted(name for name, projection in names.items() if projection in targets)
    weights = {}
    for name, subkey in zip(chosen, jax.random.split(key, len(chosen)), strict=True):
        depth, size_in, size_out = shapes[name]
        bound = size_in**-0.5
        a = jax.random.uniform(subkey, (depth, size_in, rank), jnp.float32, -bound, bound)
        weights[name] = {"a": a, "b": jnp.zeros((depth, rank, size_out), jnp.float32)}
    return Lora(weights=weights, scale=alpha / rank)


def count_parameters(params: Any) -> int:
    """Number of scalars in a pytree of arrays or of abstract shapes."""
    return sum(int(leaf.size) for leaf in jax.tree.leaves(params))
