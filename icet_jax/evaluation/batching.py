"""Rows of a data set as batches of fixed shapes: same batch size, few prompt lengths, a fixed number of images."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from icet_jax.data.batches import load_ahead
from icet_jax.data.padding import prompt_bucket
from icet_jax.data.records import Example
from icet_jax.models.base.image_batches import batch_images
from icet_jax.models.base.processor import Processor
from icet_jax.nn.protocols import Images
from icet_jax.parallel.distributed import Share, row_share
from icet_jax.parallel.sharding import place_rows
from icet_jax.vlm import VLM

_CHUNK = 256  # rows tokenised at once


@dataclass(frozen=True, eq=False)
class PromptBatch:
    """B rows ready for the model; the last batch of a data set is filled up with empty rows.

    Attributes:
      examples: the real rows, first in the batch.
      tokens: int32 [B, P], left-padded (with token 0, which the mask hides).
      mask: bool [B, P]; all false for filler rows.
      images: B * per_row images, fillers included; None where the data set has none.
    """

    examples: list[Example]
    tokens: Any
    mask: Any
    images: Images | None


def prompt_batch(
    vlm: VLM, examples: Sequence[Example], batch_size: int, per_row: int, *, length: int | None = None
) -> PromptBatch:
    """Tokens and images of rows, filled up to a fixed shape.

    Of several processes, each opens its own share of a full batch if the length is given and every row has the same
    number of images; else, and where rows do not divide over the mesh, each opens all.

    Args:
      vlm: the model.
      examples: at most `batch_size` rows.
      batch_size: B.
      per_row: most images that any row of the data set has.
      length: P; the `prompt_bucket` of the longest row if None, which only a process that has all rows can know.

    Raises:
      UserError: an image that cannot be opened, or a prompt that the processor rejects or that `length` cannot hold.
    """
    share = Share(0, 1)
    if length is not None and len(examples) == batch_size and all(len(row.images) == per_row for row in examples):
        share = row_share(vlm.mesh, batch_size)
    own, size = examples[share.rows(len(examples))], batch_size // share.count
    images, prompts = [list(row.images) for row in own], [row.prompt for row in own]
    inputs = vlm.processor(images=images, prompts=prompts, pad_to=length)
    ids, attention = inputs["input_ids"], inputs["attention_mask"]
    width = ids.shape[1]
    fill = ((0, size - len(own)), ((prompt_bucket(width) if length is None else length) - width, 0))
    tokens = np.pad(ids.astype(np.int32), fill)
    mask = np.pad(attention.astype(bool), fill)
    padded = {**inputs, "input_ids": tokens, "attention_mask": mask}
    pictures = batch_images(vlm.config, padded, num_rows=batch_size, per_row=per_row, share=share)
    tokens, mask, pictures = place_rows((tokens, mask, pictures), vlm.mesh, share.count)
    return PromptBatch(list(examples), tokens, mask, pictures)


def prompt_tokens(processor: Processor, examples: Sequence[Example]) -> list[np.ndarray]:
    """Tokens of every row, image positions included, on several threads; no image is decoded.

    Raises:
      UserError: a prompt that the processor rejects, or an image whose size is needed and cannot be read.
    """

    def tokens(start: int) -> list[np.ndarray]:
        rows = examples[start : start + _CHUNK]
        found = processor.token_ids([list(row.images) for row in rows], [row.prompt for row in rows])
        return [np.array(ids, np.int32) for ids in found]

    return [ids for part in load_ahead(tokens, range(0, len(examples), _CHUNK)) for ids in part]
