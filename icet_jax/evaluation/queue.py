"""Sends the prompts of a sweep to the decoding engine; each image is encoded once for all exits.

Rows that begin with the same tokens and images share the KV cache of this beginning at each exit. Threads open images
while the device works on earlier images.
"""

import functools
import itertools
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any, TypeVar

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
from icet_jax.generation.engine import DECODE, Engine, PromptGroup, Prompts, Response, fill_name, run_prefix
from icet_jax.generation.sampling import Sampling
from icet_jax.nn.protocols import Cache, EncodedImages, Images
from icet_jax.parallel.sharding import row_shards
from icet_jax.typing import Array, Key
from icet_jax.vlm import VLM

_T = TypeVar("_T")

_GROUP_SIZE = 8  # prompts of a group: enough for full speed, few enough that free slots need not wait for each other

_MIN_REQUESTS = 128  # a padded length for fewer requests than this is not worth a program of its own

CompileAhead = Callable[[Iterable[tuple[str, Any]]], AbstractContextManager[Any]]
"""Function that takes programs as (name, `jax.stages.Lowered`) and compiles them before they are needed, such as
`parallel.compilations.Compiling`."""

Request = tuple[int, int, int, int]
"""(row index in the data set, exit, attempt, row of the encoded batch that has the images)."""


@functools.partial(jax.jit, static_argnames="graphdef")
def encode(graphdef: nnx.GraphDef, params: nnx.State, images: Images) -> Any:
    """Returns the states of the images at all exits, see `VisionLanguageModel.encode`."""
    return nnx.merge(graphdef, params).encode(images)


def group_sizes(slots: int, mesh: Mesh | AbstractMesh | None) -> tuple[int, int]:
    """Returns (slots, prompts per group), both rounded up so that the mesh can split them evenly."""
    slots = _round_up(slots, mesh)
    return slots, min(slots, _round_up(_GROUP_SIZE, mesh))


def _round_up(count: int, mesh: Mesh | AbstractMesh | None) -> int:
    """Returns `count` rounded up to a multiple of the number of parts into which the mesh splits rows."""
    shards = 1 if mesh is None else row_shards(mesh)
    return -(-count // shards) * shards


class Queue:
    """Generates the requested responses of a data set's rows, in the order of `length_groups`."""

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
          examples: the rows of the data set.
          keys: random keys [K, N] of K attempts of N rows; every exit uses the same keys.
          todo: {row index: requested (exit, attempt) pairs}.
          sampling: how responses are sampled.
          slots: number of rows that are decoded together.
          compile_ahead: called with the programs of a length group before the group runs; None compiles each program
            when it first runs.

        Raises:
          UserError: the processor rejects a prompt, a prompt is too long for the model or its tokenizer, or the size of
            an image is needed and cannot be read.
        """
        self._slots, self._group_size = group_sizes(slots, vlm.mesh)
        self._compile_ahead = compile_ahead
        self._vlm, self._examples, self._todo, self._sampling = vlm, examples, todo, sampling
        self._keys = np.asarray(jax.random.key_data(keys))
        self._per_row = max(len(example.images) for example in examples)
        self._prompts = prompt_tokens(vlm.processor, examples)
        for example, ids in zip(examples, self._prompts, strict=True):
            problem = vlm.misfit(ids, sampling.max_new_tokens)
            if problem is not None:
                raise UserError(f"row {example.id}: {problem}")
        self._length_groups = length_groups(examples, self._prompts, vlm.config.image_token_index)
        num_image_groups = sum(len(length_group.image_groups) for length_group in self._length_groups)
        self._encoded_at_once = _round_up(min(self._group_size, num_image_groups), vlm.mesh)

    def answers(self) -> Iterator[list[Response]]:
        """Yields lists of finished responses, whose tags are (row index, exit, attempt).

        Raises:
          UserError: an image cannot be opened.
        """
        vlm = self._vlm
        for length_group in self._length_groups:
            columns = length_group.length + self._sampling.max_new_tokens
            engine = Engine(
                vlm.graphdef, vlm.params, self._sampling,
                slots=self._slots, columns=columns, lora=vlm.lora, mesh=vlm.mesh,
            )  # fmt: skip
            widths = self._widths(length_group)
            groups = self._prompt_groups(length_group, widths)
            first = next(groups, None)
            if first is None:
                continue
            groups = itertools.chain([first], groups)
            if self._compile_ahead is None:
                yield from engine.run(groups)
                continue
            # Prompts after a shared beginning have programs of their own.
            needed = [first.prompts.tokens.shape[1]] if first.prefix is not None else self._used(widths, length_group)
            with self._compile_ahead(engine.lowered(first, needed)) as compiling:
                compiling.wait(DECODE)
                yield from engine.run(_compiled(groups, needed, compiling))

    def _widths(self, length_group: LengthGroup) -> list[int]:
        """Returns the lengths to which the prompts of a length group are padded, of those that share no beginning.

        Prompts of rare lengths are padded to the next longer one: compiling a program for them would take longer.
        """
        lengths = [len(self._prompts[row]) for row in _unshared_rows(length_group)]
        rows_by_width = Counter(map(prompt_bucket, lengths))
        widths, requests = list[int](), 0
        for width in sorted(rows_by_width):
            requests += rows_by_width[width] * self._vlm.num_exits
            if requests >= _MIN_REQUESTS or width == max(rows_by_width):
                widths.append(width)
                requests = 0
        return widths

    def _used(self, widths: Sequence[int], length_group: LengthGroup) -> list[int]:
        """Returns those of `widths`, see `_widths`, that the requested prompts of the length group take."""
        rows = (row for row in _unshared_rows(length_group) if row in self._todo)
        return sorted({_width(widths, len(self._prompts[row])) for row in rows})

    def _prompt_groups(self, length_group: LengthGroup, widths: Sequence[int]) -> Iterator[PromptGroup]:
        """Yields the requested prompts of a length group, in groups for the engine; for `widths` see `_widths`."""
        image_groups = [group for group in length_group.image_groups if any(row in self._todo for row in group.rows)]
        batches = _parts(image_groups, self._encoded_at_once)
        for groups, batch in zip(batches, load_ahead(self._images, batches), strict=True):
            encoded = None
            if batch.images is not None:
                encoded = encode(self._vlm.graphdef, self._vlm.params, batch.images)
            unshared: list[Request] = []
            for image_row, group in enumerate(groups):
                if group.shared:
                    yield from self._shared_prefix_groups(group, image_row, encoded)
                else:
                    pairs = ((row, pair) for row in group.rows for pair in self._todo.get(row, ()))
                    unshared += [(row, layer, attempt, image_row) for row, (layer, attempt) in pairs]
            for requests in _parts(unshared, self._group_size):
                yield self._full_prompts(requests, encoded, widths)

    def _images(self, groups: Sequence[ImageGroup]) -> PromptBatch:
        """Opens the images of some image groups and returns them as a batch with one row for each group."""
        rows = [group.rows[0] for group in groups]
        length = prompt_bucket(max(len(self._prompts[row]) for row in rows))
        examples = [self._examples[row] for row in rows]
        return prompt_batch(self._vlm, examples, self._encoded_at_once, self._per_row, length=length)

    def _full_prompts(self, requests: Sequence[Request], encoded: EncodedImages, widths: Sequence[int]) -> PromptGroup:
        """Returns the group of prompts for these requests, which share no prefix, padded to one of `widths`."""
        rows = [row for row, *_ in requests]
        width = _width(widths, max(len(self._prompts[row]) for row in rows))
        prompts = self._prompt_arrays(requests, [self._prompts[row] for row in rows], width)
        return PromptGroup(self._pad_tags(request[:3] for request in requests), prompts, encoded)

    def _shared_prefix_groups(self, group: ImageGroup, image_row: int, encoded: EncodedImages) -> Iterator[PromptGroup]:
        """Yields the prompts of rows with a common beginning, which is processed once per exit.

        Args:
          group: the rows.
          image_row: row of `encoded` that has their images.
          encoded: the encoded images.
        """
        layers = sorted({layer for row in group.rows for layer, _ in self._todo.get(row, ())})
        beginning = self._prompts[group.rows[0]][: group.shared]
        width = prompt_bucket(max(len(self._prompts[row]) for row in group.rows) - group.shared)
        for exits in _parts(layers, self._group_size):
            prefix: Cache | None = None
            for row, attempt in self._requested_attempts(group, exits):
                requests = [(row, layer, attempt, image_row) for layer in exits]
                if prefix is None:
                    prompts = self._prompt_arrays(requests, [beginning] * len(exits), prompt_bucket(group.shared))
                    static = self._vlm.graphdef, self._vlm.mesh
                    prefix = run_prefix(*static, self._vlm.params, self._vlm.lora, prompts, encoded)
                ends = self._prompt_arrays(requests, [self._prompts[row][group.shared :]] * len(exits), width)
                tags = ((row, layer, attempt) if (layer, attempt) in self._todo[row] else None for layer in exits)
                yield PromptGroup(self._pad_tags(tags), ends, None, prefix)

    def _requested_attempts(self, group: ImageGroup, exits: Sequence[int]) -> list[tuple[int, int]]:
        """Returns the (row, attempt) pairs of an image group that are requested at any of these exits."""
        pairs = ((row, pair) for row in group.rows for pair in self._todo.get(row, ()))
        return sorted({(row, attempt) for row, (layer, attempt) in pairs if layer in exits})

    def _prompt_arrays(self, requests: Sequence[Request], texts: Sequence[np.ndarray], width: int) -> Prompts:
        """Returns the arrays of a group of prompts, filled up to `_group_size` rows.

        Args:
          requests: request of each prompt.
          texts: token ids of each prompt.
          width: length to which the prompts are padded on the right.
        """
        count = self._group_size
        tokens, mask = np.zeros((count, width), np.int32), np.zeros((count, width), bool)
        rows, exits, limit = np.zeros(count, np.int32), np.ones(count, np.int32), np.zeros(count, np.int32)
        keys = np.zeros((count, *self._keys.shape[2:]), self._keys.dtype)
        for number, ((row, layer, attempt, image_row), text) in enumerate(zip(requests, texts, strict=True)):
            tokens[number, : len(text)], mask[number, : len(text)] = text, True
            rows[number], exits[number], limit[number] = image_row, layer, self._sampling.max_new_tokens
            keys[number] = self._keys[attempt, row]
        return Prompts(tokens, mask, rows, exits, keys, limit)

    def _pad_tags(self, tags: Iterable[Any]) -> list[Any]:
        """Returns the tags of a group of prompts, filled up with None."""
        padded = list(tags)
        return padded + [None] * (self._group_size - len(padded))


def _unshared_rows(length_group: LengthGroup) -> list[int]:
    """Returns the rows of a length group whose prompts are processed from their first token on."""
    return [row for group in length_group.image_groups if not group.shared for row in group.rows]


def _width(widths: Sequence[int], length: int) -> int:
    """Returns the first of the ascending `widths` that holds `length` positions."""
    return next(width for width in widths if width >= length)


def _compiled(groups: Iterable[PromptGroup], widths: Collection[int], compiling: Any) -> Iterator[PromptGroup]:
    """Yields groups of prompts, each as soon as the program for its width is compiled, if it is one of `widths`."""
    for group in groups:
        width = group.prompts.tokens.shape[1]
        if width in widths:
            compiling.wait(fill_name(width))
        yield group


def _parts(items: Sequence[_T], size: int) -> list[Sequence[_T]]:
    """Returns `items` cut into consecutive parts of `size` items; the last part may be shorter."""
    return [items[start : start + size] for start in range(0, len(items), size)]
