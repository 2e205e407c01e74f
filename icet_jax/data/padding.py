"""Pads rows of tokens to a few lengths (buckets), because every length needs a compiled program of its own."""

from collections.abc import Sequence

import numpy as np


def bucket(length: int, longest: int | None = None, buckets_per_doubling: int = 1, shortest: int = 32) -> int:
    """Returns the length to which rows of up to `length` tokens are padded, at least `shortest` and at most `longest`.

    Args:
      length: number of tokens.
      longest: upper limit of the result; None for no limit.
      buckets_per_doubling: number of buckets from one power of two (exclusive) to the next; 1 gives only powers of
        two. Padding is at most `length` / buckets_per_doubling, unless `shortest` requires more.
      shortest: smallest bucket, a power of two. Other buckets are multiples of it (`longest` excepted).
    """
    power = max(shortest, 1 << max(length - 1, 0).bit_length())
    step = max(shortest, power // 2 // buckets_per_doubling)
    padded = -(-max(length, 1) // step) * step
    return padded if longest is None else min(longest, padded)


def prompt_bucket(length: int) -> int:
    """Returns the length to which prompts of up to `length` positions are padded.

    It is a multiple of 16, and at most about an eighth larger than `length`.
    """
    return bucket(length, buckets_per_doubling=8, shortest=16)


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
