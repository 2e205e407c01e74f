"""In what order a sweep runs its rows: rows of similar length together, rows that share images side by side."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from icet_jax.data.padding import prompt_bucket
from icet_jax.data.records import Example

_FEW = 16  # rows that join the next longer ones


@dataclass(frozen=True)
class Unit:
    """Rows with the same images, which are encoded once.

    Attributes:
      rows: their numbers in the data set.
      shared: tokens that all of them begin with, images included; 0 where each is run whole.
    """

    rows: tuple[int, ...]
    shared: int = 0


@dataclass(frozen=True)
class Stretch:
    """Units of similar length, for which one cache is as wide as needed and hardly wider.

    Attributes:
      units: shortest first.
      length: the padded length of the longest prompt.
    """

    units: tuple[Unit, ...]
    length: int


def stretches(examples: Sequence[Example], prompts: Sequence[np.ndarray], image_token: int) -> list[Stretch]:
    """The order of a data set's rows, a function of the data set alone.

    Within a stretch the longest prompt is less than half as long again as the shortest, but for a few short ones, which
    are not worth programs of their own.

    Args:
      examples: the rows.
      prompts: token ids of each.
      image_token: what stands for images in them.
    """
    together: dict[object, list[int]] = {}
    for number, example in enumerate(examples):
        known = example.images and all(isinstance(image, str) for image in map(_path, example.images))
        key = tuple(map(_path, example.images)) if known else number
        together.setdefault(key, []).append(number)
    units = [unit for rows in together.values() for unit in _units(rows, prompts, image_token)]
    by_size: dict[int, list[Unit]] = {}
    for unit in units:
        by_size.setdefault(int(2 * math.log2(prompt_bucket(_longest(unit, prompts)))), []).append(unit)
    found: list[Stretch] = []
    waiting: list[Unit] = []
    sizes = sorted(by_size)
    for size in sizes:
        waiting += sorted(by_size[size], key=lambda unit: (_longest(unit, prompts), unit.rows))
        if size == sizes[-1] or sum(len(unit.rows) for unit in waiting) >= _FEW:
            found.append(Stretch(tuple(waiting), prompt_bucket(_longest(waiting[-1], prompts))))
            waiting = []
    return found


def _path(image: object) -> object:
    """The image's path as text; other images as they are."""
    return str(image) if hasattr(image, "__fspath__") else image


def _longest(unit: Unit, prompts: Sequence[np.ndarray]) -> int:
    return max(len(prompts[row]) for row in unit.rows)


def _units(rows: list[int], prompts: Sequence[np.ndarray], image_token: int) -> list[Unit]:
    """Rows with the same images as one unit if their prompts differ only after the images; else each alone."""
    if len(rows) == 1:
        return [Unit((rows[0],))]
    shortest = min(len(prompts[row]) for row in rows)
    heads = np.stack([prompts[row][:shortest] for row in rows])
    same = np.logical_and.accumulate((heads == heads[0]).all(axis=0))
    shared = min(int(same.sum()), shortest - 1)  # something must follow it
    if any((prompts[row][shared:] == image_token).any() for row in rows):
        return [Unit((row,)) for row in rows]
    return [Unit(tuple(rows), shared)]
