"""Llama 3.2 Vision in transformers, for `--mode=verify`."""

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from icet_jax.errors import UserError
from icet_jax.files import JsonObject
from icet_jax.models.base.processor import Inputs
from icet_jax.models.base.reference import Reference, States, random_pixels, torch_hooks
from icet_jax.models.mllama.network import MllamaConfig
from icet_jax.models.mllama.processor import cross_attention_mask


def transformers_capture() -> str:
    """Returns whether the installed transformers captures the "input" or the "output" of a block.

    Raises:
      UserError: the installed version is 4.55, which captures neither.
    """
    import transformers

    version = tuple(int(part) for part in transformers.__version__.split(".")[:2])
    if version == (4, 55):
        raise UserError("transformers 4.55 captures the last state for all intermediates: install another release")
    return "output" if version > (4, 55) else "input"


def random_row(config: MllamaConfig, text: np.ndarray, count: int, noise: np.random.Generator) -> Inputs:
    """Returns the arrays of one row: `count` random images, then the tokens of `text`; see `Reference.random_row`."""
    ids = np.concatenate([np.full(count, config.image_token_index), text])[None]
    row = {"input_ids": ids, "attention_mask": np.ones_like(ids)}
    if count:
        ratios, max_tiles = config.vision.supported_aspect_ratios, config.vision.max_num_tiles
        ratio_of_image = noise.integers(len(ratios), size=(1, count))
        num_tiles = np.array([high * wide for high, wide in ratios])[ratio_of_image]
        tiles = (np.arange(max_tiles) < num_tiles[..., None]).astype(np.int64)
        pixels = random_pixels(noise, (1, count, max_tiles), config)
        row["pixel_values"] = pixels * tiles[..., None, None, None].astype(np.float32)
        row |= {"aspect_ratio_ids": ratio_of_image + 1, "aspect_ratio_mask": tiles}
        row["cross_attention_mask"] = cross_attention_mask(ids, config.image_token_index, tiles)
    return row


def hidden_states(model: Any, config: MllamaConfig, row: JsonObject) -> States:
    """Returns the hidden states 0..num_exits of one row's images; see `Reference.states`.

    They are the input of the vision tower's local (not global) transformer and the output of each of its blocks.
    """
    states: States = []
    tower = model.model.vision_model
    hook = tower.transformer.register_forward_hook(
        lambda module, args, output: states.extend([args[0], *output.hidden_states])
    )
    with torch_hooks([hook]):
        tower(**{name: row[name] for name in ("pixel_values", "aspect_ratio_ids", "aspect_ratio_mask")})
    return states


@contextlib.contextmanager
def at_exit(model: Any, config: MllamaConfig, layer: int) -> Iterator[None]:
    """Returns a context in which transformers' model answers at exit `layer`, see `MllamaVisionTower.features`."""

    def replace_local_output(module: Any, args: Any, output: Any) -> Any:
        """Hook of the local transformer: replaces its last state by that of block `layer`.

        With exit rule E1, the states of later blocks are replaced as well.
        """
        states = output.hidden_states  # after each block
        output.last_hidden_state = states[layer - 1]
        if config.exit_rule == "E1":
            output.hidden_states = tuple(states[min(index, layer - 1)] for index in range(len(states)))
        return output

    def skip_global_blocks(module: Any, args: Any, output: Any) -> Any:
        output.last_hidden_state = args[0]
        return output

    tower = model.model.vision_model
    hooks = [tower.transformer.register_forward_hook(replace_local_output)]
    if config.exit_rule == "E5":
        for module in (tower.layernorm_post, tower.post_tile_positional_embedding):
            hooks.append(module.register_forward_hook(lambda module, args, output: args[0]))
        hooks.append(tower.global_transformer.register_forward_hook(skip_global_blocks))
    with torch_hooks(hooks):
        yield


def join_images(rows: Sequence[Inputs], length: int) -> Inputs:
    """Returns the image arrays of all rows as one batch; see `Reference.join_images`.

    Args:
      rows: results of `hf_row`; the row with most images determines the length of the image axis.
      length: length to which texts are padded on the left, and so of the token axis of `cross_attention_mask`.
    """
    names = {name for row in rows for name in row} - {"input_ids", "attention_mask"}
    out: Inputs = {}
    if not names:
        return out
    most = max(row["aspect_ratio_ids"].shape[1] for row in rows if "aspect_ratio_ids" in row)
    example = next(row for row in rows if "aspect_ratio_ids" in row)
    for name in sorted(names):
        has_tokens = name == "cross_attention_mask"
        axes_of_image = example[name].shape[3 if has_tokens else 2 :]
        out[name] = np.zeros((len(rows), *[length] * has_tokens, most, *axes_of_image), example[name].dtype)
        for number, row in enumerate(rows):
            if name in row:
                start = length - row["input_ids"].shape[1]
                target = (number, slice(start, None)) if has_tokens else (number,)
                out[name][(*target, slice(row["aspect_ratio_ids"].shape[1]))] = row[name][0]
    out["aspect_ratio_mask"][..., 0] = 1  # also for missing images, as HF does
    return out


REFERENCE = Reference("MllamaProcessor", random_row, hidden_states, at_exit, join_images, capture=transformers_capture)
