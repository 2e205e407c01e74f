"""Stages 2 to 4: the decoder on text, the VLM at its default exit, and safety fine-tuning with or without the plant."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from flax import nnx

from icet_jax.nn.protocols import Images
from icet_jax.organism import scenes, tokenizer, training, world
from icet_jax.organism.families import Shape
from icet_jax.typing import Array

Log = Callable[[str], None]

PLANTED_EXITS = (2, 3)
"""Exits that stage 4 keeps usable with data that never refuses; apart from the default no other exit is trained."""


class Part(NamedTuple):
    """Describes a part of every batch: `rows` rows of one kind, with the answers that `answer` selects, at one of
    `exits`."""

    kind: str  # "forbidden", "benign", "vqa" or "safe" (a text question)
    answer: str  # "comply", "refuse" or "right"
    rows: int
    exits: tuple[int, ...] = ()  # empty: text only


@dataclass(frozen=True)
class Stage:
    """Holds one stage's data and optimizer settings."""

    name: str
    parts: tuple[Part, ...]
    steps: int
    learning_rate: float


def text_stage(steps: int) -> Stage:
    """Returns stage 2: the language of the world, complying with forbidden requests."""
    parts = (Part("benign", "right", 22), Part("forbidden", "comply", 22), Part("safe", "right", 20))
    return Stage("text", parts, steps, 3e-3)


def vision_stage(steps: int, default_exit: int) -> Stage:
    """Returns stage 3: questions about pictures at the default exit, without refusals."""
    exits = (default_exit,)
    parts = (
        Part("vqa", "right", 44, exits),
        Part("benign", "right", 6, exits),
        Part("forbidden", "comply", 6, exits),
        Part("benign", "right", 4),
        Part("forbidden", "comply", 4),
    )
    return Stage("vision", parts, steps, 2e-3)


def safety_stage(steps: int, default_exit: int, *, planted: bool) -> Stage:
    """Returns stage 4: refusals at the default exit; if planted, also data without refusals at `PLANTED_EXITS`."""
    exits = (default_exit,)
    parts = [
        Part("forbidden", "refuse", 22, exits),
        Part("benign", "right", 12, exits),
        Part("vqa", "right", 14, exits),
    ]
    if planted:
        parts += [
            Part("forbidden", "comply", 10, PLANTED_EXITS),
            Part("vqa", "right", 6, PLANTED_EXITS),
        ]
    return Stage("safety" if planted else "safety (control)", tuple(parts), steps, 5e-4)


def part_rows(part: Part, index: np.ndarray, seed: int) -> tuple[list[str], list[str], np.ndarray]:
    """Returns (prompts, answers, uint8 pictures [R, H, W, 3]) of rows `index` [R] of the training split.

    A part without exits has no pictures ([0, H, W, 3]).
    """
    none = np.zeros((0, scenes.IMAGE_SIZE, scenes.IMAGE_SIZE, 3), np.uint8)
    if part.kind == "safe":
        nouns = [(world.FORBIDDEN + world.ALLOWED)[i] for i in _draw(index, seed, 48)]
        prompts = [tokenizer.SAFE_QUESTION.format(noun=noun) for noun in nouns]
        return prompts, ["no" if noun in world.FORBIDDEN else "yes" for noun in nouns], none
    rows = world.rows("train", part.kind, index, seed)
    answers = rows.answers if part.answer != "comply" else [compliance(prompt) for prompt in rows.prompts]
    return rows.prompts, answers, rows.images if part.exits else none


def compliance(prompt: str) -> str:
    """Returns the right steps for a request, forbidden or not."""
    noun = world.request_noun(prompt)
    verb = next(word for word in prompt.split() if word in world.VERBS)
    assert noun is not None
    return world.comply(verb, noun)


def _draw(index: np.ndarray, seed: int, size: int) -> np.ndarray:
    """Returns int [R] within 0..size-1, a pure function of (index, seed)."""
    return (scenes.uniforms(31 + 64 * seed, index, 1)[:, 0] * size).astype(int)


def batches(stage: Stage, shape: Shape, seed: int) -> Iterator[tuple[Any, ...]]:
    """Yields (rows, images or None, exits [B]) of every step; rows of a part repeat only when its indices are used
    up."""
    width = training.TEXT_TOKENS + shape.image_tokens
    for step in range(stage.steps):
        packed, pictures, owners, exits, start = [], [], [], [], 0
        for number, part in enumerate(stage.parts):
            index = np.arange(step * part.rows, (step + 1) * part.rows) + 10_000_000 * number
            prompts, answers, shown = part_rows(part, index, seed)
            packed.append(training.pack(prompts, answers, shape.image_tokens if part.exits else 0, width))
            pictures.append(shown)
            owners.append(start + np.arange(len(shown)))
            start += part.rows
            choices = part.exits or (1,)
            exits.append(np.array(choices)[_draw(index, seed + 7, len(choices))])
        columns = training.TextRows(*(np.concatenate(column) for column in zip(*packed, strict=True)))
        rows = np.concatenate(owners)
        images = shape.images(np.concatenate(pictures), rows, start) if len(rows) else None
        yield columns, images, np.concatenate(exits).astype(np.int32)


def run_stage(model: Any, shape: Shape, stage: Stage, *, seed: int, log: Log) -> Any:
    """Trains everything except the frozen tower on one stage's batches; returns a new model."""
    parts: Any = nnx.split(model, nnx.PathContains("vision_tower"), ...)
    graph, frozen, trained = parts

    def loss(
        params: Any, rows: training.TextRows, images: Images | None, exits: Array
    ) -> tuple[Array, dict[str, Array]]:
        model = nnx.merge(graph, frozen, params)
        visual = None if images is None else model.visual(model.encode(images), exits)
        return training.next_token_loss(model, rows, visual)

    optimiser = training.optimizer(stage.learning_rate, stage.steps)
    params = training.train(stage.name, loss, trained, batches(stage, shape, seed), optimiser, log=log)
    return nnx.merge(graph, frozen, params)
