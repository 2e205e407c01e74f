"""Images of a batch as a network takes them, from HF-named arrays: fixed shapes, and each family's own layout."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, TypeAlias

import numpy as np

from icet_jax.errors import UserError
from icet_jax.models.llava.network import LlavaConfig
from icet_jax.models.llava_next.anyres import canvas, gather_rows, packing
from icet_jax.models.llava_next.network import LlavaNextConfig
from icet_jax.models.mllama.network import MllamaConfig
from icet_jax.nn.protocols import Images
from icet_jax.parallel.distributed import Share

Inputs: TypeAlias = Mapping[str, Any]

Parts: TypeAlias = tuple[np.ndarray, np.ndarray, Callable[["Places"], np.ndarray | None]]
"""Pixels of I images, the row of each, and what makes `Images.layout` of their places."""

_WHOLE = Share(0, 1)


class Places(NamedTuple):
    """Where images go in a batch, or in a share of one.

    Attributes:
      slots: places for images, those of the share.
      numbers: of the I images there, int [I].
      rows: of the share.
      first: number in the batch of the share's first place.
      whole: places of the whole batch.
    """

    slots: int
    numbers: np.ndarray
    rows: int
    first: int
    whole: int


def batch_images(
    config: Any, inputs: Inputs, *, num_rows: int, per_row: int | None = None, share: Share = _WHOLE
) -> Images | None:
    """The images of a batch, in numpy.

    Their shapes depend on the arguments and on the length of input_ids alone, whatever sizes the images have: every
    image has as many tiles as the largest, and LLaVA-NeXT's layout is as long as the padded tokens.

    Args:
      config: of the model.
      inputs: what the family's processor returns, input_ids [B, T] padded as the network will get them.
      num_rows: of the batch, at least B.
      per_row: images that there is room for in each row; slots without an image are filled with zeros. None: as many as
        the row with most images has, and no slots but the images'.
      share: the part of the batch that the inputs are, `per_row` images in every row unless it is the whole.

    Returns:
      `num_rows * per_row` images, each at its row's place (see `Images`), or those that are there; None where there is
      room for none. Of a share, its part of every array, numbered as in the whole batch.

    Raises:
      UserError: the inputs do not fit each other or the model, or a row has more images than there is room for.
    """
    ids = np.asarray(inputs["input_ids"])
    pixels, rows, layout = _FAMILIES[type(config)](config, inputs, ids)
    counts: list[int] = np.bincount(rows).tolist()
    most = max(counts, default=0)
    if per_row is None:
        per_row, slots = most, len(rows)
    else:
        slots = num_rows * per_row
    if most > per_row:
        raise UserError(f"inputs: row {counts.index(most)} has {most} images, but there is room for {per_row}")
    if not slots:
        return None
    own = slots // share.count
    if share.count > 1 and len(rows) != own:
        raise ValueError(f"a share of a batch has {len(rows)} images where {per_row} in each row are {own}")
    numbers = np.arange(len(rows))
    if own > len(rows):  # a row's images come one after the other: each has its place by how far it is from the first
        numbers += rows * per_row - rows.searchsorted(rows)
    filled = np.zeros((own, *_shape(config)), np.float32)
    within: tuple[Any, ...] = (numbers, *map(slice, pixels.shape[1:]))
    filled[within] = pixels
    row_of = np.full(own, num_rows, np.int32)
    row_of[numbers] = rows + share.rows(num_rows).start
    places = Places(own, numbers, num_rows // share.count, share.rows(slots).start, slots)
    return Images(pixels=filled, rows=row_of, num_rows=num_rows, per_row=per_row, layout=layout(places))


def image_rows(input_ids: np.ndarray, num_images: int, config: LlavaConfig) -> np.ndarray:
    """The row of each LLaVA-1.5 image, int32 [I] ascending, from the placeholders in input_ids [B, T].

    Raises:
      UserError: a row's placeholders are no whole number of images, or the images are too few or too many.
    """
    counts, rest = np.divmod((input_ids == config.image_token_index).sum(axis=1), config.image_tokens)
    if rest.any():
        raise UserError(
            f"input_ids: row {int(rest.argmax())} holds no whole number of images (each {config.image_tokens} tokens)"
        )
    if counts.sum() != num_images:
        raise UserError(f"input_ids hold placeholders for {counts.sum()} images, pixel_values hold {num_images}")
    return np.repeat(np.arange(len(counts), dtype=np.int32), counts)


def anyres_rows(input_ids: np.ndarray, sizes: list[tuple[int, int]], config: LlavaNextConfig) -> np.ndarray:
    """The row of each LLaVA-NeXT image, whose number of placeholders follows from its size (height, width).

    Raises:
      UserError: see `image_rows`.
    """
    lengths = [len(packing(size, config)) for size in sizes]
    rows, image = [], 0
    for row, left in enumerate((input_ids == config.image_token_index).sum(axis=1)):
        while left > 0 and image < len(lengths):
            left -= lengths[image]
            rows.append(row)
            image += 1
        if left:
            raise UserError(f"input_ids: the placeholders of row {row} are not those of images of these image_sizes")
    if image != len(lengths):
        raise UserError(f"input_ids hold placeholders for {image} images, pixel_values hold {len(lengths)}")
    return np.array(rows, np.int32)


def _shape(config: Any) -> tuple[int, ...]:
    """Shape of one image."""
    vision = config.vision
    tile = (vision.num_channels, vision.image_size, vision.image_size)
    if isinstance(config, MllamaConfig):
        return (vision.max_num_tiles, *tile)
    return (config.max_tiles, *tile) if isinstance(config, LlavaNextConfig) else tile


def _llava(config: LlavaConfig, inputs: Inputs, ids: np.ndarray) -> Parts:
    pixels = _pixels(inputs, _shape(config), axes=1)
    return pixels, image_rows(ids, len(pixels), config), lambda places: None


def _llava_next(config: LlavaNextConfig, inputs: Inputs, ids: np.ndarray) -> Parts:
    pixels = _pixels(inputs, _shape(config), axes=1, some_tiles=True)
    sizes = [(int(high), int(wide)) for high, wide in np.asarray(_entry(inputs, "image_sizes"))] if len(pixels) else []
    if len(sizes) != len(pixels):
        raise UserError(f"inputs: {len(sizes)} image_sizes, but pixel_values hold {len(pixels)} images")
    rows = anyres_rows(ids, sizes, config)
    size, tiles = config.vision.image_size, config.max_tiles
    for image, own in enumerate(sizes):
        high, wide = canvas(own, config.image_grid_pinpoints)
        needed = 1 + (high // size) * (wide // size)
        if needed > pixels.shape[1]:
            raise UserError(f"inputs: image {image} ({own[0]} x {own[1]}) has {needed} tiles, {pixels.shape[1]} given")

    def layout(places: Places) -> np.ndarray:
        numbers = places.first + places.numbers
        return gather_rows(sizes, rows.tolist(), places.rows, ids.shape[1], tiles, config, numbers, places.whole)

    return pixels, rows, layout


def _mllama(config: MllamaConfig, inputs: Inputs, ids: np.ndarray) -> Parts:
    counts = (ids == config.image_token_index).sum(axis=1)
    nested = _pixels(inputs, _shape(config), axes=2)
    given = np.zeros((0, 0), int)
    if nested.size:
        given = np.asarray(_entry(inputs, "aspect_ratio_ids"))
        known = len(config.vision.supported_aspect_ratios)
        if given.shape != nested.shape[:2] or len(given) > len(ids) or not 0 <= given.min() <= given.max() <= known:
            raise UserError(f"inputs: aspect_ratio_ids must be [rows, images] as pixel_values are, each 0..{known}")
    there = np.zeros((len(ids), given.shape[1]), bool)
    there[: len(given)] = given > 0
    if (there[:, 1:] & ~there[:, :-1]).any():
        raise UserError("inputs: a row's images must stand before its padding images (aspect_ratio_ids 0)")
    if (there.sum(axis=1) != counts).any():
        row = int((there.sum(axis=1) != counts).argmax())
        raise UserError(
            f"input_ids: row {row} holds {counts[row]} image placeholders, pixel_values hold {there[row].sum()} images"
        )
    rows = np.nonzero(there)[0]
    ratios = given[there[: len(given)]]

    def layout(places: Places) -> np.ndarray:
        filled = np.zeros(places.slots, np.int32)
        filled[places.numbers] = ratios
        return filled

    return nested[there[: len(given)]], rows, layout


_FAMILIES: dict[type, Callable[[Any, Inputs, np.ndarray], Parts]] = {
    LlavaConfig: _llava,
    LlavaNextConfig: _llava_next,
    MllamaConfig: _mllama,
}


def _pixels(inputs: Inputs, shape: tuple[int, ...], axes: int, some_tiles: bool = False) -> np.ndarray:
    """pixel_values, with `axes` axes before an image's; empty where there are none."""
    given = inputs.get("pixel_values")
    if given is None or not len(given):
        return np.zeros((0,) * axes + shape, np.float32)
    pixels = np.asarray(given, np.float32)
    found = pixels.shape[axes:]
    fewer = some_tiles and len(found) == len(shape) and 0 < found[0] <= shape[0] and found[1:] == shape[1:]
    if pixels.ndim < axes or found != shape and not fewer:
        raise UserError(f"inputs: pixel_values have shape {pixels.shape}; this model needs {(*'BI'[-axes:], *shape)}")
    return pixels


def _entry(inputs: Inputs, name: str) -> Any:
    if inputs.get(name) is None:
        raise UserError(f"inputs: '{name}' is missing; give what the processor returns")
    return inputs[name]
