"""The prompts that a sweep sends to the engine: each image is encoded once for all exits, and prompts run in groups.

Rows that share their images and the tokens before them continue one cache per exit. Images are opened by threads while
the device works on earlier ones.
"""

import functools
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax.sharding import AbstractMesh, Mesh

from icet_jax.data.batches import load_ahead
from icet_jax.data.padding import prompt_bucket
from icet_jax.data.records import Example
from icet_jax.errors import UserError
from icet_jax.evaluation.batching import PromptBatch, prompt_batch, prompt_tokens
from icet_jax.evaluation.schedule import ImageGroup, LengthGroup, length_groups
from icet_jax.generation.engine import Engine, PromptGroup, Prompts, Response, run_prefix
from icet_jax.generation.sampling import Sampling
from icet_jax.nn.protocols import Cache, EncodedImages, Images
from icet_jax.parallel.sharding import row_shards
from icet_jax.typing import Array, Key
from icet_jax.vlm import VLM

_TOGETHER = 8  # prompts in a group: enough rows for full speed, few enough that free slots do not wait for each other

CompileAhead = Callable[[Iterable[tuple[str, Any]]], None]
Request = tuple[int, int, int, int]
"""(row of the data set, exit, attempt, row of its images in the encoded batch)."""


@functools.partial(jax.jit, static_argnames="graphdef")
def encode(graphdef: nnx.GraphDef, params: nnx.State, images: Images) -> Any:
    """Encodes the images for all exits."""
    return nnx.merge(graphdef, params).encode(images)


def group_sizes(slots: int, mesh: Mesh | AbstractMesh | None) -> tuple[int, int]:
    """Returns (slots, prompts in a group), both rounded up so that they can be split evenly over the mesh."""
    slots = _spread(slots, mesh)
    return slots, min(slots, _spread(_TOGETHER, mesh))


def _spread(count: int, mesh: Mesh | AbstractMesh | None) -> int:
    """Returns `count` rounded up to a multiple of the parts of the mesh."""
    shards = 1 if mesh is None else row_shards(mesh)
    return -(-count // shards) * shards


class Queue:
    """Provides the rows of a data set at the exits where they have no response yet."""

    def __init__(
        self,
        vlm: VLM,
        examples: Sequence[Example],
        keys: Key[Array, "K N"],
        todo: Mapping[int, Sequence[tuple[int, int]]],
        sampling: Sampling,
        slots: int,
        compile_ahead: CompileAhead | None = None,
    ) -> None:
        """Tokenises the rows and orders them; nothing runs on the device yet.

        Args:
          vlm: the model, with its adapters if it has any.
          examples: the rows.
          keys: one key per attempt and row, the same at every exit.
          todo: requested (exit, attempt) pairs by row. Attempts share the encoded images, but each runs its own prompt.
          sampling: how responses are drawn.
          slots: rows decoded together.
          compile_ahead: called with (name, lowered program) pairs for rows of similar length, before they are run.

        Raises:
          UserError: the processor rejects a prompt, a prompt is too long for the model or its tokenizer, or the size of
            an image is needed and cannot be read.
        """
        self._slots, self._together = group_sizes(slots, vlm.mesh)
        self._compile_ahead = compile_ahead
        self._vlm, self._examples, self._todo, self._sampling = vlm, examples, todo, sampling
        self._keys = np.asarray(jax.random.key_data(keys))
        self._per_row = max(len(example.images) for example in examples)
        self._prompts = prompt_tokens(vlm.processor, examples)
        for example, ids in zip(examples, self._prompts, strict=True):
            problem = vlm.misfit(ids, sampling.max_new_tokens)
            if problem is not None:
                raise UserError(f"row {example.id}: {problem}")
        self._stretches = length_groups(examples, self._prompts, vlm.config.image_token_index)
        units = sum(len(stretch.units) for stretch in self._stretches)
        self._encoded_at_once = _spread(min(self._together, units), vlm.mesh)

    def answers(self) -> Iterator[list[Response]]:
        """Yields responses as they end; a tag is (row, exit, attempt).

        Raises:
          UserError: an image cannot be opened.
        """
        vlm = self._vlm
        for stretch in self._stretches:
            columns = stretch.length + self._sampling.max_new_tokens
            engine = Engine(
                vlm.graphdef, vlm.params, self._sampling,
                slots=self._slots, columns=columns, lora=vlm.lora, mesh=vlm.mesh,
            )  # fmt: skip
            groups = self._prompt_groups(stretch)
            first = next(groups, None)
            if first is None:
                continue
            if self._compile_ahead is not None:
                self._compile_ahead(engine.lowered(first, self._lengths(stretch, first)))
            yield from engine.run(itertools.chain([first], groups))

    def _lengths(self, stretch: LengthGroup, first: PromptGroup) -> list[int]:
        """Returns the lengths to which prompts are padded that run in the same way as the first group."""
        if first.prefix is not None:
            return [first.prompts.tokens.shape[1]]
        rows = (row for unit in stretch.units if not unit.shared for row in unit.rows if row in self._todo)
        return sorted({prompt_bucket(len(self._prompts[row])) for row in rows})

    def _prompt_groups(self, stretch: LengthGroup) -> Iterator[PromptGroup]:
        """Yields the prompts of a stretch, unit by unit and exit by exit."""
        units = [unit for unit in stretch.units if any(row in self._todo for row in unit.rows)]
        groups = _parts(units, self._encoded_at_once)
        for group, batch in zip(groups, load_ahead(self._images, groups), strict=True):
            encoded = None
            if batch.images is not None:
                encoded = encode(self._vlm.graphdef, self._vlm.params, batch.images)
            unshared: list[Request] = []
            for place, unit in enumerate(group):
                if unit.shared:
                    yield from self._shared_prefix_groups(unit, place, encoded)
                else:
                    pairs = ((row, pair) for row in unit.rows for pair in self._todo.get(row, ()))
                    unshared += [(row, layer, attempt, place) for row, (layer, attempt) in pairs]
            for requests in _parts(unshared, self._together):
                yield self._whole_prompts(requests, encoded)

    def _images(self, group: Sequence[ImageGroup]) -> PromptBatch:
        """Opens the images of a group of units, each once."""
        rows = [unit.rows[0] for unit in group]
        length = prompt_bucket(max(len(self._prompts[row]) for row in rows))
        examples = [self._examples[row] for row in rows]
        return prompt_batch(self._vlm, examples, self._encoded_at_once, self._per_row, length=length)

    def _whole_prompts(self, requests: Sequence[Request], encoded: EncodedImages) -> PromptGroup:
        """Returns a group of complete prompts with their images."""
        rows = [row for row, *_ in requests]
        width = prompt_bucket(max(len(self._prompts[row]) for row in rows))
        prompts = self._prompt_arrays(requests, [self._prompts[row] for row in rows], width)
        return PromptGroup(self._pad_tags(request[:3] for request in requests), prompts, encoded)

    def _shared_prefix_groups(self, unit: ImageGroup, place: int, encoded: EncodedImages) -> Iterator[PromptGroup]:
        """Yields groups for rows with a common beginning: the beginning runs once per exit, then the rest of each
        row."""
        layers = sorted({layer for row in unit.rows for layer, _ in self._todo.get(row, ())})
        head = self._prompts[unit.rows[0]][: unit.shared]
        width = prompt_bucket(max(len(self._prompts[row]) for row in unit.rows) - unit.shared)
        for exits in _parts(layers, self._together):
            prefix: Cache | None = None
            for row, attempt in self._attempts(unit, exits):
                requests = [(row, layer, attempt, place) for layer in exits]
                if prefix is None:
                    prompts = self._prompt_arrays(requests, [head] * len(exits), prompt_bucket(unit.shared))
                    static = self._vlm.graphdef, self._vlm.mesh
                    prefix = run_prefix(*static, self._vlm.params, self._vlm.lora, prompts, encoded)
                rest = self._prompt_arrays(requests, [self._prompts[row][unit.shared :]] * len(exits), width)
                tags = ((row, layer, attempt) if (layer, attempt) in self._todo[row] else None for layer in exits)
                yield PromptGroup(self._pad_tags(tags), rest, None, prefix)

    def _attempts(self, unit: ImageGroup, exits: Sequence[int]) -> list[tuple[int, int]]:
        """Returns the (row, attempt) pairs of a unit that are requested at any of these exits."""
        pairs = ((row, pair) for row in unit.rows for pair in self._todo.get(row, ()))
        return sorted({(row, attempt) for row, (layer, attempt) in pairs if layer in exits})

    def _prompt_arrays(self, requests: Sequence[Request], texts: Sequence[np.ndarray], width: int) -> Prompts:
        """Returns prompts of `texts`, padded on the right to `width` and filled up to the size of a group."""
        count = self._together
        tokens, mask = np.zeros((count, width), np.int32), np.zeros((count, width), bool)
        rows, exits, limit = np.zeros(count, np.int32), np.ones(count, np.int32), np.zeros(count, np.int32)
        keys = np.zeros((count, *self._keys.shape[2:]), self._keys.dtype)
        for number, ((row, layer, attempt, place), text) in enumerate(zip(requests, texts, strict=True)):
            tokens[number, : len(text)], mask[number, : len(text)] = text, True
            rows[number], exits[number], limit[number] = place, layer, self._sampling.max_new_tokens
            keys[number] = self._keys[attempt, row]
        return Prompts(tokens, mask, rows, exits, keys, limit)

    def _pad_tags(self, tags: Iterable[Any]) -> list[Any]:
        """Returns the tags of a group of prompts, filled up with None."""
        padded = list(tags)
        return padded + [None] * (self._together - len(padded))


def _parts(items: Sequence[Any], size: int) -> list[Any]:
    return [items[start : start + size] for start in range(0, len(items), size)]
