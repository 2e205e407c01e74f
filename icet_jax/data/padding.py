"""Pads rows of tokens to a few lengths (buckets), because every length needs a compiled program of its own."""

from collections.abc import Sequence

import numpy as np


def bucket(length: int, longest: int | None = None, steps: int = 1, shortest: int = 32) -> int:
    """Returns the padded length for rows of up to `length` tokens: from `shortest` to `longest`.

    Args:
      length: number of tokens.
      longest: upper limit of the result; None for no limit.
      steps: number of buckets between two powers of two; 1 gives only powers of two. Padding is at most 1 / steps of
        `length`, where `shortest` does not require more.
      shortest: smallest bucket, a power of two. Other buckets are multiples of it (`longest` excepted).
    """
    power = max(shortest, 1 << max(length - 1, 0).bit_length())
    step = max(shortest, power // 2 // steps)
    padded = -(-max(length, 1) // step) * step
    return padded if longest is None else min(longest, padded)


def prompt_bucket(length: int) -> int:
    """Returns the padded length for prompts of up to `length` positions: a multiple of 16, about an eighth longer at
    most."""
    return bucket(length, steps=8, shortest=16)


def pad_rows(
    rows: Sequence[Sequence[int]], length: int, count: int, side: str = "right"
) -> tuple[np.ndarray, np.ndarray]:
    """Returns rows of token ids as int32 tokens and a bool mask (true: not padding), both [count, length].

    Args:
      rows: at most `count` rows of at most `length` token ids; missing rows become padding.
      length: padded length.
      count: padded number of rows.
      side: where the padding of a row stands, "left" or "right".
    """
    tokens = np.zeros((count, length), np.int32)
    mask = np.zeros((count, length), bool)
    for index, ids in enumerate(rows):
        columns = slice(length - len(ids), length) if side == "left" else slice(0, len(ids))
        tokens[index, columns] = ids
        mask[index, columns] = True
    return tokens, mask
