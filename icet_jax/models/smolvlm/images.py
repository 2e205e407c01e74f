"""The images of a SmolVLM batch: the tiles of all images of a row, in groups of the same number of tiles."""

import numpy as np

from icet_jax.errors import UserError
from icet_jax.models.base.image_batches import ImageParts, Inputs, Placement, pixel_values
from icet_jax.models.llava.images import image_shape as tile_shape
from icet_jax.models.smolvlm.network import SmolVLMConfig, TileLayout
from icet_jax.nn.siglip import patch_positions


def image_shape(config: SmolVLMConfig, positions: int = 0) -> tuple[int, ...]:
    """Returns the shape of one group of tiles, (tiles, C, H, W); the same for any number of `positions`."""
    return (config.max_tiles, *tile_shape(config))


def image_parts(config: SmolVLMConfig, inputs: Inputs, ids: np.ndarray) -> ImageParts:
    """Returns pixels and rows of the groups of tiles, and a function that returns their `TileLayout`.

    As in HF, a tile without any non-zero value is one that only fills up the array. If there is no other tile, the
    first one counts nevertheless.
    """
    nested = pixel_values(inputs, tile_shape(config), axes=2)
    is_tile = np.zeros((len(ids), nested.shape[1]), bool)
    if len(nested) > len(ids):
        raise UserError(f"inputs: pixel_values have {len(nested)} rows, input_ids have {len(ids)}")
    is_tile[: len(nested)] = nested.any(axis=(2, 3, 4))
    counts, num_groups = tiles_and_groups(ids, config)
    if nested.size and counts.any() and not is_tile.any():
        is_tile[0, 0] = True
    if (is_tile.sum(axis=1) != counts).any():
        row = int((is_tile.sum(axis=1) != counts).argmax())
        raise UserError(
            f"input_ids: row {row} holds placeholders for {counts[row]} tiles, pixel_values hold {is_tile[row].sum()}"
        )
    # The k-th tile of a row is tile k % max_tiles of the row's group k // max_tiles.
    rows, number = np.nonzero(is_tile)[0], np.concatenate([np.arange(count) for count in counts])
    group = (np.cumsum(num_groups) - num_groups)[rows] + number // config.max_tiles
    place = group, number % config.max_tiles
    num_tiles = np.bincount(group, minlength=num_groups.sum())
    pixels = np.zeros((num_groups.sum(), num_tiles.max(initial=0), *tile_shape(config)), np.float32)
    pixels[place] = nested[is_tile[: len(nested)]]
    positions = _positions(config, inputs, is_tile, nested.shape)

    def layout(placement: Placement) -> TileLayout:
        tiles_of_group = np.zeros(placement.num_images, np.int32)
        tiles_of_group[placement.indices] = num_tiles
        if positions is None:
            return TileLayout(num_tiles=tiles_of_group)
        whole = _whole_tile(config)[0]
        table = np.broadcast_to(whole, (placement.num_images, config.max_tiles, len(whole))).copy()
        table[placement.indices[place[0]], place[1]] = positions
        return TileLayout(num_tiles=tiles_of_group, positions=table)

    return pixels, np.repeat(np.arange(len(ids), dtype=np.int32), num_groups), layout


def tiles_and_groups(ids: np.ndarray, config: SmolVLMConfig) -> tuple[np.ndarray, np.ndarray]:
    """Returns the number of tiles and the number of groups of each row, int [B] each, from input_ids [B, T].

    There are as many groups as images, or more if the tiles do not fit into them. Two tiles belong to different images
    if there are at least three tokens between them, of which the first and the last but one are the same: the
    processor puts `<fake_token_around_image>` before every tile and behind every image.

    Raises:
      UserError: the number of placeholders in a row is not a multiple of `config.image_tokens`.
    """
    counts, images = np.zeros(len(ids), int), np.zeros(len(ids), int)
    for row, tokens in enumerate(ids):
        at = np.flatnonzero(tokens == config.image_token_index)
        if len(at) % config.image_tokens:
            raise UserError(
                f"input_ids: row {row} does not hold placeholders for whole tiles (each {config.image_tokens} tokens)"
            )
        tiles = at.reshape(-1, config.image_tokens)
        ends, starts = tiles[:-1, -1] + 1, tiles[1:, 0]
        is_last = (starts - ends >= 3) & (tokens[ends] == tokens[starts - 2])
        counts[row], images[row] = len(tiles), is_last.sum() + (len(tiles) > 0)
    return counts, np.maximum(images, -(-counts // config.max_tiles))


def _positions(config: SmolVLMConfig, inputs: Inputs, is_tile: np.ndarray, shape: tuple[int, ...]) -> np.ndarray | None:
    """Returns `patch_positions` of the real tiles, int32 [tiles, P]; None if no tile has padding.

    Args:
      config: config of the network.
      inputs: output of the processor; without `pixel_attention_mask` no tile has padding.
      is_tile: True at real tiles [B, N].
      shape: shape of pixel_values.

    Raises:
      UserError: the mask does not have the shape of pixel_values, without the channels.
    """
    mask = inputs.get("pixel_attention_mask")
    if mask is None or not is_tile.any():
        return None
    mask = np.asarray(mask).astype(bool)
    expected_shape = (*shape[:2], *shape[3:])
    if mask.shape != expected_shape:
        raise UserError(f"inputs: pixel_attention_mask has shape {mask.shape}; pixel_values need {expected_shape}")
    mask = mask[is_tile[: shape[0]]]
    if mask.all():
        return None
    side, size = config.vision.image_size // config.vision.patch_size, config.vision.patch_size
    cells = mask[:, : side * size, : side * size].reshape(-1, side, size, side, size)
    return patch_positions(cells.any(axis=(2, 4)), side)


def _whole_tile(config: SmolVLMConfig) -> np.ndarray:
    """Returns `patch_positions` of one tile without padding, int32 [1, P]."""
    side = config.vision.image_size // config.vision.patch_size
    return patch_positions(np.ones((1, side, side), bool), side)
