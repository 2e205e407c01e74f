"""Builds batches of rows, as arrays of few different shapes, so that few programs are compiled."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from icet_jax.data.batches import load_ahead
from icet_jax.data.padding import prompt_bucket
from icet_jax.data.records import Example
from icet_jax.models.base.image_batches import batch_images
from icet_jax.models.base.processor import Processor
from icet_jax.nn.protocols import Images
from icet_jax.parallel.distributed import Share, row_share
from icet_jax.parallel.sharding import place_rows
from icet_jax.typing import ArrayLike
from icet_jax.vlm import VLM

_ROWS_PER_CALL = 256  # rows that one thread tokenises at a time


@dataclass(frozen=True, eq=False)
class PromptBatch:
    """Holds the model's input arrays for B rows: first rows of data, then filler rows.

    Attributes:
      examples: the rows of data.
      tokens: int32 [B, P], prompts padded on the left with token 0 to the same length P.
      mask: bool [B, P], True at tokens that are not padding; all False for filler rows.
      images: the images, with filler images so that every row has the same number; None if no row has an image.
    """

    examples: list[Example]
    tokens: ArrayLike
    mask: ArrayLike
    images: Images | None


def prompt_batch(
    vlm: VLM, examples: Sequence[Example], batch_size: int, per_row: int, *, length: int | None = None
) -> PromptBatch:
    """Returns the tokens and images of rows, with filler rows up to `batch_size` and filler images up to `per_row`.

    If there are several processes, each opens only the images of its own rows, provided that `length` is given, the
    batch is full and divisible over the mesh, and every row has `per_row` images. Otherwise every process opens all
    images.

    Args:
      vlm: the model.
      examples: at most `batch_size` rows.
      batch_size: B.
      per_row: largest number of images of any row of the data set.
      length: padded length P of the prompts; None for the `prompt_bucket` of the longest one.

    Raises:
      UserError: an image cannot be opened, the processor rejects a prompt, or a prompt is longer than `length`.
    """
    share = Share(0, 1)
    if length is not None and len(examples) == batch_size and all(len(row.images) == per_row for row in examples):
        share = row_share(vlm.mesh, batch_size)
    rows, size = examples[share.rows(len(examples))], batch_size // share.count
    row_images, prompts = [list(row.images) for row in rows], [row.prompt for row in rows]
    inputs = vlm.processor(images=row_images, prompts=prompts, pad_to=length)
    ids, attention = inputs["input_ids"], inputs["attention_mask"]
    width = ids.shape[1]
    padding = ((0, size - len(rows)), ((prompt_bucket(width) if length is None else length) - width, 0))
    tokens = np.pad(ids.astype(np.int32), padding)
    mask = np.pad(attention.astype(bool), padding)
    padded = {**inputs, "input_ids": tokens, "attention_mask": mask}
    images = batch_images(vlm.config, padded, num_rows=batch_size, per_row=per_row, share=share)
    return PromptBatch(list(examples), *place_rows((tokens, mask, images), vlm.mesh, share.count))


def prompt_tokens(processor: Processor, examples: Sequence[Example]) -> list[np.ndarray]:
    """Returns the token ids of every row's prompt, image tokens included, without decoding images; uses several
    threads.

    Raises:
      UserError: see `Processor.token_ids`.
    """

    def tokens_of_chunk(start: int) -> list[np.ndarray]:
        rows = examples[start : start + _ROWS_PER_CALL]
        token_ids = processor.token_ids([list(row.images) for row in rows], [row.prompt for row in rows])
        return [np.array(ids, np.int32) for ids in token_ids]

    chunks = load_ahead(tokens_of_chunk, range(0, len(examples), _ROWS_PER_CALL))
    return [ids for chunk in chunks for ids in chunk]
