"""Transformers' side of `--mode=verify`, which compares transformers with this package.

Rows are given to transformers one at a time, because it cannot batch rows with different numbers of images in every
family. Models and tensors are used only through their methods, so this module does not import torch.
"""

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Sequence
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
    """Holds what is needed to run a family's models in transformers; below, *config* means this package's config.

    Attributes:
      processor: name of the class of the family's processor in transformers, or function that returns the class.
      random_row: function of (config, tokens of the text, number of images, random generator) that returns arrays of a
        random row, in the form of `hf_row`.
      states: function of (model, config, torch tensors of a row) that returns the hidden states of the image encoder.
      at_exit: function of (model, config, exit) that returns a context in which transformers' model answers at that
        exit.
      join_images: function of (rows, padded length) that returns the image arrays of all rows as one batch.
      prepare_processor: function of (processor, config) that sets attributes which the processor's files lack.
      capture: function that returns which value of the exit option "capture" the installed transformers implements, or
        None for a family without this option.
    """

    processor: str | Callable[[], Any]
    random_row: Callable[[Any, np.ndarray, int, np.random.Generator], Inputs]
    states: Callable[[Any, Any, dict[str, Any]], States]
    at_exit: Callable[[Any, Any, int], contextlib.AbstractContextManager[None]]
    join_images: Callable[[Sequence[Inputs], int], Inputs]
    prepare_processor: Callable[[Any, Any], None] = lambda processor, config: None
    capture: Callable[[], str | None] = lambda: None


def transformers_capture(directory: str | Path) -> str | None:
    """Returns which value of the exit option "capture" the installed transformers implements for a checkpoint's family.

    Returns:
      "input" or "output" (`icet_jax.config.names.CAPTURES`); None for a family without this option.

    Raises:
      UserError: there is no such checkpoint, or this version of transformers implements neither value.
    """
    return family(read_hf_config(directory)["model_type"], str(directory)).reference.capture()


def hf_processor(directory: str | Path, config: NetworkConfig) -> Any:
    """Returns transformers' processor of a checkpoint, with the image processor that needs no torch."""
    import transformers

    reference = family_of(config).reference
    name = reference.processor
    processor_class = getattr(transformers, name) if isinstance(name, str) else name()
    processor = processor_class.from_pretrained(directory)
    processor.image_processor = transformers.AutoImageProcessor.from_pretrained(directory, backend="pil")
    reference.prepare_processor(processor, config)
    return processor


def hf_row(processor: Any, template: Template, images: Sequence[Any], prompt: str) -> Inputs:
    """Returns the arrays that transformers' processor makes of one row.

    Args:
      processor: result of `hf_processor`.
      template: used if the checkpoint has no chat template of its own.
      images: PIL images or files.
      prompt: the raw prompt.

    Returns:
      {name: array}. The first axis has size 1, the row; arrays without an axis of rows begin with the axis of images.
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
    needs_bos = bos is None or not text.startswith(bos)
    arrays = processor(
        text=[text], images=[opened] if opened else None, add_special_tokens=needs_bos, return_tensors="np"
    )
    return {name: np.asarray(array) for name, array in arrays.items()}


def random_row(
    config: NetworkConfig, vocabulary: np.ndarray, count: int, length: int, noise: np.random.Generator
) -> Inputs:
    """Returns the arrays of a row with random tokens and pixels, in the form of `hf_row`.

    Args:
      config: config of the network.
      vocabulary: tokens to sample from.
      count: number of images, which come before the text.
      length: number of text tokens.
      noise: random generator.
    """
    return family_of(config).reference.random_row(config, noise.choice(vocabulary, length), count, noise)


def join(config: NetworkConfig, rows: Sequence[Inputs], pad_id: int) -> Inputs:
    """Returns the arrays of several rows joined to one batch, with text padded on the left.

    Args:
      config: config of the network.
      rows: results of `hf_row`. The largest number of images and of tiles determines the shapes of the image arrays.
      pad_id: token id of the padding.
    """
    length = max(row["input_ids"].shape[1] for row in rows)
    shape = (len(rows), length)
    out = {"input_ids": np.full(shape, pad_id, np.int64), "attention_mask": np.zeros(shape, np.int64)}
    for number, row in enumerate(rows):
        start = length - row["input_ids"].shape[1]
        out["input_ids"][number, start:], out["attention_mask"][number, start:] = row["input_ids"][0], 1
    return out | family_of(config).reference.join_images(rows, length)


def concatenate_images(rows: Sequence[Inputs], length: int) -> Inputs:
    """Returns the image arrays of all rows, concatenated along the first axis (images); `length` is not used."""
    names = {name for row in rows for name in row} - {"input_ids", "attention_mask"}
    return {name: concatenate_padded([row[name] for row in rows if name in row]) for name in sorted(names)}


def concatenate_padded(parts: list[np.ndarray]) -> np.ndarray:
    """Returns arrays concatenated along the first axis; their other axes are padded with zeros to the largest."""
    shape = np.max([part.shape[1:] for part in parts], axis=0)
    widths = [[(0, 0), *((0, most - size) for most, size in zip(shape, part.shape[1:], strict=True))] for part in parts]
    return np.concatenate([np.pad(part, width) for part, width in zip(parts, widths, strict=True)])


def encoder_states(model: Any, config: NetworkConfig, row: dict[str, Any]) -> States:
    """Returns all hidden states of transformers' image encoder for one row's images.

    They have the same form as the result of `VisionLanguageModel.hidden_states`.

    Args:
      model: transformers' model.
      config: config of the network.
      row: result of `hf_row` as torch tensors.
    """
    return family_of(config).reference.states(model, config, row)


def at_exit(model: Any, config: NetworkConfig, layer: int) -> contextlib.AbstractContextManager[None]:
    """Returns a context in which transformers' model generates its answers at exit `layer` (1..num_exits)."""
    return family_of(config).reference.at_exit(model, config, layer)


def random_pixels(noise: np.random.Generator, shape: tuple[int, ...], config: Any) -> np.ndarray:
    """Returns random images of the size that the image encoder takes, float32 [*shape, C, S, S]."""
    size = config.vision.image_size
    return noise.normal(size=(*shape, config.vision.num_channels, size, size)).astype(np.float32)


def norms_in_own_dtype(model: Any) -> contextlib.AbstractContextManager[None]:
    """Returns a context in which a float64 model computes its RMS norms in float64; other models stay as they are.

    transformers computes RMS norms in float32 whatever the dtype of the model. Its float64 results would therefore have
    the rounding errors of float32.
    """

    def normalise(module: Any, args: Any, output: Any) -> Any:
        hidden = args[0]
        mean_square = hidden.pow(2).mean(-1, keepdim=True)
        return module.weight * hidden * (mean_square + module.variance_epsilon).rsqrt()

    is_double = str(model.dtype) == "torch.float64"
    norms = [module for module in model.modules() if is_double and type(module).__name__.endswith("RMSNorm")]
    return torch_hooks([module.register_forward_hook(normalise) for module in norms])


@contextlib.contextmanager
def torch_hooks(hooks: Sequence[Any]) -> Iterator[None]:
    """Returns a context that removes these hooks of torch modules at its end."""
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
