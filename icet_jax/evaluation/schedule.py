"""The order in which a sweep runs its rows: rows of similar length together, rows that share images next to each
other."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from icet_jax.data.padding import prompt_bucket
from icet_jax.data.records import Example

_FEW = 16  # fewer rows than this are run together with the next longer ones


@dataclass(frozen=True)
class ImageGroup:
    """Holds rows with the same images, which are encoded once.

    Attributes:
      rows: numbers of the rows in the data set.
      shared: number of tokens that all of them begin with, images included; 0 if each row runs as a whole.
    """

    rows: tuple[int, ...]
    shared: int = 0


@dataclass(frozen=True)
class LengthGroup:
    """Holds units of similar length, which fit one width of the cache.

    Attributes:
      units: the units, shortest first.
      length: the padded length of the longest prompt.
    """

    units: tuple[ImageGroup, ...]
    length: int


def length_groups(examples: Sequence[Example], prompts: Sequence[np.ndarray], image_token: int) -> list[LengthGroup]:
    """Returns the order of a data set's rows, which depends only on the data set.

    Within a stretch the longest prompt is less than 1.5 times as long as the shortest. The exception are a few short
    prompts for which separate programs are not worthwhile.

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
    units = [unit for rows in rows_by_images.values() for unit in _units(rows, prompts, image_token)]
    by_size: dict[int, list[ImageGroup]] = {}
    for unit in units:
        by_size.setdefault(int(2 * math.log2(prompt_bucket(_longest(unit, prompts)))), []).append(unit)
    result: list[LengthGroup] = []
    waiting: list[ImageGroup] = []
    sizes = sorted(by_size)
    for size in sizes:
        waiting += sorted(by_size[size], key=lambda unit: (_longest(unit, prompts), unit.rows))
        if size == sizes[-1] or sum(len(unit.rows) for unit in waiting) >= _FEW:
            result.append(LengthGroup(tuple(waiting), prompt_bucket(_longest(waiting[-1], prompts))))
            waiting = []
    return result


def _path(image: object) -> object:
    """Returns an image's path as text; other images are returned unchanged."""
    return str(image) if hasattr(image, "__fspath__") else image


def _longest(unit: ImageGroup, prompts: Sequence[np.ndarray]) -> int:
    return max(len(prompts[row]) for row in unit.rows)


def _units(rows: list[int], prompts: Sequence[np.ndarray], image_token: int) -> list[ImageGroup]:
    """Returns rows with the same images as one unit if their prompts differ only after the images, else one unit per
    row."""
    if len(rows) == 1:
        return [ImageGroup((rows[0],))]
    shortest = min(len(prompts[row]) for row in rows)
    heads = np.stack([prompts[row][:shortest] for row in rows])
    same = np.logical_and.accumulate((heads == heads[0]).all(axis=0))
    shared = min(int(same.sum()), shortest - 1)  # at least one token must follow
    if any((prompts[row][shared:] == image_token).any() for row in rows):
        return [ImageGroup((row,)) for row in rows]
    return [ImageGroup(tuple(rows), shared)]
