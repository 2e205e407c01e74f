"""Builds batches of fixed shapes from rows: one batch size, few prompt lengths, a fixed number of images."""

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

_CHUNK = 256  # rows that are tokenised in one call


@dataclass(frozen=True, eq=False)
class PromptBatch:
    """Holds B rows ready for the model; the last batch of a data set is filled up with empty rows.

    Attributes:
      examples: the real rows, which come first in the batch.
      tokens: int32 [B, P], padded on the left (with token 0, which the mask hides).
      mask: bool [B, P]; all False for filler rows.
      images: B * per_row images, fillers included; None if the data set has no images.
    """

    examples: list[Example]
    tokens: Any
    mask: Any
    images: Images | None


def prompt_batch(
    vlm: VLM, examples: Sequence[Example], batch_size: int, per_row: int, *, length: int | None = None
) -> PromptBatch:
    """Returns tokens and images of rows, filled up to a fixed shape.

    With several processes, each opens only its own share of a full batch if `length` is given and every row has the
    same number of images. Otherwise, and if rows cannot be divided over the mesh, each opens all rows.

    Args:
      vlm: the model.
      examples: at most `batch_size` rows.
      batch_size: B.
      per_row: most images of any row of the data set.
      length: P; if None the `prompt_bucket` of the longest row, which only a process that has all rows can know.

    Raises:
      UserError: an image cannot be opened, the processor rejects a prompt, or `length` is too short for it.
    """
    share = Share(0, 1)
    if length is not None and len(examples) == batch_size and all(len(row.images) == per_row for row in examples):
        share = row_share(vlm.mesh, batch_size)
    own_rows, size = examples[share.rows(len(examples))], batch_size // share.count
    images, prompts = [list(row.images) for row in own_rows], [row.prompt for row in own_rows]
    inputs = vlm.processor(images=images, prompts=prompts, pad_to=length)
    ids, attention = inputs["input_ids"], inputs["attention_mask"]
    width = ids.shape[1]
    fill = ((0, size - len(own_rows)), ((prompt_bucket(width) if length is None else length) - width, 0))
    tokens = np.pad(ids.astype(np.int32), fill)
    mask = np.pad(attention.astype(bool), fill)
    padded = {**inputs, "input_ids": tokens, "attention_mask": mask}
    pictures = batch_images(vlm.config, padded, num_rows=batch_size, per_row=per_row, share=share)
    tokens, mask, pictures = place_rows((tokens, mask, pictures), vlm.mesh, share.count)
    return PromptBatch(list(examples), tokens, mask, pictures)


def prompt_tokens(processor: Processor, examples: Sequence[Example]) -> list[np.ndarray]:
    """Returns the tokens of every row, image positions included, using several threads and decoding no image.

    Raises:
      UserError: the processor rejects a prompt, or the size of an image is needed and cannot be read.
    """

    def tokens(start: int) -> list[np.ndarray]:
        rows = examples[start : start + _CHUNK]
        token_ids = processor.token_ids([list(row.images) for row in rows], [row.prompt for row in rows])
        return [np.array(ids, np.int32) for ids in token_ids]

    return [ids for part in load_ahead(tokens, range(0, len(examples), _CHUNK)) for ids in part]
