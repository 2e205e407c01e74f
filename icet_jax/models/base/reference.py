"""Rows and models in transformers, which `--mode=verify` compares with this package.

Rows are given to transformers one at a time, because it cannot batch every mixture of them. Models and tensors are used
only through their methods, so this module does not import torch.
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
from icet_jax.nn.protocols import NetworkConfig

States = list[Any]
"""Hidden states 0..num_exits of the image encoder, each a torch tensor [I, P, D]."""


@dataclasses.dataclass(frozen=True)
class Reference:
    """Describes a family in transformers.

    Attributes:
      processor: name of the class of its processor.
      random_row: function of (config, tokens of the text, number of images, random generator) that returns arrays like
        those of `hf_row`.
      states: function of (model, config, torch tensors of a row) that returns the hidden states of the image encoder.
      at_exit: function of (model, config, exit) that returns a context in which transformers' model answers at that
        exit.
      join_images: function of (rows, padded length) that returns the image arrays of all rows.
      prepare_processor: sets attributes from the model's config that the processor's files do not have.
      capture: function that returns which states the installed transformers uses as captured intermediates
        (`Family.exit_options`); None for a family without any.
    """

    processor: str
    random_row: Callable[[Any, np.ndarray, int, np.random.Generator], Inputs]
    states: Callable[[Any, Any, dict[str, Any]], States]
    at_exit: Callable[[Any, Any, int], contextlib.AbstractContextManager[None]]
    join_images: Callable[[Sequence[Inputs], int], Inputs]
    prepare_processor: Callable[[Any, Any], None] = lambda processor, config: None
    capture: Callable[[], str | None] = lambda: None


def transformers_capture(directory: str | Path) -> str | None:
    """Returns which states the installed transformers uses as a model's captured intermediates; None for a family
    without any.

    Raises:
      UserError: there is no such checkpoint, or this version of transformers supports neither choice.
    """
    return family(read_hf_config(directory)["model_type"], str(directory)).reference.capture()


def hf_processor(directory: str | Path, config: NetworkConfig) -> Any:
    """Returns transformers' own processor of a checkpoint, with the image processor that needs no torch."""
    import transformers

    processor = getattr(transformers, family_of(config).reference.processor).from_pretrained(directory)
    processor.image_processor = transformers.AutoImageProcessor.from_pretrained(directory, backend="pil")
    family_of(config).reference.prepare_processor(processor, config)
    return processor


def hf_row(processor: Any, template: Template, images: Sequence[Any], prompt: str) -> Inputs:
    """Returns transformers' arrays of one row; the first axis is 1, or the images for arrays without an axis of rows.

    Args:
      processor: result of `hf_processor`.
      template: used if the checkpoint has no chat template of its own.
      images: PIL images or files.
      prompt: the raw prompt.
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
    arrays = processor(
        text=[text], images=[opened] if opened else None, add_special_tokens=special, return_tensors="np"
    )
    return {name: np.asarray(array) for name, array in arrays.items()}


def random_row(
    config: NetworkConfig, vocabulary: np.ndarray, count: int, length: int, noise: np.random.Generator
) -> Inputs:
    """Returns arrays like those of `hf_row`, of random tokens and pixels.

    Args:
      config: config of the network.
      vocabulary: tokens to draw from.
      count: number of images, which come before the text.
      length: number of text tokens.
      noise: source of the randomness.
    """
    return family_of(config).reference.random_row(config, noise.choice(vocabulary, length), count, noise)


def join(config: NetworkConfig, rows: Sequence[Inputs], pad_id: int) -> Inputs:
    """Returns rows as one batch, padded on the left; images are padded to the largest number and tiles of any row."""
    length = max(row["input_ids"].shape[1] for row in rows)
    shape = (len(rows), length)
    out = {"input_ids": np.full(shape, pad_id, np.int64), "attention_mask": np.zeros(shape, np.int64)}
    for number, row in enumerate(rows):
        start = length - row["input_ids"].shape[1]
        out["input_ids"][number, start:], out["attention_mask"][number, start:] = row["input_ids"][0], 1
    return out | family_of(config).reference.join_images(rows, length)


def stacked_images(rows: Sequence[Inputs], length: int) -> Inputs:
    """Returns the concatenated image arrays of rows whose first axis is the images."""
    names = {name for row in rows for name in row} - {"input_ids", "attention_mask"}
    return {name: _stacked([row[name] for row in rows if name in row]) for name in sorted(names)}


def _stacked(parts: list[np.ndarray]) -> np.ndarray:
    """Concatenates arrays along the first axis; their other axes are filled up with zeros to the largest."""
    shape = np.max([part.shape[1:] for part in parts], axis=0)
    fills = [[(0, 0), *((0, most - size) for most, size in zip(shape, part.shape[1:], strict=True))] for part in parts]
    return np.concatenate([np.pad(part, fill) for part, fill in zip(parts, fills, strict=True)])


def encoder_states(model: Any, config: NetworkConfig, row: dict[str, Any]) -> States:
    """Returns every hidden state of the image encoder for one row's images, as `VisionLanguageModel.hidden_states`
    does.

    Args:
      model: transformers' model.
      config: config of the network.
      row: torch tensors of `hf_row`.
    """
    return family_of(config).reference.states(model, config, row)


def at_exit(model: Any, config: NetworkConfig, layer: int) -> contextlib.AbstractContextManager[None]:
    """Returns a context in which transformers' model answers at exit `layer`."""
    return family_of(config).reference.at_exit(model, config, layer)


def random_pixels(noise: np.random.Generator, shape: tuple[int, ...], config: Any) -> np.ndarray:
    """Returns normally distributed pixels of images of the tower's size, float32 [*shape, C, S, S]."""
    size = config.vision.image_size
    return noise.normal(size=(*shape, config.vision.num_channels, size, size)).astype(np.float32)


class RemovingHooks:
    """Removes torch hooks when it is closed."""

    def __init__(self, hooks: Sequence[Any]) -> None:
        self._hooks = hooks

    def close(self) -> None:
        """Removes the hooks."""
        for hook in self._hooks:
            hook.remove()
