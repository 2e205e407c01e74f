"""Synthetic images and questions about them: coloured shapes on a 2 x 2 grid of 32 x 32 pixels.

Everything is a pure function of (key, index), through a counter-based generator of random numbers. Any row of any split
can therefore be created by itself, in any order, and is the same on every machine.
"""

from functools import lru_cache
from typing import NamedTuple

import numpy as np

IMAGE_SIZE = 32
CELL = 16
SHAPES = ("circle", "square", "triangle", "cross")
COLOURS = {
    "red": (220, 50, 50), "green": (50, 190, 70), "blue": (60, 90, 230), "yellow": (230, 210, 60),
    "purple": (180, 70, 200), "white": (235, 235, 235),
}  # fmt: skip
COLOUR_NAMES = tuple(COLOURS)
PLACES = ("top left", "top right", "bottom left", "bottom right")
COUNTS = ("one", "two", "three")
QUESTION_KINDS = ("colour", "shape", "count", "position", "presence")
MAX_OBJECTS = 3

_RADII = (4, 5, 6)  # sizes of objects, in pixels
_JITTER = 2  # largest offset of an object from the middle of its cell, in pixels
_BACKGROUND = 45  # grey level
_NOISE = 12  # standard deviation of the pixel noise, in grey levels


class Scenes(NamedTuple):
    """Describes B images; the objects of one image differ in shape and in colour, so every question has one answer."""

    count: np.ndarray  # type: ignore[assignment]  # int64 [B], number of objects, 1..3; hides tuple.count
    cells: np.ndarray  # int64 [B, 3], index into PLACES of each object; only the first `count` objects exist
    shapes: np.ndarray  # int64 [B, 3], index into SHAPES
    colours: np.ndarray  # int64 [B, 3], index into COLOUR_NAMES
    looks: np.ndarray  # float64 [B, 10]: sizes, offsets and noise, uniform in [0, 1)


def uniforms(key: int, index: np.ndarray, count: int) -> np.ndarray:
    """Returns random numbers, uniform in [0, 1), float64 [B, count], each a pure function of (key, index, column).

    They are computed by SplitMix64's finaliser (Steele, Lea and Flood 2014) from a combination of these three numbers.
    """
    rows = np.asarray(index, dtype=np.uint64)[:, None]
    columns = np.arange(count, dtype=np.uint64)[None, :]
    start = np.uint64((key * 0x9E3779B97F4A7C15 + 0x632BE59BD9B4E019) & 0xFFFFFFFFFFFFFFFF)
    with np.errstate(over="ignore"):
        bits = _finalise(
            _finalise(rows * np.uint64(0xD1342543DE82EF95) + start) + columns * np.uint64(0x9E3779B97F4A7C15)
        )
    return (bits >> np.uint64(11)).astype(np.float64) * 2.0**-53


def _finalise(bits: np.ndarray) -> np.ndarray:
    """Returns the results of SplitMix64's finaliser, a hash function, for uint64 numbers."""
    bits = (bits ^ (bits >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    bits = (bits ^ (bits >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return bits ^ (bits >> np.uint64(31))


def draw_scenes(key: int, index: np.ndarray) -> Scenes:
    """Returns the random scenes of the rows `index` [B] for the seed `key`."""
    u = uniforms(key, index, 25)
    return Scenes(
        count=1 + np.floor(u[:, 0] * MAX_OBJECTS).astype(np.int64),
        cells=np.argsort(u[:, 1:5], axis=1)[:, :MAX_OBJECTS],
        shapes=np.argsort(u[:, 5:9], axis=1)[:, :MAX_OBJECTS],
        colours=np.argsort(u[:, 9:15], axis=1)[:, :MAX_OBJECTS],
        looks=u[:, 15:25],
    )


def render(scenes: Scenes) -> np.ndarray:
    """Returns the pictures of scenes as RGB, uint8 [B, 32, 32, 3]."""
    rows = len(scenes.count)
    bank = _noise_bank()
    start = np.floor(scenes.looks[:, 9] * (len(bank) - 3 * IMAGE_SIZE**2)).astype(np.int64)
    noise = bank[start[:, None] + np.arange(3 * IMAGE_SIZE**2)].reshape(rows, IMAGE_SIZE, IMAGE_SIZE, 3)
    canvas = np.full((rows, 2, CELL, 2, CELL, 3), _BACKGROUND, dtype=np.int16)
    masks, palette = _shape_masks(), np.array(list(COLOURS.values()), dtype=np.int16)
    side = 2 * _JITTER + 1
    for number in range(MAX_OBJECTS):
        visible = np.nonzero(scenes.count > number)[0]
        look = scenes.looks[visible, 3 * number : 3 * number + 3]
        size = np.floor(look[:, 0] * len(_RADII)).astype(np.int64)
        dy, dx = np.floor(look[:, 1] * side).astype(np.int64), np.floor(look[:, 2] * side).astype(np.int64)
        mask = masks[scenes.shapes[visible, number], size, dy, dx][..., None]
        cell = scenes.cells[visible, number]
        background = canvas[visible, cell // 2, :, cell % 2]
        canvas[visible, cell // 2, :, cell % 2] = np.where(
            mask, palette[scenes.colours[visible, number]][:, None, None], background
        )
    return np.clip(canvas.reshape(rows, IMAGE_SIZE, IMAGE_SIZE, 3) + noise, 0, 255).astype(np.uint8)


@lru_cache(maxsize=1)
def _noise_bank() -> np.ndarray:
    """Returns fixed normal noise, int16 [N]; the noise of each image is a part of it."""
    u = uniforms(0x401CE, np.arange(65536), 8).reshape(-1, 2)
    normal = np.sqrt(-2.0 * np.log1p(-u[:, 0])) * np.cos(2 * np.pi * u[:, 1])
    return np.round(_NOISE * normal).astype(np.int16)


@lru_cache(maxsize=1)
def _shape_masks() -> np.ndarray:
    """Returns masks of every shape at every size and offset, bool [shape, size, dy, dx, 16, 16]."""
    offsets = range(-_JITTER, _JITTER + 1)
    middle = (CELL - 1) / 2
    y, x = np.mgrid[0:CELL, 0:CELL].astype(np.float64)
    out = np.zeros((len(SHAPES), len(_RADII), len(offsets), len(offsets), CELL, CELL), dtype=bool)
    for s, radius in enumerate(_RADII):
        for i, dy in enumerate(offsets):
            for j, dx in enumerate(offsets):
                v, h = y - middle - dy, x - middle - dx
                out[0, s, i, j] = v**2 + h**2 <= radius**2
                out[1, s, i, j] = np.maximum(abs(v), abs(h)) <= 0.85 * radius
                out[2, s, i, j] = (v <= 0.8 * radius) & (abs(h) <= 0.55 * (v + radius))
                out[3, s, i, j] = (np.minimum(abs(v), abs(h)) <= 1.6) & (np.maximum(abs(v), abs(h)) <= radius)
    return out


def captions(scenes: Scenes) -> list[str]:
    """Returns a description of each image, which names all objects in reading order (so it is unique)."""
    lines = []
    for row in range(len(scenes.count)):
        parts = sorted(_objects(scenes, row))
        lines.append(" and ".join(f"a {colour} {shape} {PLACES[cell]}" for cell, shape, colour in parts))
    return lines


def cell_labels(scenes: Scenes) -> np.ndarray:
    """Returns a label for each cell, int64 [B, 4]: 0 if it is empty, else 1 + shape * 6 + colour of its object."""
    labels = np.zeros((len(scenes.count), 4), dtype=np.int64)
    for number in range(MAX_OBJECTS):
        visible = np.nonzero(scenes.count > number)[0]
        label = 1 + scenes.shapes[visible, number] * len(COLOURS) + scenes.colours[visible, number]
        labels[visible, scenes.cells[visible, number]] = label
    return labels


def ask(scenes: Scenes, key: int, index: np.ndarray) -> tuple[list[str], list[str], list[str]]:
    """Returns (questions, answers, kinds of questions), one per image, drawn by the seed `key` and row `index` [B]."""
    u = uniforms(key, index, 6)
    rows = [_question(_objects(scenes, row), u[row]) for row in range(len(u))]
    return [r[0] for r in rows], [r[1] for r in rows], [r[2] for r in rows]


def _objects(scenes: Scenes, row: int) -> list[tuple[int, str, str]]:
    """Returns (cell, shape, colour) of the objects in one image."""
    return [
        (int(scenes.cells[row, k]), SHAPES[scenes.shapes[row, k]], COLOUR_NAMES[scenes.colours[row, k]])
        for k in range(int(scenes.count[row]))
    ]


def _question(objects: list[tuple[int, str, str]], u: np.ndarray) -> tuple[str, str, str]:
    """Returns (question, answer, kind) about one image, given its objects and six uniform random numbers."""
    kind = QUESTION_KINDS[int(u[0] * len(QUESTION_KINDS))]
    cell, shape, colour = objects[int(u[1] * len(objects))]
    is_first_wording = u[2] < 0.5
    if kind == "colour":
        return (f"what colour is the {shape}" if is_first_wording else f"name the colour of the {shape}"), colour, kind
    if kind == "shape":
        text = f"what shape is the {colour} object" if is_first_wording else f"name the shape of the {colour} object"
        return text, shape, kind
    if kind == "count":
        text = "how many objects are there" if is_first_wording else "count the objects in the picture"
        return text, COUNTS[len(objects) - 1], kind
    if kind == "position":
        text = f"where is the {shape}" if is_first_wording else f"where is the {colour} object"
        return text, PLACES[cell], kind
    if u[3] >= 0.5:
        shape, colour = _absent(shape, colour, u[4:])
    answer = "yes" if u[3] < 0.5 else "no"
    return (f"is there a {colour} {shape}" if is_first_wording else f"can you see a {colour} {shape}"), answer, kind


def _absent(shape: str, colour: str, u: np.ndarray) -> tuple[str, str]:
    """Returns a (shape, colour) that no object of the image has: that of an object, with one of the two changed.

    Objects of an image differ from each other both in shape and in colour, so no other object has the result either.
    """
    if u[0] < 0.5:
        others = [name for name in COLOUR_NAMES if name != colour]
        return shape, others[int(u[1] * len(others))]
    others = [name for name in SHAPES if name != shape]
    return others[int(u[1] * len(others))], colour


def answer_words() -> list[str]:
    """Returns every word that a correct answer can contain."""
    return sorted({*COLOUR_NAMES, *SHAPES, *COUNTS, "yes", "no", *" ".join(PLACES).split()})
