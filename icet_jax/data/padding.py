"""Pads rows of tokens to few widths, because every width needs a program of its own."""

from collections.abc import Sequence

import numpy as np


def bucket(length: int, longest: int | None = None, steps: int = 1, shortest: int = 32) -> int:
    """Returns the padded length for rows of up to `length` tokens, at least `shortest` and at most `longest`.

    Args:
      length: number of tokens.
      longest: most tokens of any row; None if there is no limit.
      steps: buckets per doubling; 1 gives powers of two, 4 wastes at most a quarter of the positions.
      shortest: a power of two, which divides every other bucket.
    """
    power = max(shortest, 1 << max(length - 1, 0).bit_length())
    step = max(shortest, power // 2 // steps)
    padded = -(-max(length, 1) // step) * step
    return padded if longest is None else min(longest, padded)


def prompt_bucket(length: int) -> int:
    """Returns the padded length for prompts of up to `length` positions: at most an eighth longer, or a multiple of
    16."""
    return bucket(length, steps=8, shortest=16)


def pad_rows(
    rows: Sequence[Sequence[int]], length: int, count: int, side: str = "right"
) -> tuple[np.ndarray, np.ndarray]:
    """Returns rows padded on `side` as tokens int32 [count, length] and mask bool; missing and empty rows are all
    padding."""
    tokens = np.zeros((count, length), np.int32)
    mask = np.zeros((count, length), bool)
    for index, ids in enumerate(rows):
        where = slice(length - len(ids), length) if side == "left" else slice(0, len(ids))
        tokens[index, where] = ids
        mask[index, where] = True
    return tokens, mask
