"""Qwen2.5-VL in transformers, for `--mode=verify`."""

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from icet_jax.files import JsonObject
from icet_jax.models.base.processor import Inputs
from icet_jax.models.base.reference import Reference, States, concatenate_images, torch_hooks
from icet_jax.models.qwen2_5_vl.network import Qwen25VLConfig


def image_only_processor() -> Any:
    """Returns HF's `Qwen2_5_VLProcessor` as a class without a video processor, which would need torchvision."""
    from transformers.models.qwen2_5_vl.processing_qwen2_5_vl import Qwen2_5_VLProcessor

    class ImageOnlyProcessor(Qwen2_5_VLProcessor):
        """Has the two attributes that its `__init__` takes, as transformers finds them by its signature."""

        def __init__(self, image_processor: Any = None, tokenizer: Any = None, chat_template: Any = None):
            self.image_token, self.video_token = "<|image_pad|>", "<|video_pad|>"
            self.image_token_id = tokenizer.convert_tokens_to_ids(self.image_token)
            self.video_token_id = tokenizer.convert_tokens_to_ids(self.video_token)
            super(Qwen2_5_VLProcessor, self).__init__(image_processor, tokenizer, chat_template=chat_template)

    return ImageOnlyProcessor


def random_row(config: Qwen25VLConfig, text: np.ndarray, count: int, noise: np.random.Generator) -> Inputs:
    """Returns the arrays of one row: `count` random images of a few windows, then `text`; see `Reference.random_row`.

    There is a token of the text before each image, because transformers takes two images without one for a single one.
    """
    vision, merge = config.vision, config.vision.spatial_merge_size
    most = max(config.max_patches // vision.group_size, 1)
    high = np.minimum(noise.integers(1, 2 * vision.window_side + 2, count), most)
    wide = np.minimum(noise.integers(1, vision.window_side + 2, count), most // high)
    images = [np.full(h * w, config.image_token_index) for h, w in zip(high, wide, strict=True)]
    before = [part for number, image in enumerate(images) for part in (text[number : number + 1], image)]
    ids = np.concatenate([*before, text])[None]
    types = (ids == config.image_token_index).astype(np.int64)
    row = {"input_ids": ids, "attention_mask": np.ones_like(ids), "mm_token_type_ids": types}
    if count:
        grids = np.stack([np.ones_like(high), high * merge, wide * merge], axis=1)
        shape = int(grids.prod(axis=1).sum()), int(np.prod(vision.patch_shape))
        row |= {"pixel_values": noise.normal(size=shape).astype(np.float32), "image_grid_thw": grids}
    return row


def hidden_states(model: Any, config: Qwen25VLConfig, row: JsonObject) -> States:
    """Returns hidden states 0..num_exits of the image encoder for one row's images; see `Reference.states`.

    The patches have the processor's order, as here, not transformers' order by windows; and padding is 0.
    """
    states: States = []
    tower, grids = model.model.visual, row["image_grid_thw"]
    hooks = [tower.blocks[0].register_forward_pre_hook(lambda module, args: states.append(args[0]))]
    hooks += [block.register_forward_hook(lambda module, args, output: states.append(output)) for block in tower.blocks]
    with torch_hooks(hooks):
        tower(row["pixel_values"], grid_thw=grids)
    sides = [(high, wide) for _, high, wide in grids.tolist()]
    order = torch_order(config, sides)
    most = max(high * wide for high, wide in sides)
    out = []
    for state in states:
        images = state.new_zeros((len(sides), most, state.shape[-1]))
        first = 0
        for image, (high, wide) in zip(images, sides, strict=True):
            image[order[first : first + high * wide] - first] = state[first : first + high * wide]
            first += high * wide
        out.append(images)
    return out


def torch_order(config: Qwen25VLConfig, sides: Sequence[tuple[int, int]]) -> np.ndarray:
    """Returns the index among the processor's patches of each patch in transformers' order, by windows.

    Args:
      config: config of the network.
      sides: rows and columns of patches of each image.
    """
    merge, group, side = config.vision.spatial_merge_size, config.vision.group_size, config.vision.window_side
    parts, first = [], 0
    for high, wide in sides:
        row, column = np.divmod(np.arange(high * wide // group), wide // merge)
        groups = np.lexsort((column, row, column // side, row // side))
        parts.append(first + (groups[:, None] * group + np.arange(group)).reshape(-1))
        first += high * wide
    return np.concatenate(parts)


@contextlib.contextmanager
def at_exit(model: Any, config: Qwen25VLConfig, layer: int) -> Iterator[None]:
    """Returns a context in which transformers' model answers at exit `layer`: its image encoder has no later block."""
    tower = model.model.visual
    blocks = tower.blocks
    tower.blocks = blocks[:layer]
    try:
        yield
    finally:
        tower.blocks = blocks


def join_images(rows: Sequence[Inputs], length: int) -> Inputs:
    """Returns the image arrays of all rows as one batch, and the types of their tokens, padded on the left."""
    types = [
        np.pad(row["mm_token_type_ids"], ((0, 0), (length - row["mm_token_type_ids"].shape[1], 0))) for row in rows
    ]
    others = [{name: row[name] for name in row if name != "mm_token_type_ids"} for row in rows]
    return concatenate_images(others, length) | {"mm_token_type_ids": np.concatenate(types)}


REFERENCE = Reference(image_only_processor, random_row, hidden_states, at_exit, join_images)
