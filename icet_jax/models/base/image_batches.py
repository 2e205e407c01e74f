"""Converts the image arrays of Hugging Face processors to `Images`, whose arrays have few different shapes."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, TypeAlias

import numpy as np

from icet_jax.errors import UserError
from icet_jax.models import family_of
from icet_jax.nn.protocols import Images, NetworkConfig
from icet_jax.parallel.distributed import Share

Inputs: TypeAlias = Mapping[str, Any]

ImageParts: TypeAlias = tuple[np.ndarray, np.ndarray, Callable[["Placement"], Any]]
"""(pixels of I images, the row of each image, function of the images' `Placement` that returns `Images.layout`)."""

_WHOLE_BATCH = Share(0, 1)


class Placement(NamedTuple):
    """Describes where the images of a batch, or of one process's share of a batch, are put in the arrays of `Images`.

    Attributes:
      num_images: first axis of the share's arrays, filler images included.
      indices: index of each of the I real images in these arrays, int [I].
      num_rows: number of rows of the share.
      offset: index in the whole batch's arrays of the share's first image.
      num_images_of_batch: first axis of the whole batch's arrays.
    """

    num_images: int
    indices: np.ndarray
    num_rows: int
    offset: int
    num_images_of_batch: int


def batch_images(
    config: NetworkConfig, inputs: Inputs, *, num_rows: int, per_row: int | None = None, share: Share = _WHOLE_BATCH
) -> Images | None:
    """Returns the images of a batch, or of one process's share of it, as numpy arrays.

    The arrays' shapes do not depend on the sizes of the images: every image has as many tiles as the largest possible
    image, and LLaVA-NeXT's layout is as long as the padded tokens. Only Qwen2.5-VL, whose images have no tiles, has
    some shapes (`Family.image_shape`). With `per_row` its shape is that for images as long as the padded tokens;
    without, that for the largest image of the batch.

    Args:
      config: config of the network.
      inputs: output of the family's processor, with input_ids [B, T] padded as for the network.
      num_rows: number of rows of the batch, at least B.
      per_row: number of images of every row, filler images included. None adds no filler images.
      share: the part of the batch that `inputs` contain. If it is not the whole batch, every row must have `per_row`
        real images.

    Returns:
      The images, with fixed places (see `Images`) if `per_row` is set; None if there are no images. For a share, the
      result is that part of every array; its `rows` are row indices in the whole batch.

    Raises:
      UserError: the inputs do not fit each other or the model, or a row has more than `per_row` images.
    """
    family, ids = family_of(config), np.asarray(inputs["input_ids"])
    pixels, rows, layout = family.image_parts(config, inputs, ids)
    counts: list[int] = np.bincount(rows).tolist()
    most = max(counts, default=0)
    if per_row is None:
        per_row, num_images, positions = most, len(rows), _longest_run(ids == config.image_token_index)
    else:
        num_images, positions = num_rows * per_row, ids.shape[1]
    if most > per_row:
        raise UserError(f"inputs: row {counts.index(most)} has {most} images, but there is room for {per_row}")
    if not num_images:
        return None
    images_of_share = num_images // share.count
    if share.count > 1 and len(rows) != images_of_share:
        raise ValueError(f"a share of a batch has {len(rows)} images where {per_row} in each row are {images_of_share}")
    indices = np.arange(len(rows))
    if images_of_share > len(rows):  # the k-th image of a row goes to the k-th of the row's `per_row` indices
        indices += rows * per_row - rows.searchsorted(rows)
    padded_pixels = np.zeros((images_of_share, *family.image_shape(config, positions)), np.float32)
    real_tiles: tuple[Any, ...] = (indices, *map(slice, pixels.shape[1:]))
    padded_pixels[real_tiles] = pixels
    row_of_image = np.full(images_of_share, num_rows, np.int32)
    row_of_image[indices] = rows + share.rows(num_rows).start
    placement = Placement(images_of_share, indices, num_rows // share.count, share.rows(num_images).start, num_images)
    return Images(pixels=padded_pixels, rows=row_of_image, num_rows=num_rows, per_row=per_row, layout=layout(placement))


def _longest_run(is_image: np.ndarray) -> int:
    """Returns the largest number of consecutive True values in a row of a bool array [B, T]."""
    changes = np.diff(np.pad(is_image.astype(np.int8), ((0, 0), (1, 1))), axis=1)
    starts, ends = np.nonzero(changes == 1)[1], np.nonzero(changes == -1)[1]
    return int((ends - starts).max(initial=0))


def pixel_values(inputs: Inputs, shape: tuple[int, ...], axes: int, some_tiles: bool = False) -> np.ndarray:
    """Returns pixel_values as a float32 array, after checking its shape; an empty array if the inputs have none.

    Args:
      inputs: output of the family's processor.
      shape: shape of one image.
      axes: number of axes before those of an image: 1 (images) or 2 (rows, images).
      some_tiles: whether an image may have fewer tiles than `shape`.

    Raises:
      UserError: the array has another shape.
    """
    values = inputs.get("pixel_values")
    if values is None or not len(values):
        return np.zeros((0,) * axes + shape, np.float32)
    pixels = np.asarray(values, np.float32)
    image = pixels.shape[axes:]
    has_fewer_tiles = some_tiles and len(image) == len(shape) and 0 < image[0] <= shape[0] and image[1:] == shape[1:]
    if pixels.ndim < axes or image != shape and not has_fewer_tiles:
        raise UserError(f"inputs: pixel_values have shape {pixels.shape}; this model needs {(*'BI'[-axes:], *shape)}")
    return pixels


def required_entry(inputs: Inputs, name: str) -> Any:
    """Returns the input called `name`.

    Raises:
      UserError: there is no such input.
    """
    if inputs.get(name) is None:
        raise UserError(f"inputs: '{name}' is missing; give what the processor returns")
    return inputs[name]
