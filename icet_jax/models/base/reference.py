"""Rows as transformers sees them, and its models at an exit: the other side of `--mode=verify`.

Rows are given to transformers one at a time, as it cannot batch every mixture of them. Models and tensors are handled
through their own methods alone, so that torch need not be imported here.
"""

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from icet_jax.checkpoints.hf_config import read_hf_config
from icet_jax.errors import UserError
from icet_jax.media.templates import DATE, Template
from icet_jax.models.base.processor import Inputs, cross_attention_mask
from icet_jax.models.llava.network import LlavaConfig
from icet_jax.models.llava_next.anyres import canvas, packing
from icet_jax.models.llava_next.network import LlavaNextConfig
from icet_jax.models.mllama.network import MllamaConfig

States = list[Any]
"""torch tensors [I, P, D]: hidden states 0..num_exits of the image encoder."""


def transformers_capture(directory: str | Path) -> str | None:
    """Which states the installed transformers takes Llama 3.2 Vision's intermediates to be; None for other families.

    Raises:
      UserError: no such checkpoint, or this transformers takes neither.
    """
    if read_hf_config(directory)["model_type"] != "mllama":
        return None
    import transformers

    version = tuple(int(part) for part in transformers.__version__.split(".")[:2])
    if version == (4, 55):
        raise UserError("transformers 4.55 captures the last state for all intermediates: install another release")
    return "output" if version > (4, 55) else "input"


def hf_processor(directory: str | Path, config: Any) -> Any:
    """transformers' own processor of a checkpoint, its image processor the one that needs no torch."""
    import transformers

    processor = getattr(transformers, _FAMILIES[type(config)].processor).from_pretrained(directory)
    processor.image_processor = transformers.AutoImageProcessor.from_pretrained(directory, backend="pil")
    if isinstance(config, LlavaConfig):  # the counts of the model's own config: hub files differ
        processor.patch_size = config.vision.patch_size
        processor.vision_feature_select_strategy = config.vision_feature_select_strategy
        processor.num_additional_image_tokens = 1
    return processor


def hf_row(processor: Any, template: Template, images: Sequence[Any], prompt: str) -> Inputs:
    """transformers' arrays of one row: its first axis is 1, or the images where they have no axis of rows.

    Args:
      processor: see `hf_processor`.
      template: used where the checkpoint has no chat template of its own.
      images: PIL images or files.
      prompt: raw.
    """
    text = template(prompt, len(images))
    if processor.chat_template is not None:
        content = [{"type": "image"}] * len(images) + [{"type": "text", "text": prompt}]
        text = processor.tokenizer.apply_chat_template(
            [{"role": "user", "content": content}], chat_template=processor.chat_template, tokenize=False,
            add_generation_prompt=True, date_string=DATE,
        )  # fmt: skip
    opened = [str(image) if isinstance(image, Path) else image for image in images]
    bos = processor.tokenizer.bos_token
    special = bos is None or not text.startswith(bos)
    made = processor(text=[text], images=[opened] if opened else None, add_special_tokens=special, return_tensors="np")
    return {name: np.asarray(array) for name, array in made.items()}


def random_row(config: Any, vocabulary: np.ndarray, count: int, length: int, noise: np.random.Generator) -> Inputs:
    """Arrays as `hf_row` gives them, of random tokens and pixels.

    Args:
      config: of the network.
      vocabulary: tokens to draw from.
      count: of images, which stand before the text.
      length: of the text.
      noise: source of the randomness.
    """
    return _FAMILIES[type(config)].random_row(config, noise.choice(vocabulary, length), count, noise)


def join(rows: Sequence[Inputs], pad_id: int) -> Inputs:
    """Rows as one batch, padded on the left; images are padded to the largest row's number and tiles."""
    length = max(row["input_ids"].shape[1] for row in rows)
    shape = (len(rows), length)
    out = {"input_ids": np.full(shape, pad_id, np.int64), "attention_mask": np.zeros(shape, np.int64)}
    for number, row in enumerate(rows):
        start = length - row["input_ids"].shape[1]
        out["input_ids"][number, start:], out["attention_mask"][number, start:] = row["input_ids"][0], 1
    names = {name for row in rows for name in row} - set(out)
    if "aspect_ratio_ids" not in names:
        for name in sorted(names):
            out[name] = _stacked([row[name] for row in rows if name in row])
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
    out["aspect_ratio_mask"][..., 0] = 1  # also of images that are not there
    return out


def _stacked(parts: list[np.ndarray]) -> np.ndarray:
    """Arrays one after the other, their other axes filled up with zeros to the largest."""
    shape = np.max([part.shape[1:] for part in parts], axis=0)
    fills = [[(0, 0), *((0, most - size) for most, size in zip(shape, part.shape[1:], strict=True))] for part in parts]
    return np.concatenate([np.pad(part, fill) for part, fill in zip(parts, fills, strict=True)])


def encoder_states(model: Any, config: Any, row: dict[str, Any]) -> States:
    """Every hidden state of the image encoder for one row's images, as `VisionLanguageModel.hidden_states` has them.

    Args:
      model: transformers'.
      config: of the network.
      row: torch tensors of `hf_row`.
    """
    return _FAMILIES[type(config)].states(model, config, row)


def at_exit(model: Any, config: Any, layer: int) -> contextlib.AbstractContextManager[None]:
    """Within it transformers' model answers at exit `layer`."""
    return _FAMILIES[type(config)].at_exit(model, config, layer)


def _llava_row(config: LlavaConfig, text: np.ndarray, count: int, noise: np.random.Generator) -> Inputs:
    ids = np.concatenate([np.full(count * config.image_tokens, config.image_token_index), text])[None]
    row = {"input_ids": ids, "attention_mask": np.ones_like(ids)}
    if count:
        row["pixel_values"] = _noise(noise, (count,), config)
    return row


def _llava_next_row(config: LlavaNextConfig, text: np.ndarray, count: int, noise: np.random.Generator) -> Inputs:
    sizes = [(int(high), int(wide)) for high, wide in noise.integers(20, 1200, (count, 2))]
    places = sum(len(packing(size, config)) for size in sizes)
    ids = np.concatenate([np.full(places, config.image_token_index), text])[None]
    row = {"input_ids": ids, "attention_mask": np.ones_like(ids)}
    if count:
        pixels = _noise(noise, (count, config.max_tiles), config)
        for image, size in enumerate(sizes):
            high, wide = (edge // config.vision.image_size for edge in canvas(size, config.image_grid_pinpoints))
            pixels[image, 1 + high * wide :] = 0
        row |= {"pixel_values": pixels, "image_sizes": np.array(sizes)}
    return row


def _mllama_row(config: MllamaConfig, text: np.ndarray, count: int, noise: np.random.Generator) -> Inputs:
    ids = np.concatenate([np.full(count, config.image_token_index), text])[None]
    row = {"input_ids": ids, "attention_mask": np.ones_like(ids)}
    if count:
        ratios, most = config.vision.supported_aspect_ratios, config.vision.max_num_tiles
        chosen = noise.integers(len(ratios), size=(1, count))
        tiles = (np.arange(most) < np.array([high * wide for high, wide in ratios])[chosen][..., None]).astype(np.int64)
        row["pixel_values"] = _noise(noise, (1, count, most), config) * tiles[..., None, None, None].astype(np.float32)
        row |= {"aspect_ratio_ids": chosen + 1, "aspect_ratio_mask": tiles}
        row["cross_attention_mask"] = cross_attention_mask(ids, config.image_token_index, tiles)
    return row


def _noise(noise: np.random.Generator, shape: tuple[int, ...], config: Any) -> np.ndarray:
    size = config.vision.image_size
    return noise.normal(size=(*shape, config.vision.num_channels, size, size)).astype(np.float32)


def _llava_states(model: Any, config: LlavaConfig, row: dict[str, Any]) -> States:
    pixels = row["pixel_values"]
    if isinstance(config, LlavaNextConfig):
        every = pixels.new_zeros((len(pixels), config.max_tiles, *pixels.shape[2:]))
        every[:, : pixels.shape[1]] = pixels
        pixels = every.flatten(0, 1)
    return list(model.model.vision_tower(pixels, output_hidden_states=True).hidden_states)


def _mllama_states(model: Any, config: MllamaConfig, row: dict[str, Any]) -> States:
    found: States = []
    tower = model.model.vision_model
    hook = tower.transformer.register_forward_hook(
        lambda module, args, output: found.extend([args[0], *output.hidden_states])
    )
    with contextlib.closing(_Removing([hook])):
        tower(**{name: row[name] for name in ("pixel_values", "aspect_ratio_ids", "aspect_ratio_mask")})
    return found


class _Removing:
    """Takes hooks away again when it is closed."""

    def __init__(self, hooks: Sequence[Any]) -> None:
        self._hooks = hooks

    def close(self) -> None:
        for hook in self._hooks:
            hook.remove()


@contextlib.contextmanager
def _llava_at_exit(model: Any, config: LlavaConfig, layer: int) -> Iterator[None]:
    kept = model.config.vision_feature_layer
    model.config.vision_feature_layer = layer
    try:
        yield
    finally:
        model.config.vision_feature_layer = kept


@contextlib.contextmanager
def _mllama_at_exit(model: Any, config: MllamaConfig, layer: int) -> Iterator[None]:
    """What `MllamaVisionTower.features` says, in terms of transformers' modules."""

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
    with contextlib.closing(_Removing(hooks)):
        yield


@dataclasses.dataclass(frozen=True)
class _HfFamily:
    """A family in transformers: its processor's class, and the functions above."""

    processor: str
    random_row: Callable[[Any, np.ndarray, int, np.random.Generator], Inputs]
    states: Callable[[Any, Any, dict[str, Any]], States]
    at_exit: Callable[[Any, Any, int], contextlib.AbstractContextManager[None]]


_FAMILIES: dict[type, _HfFamily] = {
    LlavaConfig: _HfFamily("LlavaProcessor", _llava_row, _llava_states, _llava_at_exit),
    LlavaNextConfig: _HfFamily("LlavaNextProcessor", _llava_next_row, _llava_states, _llava_at_exit),
    MllamaConfig: _HfFamily("MllamaProcessor", _mllama_row, _mllama_states, _mllama_at_exit),
}
