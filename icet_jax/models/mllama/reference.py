"""Llama 3.2 Vision in transformers, for `--mode=verify`."""

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from icet_jax.errors import UserError
from icet_jax.files import JsonObject
from icet_jax.models.base.processor import Inputs
from icet_jax.models.base.reference import Reference, RemovingHooks, States, random_pixels
from icet_jax.models.mllama.network import MllamaConfig
from icet_jax.models.mllama.processor import cross_attention_mask


def transformers_capture() -> str:
    """Returns which states the installed transformers captures as intermediates: "input" or "output" of a block.

    Raises:
      UserError: the installed version captures neither.
    """
    import transformers

    version = tuple(int(part) for part in transformers.__version__.split(".")[:2])
    if version == (4, 55):
        raise UserError("transformers 4.55 captures the last state for all intermediates: install another release")
    return "output" if version > (4, 55) else "input"


def random_row(config: MllamaConfig, text: np.ndarray, count: int, noise: np.random.Generator) -> Inputs:
    """Returns arrays of one row of random pixels and the tokens of `text`, which follow `count` images."""
    ids = np.concatenate([np.full(count, config.image_token_index), text])[None]
    row = {"input_ids": ids, "attention_mask": np.ones_like(ids)}
    if count:
        ratios, most = config.vision.supported_aspect_ratios, config.vision.max_num_tiles
        chosen = noise.integers(len(ratios), size=(1, count))
        tiles = (np.arange(most) < np.array([high * wide for high, wide in ratios])[chosen][..., None]).astype(np.int64)
        row["pixel_values"] = random_pixels(noise, (1, count, most), config) * tiles[..., None, None, None].astype(
            np.float32
        )
        row |= {"aspect_ratio_ids": chosen + 1, "aspect_ratio_mask": tiles}
        row["cross_attention_mask"] = cross_attention_mask(ids, config.image_token_index, tiles)
    return row


def hidden_states(model: Any, config: MllamaConfig, row: JsonObject) -> States:
    """Returns states 0..num_exits of the image encoder for one row's images."""
    states: States = []
    tower = model.model.vision_model
    hook = tower.transformer.register_forward_hook(
        lambda module, args, output: states.extend([args[0], *output.hidden_states])
    )
    with contextlib.closing(RemovingHooks([hook])):
        tower(**{name: row[name] for name in ("pixel_values", "aspect_ratio_ids", "aspect_ratio_mask")})
    return states


@contextlib.contextmanager
def at_exit(model: Any, config: MllamaConfig, layer: int) -> Iterator[None]:
    """Makes transformers' model answer at exit `layer` within the context, as `MllamaVisionTower.features` defines
    it."""

    def local_blocks(module: Any, args: Any, output: Any) -> Any:
        states = output.hidden_states  # after each block
        output.last_hidden_state = states[layer - 1]
        if config.exit_rule == "E1":
            output.hidden_states = tuple(states[min(index, layer - 1)] for index in range(len(states)))
        return output

    def global_blocks(module: Any, args: Any, output: Any) -> Any:
        output.last_hidden_state = args[0]
        return output

    tower = model.model.vision_model
    hooks = [tower.transformer.register_forward_hook(local_blocks)]
    if config.exit_rule == "E5":
        for module in (tower.layernorm_post, tower.post_tile_positional_embedding):
            hooks.append(module.register_forward_hook(lambda module, args, output: args[0]))
        hooks.append(tower.global_transformer.register_forward_hook(global_blocks))
    with contextlib.closing(RemovingHooks(hooks)):
        yield


def join_images(rows: Sequence[Inputs], length: int) -> Inputs:
    """Returns the image arrays of all rows, padded to the largest number of images and on the left to `length`
    tokens."""
    names = {name for row in rows for name in row} - {"input_ids", "attention_mask"}
    out: Inputs = {}
    if not names:
        return out
    most = max(row["aspect_ratio_ids"].shape[1] for row in rows if "aspect_ratio_ids" in row)
    some = next(row for row in rows if "aspect_ratio_ids" in row)
    for name in sorted(names):
        after = some[name].shape[3:] if name == "cross_attention_mask" else some[name].shape[2:]
        before = (length,) if name == "cross_attention_mask" else ()
        out[name] = np.zeros((len(rows), *before, most, *after), some[name].dtype)
        for number, row in enumerate(rows):
            if name in row:
                start = length - row["input_ids"].shape[1]
                where = (number, slice(start, None)) if before else (number,)
                out[name][(*where, slice(row["aspect_ratio_ids"].shape[1]))] = row[name][0]
    out["aspect_ratio_mask"][..., 0] = 1  # also for missing images, as HF does
    return out


REFERENCE = Reference("MllamaProcessor", random_row, hidden_states, at_exit, join_images, capture=transformers_capture)
