"""The interface that every model family implements for the rest of the package.

Code outside models/, checkpoints/ and data/ depends only on this file. Exits are numbered 1..num_exits, as in the
paper: at exit l the projector gets the output of the l-th block of the image encoder.
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
"""Opaque pytree of the image features that the decoder gets; the first axis of every leaf is the batch."""

EncodedImages = Any
"""Opaque pytree of the image encoder's states of all images at every exit."""

ProjectorInputs = Any
"""Opaque pytree of what the projector takes of each row's images; the first axis of every leaf is the batch."""

Positions = Any
"""Opaque array of the tokens' positions, made by a family's `positions` and read by its `decode`: `[B, T]` for most
families, `[3, B, T]` for multimodal rotary embedding."""

Cache = Any
"""Opaque pytree in which a decoder keeps the tokens that it has processed and the position of the next one. It has the
methods `with_room`, `trim` and `replace_rows` and the property `columns` of `nn.kv_cache.KVCache`; the first axis of
every leaf is the batch."""


@flax.struct.dataclass
class Images:
    """Holds the preprocessed images of a batch whose rows may have any number of images.

    The images can be arranged in two ways. With *fixed places*, every row has M images, of which some may be filler
    images, and image m of row r is at position r * M + m of `pixels` (so I = B * M). Rows and their images are then
    split over devices in the same way. Without fixed places, I is smaller and the images are in the order of the rows.

    Attributes:
      pixels: Float[I, C, H, W], normalised; in some families with an axis of tiles, or as flat patches.
      rows: Int[I], the row of each image; a filler image has row `num_rows`. Without fixed places, fillers come last.
      num_rows: number of rows B of the batch, static.
      per_row: largest number M of images in one row, static.
      layout: array, or pytree of arrays, with what else the family's network needs to know about the images
        (`image_parts`), or None.
    """

    # Not annotated as arrays: jax also builds this pytree with other leaves, for example in jit(...).lower.
    pixels: Any
    rows: Any
    num_rows: int = flax.struct.field(pytree_node=False)
    per_row: int = flax.struct.field(pytree_node=False, default=1)
    layout: Any = None

    def index(self, rows: Int[Array, "R"] | None = None) -> Int[Array, "R M"]:
        """Returns, for each of `rows` (all rows if None), the positions of its images in `pixels`.

        They are padded with -1 to M, the largest number of images of a row.
        """
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
        """Returns whether the images are arranged with fixed places."""
        return self.rows.shape[0] == self.num_rows * self.per_row

    def image_exits(
        self, exits: Int[Array, "..."], rows: Int[Array, "R"] | None = None
    ) -> tuple[Int[Array, "N"], Int[Array, "N"] | None]:
        """Returns the exits and positions of images, in the form that `parallel.traced.take_exit_states` takes.

        Args:
          exits: one exit for all rows, or one for each row.
          rows: the requested rows; None requests all.

        Returns:
          (exit of each image, position of each image in `pixels`). With `rows` these are the R * M images of
          `index(rows)`. Without `rows`, they are all images in order, and the positions are None.
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
        """Returns the features of images grouped by row, M images for each; zeros where a row has fewer images.

        Args:
          features: features of the images, in the order of `image_exits(exits, rows)`.
          rows: the requested rows; None for all.
        """
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
        """Returns the name of the family: `model_type` in `config.json`."""
        ...

    @property
    def image_token_index(self) -> int:
        """Returns the token id that stands for an image."""
        ...

    def lora_shapes(self) -> Mapping[str, tuple[int, int, int]]:
        """Returns {key in `Lora.weights`: (layers, input size, output size)} of the projections that LoRA can adapt."""
        ...


class Operations(NamedTuple):
    """Holds the numbers of floating-point operations of the parts of a model, see `VisionLanguageModel.operations`.

    Attributes:
      encode: operations to encode one image for all exits.
      visual: operations to compute one image's features at one exit from the encoder's states.
      project: operations of the projector, a part of `visual`.
      prefill: operations to process one row's prompt at one exit, with the logits of its last position.
      step: operations to decode one new token of one row, with its logits.
      forward: operations to run one row through the decoder layers without a cache, without logits.
    """

    encode: int
    visual: int
    project: int
    prefill: int
    step: int
    forward: int


@runtime_checkable
class LanguageModel(Protocol):
    """What generation needs of a network: decoding whole sequences, and decoding token by token with a cache."""

    @property
    def vocab_size(self) -> int:
        """Returns the number of logits."""
        ...

    @property
    def hidden_size(self) -> int:
        """Returns the width of the decoder."""
        ...

    def positions(self, tokens: Int[Array, "B T"], mask: Bool[Array, "B T"], visual: Visual | None = None) -> Positions:
        """Returns the positions of whole sequences for `decode`; padding may be on either side."""
        ...

    def decode(
        self,
        tokens: Int[Array, "B T"],
        positions: Positions,
        mask: Bool[Array, "B T"],
        visual: Visual | None = None,
        lora: Lora | None = None,
    ) -> Float[Array, "B T E"]:
        """Returns the hidden states of whole sequences after the final norm.

        Args:
          tokens: the sequences, with image placeholders.
          positions: result of `positions`.
          mask: True at tokens that are not padding, which may be on either side.
          visual: image features of the rows; None without images.
          lora: adapters; None for the model without adapters.
        """
        ...

    def prefill(
        self,
        tokens: Int[Array, "B T"],
        mask: Bool[Array, "B T"],
        visual: Visual | None = None,
        prefix: Cache | None = None,
        lora: Lora | None = None,
    ) -> tuple[Float[Array, "B E"], Cache]:
        """Returns the hidden state of each row's last token after the final norm, and the cache of all tokens.

        Args:
          tokens: see `decode`.
          mask: see `decode`; padding must be on the right.
          visual: see `decode`.
          lora: see `decode`.
          prefix: cache of B rows whose tokens come before `tokens`, or None. With a prefix, `tokens` have no images.
        """
        ...

    def unstack_layers(self, lora: Lora | None = None) -> Any:
        """Returns separate arrays for each of the decoder's layers and its adapters, as an opaque pytree for `step`."""
        ...

    def step(
        self, tokens: Int[Array, "B"], active: Bool[Array, "B"], cache: Cache, unstacked: Any
    ) -> tuple[Float[Array, "B E"], Cache]:
        """Returns the state of one new token of each row after the final norm, and the cache with these tokens.

        Args:
          tokens: the new tokens.
          active: False for rows that have ended, whose cache does not change.
          cache: cache of the earlier tokens.
          unstacked: result of `unstack_layers`.
        """
        ...

    def logits(self, hidden: Float[Array, "*batch E"], head: Array | None = None) -> Float[Array, "*batch V"]:
        """Returns float32 logits of the next token for states after the final norm.

        `head` is the result of `head_for`; with None this method collects the head's weights itself.
        """
        ...

    def head_for(self, hidden: Float[Array, "B *rest E"]) -> Float[Array, "E V"]:
        """Returns the head's weight matrix, collected from all devices.

        Pass it to `logits` if that is called several times, on parts of `hidden`.
        """
        ...


@runtime_checkable
class VisionLanguageModel(LanguageModel, Protocol):
    """A language model with an image encoder; each block of the encoder is an exit.

    Attributes:
      exit_definition: what exit l means in this family, in words.
    """

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
        """Returns {key in `Lora.weights`: (layers, input size, output size)} of the projections that LoRA can adapt."""
        ...

    def encode(self, images: Images, upto: int | None = None) -> EncodedImages:
        """Runs the image encoder and returns its states at every exit; with a static `upto`, at exits 1..upto only."""
        ...

    def visual(self, encoded: EncodedImages, exits: Int[Array, "..."], rows: Int[Array, "R"] | None = None) -> Visual:
        """Returns the image features that the decoder gets.

        Args:
          encoded: result of `encode`.
          exits: the exit of all rows, or one for each row; may be traced.
          rows: indices of the requested rows of the batch, in any order and with repeats; None requests each row once.
        """
        ...

    def projector_inputs(self, encoded: EncodedImages, exits: Int[Array, "..."]) -> ProjectorInputs:
        """Returns what the projector takes of each row's images at its exit; see `visual` for the arguments."""
        ...

    def project(self, inputs: ProjectorInputs) -> Visual:
        """Returns `visual(encoded, exits)`, given `projector_inputs(encoded, exits)` or any of its rows.

        Training of the projector differentiates this method and leaves the image encoder out.
        """
        ...

    def image_features(
        self, encoded: EncodedImages, exits: Int[Array, "..."]
    ) -> tuple[Float[Array, "B N E"], Bool[Array, "B N"]]:
        """Returns (N image features of each row at its exit, whether each belongs to an image); see `visual`."""
        ...

    def hidden_states(self, images: Images) -> Float[Array, "X I P D"]:
        """Returns every hidden state of the image encoder: index 0 is the input of its first block, index l exit l."""
        ...

    def operations(self, length: int, cached: int, per_row: int) -> Operations:
        """Returns the numbers of operations for one image and for one row.

        Args:
          length: positions of the row's prompt.
          cached: columns of the KV cache to which a new token attends.
          per_row: images of the row.
        """
        ...


def check_exit(exit_layer: int, num_exits: int, field: str) -> int:
    """Returns `exit_layer` if it is one of 1..num_exits.

    Raises:
      UserError: there is no such exit; the message names `field`.
    """
    if not 1 <= exit_layer <= num_exits:
        raise UserError(f"{field}: exit {exit_layer} is out of range; this model has exits 1..{num_exits}")
    return exit_layer


POLICY_ROOT = "language_model"
"""First part of the paths of the decoder's parameters, which every algorithm trains unless it trains the projector
alone."""

PROJECTOR_ROOT = "projector"
"""First part of the paths of the projector's parameters, which L-SFT can train; all other parts are always frozen."""


def lora_key(path: str) -> str | None:
    """Returns the key in `Lora.weights` of the adapter for a parameter, or None if LoRA cannot adapt it.

    The key is the name of the projection ("q_proj"). In a stack of layers that is not called `layers`, the name of the
    stack precedes it ("cross_layers/q_proj").

    Args:
      path: path of the parameter, "language_model/layers/q_proj/kernel".
    """
    parts = path.split("/")
    if len(parts) != 4 or parts[0] != POLICY_ROOT or not parts[1].endswith("layers") or parts[3] != "kernel":
        return None
    return parts[2] if parts[1] == "layers" else f"{parts[1]}/{parts[2]}"


def init_lora(
    shapes: Mapping[str, tuple[int, int, int]], *, rank: int, alpha: float, targets: Sequence[str],
    key: Key[Array, ""],
) -> Lora:  # fmt: skip
    """Returns new adapters, initialised as in PEFT: `a` is uniform within +-1/sqrt(in), `b` is zero.

    The product `a @ b` is therefore zero, and the adapters do not change the model at first.

    Args:
      shapes: the model's `lora_shapes()`.
      rank: rank r of the updates.
      alpha: the updates are scaled by alpha / r.
      targets: names of projections ("q_proj"), adapted in all layers that have them.
      key: source of the random numbers.

    Raises:
      ValueError: a target is not a projection of the decoder, or the rank is not positive.
    """
    names = {name: name.rpartition("/")[2] for name in shapes}
    unknown = sorted(set(targets) - set(names.values()))
    if unknown or rank < 1 or not targets:
        projections = ", ".join(dict.fromkeys(names.values()))
        raise ValueError(f"LoRA needs rank >= 1 and targets among {projections}; got rank {rank}, {unknown}")
    adapted = sorted(name for name, projection in names.items() if projection in targets)
    weights = {}
    for name, subkey in zip(adapted, jax.random.split(key, len(adapted)), strict=True):
        depth, size_in, size_out = shapes[name]
        bound = size_in**-0.5
        a = jax.random.uniform(subkey, (depth, size_in, rank), jnp.float32, -bound, bound)
        weights[name] = {"a": a, "b": jnp.zeros((depth, rank, size_out), jnp.float32)}
    return Lora(weights=weights, scale=alpha / rank)


def count_parameters(params: Any) -> int:
    """Returns the number of scalars in a pytree of arrays or of abstract shapes."""
    return sum(int(leaf.size) for leaf in jax.tree.leaves(params))
