"""Rows as transformers sees them, and its models at an exit: the other side of `--mode=verify`.

Rows are given to transformers one at a time, as it cannot batch every mixture of them. Models and tensors are handled
through their own methods alone, so that torch need not be imported here.
"""

import contextlib
import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from icet_jax.checkpoints.hf_config import read_hf_config
from icet_jax.media.templates import DATE, Template
from icet_jax.models import family, family_of
from icet_jax.models.base.processor import Inputs

States = list[Any]
"""torch tensors [I, P, D]: hidden states 0..num_exits of the image encoder."""


@dataclasses.dataclass(frozen=True)
class Reference:
    """A family in transformers.

    Attributes:
      processor: name of its processor's class.
      random_row: (config, tokens of the text, number of images, randomness) -> arrays as `hf_row` gives them.
      states: (model, config, torch tensors of a row) -> hidden states of the image encoder.
      at_exit: (model, config, exit) -> a context in which transformers' model answers at that exit.
      join_images: (rows, padded length) -> the image arrays of all rows.
      prepare_processor: sets what a processor's files leave out, from the model's config.
      capture: which states the installed transformers takes for the intermediates that the family captures
        (`Family.exit_options`); None where it captures none.
    """

    processor: str
    random_row: Callable[[Any, np.ndarray, int, np.random.Generator], Inputs]
    states: Callable[[Any, Any, dict[str, Any]], States]
    at_exit: Callable[[Any, Any, int], contextlib.AbstractContextManager[None]]
    join_images: Callable[[Sequence[Inputs], int], Inputs]
    prepare_processor: Callable[[Any, Any], None] = lambda processor, config: None
    capture: Callable[[], str | None] = lambda: None


def transformers_capture(directory: str | Path) -> str | None:
    """Which states the installed transformers takes a model's captured intermediates to be; None where it has none.

    Raises:
      UserError: no such checkpoint, or this transformers takes neither.
    """
    return family(read_hf_config(directory)["model_type"], str(directory)).reference.capture()


def hf_processor(directory: str | Path, config: Any) -> Any:
    """transformers' own processor of a checkpoint, its image processor the one that needs no torch."""
    import transformers

    processor = getattr(transformers, family_of(config).reference.processor).from_pretrained(directory)
    processor.image_processor = transformers.AutoImageProcessor.from_pretrained(directory, backend="pil")
    family_of(config).reference.prepare_processor(processor, config)
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
    return family_of(config).reference.random_row(config, noise.choice(vocabulary, length), count, noise)


def join(config: Any, rows: Sequence[Inputs], pad_id: int) -> Inputs:
    """Rows as one batch, padded on the left; images are padded to the largest row's number and tiles."""
    length = max(row["input_ids"].shape[1] for row in rows)
    shape = (len(rows), length)
    out = {"input_ids": np.full(shape, pad_id, np.int64), "attention_mask": np.zeros(shape, np.int64)}
    for number, row in enumerate(rows):
        start = length - row["input_ids"].shape[1]
        out["input_ids"][number, start:], out["attention_mask"][number, start:] = row["input_ids"][0], 1
    return out | family_of(config).reference.join_images(rows, length)


def stacked_images(rows: Sequence[Inputs], length: int) -> Inputs:
    """The image arrays of rows whose first axis is the images."""
    names = {name for row in rows for name in row} - {"input_ids", "attention_mask"}
    return {name: _stacked([row[name] for row in rows if name in row]) for name in sorted(names)}


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
    return family_of(config).reference.states(model, config, row)


def at_exit(model: Any, config: Any, layer: int) -> contextlib.AbstractContextManager[None]:
    """Within it transformers' model answers at exit `layer`."""
    return family_of(config).reference.at_exit(model, config, layer)


def random_pixels(noise: np.random.Generator, shape: tuple[int, ...], config: Any) -> np.ndarray:
    """Normal pixels of that many squares of the tower's size, float32 [*shape, C, S, S]."""
    size = config.vision.image_size
    return noise.normal(size=(*shape, config.vision.num_channels, size, size)).astype(np.float32)


class RemovingHooks:
    """Takes hooks away again when it is closed."""

    def __init__(self, hooks: Sequence[Any]) -> None:
        self._hooks = hooks

    def close(self) -> None:
        """Removes the hooks."""
        """Removes the hooks."""
        for hook in self._hooks:
            hook.remove()
