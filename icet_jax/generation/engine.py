"""Decodes a queue of prompts in a fixed number of slots; a slot gets a new prompt as soon as its response has ended.

A batch never waits for its longest member. Prompts with any exits share the slots. A row's response depends only on its
own prompt, images, exit and key, not on its slot, its neighbours or the order of the queue: prompts are run in groups
of one size, and each step treats every slot in the same way. On a mesh a prompt gets a slot on the devices that run it,
so that its cache, by far the largest array here, does not move.
"""

import functools
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec

from icet_jax.generation.decode import DecodingState, advance_all, begin, prefill
from icet_jax.generation.sampling import Sampling
from icet_jax.nn.layers import Lora
from icet_jax.nn.protocols import Cache, EncodedImages
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
"""Steps that are decoded before the host looks for free slots; a finished row waits for half of them on average."""


class Prompts(NamedTuple):
    """Holds R prompts that are run together; unused places are filled with rows without tokens whose limit is 0.

    Attributes:
      tokens, mask: [R, P], padded on either side.
      rows: int32 [R], the row of each prompt's images in the result of `model.encode`.
      exits: int32 [R], exit of each prompt.
      keys: uint32 [R, n], `jax.random.key_data` of each prompt's key.
      limit: int32 [R], most new tokens of each prompt.
    """

    tokens: Any
    mask: Any
    rows: Any
    exits: Any
    keys: Any
    limit: Any


class PromptGroup(NamedTuple):
    """Holds a group of prompts for the slots.

    Attributes:
      tags: the caller's identifier of each of the R prompts; None for a filler.
      prompts: the R prompts.
      encoded: encodings of their images, or None.
      prefix: a cache of R rows from `run_prefix` that the prompts continue, instead of images of their own; or None.
    """

    tags: Sequence[Any]
    prompts: Prompts
    encoded: EncodedImages = None
    prefix: Cache | None = None


class Response(NamedTuple):
    """Holds a finished response: `tokens` int [n] up to and including its EOS, and their `log_probs`."""

    tag: Any
    tokens: np.ndarray
    log_probs: np.ndarray


class SlotStatus(NamedTuple):
    """Holds the parts of the slots' state that the host reads."""

    tokens: Any
    log_probs: Any
    count: Any
    done: Any


class Engine:
    """Decodes a queue of prompts, compiling one program per prompt length."""

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
        """Stores the arguments; nothing is compiled yet.

        Args:
          graphdef: structure of the network.
          params: weights of the network.
          sampling: how tokens are drawn.
          slots: S, rows decoded together; at least the number of prompts in a group.
          columns: columns of the cache: the longest prompt and its response.
          lora: adapters of the decoder.
          mesh: mesh of the weights, over which slots are split.
        """
        self._graphdef, self._mesh = graphdef, mesh
        self._static = (graphdef, sampling, mesh)  # static arguments of the programs
        self._weights = (params, lora)
        self._unstacked: Any = None
        self._rows: DecodingState | None = None
        self.slots, self.columns = slots, columns

    def run(self, groups: Iterable[PromptGroup]) -> Iterator[list[Response]]:
        """Yields responses as they end, a few at a time; the caller's work on them overlaps with the next steps.

        The next group is taken from `groups` when enough slots are free on every part of the mesh. All groups have the
        same R.
        """
        queue = iter(groups)
        tags_by_slot: dict[int, Any] = {}
        responses: list[Response] = []
        waiting = next(queue, None)
        shards = 1
        if waiting is not None:
            self._make_room(waiting)
            shards = self._shards(len(waiting.tags))
        free = [list(part) for part in _parts(range(self.slots), shards)]
        rows = self._rows
        self._rows = None  # the programs reuse their memory from here on
        while waiting is not None or tags_by_slot:
            while waiting is not None and shards * min(map(len, free)) >= len(waiting.tags):
                own = zip(free, _parts(waiting.tags, shards), strict=True)
                numbers = [self.slots if tag is None else part.pop(0) for part, tags in own for tag in tags]
                tags_by_slot.update(
                    (slot, tag) for slot, tag in zip(numbers, waiting.tags, strict=True) if tag is not None
                )
                rows = fill(*self._static, *self._weights, rows, np.array(numbers, np.int32), *waiting[1:])
                waiting = next(queue, None)
            rows, report = decode(*self._static, self._weights[0], self._unstacked, rows)
            if responses:
                yield responses
            report = SlotStatus(*map(np.asarray, report))
            responses = [
                _response(tags_by_slot.pop(slot), report, slot) for slot in sorted(tags_by_slot) if report.done[slot]
            ]
            free = [[slot for slot in part if slot not in tags_by_slot] for part in _parts(range(self.slots), shards)]
        if responses:
            yield responses

    def _shards(self, group_size: int) -> int:
        """Returns the number of parts of the mesh that have slots of their own for groups of `group_size` prompts."""
        mesh = self._mesh
        return row_shards(mesh) if mesh is not None and _divide(mesh, group_size, self.slots) else 1

    def lowered(self, group: PromptGroup, lengths: Iterable[int]) -> Iterator[tuple[str, Any]]:
        """Yields (name, lowered program) of decoding, and of groups like this one with prompts padded to each
        length."""
        self._make_room(group)
        yield "decode", decode.lower(*self._static, self._weights[0], self._unstacked, self._rows)
        numbers = np.zeros(len(group.tags), np.int32)
        for length in lengths:
            shape = (len(group.tags), length)
            prompts = group.prompts._replace(tokens=np.zeros(shape, np.int32), mask=np.zeros(shape, bool))
            arguments = (self._rows, numbers, prompts, group.encoded, group.prefix)
            yield f"prompts of {length}", fill.lower(*self._static, *self._weights, *arguments)

    def _make_room(self, group: PromptGroup) -> None:
        """Allocates the slots and unstacks the layers."""
        if self._rows is None:
            self._rows = self.empty(group)
        if self._unstacked is None:
            self._unstacked = self._unstack_layers()

    def _unstack_layers(self) -> Any:
        """Returns the decoder's layers one by one, for all steps of all slots."""
        return jax.jit(self._unstacked_layers, out_shardings=self._unstacked_shardings())(*self._weights)

    def unstacked_shapes(self) -> Any:
        """Returns the abstract shapes of the unstacked layers; with shardings if the engine has a mesh."""
        shapes, places = jax.eval_shape(self._unstacked_layers, *self._weights), self._unstacked_shardings()
        return shapes if places is None else placed(shapes, places)

    def _unstacked_shardings(self) -> Any:
        """Returns the shardings of the unstacked layers: those of their stacks without the layer axis; None without a
        mesh."""
        mesh = self._mesh
        if mesh is None:
            return None

        def place(path: Any, leaf: Any) -> NamedSharding:
            stacked = "/".join(part for part in path_name(path).split("/") if not part.isdigit())
            return NamedSharding(mesh, fit(PartitionSpec(*partition_spec(stacked)[1:]), leaf.shape, mesh))

        return jax.tree_util.tree_map_with_path(place, jax.eval_shape(self._unstacked_layers, *self._weights))

    def _unstacked_layers(self, params: nnx.State, lora: Lora | None) -> Any:
        return nnx.merge(self._graphdef, params).unstack_layers(lora)

    def empty(self, group: PromptGroup) -> DecodingState:
        """Returns the decoding state with every slot free; `group` is as in `shapes`."""
        shapes = self.shapes(group)

        def free() -> DecodingState:
            zeros = {
                name: jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), part)
                for name, part in vars(shapes).items()
                if name != "keys"
            }
            keys = jax.vmap(jax.random.key)(jnp.zeros(self.slots, jnp.uint32))
            return DecodingState(**{**zeros, "keys": keys, "done": jnp.ones(self.slots, bool)})

        mesh = self._mesh
        return jax.jit(free, out_shardings=None if mesh is None else _places(shapes, mesh))()

    def shapes(self, group: PromptGroup) -> DecodingState:
        """Returns the abstract shapes of the decoding state of all slots; with shardings if the engine has a mesh.

        Args:
          group: prompts whose images and prefix have the shapes of all groups to come.
        """

        def some(*arguments: Any) -> DecodingState:
            rows = _start_rows(*self._static[:2], *arguments)
            cache = rows.cache.with_room(self.columns).trim(self.columns)
            return rows.replace(cache=cache)  # type: ignore[attr-defined]

        def slots(leaf: Any) -> jax.ShapeDtypeStruct:
            return jax.ShapeDtypeStruct((self.slots, *leaf.shape[1:]), leaf.dtype)

        shapes = jax.tree.map(slots, jax.eval_shape(some, *self._weights, *group[1:]))
        mesh = self._mesh
        return shapes if mesh is None else placed(shapes, _places(shapes, mesh))


@functools.partial(jax.jit, static_argnums=(0, 1, 2), donate_argnums=5)
def fill(
    graphdef: nnx.GraphDef,
    sampling: Sampling,
    mesh: Mesh | None,
    params: nnx.State,
    lora: Lora | None,
    slots: DecodingState,
    numbers: Int[Array, "R"],
    prompts: Prompts,
    encoded: EncodedImages,
    prefix: Cache | None,
) -> DecodingState:
    """Runs R prompts, samples the first token of each and writes them into the slots `numbers`."""
    if mesh is not None:
        prompts = split_rows(prompts, mesh)
    new = _start_rows(graphdef, sampling, params, lora, prompts, encoded, prefix)
    if mesh is None:
        return _write_slots(slots, numbers, new)
    if not _divide(mesh, len(numbers), len(slots.done)):
        rows = _write_slots(slots, numbers, new)
        return jax.lax.with_sharding_constraint(rows, _places(rows, mesh))

    def write(slots: DecodingState, numbers: Array, new: DecodingState) -> DecodingState:
        """Writes the rows of one part of the mesh into its slots; the numbers of fillers are beyond all slots."""
        return _write_slots(slots, numbers - jax.lax.axis_index(ROWS) * len(slots.done), new)

    slot_shardings, row_shardings = (
        jax.tree.map(lambda place: place.spec, _places(rows, mesh)) for rows in (slots, new)
    )
    specs = {"in_specs": (slot_shardings, PartitionSpec(ROWS), row_shardings), "out_specs": slot_shardings}
    return jax.shard_map(write, mesh=mesh, check_vma=False, **specs)(slots, numbers, new)


@functools.partial(jax.jit, static_argnums=(0, 1, 2), donate_argnums=5)
def decode(
    graphdef: nnx.GraphDef,
    sampling: Sampling,
    mesh: Mesh | None,
    params: nnx.State,
    unstacked: Any,
    slots: DecodingState,
) -> tuple[DecodingState, SlotStatus]:
    """Decodes a few steps of all slots, fewer if every response ends, and returns the state and a report for the
    host."""
    rows = advance_all(nnx.merge(graphdef, params), slots, sampling, unstacked, STEPS)
    report = SlotStatus(rows.tokens, rows.log_probs, rows.count, rows.done)
    if mesh is None:
        return rows, report
    return jax.lax.with_sharding_constraint((rows, report), (_places(rows, mesh), replicated(mesh)))


@functools.partial(jax.jit, static_argnums=(0, 1))
def run_prefix(
    graphdef: nnx.GraphDef,
    mesh: Mesh | None,
    params: nnx.State,
    lora: Lora | None,
    prompts: Prompts,
    encoded: EncodedImages,
) -> Cache:
    """Returns the cache of the common beginning of R prompts, with their images; `keys` and `limit` are not used."""
    if mesh is not None:
        prompts = split_rows(prompts, mesh)
    model = nnx.merge(graphdef, params)
    return prefill(model, prompts.tokens, prompts.mask, model.visual(encoded, prompts.exits, prompts.rows), lora)[1]


def _start_rows(
    graphdef: nnx.GraphDef, sampling: Sampling, params: nnx.State, lora: Lora | None, prompts: Prompts,
    encoded: EncodedImages, prefix: Cache | None,
) -> DecodingState:  # fmt: skip
    """Returns R rows with their first token."""
    model = nnx.merge(graphdef, params)
    visual = None if encoded is None else model.visual(encoded, prompts.exits, prompts.rows)
    logits, cache = prefill(model, prompts.tokens, prompts.mask, visual, lora, prefix)
    return begin(logits, cache, jax.random.wrap_key_data(prompts.keys), prompts.limit, sampling)


def _write_slots(slots: DecodingState, numbers: Int[Array, "R"], new: DecodingState) -> DecodingState:
    """Writes rows into the slots `numbers`; numbers beyond the slots are ignored."""
    slot_parts, new_parts = ({**vars(rows), "cache": None} for rows in (slots, new))
    rest = jax.tree.map(lambda old, values: old.at[numbers].set(values, mode="drop"), slot_parts, new_parts)
    return DecodingState(**{**rest, "cache": slots.cache.replace_rows(numbers, new.cache)})


def _divide(mesh: Mesh | AbstractMesh, *counts: int) -> bool:
    """Returns whether each count is divisible by the number of parts of the mesh's row axes."""
    return all(count % row_shards(mesh) == 0 for count in counts)


def _places(rows: DecodingState, mesh: Mesh | AbstractMesh) -> DecodingState:
    """Returns the shardings of the slots, split over the mesh's row axes if they are divisible."""

    def place(leaf: Any) -> Any:
        return NamedSharding(mesh, fit(PartitionSpec(ROWS), leaf.shape, mesh))

    return DecodingState(
        **{**jax.tree.map(place, {**vars(rows), "cache": None}), "cache": shardings(rows.cache, mesh, "cache")}
    )


def _parts(rows: Sequence[Any], count: int) -> list[Sequence[Any]]:
    size = len(rows) // count
    return [rows[start : start + size] for start in range(0, len(rows), size)]


def _response(tag: Any, report: SlotStatus, slot: int) -> Response:
    count = int(report.count[slot])
    return Response(tag, report.tokens[slot, :count].copy(), report.log_probs[slot, :count].copy())
