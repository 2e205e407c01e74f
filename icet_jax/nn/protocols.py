"""The interface that every model family implements for the rest of the package.

Code outside models/, checkpoints/ and data/ depends only on this file. Exits are numbered 1..num_exits, as in the
paper: exit l feeds the projector the output of the l-th block of the image encoder.
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
"""Opaque pytree of image features for the decoder; the first axis of every leaf is the batch."""

EncodedImages = Any
"""Opaque pytree in which an image encoder returns the states of images at every exit."""

Cache = Any
"""Opaque pytree in which a decoder keeps the tokens that it has processed. It has the methods `with_room`, `trim` and
`replace_rows` and the property `columns` of `nn.kv_cache.KVCache`; the first axis of every leaf is the batch."""


@flax.struct.dataclass
class Images:
    """Holds the preprocessed images of a batch whose rows may have any number of images.

    There are two layouts. With fixed places, I is B * M and every row has M places, of which unused ones hold filler
    images: place m of row r is image number r * M + m. Rows and their images are then split over devices in the same
    way. Otherwise I is smaller, and the images are in HF's order: by row, then by position in the row.

    Attributes:
      pixels: Float[I, C, H, W], normalised.
      rows: Int[I], the row of each image; a filler image has row `num_rows`. Without fixed places fillers come last.
      num_rows: number of rows B of the batch, static.
      per_row: largest number M of images in one row, static.
      layout: further data about the images that the family's network needs, made by its processor; or None.
    """

    # Not annotated as arrays: jax also builds this pytree with other leaves, for example in jit(...).lower.
    pixels: Any
    rows: Any
    num_rows: int = flax.struct.field(pytree_node=False)
    per_row: int = flax.struct.field(pytree_node=False, default=1)
    layout: Any = None

    def index(self, rows: Int[Array, "R"] | None = None) -> Int[Array, "R M"]:
        """Returns the numbers of each row's images, -1 where a row has fewer than `per_row`; `rows=None` means all
        rows."""
        requested_rows = jnp.arange(self.num_rows) if rows is None else rows
        if self.has_fixed_places:
            number = requested_rows[:, None] * self.per_row + jnp.arange(self.per_row)
            row = self.rows.reshape(number.shape) if rows is None else self.rows[number]
            return jnp.where(row == requested_rows[:, None], number, -1)
        first, end = (jnp.searchsorted(self.rows, requested_rows, side=side)[:, None] for side in ("left", "right"))
        number = first + jnp.arange(self.per_row)
        return jnp.where(number < end, number, -1)

    @property
    def has_fixed_places(self) -> bool:
        """Returns whether every row has `per_row` fixed places for images."""
        return self.rows.shape[0] == self.num_rows * self.per_row

    def image_exits(
        self, exits: Int[Array, "..."], rows: Int[Array, "R"] | None = None
    ) -> tuple[Int[Array, "N"], Int[Array, "N"] | None]:
        """Returns the exit and the number of each image whose features are needed, for
        `parallel.traced.take_exit_states`.

        `exits` is one exit for all rows, or one for each row. With `rows`, these are the R * M images of `index(rows)`;
        without, all images, and None in place of their numbers.
        """
        if rows is not None:
            index = self.index(rows)
            per_row = jnp.broadcast_to(jnp.asarray(exits, jnp.int32), index.shape[:1])
            return jnp.repeat(per_row, self.per_row), index.reshape(-1)
        per_row = jnp.broadcast_to(jnp.asarray(exits, jnp.int32), (self.num_rows,))
        if self.has_fixed_places:
            return jnp.repeat(per_row, self.per_row), None
        return per_row[jnp.minimum(self.rows, self.num_rows - 1)], None

    def group_by_row(
        self, features: Shaped[Array, "N ..."], rows: Int[Array, "R"] | None = None
    ) -> Shaped[Array, "R M ..."]:
        """Returns the features of the images of `image_exits`, grouped by row; zeros (False) where a row has fewer
        images."""
        index = self.index(rows)
        is_ungrouped = rows is None and not self.has_fixed_places
        grouped = features[index] if is_ungrouped else features.reshape(*index.shape, *features.shape[1:])
        is_present = (index >= 0).reshape(*index.shape, *[1] * (features.ndim - 1))
        return jnp.where(is_present, grouped, jnp.zeros((), grouped.dtype))


def one_image_per_row(pixels: Float[Array, "B C H W"]) -> Images:
    """Returns `Images` in which row i has exactly image i."""
    return Images(pixels=pixels, rows=jnp.arange(pixels.shape[0]), num_rows=pixels.shape[0], per_row=1)


@runtime_checkable
class NetworkConfig(Protocol):
    """The fields that the configs of all vision-language models have in common."""

    @property
    def model_type(self) -> str:
        """Returns the name of the family, as `config.json` has it."""
        ...

    @property
    def image_token_index(self) -> int:
        """Returns the token id that stands for an image."""
        ...

    def lora_shapes(self) -> Mapping[str, tuple[int, int, int]]:
        """Returns `(layers, in, out)` of every decoder projection that LoRA can adapt, by its key in `Lora.weights`."""
        ...


class Operations(NamedTuple):
    """Holds the numbers of floating-point operations of the parts of a response, see `VisionLanguageModel.operations`.

    Attributes:
      encode: encoding one image for all exits.
      visual: computing one image's features at one exit from the encoder's states.
      prefill: processing one row's prompt at one exit, and the logits of its last position.
      step: decoding one new token of one row.
      forward: running all positions of one row through the decoder layers, each attending to all columns; no logits.
    """

    encode: int
    visual: int
    prefill: int
    step: int
    forward: int


@runtime_checkable
class LanguageModel(Protocol):
    """The methods that generation needs of a network: decoding with a cache and without."""

    @property
    def vocab_size(self) -> int:
        """Returns the number of logits."""
        ...

    @property
    def hidden_size(self) -> int:
        """Returns the width of the decoder."""
        ...

    def decode(
        self,
        tokens: Int[Array, "B T"],
        positions: Int[Array, "B T"],
        mask: Bool[Array, "B T"],
        visual: Visual | None = None,
        lora: Lora | None = None,
    ) -> Float[Array, "B T E"]:
        """Returns the hidden states of whole sequences after the final norm; padding may be on either side."""
        ...

    def prefill(
        self,
        tokens: Int[Array, "B T"],
        mask: Bool[Array, "B T"],
        visual: Visual | None = None,
        prefix: Cache | None = None,
        lora: Lora | None = None,
    ) -> tuple[Float[Array, "B E"], Cache]:
        """Returns the state of each row's last token, and the cache of its tokens, which are padded on the right.

        With a `prefix`, a cache of as many rows, the tokens follow those in it and have no images of their own.
        """
        ...

    def unstack_layers(self, lora: Lora | None = None) -> Any:
        """Returns the decoder's layers one by one with their adapters, a pytree that many calls of `step` share."""
        ...

    def step(
        self, tokens: Int[Array, "B"], active: Bool[Array, "B"], cache: Cache, unstacked: Any
    ) -> tuple[Float[Array, "B E"], Cache]:
        """Returns the state of one new token of each row, and the cache with it; inactive rows keep their length."""
        ...

    def logits(self, hidden: Float[Array, "*batch E"], head: Array | None = None) -> Float[Array, "*batch V"]:
        """Returns float32 logits of the next token; `head` is the result of `head_for`, if available."""
        ...

    def head_for(self, hidden: Float[Array, "B *rest E"]) -> Float[Array, "E V"]:
        """Returns the head's kernel, gathered once so that `logits` can be called on parts of `hidden` one after
        another."""
        ...


@runtime_checkable
class VisionLanguageModel(LanguageModel, Protocol):
    """A language model with an image encoder, each of whose layers is an exit."""

    exit_definition: str

    @property
    def num_exits(self) -> int:
        """Returns the number of exits."""
        ...

    @property
    def default_exit(self) -> int:
        """Returns the exit that the model was trained with."""
        ...

    @property
    def image_token_index(self) -> int:
        """Returns the token id of the positions that image features replace."""
        ...

    def lora_shapes(self) -> Mapping[str, tuple[int, int, int]]:
        """Returns `(layers, in, out)` of every decoder projection that LoRA can adapt, by its key in `Lora.weights`."""
        ...

    def encode(self, images: Images, upto: int | None = None) -> EncodedImages:
        """Runs the image encoder once and returns its states at every exit, or at every exit up to a static `upto`."""
        ...

    def visual(self, encoded: EncodedImages, exits: Int[Array, "..."], rows: Int[Array, "R"] | None = None) -> Visual:
        """Returns the image features for the decoder at the traced `exits`, one for all rows or one for each row.

        `rows` are the requested rows of the batch, in any order and with repeats; None requests each row once.
        """
        ...

    def image_features(
        self, encoded: EncodedImages, exits: Int[Array, "..."]
    ) -> tuple[Float[Array, "B N E"], Bool[Array, "B N"]]:
        """Returns the features of each row's images at the traced `exits`, and which of the N the decoder can attend
        to."""
        ...

    def hidden_states(self, images: Images) -> Float[Array, "X I P D"]:
        """Returns every hidden state of the image encoder; index 0 is the input of its first block."""
        ...

    def operations(self, length: int, cached: int, per_row: int) -> Operations:
        """Returns the operations for rows of `length` positions with `per_row` images, then steps with `cached`
        columns."""
        ...


def check_exit(exit_layer: int, num_exits: int, field: str) -> int:
    """Returns `exit_layer` if it is one of 1..num_exits.

    Raises:
      UserError: it is not; the message names `field`.
    """
    if not 1 <= exit_layer <= num_exits:
        raise UserError(f"{field}: exit {exit_layer} is out of range; this model has exits 1..{num_exits}")
    return exit_layer


POLICY_ROOT = "language_model"
"""Root of the paths of the weights that L-PPO may train in every family; encoder and projector are frozen."""


def lora_key(path: str) -> str | None:
    """Returns the key in `Lora.weights` of the adapter for the parameter at `path`, or None if it is no decoder kernel.

    A projection of the stack `layers` has its own name as key, "q_proj"; one of another stack has both names,
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
    """Returns new adapters: `a` Kaiming-uniform (bound `1/sqrt(in)`), `b` zero, so that they change nothing yet (PEFT).

    Args:
      shapes: the model's `lora_shapes()`.
      rank: rank r of the updates.
      alpha: the updates are scaled by alpha / r.
      targets: names of projections ("q_proj"); each is adapted in every stack of layers that has it.
      key: source of the random numbers.

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
    """Returns the number of scalars in a pytree of arrays or of abstract shapes."""
    return sum(int(leaf.size) for leaf in jax.tree.leaves(params))
