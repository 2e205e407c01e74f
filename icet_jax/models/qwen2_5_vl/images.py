"""The images of a Qwen2.5-VL batch: patches of images of any size, padded to the same number."""

import numpy as np

from icet_jax.errors import UserError
from icet_jax.models.base.image_batches import ImageParts, Inputs, Placement, required_entry
from icet_jax.models.qwen2_5_vl.network import Qwen25VLConfig, patch_bucket

_VIDEO = ("pixel_values_videos", "video_grid_thw", "second_per_grid_ts")
_VIDEO_TYPE = 2  # of mm_token_type_ids, in which 0 is text and 1 an image


def image_shape(config: Qwen25VLConfig, positions: int) -> tuple[int, ...]:
    """Returns the shape of one image's patches, (P, patch), if no image takes more than `positions` positions."""
    return patch_bucket(config, positions), int(np.prod(config.vision.patch_shape))


def image_parts(config: Qwen25VLConfig, inputs: Inputs, ids: np.ndarray) -> ImageParts:
    """Returns patches and rows of the images; the layout is each image's rows and columns of patches, int32 [I, 2].

    Raises:
      UserError: the inputs hold a video, or do not fit each other or the model.
    """
    _check_types(config, inputs, ids)
    grids = _grids(config, inputs)
    patches = _patches(config, inputs, grids)
    rows = _image_rows(config, ids, grids)
    counts = grids.prod(axis=1)
    pixels = np.zeros((len(grids), counts.max(initial=0), patches.shape[1]), np.float32)
    pixels[np.arange(pixels.shape[1]) < counts[:, None]] = patches

    def layout(placement: Placement) -> np.ndarray:
        grid_of_image = np.zeros((placement.num_images, 2), np.int32)
        grid_of_image[placement.indices] = grids
        return grid_of_image

    return pixels, rows, layout


def _check_types(config: Qwen25VLConfig, inputs: Inputs, ids: np.ndarray) -> None:
    """Raises a `UserError` if there is a video, or if `mm_token_type_ids` are not those of `ids`.

    HF's processor returns these types, by which HF's model finds the images. Here they are found by their token; so the
    types may be missing, and need not be padded as `ids` are.
    """
    types = np.asarray(inputs.get("mm_token_type_ids", 0))
    if any(inputs.get(name) is not None for name in _VIDEO) or (types == _VIDEO_TYPE).any():
        raise UserError("inputs: videos are not supported; give images")
    count, placeholders = int((types == 1).sum()), int((ids == config.image_token_index).sum())
    if types.ndim and count != placeholders:
        raise UserError(
            f"inputs: mm_token_type_ids mark {count} image positions, but input_ids hold {placeholders} placeholders"
        )


def _grids(config: Qwen25VLConfig, inputs: Inputs) -> np.ndarray:
    """Returns rows and columns of patches of each image, int [I, 2], after checking them."""
    values = inputs.get("pixel_values")
    if values is None or not len(values):
        return np.zeros((0, 2), int)
    frames_and_sides = np.asarray(required_entry(inputs, "image_grid_thw"))
    if frames_and_sides.ndim != 2 or frames_and_sides.shape[1] != 3:
        raise UserError(f"inputs: image_grid_thw has shape {frames_and_sides.shape}; it must be [images, 3]")
    merge = config.vision.spatial_merge_size
    for image, (frames, *sides) in enumerate(frames_and_sides.tolist()):
        if frames != 1 or min(sides) < merge or any(side % merge for side in sides):
            raise UserError(
                f"inputs: image {image} has the grid {[frames, *sides]}; it must have one frame, and rows and columns "
                f"that are multiples of {merge}"
            )
        if np.prod(sides) > config.max_patches:
            raise UserError(
                f"inputs: image {image} has {np.prod(sides)} patches, but the model was loaded for up to "
                f"{config.max_patches} (preprocessor_config.json: max_pixels)"
            )
    return frames_and_sides[:, 1:].astype(int)


def _patches(config: Qwen25VLConfig, inputs: Inputs, grids: np.ndarray) -> np.ndarray:
    """Returns the patches of all images, float32 [patches, patch], after checking their shape."""
    expected = int(grids.prod(axis=1).sum()), int(np.prod(config.vision.patch_shape))
    if not len(grids):
        return np.zeros(expected, np.float32)
    patches = np.asarray(inputs["pixel_values"], np.float32)
    if patches.shape != expected:
        raise UserError(f"inputs: pixel_values have shape {patches.shape}; image_grid_thw needs {expected}")
    return patches


def _image_rows(config: Qwen25VLConfig, ids: np.ndarray, grids: np.ndarray) -> np.ndarray:
    """Returns the row of each image, int32 [I] ascending, from the placeholders in input_ids [B, T].

    Raises:
      UserError: images of these grids need another number of placeholders.
    """
    ends = np.cumsum(grids.prod(axis=1) // config.vision.group_size)
    in_rows = np.cumsum((ids == config.image_token_index).sum(axis=1))
    rows = np.searchsorted(in_rows, ends)
    if in_rows[-1:].sum() != ends[-1:].sum():
        raise UserError(
            f"input_ids hold {in_rows[-1:].sum()} image placeholders, the images of image_grid_thw need "
            f"{ends[-1:].sum()}"
        )
    split = np.setdiff1d(in_rows, [0, *ends])
    if len(split):
        raise UserError(
            f"input_ids: the placeholders of row {int(np.searchsorted(in_rows, split[0]))} are not those of whole "
            "images of image_grid_thw"
        )
    return rows.astype(np.int32)
