"""Slots: a fixed number of rows decoded together, each taken by a new prompt as soon as its response has ended.

A batch never waits for its longest member. Prompts of any exits share the slots; a row's response depends on its own
prompt, images, exit and key alone, not on its slot, its neighbours or the order of the queue: prompts are run in groups
of one size, and each step treats every slot the same. On a mesh a prompt gets a slot on the devices that run it, so
that its cache, by far the largest thing here, stays where it is made.
"""

import functools
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec

from icet_jax.generation.decode import Rows, advance_all, begin, prefill
from icet_jax.generation.sampling import Sampling
from icet_jax.nn.layers import Lora
from icet_jax.nn.protocols import Cache
from icet_jax.parallel.sharding import (
    ROWS,
    fit,
    partition_spec,
    path_name,
    placed,
    replicated,
    row_shards,
    shardings,
    split_rows,
)
from icet_jax.typing import Array, Int

STEPS = 8
"""Steps decoded before the host looks which slots are free: a finished row waits for half of them."""


class Prompts(NamedTuple):
    """R prompts that are run together; a row without tokens, with limit 0, fills them up.

    Attributes:
      tokens, mask: [R, P], padded on either side.
      rows: int32 [R], which rows of what `model.encode` returned have their images.
      exits: int32 [R].
      keys: uint32 [R, n], `jax.random.key_data` of each row's key.
      limit: int32 [R], most new tokens.
    """

    tokens: Any
    mask: Any
    rows: Any
    exits: Any
    keys: Any
    limit: Any


class Work(NamedTuple):
    """Prompts for the slots.

    Attributes:
      tags: what each of the R prompts is called; None is a filler.
      prompts: the R prompts.
      encoded: of their images, or None.
      prefix: a cache of R rows from `run_prefix` that they continue, in place of images of their own; or None.
    """

    tags: Sequence[Any]
    prompts: Prompts
    encoded: Any = None
    prefix: Cache | None = None


class Finished(NamedTuple):
    """A response: `tokens` int [n] up to and including its EOS, and their `log_probs`."""

    tag: Any
    tokens: np.ndarray
    log_probs: np.ndarray


class Report(NamedTuple):
    """What the host sees of the slots."""

    tokens: Any
    log_probs: Any
    count: Any
    done: Any


class Engine:
    """Decodes what comes out of a queue of prompts; one compile per length of prompt."""

    def __init__(
        self,
        graphdef: nnx.GraphDef,
        params: nnx.State,
        sampling: Sampling,
        *,
        slots: int,
        columns: int,
        lora: Lora | None = None,
        mesh: Mesh | AbstractMesh | None = None,
    ) -> None:
        """Nothing is compiled yet.

        Args:
          graphdef: of the network.
          params: its weights.
          sampling: how tokens are drawn.
          slots: S, rows decoded together; at least as many as prompts are run together.
          columns: of the cache: the longest prompt, and its response.
          lora: adapters of the decoder.
          mesh: that of the weights, over which slots are split.
        """
        self._static = (graphdef, sampling, mesh)
        self._weights = (params, lora)
        self._apart: Any = None
        self._rows: Rows | None = None
        self.slots, self.columns = slots, columns

    def run(self, work: Iterable[Work]) -> Iterator[list[Finished]]:
        """Responses as they end, a few at a time; what the caller does with them overlaps the next steps.

        `work` is asked for more whenever that many slots are free on every part of the mesh; all of it has the same R.
        """
        queue = iter(work)
        held: dict[int, Any] = {}
        ended: list[Finished] = []
        waiting = next(queue, None)
        shards = 1
        if waiting is not None:
            self._make_room(waiting)
            shards = self._shards(len(waiting.tags))
        free = [list(part) for part in _parts(range(self.slots), shards)]
        rows = self._rows
        self._rows = None  # from here on they belong to the programs
        while waiting is not None or held:
            while waiting is not None and shards * min(map(len, free)) >= len(waiting.tags):
                own = zip(free, _parts(waiting.tags, shards), strict=True)
                numbers = [self.slots if tag is None else part.pop(0) for part, tags in own for tag in tags]
                held.update((slot, tag) for slot, tag in zip(numbers, waiting.tags, strict=True) if tag is not None)
                rows = fill(*self._static, *self._weights, rows, np.array(numbers, np.int32), *waiting[1:])
                waiting = next(queue, None)
            rows, report = decode(*self._static, self._weights[0], self._apart, rows)
            if ended:
                yield ended
            report = Report(*map(np.asarray, report))
            ended = [_finished(held.pop(slot), report, slot) for slot in sorted(held) if report.done[slot]]
            free = [[slot for slot in part if slot not in held] for part in _parts(range(self.slots), shards)]
        if ended:
            yield ended

    def _shards(self, together: int) -> int:
        """Parts of the mesh that have slots of their own for prompts of which so many are run together."""
        mesh = self._static[2]
        return row_shards(mesh) if mesh is not None and _divide(mesh, together, self.slots) else 1

    def lowered(self, work: Work, lengths: Iterable[int]) -> Iterator[tuple[str, Any]]:
        """(name, what `.compile()` compiles) of decoding, and of work like this with prompts padded to each length."""
        self._make_room(work)
        yield "decode", decode.lower(*self._static, self._weights[0], self._apart, self._rows)
        numbers = np.zeros(len(work.tags), np.int32)
        for length in lengths:
            shape = (len(work.tags), length)
            prompts = work.prompts._replace(tokens=np.zeros(shape, np.int32), mask=np.zeros(shape, bool))
            arguments = (self._rows, numbers, prompts, work.encoded, work.prefix)
            yield f"prompts of {length}", fill.lower(*self._static, *self._weights, *arguments)

    def _make_room(self, work: Work) -> None:
        """Allocates the slots, and cuts the layers apart."""
        if self._rows is None:
            self._rows = self.empty(work)
        if self._apart is None:
            self._apart = self._layers_apart()

    def _layers_apart(self) -> Any:
        """The decoder's layers one by one, for all steps of all slots."""
        return jax.jit(self._cut, out_shardings=self._apart_places())(*self._weights)

    def apart_shapes(self) -> Any:
        """What decoding takes of the layers, abstractly, and on a mesh where it lies."""
        shapes, places = jax.eval_shape(self._cut, *self._weights), self._apart_places()
        return shapes if places is None else placed(shapes, places)

    def _apart_places(self) -> Any:
        """Where the layers lie: as their stacks do; None without a mesh."""
        mesh = self._static[2]
        if mesh is None:
            return None

        def place(path: Any, leaf: Any) -> NamedSharding:
            stacked = "/".join(part for part in path_name(path).split("/") if not part.isdigit())
            return NamedSharding(mesh, fit(PartitionSpec(*partition_spec(stacked)[1:]), leaf.shape, mesh))

        return jax.tree_util.tree_map_with_path(place, jax.eval_shape(self._cut, *self._weights))

    def _cut(self, params: nnx.State, lora: Lora | None) -> Any:
        return nnx.merge(self._static[0], params).apart(lora)

    def empty(self, work: Work) -> Rows:
        """Slots without rows, for work of this kind."""
        shapes = self.shapes(work)

        def free() -> Rows:
            zeros = {
                name: jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), part)
                for name, part in vars(shapes).items()
                if name != "keys"
            }
            keys = jax.vmap(jax.random.key)(jnp.zeros(self.slots, jnp.uint32))
            return Rows(**{**zeros, "keys": keys, "done": jnp.ones(self.slots, bool)})

        mesh = self._static[2]
        return jax.jit(free, out_shardings=None if mesh is None else _places(shapes, mesh))()

    def shapes(self, work: Work) -> Rows:
        """The slots for work of this kind, abstractly, and on a mesh where they lie."""

        def some(*weights_and_work: Any) -> Rows:
            rows = _started(*self._static[:2], *weights_and_work)
            wide = rows.cache.with_room(self.columns).trimmed(self.columns)
            return rows.replace(cache=wide)  # type: ignore[attr-defined]

        def slots(leaf: Any) -> jax.ShapeDtypeStruct:
            return jax.ShapeDtypeStruct((self.slots, *leaf.shape[1:]), leaf.dtype)

        shapes = jax.tree.map(slots, jax.eval_shape(some, *self._weights, *work[1:]))
        mesh = self._static[2]
        return shapes if mesh is None else placed(shapes, _places(shapes, mesh))


@functools.partial(jax.jit, static_argnums=(0, 1, 2), donate_argnums=5)
def fill(
    graphdef: nnx.GraphDef,
    sampling: Sampling,
    mesh: Mesh | None,
    params: nnx.State,
    lora: Lora | None,
    slots: Rows,
    numbers: Int[Array, "R"],
    prompts: Prompts,
    encoded: Any,
    prefix: Cache | None,
) -> Rows:
    """Runs R prompts, samples the first token of each and puts them into the slots `numbers`."""
    if mesh is not None:
        prompts = split_rows(prompts, mesh)
    new = _started(graphdef, sampling, params, lora, prompts, encoded, prefix)
    if mesh is None:
        return _put(slots, numbers, new)
    if not _divide(mesh, len(numbers), len(slots.done)):
        rows = _put(slots, numbers, new)
        return jax.lax.with_sharding_constraint(rows, _places(rows, mesh))

    def put(slots: Rows, numbers: Array, new: Rows) -> Rows:
        """On one part of the mesh: its rows into its slots; fillers, whose number is beyond all slots, nowhere."""
        return _put(slots, numbers - jax.lax.axis_index(ROWS) * len(slots.done), new)

    own, theirs = (jax.tree.map(lambda place: place.spec, _places(rows, mesh)) for rows in (slots, new))
    specs = {"in_specs": (own, PartitionSpec(ROWS), theirs), "out_specs": own}
    return jax.shard_map(put, mesh=mesh, check_vma=False, **specs)(slots, numbers, new)


@functools.partial(jax.jit, static_argnums=(0, 1, 2), donate_argnums=5)
def decode(
    graphdef: nnx.GraphDef, sampling: Sampling, mesh: Mesh | None, params: nnx.State, apart: Any, slots: Rows
) -> tuple[Rows, Report]:
    """A few steps of all slots, fewer where every response ends before; and what has come of them."""
    rows = advance_all(nnx.merge(graphdef, params), slots, sampling, apart, STEPS)
    report = Report(rows.tokens, rows.log_probs, rows.count, rows.done)
    if mesh is None:
        return rows, report
    return jax.lax.with_sharding_constraint((rows, report), (_places(rows, mesh), replicated(mesh)))


@functools.partial(jax.jit, static_argnums=(0, 1))
def run_prefix(
    graphdef: nnx.GraphDef, mesh: Mesh | None, params: nnx.State, lora: Lora | None, prompts: Prompts, encoded: Any
) -> Cache:
    """The cache of what R prompts begin with, their images included; `keys` and `limit` mean nothing here."""
    if mesh is not None:
        prompts = split_rows(prompts, mesh)
    model = nnx.merge(graphdef, params)
    return prefill(model, prompts.tokens, prompts.mask, model.visual(encoded, prompts.exits, prompts.rows), lora)[1]


def _started(
    graphdef: nnx.GraphDef, sampling: Sampling, params: nnx.State, lora: Lora | None, prompts: Prompts, encoded: Any,
    prefix: Cache | None,
) -> Rows:  # fmt: skip
    """R rows with their first token."""
    model = nnx.merge(graphdef, params)
    visual = None if encoded is None else model.visual(encoded, prompts.exits, prompts.rows)
    logits, cache = prefill(model, prompts.tokens, prompts.mask, visual, lora, prefix)
    return begin(logits, cache, jax.random.wrap_key_data(prompts.keys), prompts.limit, sampling)


def _put(slots: Rows, numbers: Int[Array, "R"], new: Rows) -> Rows:
    """Rows in the slots `numbers`; numbers beyond them are left out."""
    mine, theirs = ({**vars(rows), "cache": None} for rows in (slots, new))
    rest = jax.tree.map(lambda old, some: old.at[numbers].set(some, mode="drop"), mine, theirs)
    return Rows(**{**rest, "cache": slots.cache.put(numbers, new.cache)})


def _divide(mesh: Mesh | AbstractMesh, *counts: int) -> bool:
    """Whether each of them is split evenly over the mesh's row axes."""
    return all(count % row_shards(mesh) == 0 for count in counts)


def _places(rows: Rows, mesh: Mesh | AbstractMesh) -> Rows:
    """Where the slots lie: split over the mesh's row axes where they divide."""

    def place(leaf: Any) -> Any:
        return NamedSharding(mesh, fit(PartitionSpec(ROWS), leaf.shape, mesh))

    return Rows(**{**jax.tree.map(place, {**vars(rows), "cache": None}), "cache": shardings(rows.cache, mesh, "cache")})


def _parts(rows: Sequence[Any], count: int) -> list[Sequence[Any]]:
    size = len(rows) // count
    return [rows[start : start + size] for start in range(0, len(rows), size)]


def _finished(tag: Any, report: Report, slot: int) -> Finished:
    count = int(report.count[slot])
    return Finished(tag, report.tokens[slot, :count].copy(), report.log_probs[slot, :count].copy())
