"""Builds the images of a batch, with fixed shapes and each family's layout, from arrays with HF's names."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, TypeAlias

import numpy as np

from icet_jax.errors import UserError
from icet_jax.models import family_of
from icet_jax.nn.protocols import Images
from icet_jax.parallel.distributed import Share

Inputs: TypeAlias = Mapping[str, Any]

ImageParts: TypeAlias = tuple[np.ndarray, np.ndarray, Callable[["Places"], np.ndarray | None]]
"""Pixels of I images, the row of each, and a function that computes `Images.layout` from their places."""

_WHOLE = Share(0, 1)


class Places(NamedTuple):
    """Describes where images are put in a batch, or in one process's share of a batch.

    Attributes:
      slots: number of places for images in the share.
      numbers: place of each of the I images, int [I].
      rows: number of rows of the share.
      first: number in the whole batch of the share's first place.
      whole: number of places in the whole batch.
    """

    slots: int
    numbers: np.ndarray
    rows: int
    first: int
    whole: int


def batch_images(
    config: Any, inputs: Inputs, *, num_rows: int, per_row: int | None = None, share: Share = _WHOLE
) -> Images | None:
    """Returns the images of a batch as numpy arrays.

    Their shapes depend only on the arguments and the length of input_ids, not on the sizes of the images: every image
    has as many tiles as the largest possible one, and LLaVA-NeXT's layout is as long as the padded tokens.

    Args:
      config: config of the model.
      inputs: output of the family's processor, with input_ids [B, T] padded as for the network.
      num_rows: number of rows of the batch, at least B.
      per_row: number of places for images in each row; places without an image are filled with zeros. None means as
        many as the row with most images has, and no places beyond the images.
      share: the part of the batch that the inputs are; a share that is not the whole has `per_row` images in every row.

    Returns:
      `num_rows * per_row` images, each at its row's place (see `Images`), or only the existing images; None if there is
      no place for any. A share gets its part of every array, numbered as in the whole batch.

    Raises:
      UserError: the inputs do not fit each other or the model, or a row has more images than places.
    """
    family, ids = family_of(config), np.asarray(inputs["input_ids"])
    pixels, rows, layout = family.image_parts(config, inputs, ids)
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
    own_slots = slots // share.count
    if share.count > 1 and len(rows) != own_slots:
        raise ValueError(f"a share of a batch has {len(rows)} images where {per_row} in each row are {own_slots}")
    numbers = np.arange(len(rows))
    if own_slots > len(rows):  # a row's images are consecutive: the k-th one goes to the row's k-th place
        numbers += rows * per_row - rows.searchsorted(rows)
    padded_pixels = np.zeros((own_slots, *family.image_shape(config)), np.float32)
    within: tuple[Any, ...] = (numbers, *map(slice, pixels.shape[1:]))
    padded_pixels[within] = pixels
    row_of = np.full(own_slots, num_rows, np.int32)
    row_of[numbers] = rows + share.rows(num_rows).start
    places = Places(own_slots, numbers, num_rows // share.count, share.rows(slots).start, slots)
    return Images(pixels=padded_pixels, rows=row_of, num_rows=num_rows, per_row=per_row, layout=layout(places))


def pixel_values(inputs: Inputs, shape: tuple[int, ...], axes: int, some_tiles: bool = False) -> np.ndarray:
    """Returns pixel_values with `axes` axes before the axes of one image; empty if the inputs have none."""
    values = inputs.get("pixel_values")
    if values is None or not len(values):
        return np.zeros((0,) * axes + shape, np.float32)
    pixels = np.asarray(values, np.float32)
    own_shape = pixels.shape[axes:]
    fewer = some_tiles and len(own_shape) == len(shape) and 0 < own_shape[0] <= shape[0] and own_shape[1:] == shape[1:]
    if pixels.ndim < axes or own_shape != shape and not fewer:
        raise UserError(f"inputs: pixel_values have shape {pixels.shape}; this model needs {(*'BI'[-axes:], *shape)}")
    return pixels


def required_entry(inputs: Inputs, name: str) -> Any:
    """Returns the array called `name`.

    Raises:
      UserError: it is missing.
    """
    if inputs.get(name) is None:
        raise UserError(f"inputs: '{name}' is missing; give what the processor returns")
    return inputs[name]
