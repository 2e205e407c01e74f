"""What a sweep asks of the engine: each image encoded once for all exits, prompts run in groups of one size.

Rows that share their images and what stands before them are continued from one cache per exit. Images are opened on
threads while the device works on those before.
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
from icet_jax.evaluation.schedule import Stretch, Unit, stretches
from icet_jax.generation.engine import Engine, Finished, Prompts, Work, run_prefix
from icet_jax.generation.sampling import Sampling
from icet_jax.nn.protocols import Cache, Images
from icet_jax.parallel.sharding import row_shards
from icet_jax.typing import Array, Key
from icet_jax.vlm import VLM

_TOGETHER = 8  # prompts run at once: enough rows for full speed, few enough that slots do not wait for one another

CompileAhead = Callable[[Iterable[tuple[str, Any]]], None]
Request = tuple[int, int, int]
"""(row of the data set, exit, number of the row's images in the encoded batch)."""


@functools.partial(jax.jit, static_argnames="graphdef")
def encode(graphdef: nnx.GraphDef, params: nnx.State, images: Images) -> Any:
    """The images' encodings for all exits."""
    return nnx.merge(graphdef, params).encode(images)


def group_sizes(slots: int, mesh: Mesh | AbstractMesh | None) -> tuple[int, int]:
    """(slots, prompts run together), both spread evenly over the mesh."""
    slots = _spread(slots, mesh)
    return slots, min(slots, _spread(_TOGETHER, mesh))


def _spread(count: int, mesh: Mesh | AbstractMesh | None) -> int:
    """At least `count` rows, as many for every part of the mesh."""
    shards = 1 if mesh is None else row_shards(mesh)
    return -(-count // shards) * shards


class Queue:
    """The rows of a data set at the exits where they have no answer yet."""

    def __init__(
        self,
        vlm: VLM,
        examples: Sequence[Example],
        keys: Key[Array, "N"],
        todo: Mapping[int, Sequence[int]],
        sampling: Sampling,
        slots: int,
        compile_ahead: CompileAhead | None = None,
    ) -> None:
        """Tokenises the rows and orders them; nothing runs on the device yet.

        Args:
          vlm: the model, with its adapters if it has any.
          examples: the rows.
          keys: of each row, the same at every exit.
          todo: the exits wanted of each row.
          sampling: how answers are drawn.
          slots: rows decoded together.
          compile_ahead: gets (name, lowered program) of what rows of similar length need, before they are run.

        Raises:
          UserError: a prompt that the processor rejects or that is too long for the model or its tokenizer, or an
            image whose size is needed and cannot be read.
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
        self._stretches = stretches(examples, self._prompts, vlm.config.image_token_index)
        units = sum(len(stretch.units) for stretch in self._stretches)
        self._encoded_at_once = _spread(min(self._together, units), vlm.mesh)

    def answers(self) -> Iterator[list[Finished]]:
        """Answers as they end; a tag is (row, exit).

        Raises:
          UserError: an image that cannot be opened.
        """
        vlm = self._vlm
        for stretch in self._stretches:
            columns = stretch.length + self._sampling.max_new_tokens
            engine = Engine(
                vlm.graphdef, vlm.params, self._sampling,
                slots=self._slots, columns=columns, lora=vlm.lora, mesh=vlm.mesh,
            )  # fmt: skip
            work = self._work(stretch)
            first = next(work, None)
            if first is None:
                continue
            if self._compile_ahead is not None:
                self._compile_ahead(engine.lowered(first, self._lengths(stretch, first)))
            yield from engine.run(itertools.chain([first], work))

    def _lengths(self, stretch: Stretch, first: Work) -> list[int]:
        """What prompts are padded to that are run like the first work."""
        if first.prefix is not None:
            return [first.prompts.tokens.shape[1]]
        rows = (row for unit in stretch.units if not unit.shared for row in unit.rows if row in self._todo)
        return sorted({prompt_bucket(len(self._prompts[row])) for row in rows})

    def _work(self, stretch: Stretch) -> Iterator[Work]:
        """The prompts of a stretch, unit by unit, exit by exit."""
        units = [unit for unit in stretch.units if any(row in self._todo for row in unit.rows)]
        groups = _parts(units, self._encoded_at_once)
        for group, batch in zip(groups, load_ahead(self._images, groups), strict=True):
            encoded = None
            if batch.images is not None:
                encoded = encode(self._vlm.graphdef, self._vlm.params, batch.images)
            alone: list[Request] = []
            for place, unit in enumerate(group):
                if unit.shared:
                    yield from self._continued(unit, place, encoded)
                else:
                    alone += [(row, layer, place) for row in unit.rows for layer in self._todo.get(row, ())]
            for requests in _parts(alone, self._together):
                yield self._whole(requests, encoded)

    def _images(self, group: Sequence[Unit]) -> PromptBatch:
        """The images of a group of units, each once."""
        rows = [unit.rows[0] for unit in group]
        length = prompt_bucket(max(len(self._prompts[row]) for row in rows))
        examples = [self._examples[row] for row in rows]
        return prompt_batch(self._vlm, examples, self._encoded_at_once, self._per_row, length=length)

    def _whole(self, requests: Sequence[Request], encoded: Any) -> Work:
        """Prompts with their images."""
        width = prompt_bucket(max(len(self._prompts[row]) for row, _, _ in requests))
        prompts = self._arrays(requests, [self._prompts[row] for row, _, _ in requests], width)
        return Work(self._filled((row, layer) for row, layer, _ in requests), prompts, encoded)

    def _continued(self, unit: Unit, place: int, encoded: Any) -> Iterator[Work]:
        """Rows that begin alike: the beginning once per exit, then what is each row's own."""
        layers = sorted({layer for row in unit.rows for layer in self._todo.get(row, ())})
        head = self._prompts[unit.rows[0]][: unit.shared]
        width = prompt_bucket(max(len(self._prompts[row]) for row in unit.rows) - unit.shared)
        for exits in _parts(layers, self._together):
            prefix: Cache | None = None
            for row in unit.rows:
                requests = [(row, layer, place) for layer in exits]
                wanted = [(layer, layer in self._todo.get(row, ())) for layer in exits]
                if not any(there for _, there in wanted):
                    continue
                if prefix is None:
                    prompts = self._arrays(requests, [head] * len(exits), prompt_bucket(unit.shared))
                    static = self._vlm.graphdef, self._vlm.mesh
                    prefix = run_prefix(*static, self._vlm.params, self._vlm.lora, prompts, encoded)
                own = self._arrays(requests, [self._prompts[row][unit.shared :]] * len(exits), width)
                yield Work(self._filled((row, layer) if there else None for layer, there in wanted), own, None, prefix)

    def _arrays(self, requests: Sequence[Request], texts: Sequence[np.ndarray], width: int) -> Prompts:
        """Prompts of `texts`, padded on the right to `width` and filled up."""
        count = self._together
        tokens, mask = np.zeros((count, width), np.int32), np.zeros((count, width), bool)
        rows, exits, limit = np.zeros(count, np.int32), np.ones(count, np.int32), np.zeros(count, np.int32)
        keys = np.zeros((count, *self._keys.shape[1:]), self._keys.dtype)
        for number, ((row, layer, place), text) in enumerate(zip(requests, texts, strict=True)):
            tokens[number, : len(text)], mask[number, : len(text)] = text, True
            rows[number], exits[number], limit[number] = place, layer, self._sampling.max_new_tokens
            keys[number] = self._keys[row]
        return Prompts(tokens, mask, rows, exits, keys, limit)

    def _filled(self, tags: Iterable[Any]) -> list[Any]:
        """The tags of prompts that are run together, filled up with None."""
        found = list(tags)
        return found + [None] * (self._together - len(found))


def _parts(items: Sequence[Any], size: int) -> list[Any]:
    return [items[start : start + size] for start in range(0, len(items), size)]
