"""Orders the rows of a sweep: by prompt length, and within similar lengths by the images that rows share."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from icet_jax.data.padding import prompt_bucket
from icet_jax.data.records import Example

_MIN_ROWS = 16  # fewer rows of similar length than this join the group of the next longer ones


@dataclass(frozen=True)
class ImageGroup:
    """Describes rows with the same images, which are encoded once.

    Attributes:
      rows: indices of the rows in the data set.
      shared: length in tokens (images included) of the common beginning of these rows' prompts, which is processed only
        once; 0 if every prompt is processed from its first token on.
    """

    rows: tuple[int, ...]
    shared: int = 0


@dataclass(frozen=True)
class LengthGroup:
    """Describes rows whose prompts have similar lengths, so that one size of the KV cache serves them.

    Attributes:
      image_groups: the rows, shortest first.
      length: the padded length of the longest prompt.
    """

    image_groups: tuple[ImageGroup, ...]
    length: int


def length_groups(examples: Sequence[Example], prompts: Sequence[np.ndarray], image_token: int) -> list[LengthGroup]:
    """Returns the rows of a data set in the order in which a sweep runs them.

    In each group the longest prompt is less than 1.5 times as long as the shortest. Every group needs programs of its
    own, so fewer than `_MIN_ROWS` rows of similar length are joined with the next longer rows. The lengths in such a
    group differ more.

    Args:
      examples: the rows.
      prompts: token ids of each row.
      image_token: token that stands for images.
    """
    rows_by_images: dict[object, list[int]] = {}
    for number, example in enumerate(examples):
        has_paths = example.images and all(isinstance(image, str) for image in map(_path, example.images))
        key = tuple(map(_path, example.images)) if has_paths else number
        rows_by_images.setdefault(key, []).append(number)
    by_size: dict[int, list[ImageGroup]] = {}  # size: twice the logarithm of the padded length
    for rows in rows_by_images.values():
        for group in _image_groups(rows, prompts, image_token):
            size = int(2 * math.log2(prompt_bucket(_longest_prompt(group, prompts))))
            by_size.setdefault(size, []).append(group)
    result: list[LengthGroup] = []
    collected: list[ImageGroup] = []
    sizes = sorted(by_size)
    for size in sizes:
        collected += sorted(by_size[size], key=lambda group: (_longest_prompt(group, prompts), group.rows))
        if size == sizes[-1] or sum(len(group.rows) for group in collected) >= _MIN_ROWS:
            result.append(LengthGroup(tuple(collected), prompt_bucket(_longest_prompt(collected[-1], prompts))))
            collected = []
    return result


def _path(image: object) -> object:
    """Returns an image's path as text; other images are returned unchanged."""
    return str(image) if hasattr(image, "__fspath__") else image


def _longest_prompt(group: ImageGroup, prompts: Sequence[np.ndarray]) -> int:
    return max(len(prompts[row]) for row in group.rows)


def _image_groups(rows: list[int], prompts: Sequence[np.ndarray], image_token: int) -> list[ImageGroup]:
    """Returns the image groups of `rows`, all of which have the same images.

    It is one group if the prompts differ only after the images, and otherwise one group for each row.
    """
    if len(rows) == 1:
        return [ImageGroup((rows[0],))]
    shortest = min(len(prompts[row]) for row in rows)
    beginnings = np.stack([prompts[row][:shortest] for row in rows])
    is_shared = np.logical_and.accumulate((beginnings == beginnings[0]).all(axis=0))
    shared = min(int(is_shared.sum()), shortest - 1)  # every prompt must have a token after the common beginning
    if any((prompts[row][shared:] == image_token).any() for row in rows):
        return [ImageGroup((row,)) for row in rows]
    return [ImageGroup(tuple(rows), shared)]
