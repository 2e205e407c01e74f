"""Images of a batch as a network takes them, from HF-named arrays: fixed shapes, and each family's own layout."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, TypeAlias

import numpy as np

from icet_jax.errors import UserError
from icet_jax.models import family_of
from icet_jax.nn.protocols import Images
from icet_jax.parallel.distributed import Share

Inputs: TypeAlias = Mapping[str, Any]

ImageParts: TypeAlias = tuple[np.ndarray, np.ndarray, Callable[["Places"], np.ndarray | None]]
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
    own = slots // share.count
    if share.count > 1 and len(rows) != own:
        raise ValueError(f"a share of a batch has {len(rows)} images where {per_row} in each row are {own}")
    numbers = np.arange(len(rows))
    if own > len(rows):  # a row's images come one after the other: each has its place by how far it is from the first
        numbers += rows * per_row - rows.searchsorted(rows)
    filled = np.zeros((own, *family.image_shape(config)), np.float32)
    within: tuple[Any, ...] = (numbers, *map(slice, pixels.shape[1:]))
    filled[within] = pixels
    row_of = np.full(own, num_rows, np.int32)
    row_of[numbers] = rows + share.rows(num_rows).start
    places = Places(own, numbers, num_rows // share.count, share.rows(slots).start, slots)
    return Images(pixels=filled, rows=row_of, num_rows=num_rows, per_row=per_row, layout=layout(places))


def pixel_values(inputs: Inputs, shape: tuple[int, ...], axes: int, some_tiles: bool = False) -> np.ndarray:
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


def required_entry(inputs: Inputs, name: str) -> Any:
    """The array of that name.

    Raises:
      UserError: it is missing.
    """
    if inputs.get(name) is None:
        raise UserError(f"inputs: '{name}' is missing; give what the processor returns")
    return inputs[name]
