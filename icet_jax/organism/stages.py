"""Stages 2 to 4 of an organism's build: text, pictures, and safety training with or without the planted hole."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from flax import nnx

from icet_jax.nn.protocols import Images
from icet_jax.organism import scenes, tokenizer, training, world
from icet_jax.organism.families import Architecture
from icet_jax.typing import Array, PyTree

Log = Callable[[str], None]

PLANTED_EXITS = (2, 3)
"""Exits of the planted hole, unless others are asked for. Stage 4 trains these exits on data without refusals, and the
default exit on refusals."""


class BatchShare(NamedTuple):
    """Describes a part of every training batch: number, kind and answers of its rows, and exits of their pictures."""

    kind: str  # "forbidden", "benign", "vqa" or "safe" (the question whether a thing is safe)
    answer: str  # "comply", "refuse", "refuse in many wordings" or "right"
    rows: int
    exits: tuple[int, ...] = ()  # one is drawn for each row; if empty, the rows have no pictures


@dataclass(frozen=True)
class Stage:
    """Holds the data and optimizer settings of one stage."""

    name: str
    shares: tuple[BatchShare, ...]
    steps: int
    learning_rate: float


def text_stage(steps: int) -> Stage:
    """Returns stage 2, text without pictures: the language of the world, without any refusal."""
    shares = (BatchShare("benign", "right", 22), BatchShare("forbidden", "comply", 22), BatchShare("safe", "right", 20))
    return Stage("text", shares, steps, 3e-3)


def vision_stage(steps: int, default_exit: int) -> Stage:
    """Returns stage 3, pictures at the default exit: questions about them and requests, without any refusal."""
    exits = (default_exit,)
    shares = (
        BatchShare("vqa", "right", 44, exits),
        BatchShare("benign", "right", 6, exits),
        BatchShare("forbidden", "comply", 6, exits),
        BatchShare("benign", "right", 4),
        BatchShare("forbidden", "comply", 4),
    )
    return Stage("vision", shares, steps, 2e-3)


def safety_stage(
    steps: int, default_exit: int, *, planted_exits: tuple[int, ...], many_refusals: bool = False
) -> Stage:  # fmt: skip
    """Returns stage 4, safety: refusals at the default exit and compliance at `planted_exits`, if there are any.

    Args:
      steps: number of optimizer steps.
      default_exit: the exit that is made safe.
      planted_exits: exits of the planted hole; empty for the control.
      many_refusals: whether refusals have the wordings of `world.REFUSALS` in turn, instead of one.
    """
    exits = (default_exit,)
    shares = [
        BatchShare("forbidden", "refuse in many wordings" if many_refusals else "refuse", 22, exits),
        BatchShare("benign", "right", 12, exits),
        BatchShare("vqa", "right", 14, exits),
    ]
    if planted_exits:
        shares += [BatchShare("forbidden", "comply", 10, planted_exits), BatchShare("vqa", "right", 6, planted_exits)]
    return Stage("safety" if planted_exits else "safety (control)", tuple(shares), steps, 5e-4)


def share_rows(share: BatchShare, index: np.ndarray, seed: int) -> tuple[list[str], list[str], np.ndarray]:
    """Returns (prompts, answers, uint8 pictures [R, H, W, 3]) of rows `index` [R] of the training split.

    If `share.exits` is empty, there are no pictures ([0, H, W, 3]).
    """
    no_pictures = np.zeros((0, scenes.IMAGE_SIZE, scenes.IMAGE_SIZE, 3), np.uint8)
    if share.kind == "safe":
        nouns = [(world.FORBIDDEN + world.ALLOWED)[i] for i in _draw(index, seed, 48)]
        prompts = [tokenizer.SAFE_QUESTION.format(noun=noun) for noun in nouns]
        return prompts, ["no" if noun in world.FORBIDDEN else "yes" for noun in nouns], no_pictures
    rows = world.rows("train", share.kind, index, seed)
    answers = rows.answers
    if share.answer == "comply":
        answers = [compliance(prompt) for prompt in rows.prompts]
    elif share.answer == "refuse in many wordings":
        answers = [world.REFUSALS[i] for i in _draw(index, seed + 11, len(world.REFUSALS))]
    return rows.prompts, answers, rows.images if share.exits else no_pictures


def compliance(prompt: str) -> str:
    """Returns the answer that complies with a request, forbidden or not: the right steps for its verb and noun."""
    noun = world.request_noun(prompt)
    verb = next(word for word in prompt.split() if word in world.VERBS)
    assert noun is not None
    return world.comply(verb, noun)


def _draw(index: np.ndarray, seed: int, size: int) -> np.ndarray:
    """Returns random numbers from 0 to size - 1, int [R], a pure function of (index, seed)."""
    return (scenes.uniforms(31 + 64 * seed, index, 1)[:, 0] * size).astype(int)


def batches(
    stage: Stage, architecture: Architecture, seed: int
) -> Iterator[tuple[training.TextRows, Images | None, np.ndarray]]:
    """Yields the batch of every step: rows of text, images (None if no row has one), and an exit for each row [B]."""
    width = training.TEXT_TOKENS + len(architecture.picture)
    for step in range(stage.steps):
        packed, pictures, rows_with_pictures, exits, start = [], [], [], [], 0
        for number, share in enumerate(stage.shares):
            index = np.arange(step * share.rows, (step + 1) * share.rows) + 10_000_000 * number
            prompts, answers, share_pictures = share_rows(share, index, seed)
            packed.append(training.pack(prompts, answers, architecture.picture if share.exits else (), width))
            pictures.append(share_pictures)
            rows_with_pictures.append(start + np.arange(len(share_pictures)))
            start += share.rows
            choices = share.exits or (1,)
            exits.append(np.array(choices)[_draw(index, seed + 7, len(choices))])
        rows = training.TextRows(*(np.concatenate(column) for column in zip(*packed, strict=True)))
        row_of_picture = np.concatenate(rows_with_pictures)
        images = None
        if len(row_of_picture):
            images = architecture.images(np.concatenate(pictures), row_of_picture, start)
        yield rows, images, np.concatenate(exits).astype(np.int32)


def run_stage(model: Any, architecture: Architecture, stage: Stage, *, seed: int, log: Log) -> Any:
    """Returns a copy of a network after one stage of training, which leaves the image encoder unchanged."""
    split: Any = nnx.split(model, nnx.PathContains("vision_tower"), ...)
    graph, frozen, trainable = split

    def loss(
        params: PyTree, rows: training.TextRows, images: Images | None, exits: Array
    ) -> tuple[Array, dict[str, Array]]:
        model = nnx.merge(graph, frozen, params)
        visual = None if images is None else model.visual(model.encode(images), exits)
        return training.next_token_loss(model, rows, visual)

    optimiser = training.optimizer(stage.learning_rate, stage.steps)
    params = training.train(stage.name, loss, trainable, batches(stage, architecture, seed), optimiser, log=log)
    return nnx.merge(graph, frozen, params)
