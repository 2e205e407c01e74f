"""Decodes a queue of prompts in a fixed number of slots; a slot gets a new prompt as soon as its response has ended.

No row therefore waits for the longest response of a batch. Prompts with different exits share the slots. A row's
response depends only on its own prompt, images, exit and key, not on its slot, its neighbours or the order of the
queue, because all groups of prompts have the same size and each step treats every slot in the same way. On a mesh, a
prompt gets a slot on the devices that run its prefill, so that its cache, by far the largest array, does not move.
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
"""Number of steps that are decoded before the host looks for free slots. On average, a finished row waits for half of
that number."""

DECODE = "decode"
"""Name of the program that decodes."""


def fill_name(length: int) -> str:
    """Returns the name of the program that processes prompts which are padded to `length` positions."""
    return f"prompts of {length}"


class Prompts(NamedTuple):
    """Holds R prompts that are run together.

    If there are fewer prompts, the rest are filler rows without tokens and with the limit 0.

    Attributes:
      tokens, mask: [R, P], padded on the left or on the right.
      rows: int32 [R], the row of each prompt's images in the result of `model.encode`.
      exits: int32 [R], exit of each prompt.
      keys: uint32 [R, n], `jax.random.key_data` of each prompt's key.
      limit: int32 [R], largest number of new tokens of each prompt.
    """

    tokens: Any
    mask: Any
    rows: Any
    exits: Any
    keys: Any
    limit: Any


class PromptGroup(NamedTuple):
    """Holds a group of prompts that get their slots at the same time.

    Attributes:
      tags: the caller's identifier of each of the R prompts; None for a filler row.
      prompts: the R prompts.
      encoded: result of `model.encode` for the images of the prompts; None without images or with a `prefix`.
      prefix: a cache of R rows from `run_prefix` that the prompts continue, or None.
    """

    tags: Sequence[Any]
    prompts: Prompts
    encoded: EncodedImages = None
    prefix: Cache | None = None


class Response(NamedTuple):
    """Holds a finished response.

    Attributes:
      tag: the caller's identifier of the prompt, from `PromptGroup.tags`.
      tokens: int [n], the tokens up to and including EOS.
      log_probs: float32 [n], log-probs of the tokens in nats.
    """

    tag: Any
    tokens: np.ndarray
    log_probs: np.ndarray


class SlotStatus(NamedTuple):
    """Holds the parts of the slots' `DecodingState` that the host reads, for S slots."""

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
          columns: number of columns of the cache, enough for the longest prompt and its response.
          lora: adapters of the decoder; None for the model without adapters.
          mesh: mesh of the weights, over which slots are split; None on one device.
        """
        self._graphdef, self._sampling, self._mesh = graphdef, sampling, mesh
        self._static = (graphdef, sampling, mesh)  # the first, static arguments of `fill` and `decode`
        self._params = params
        self._weights = (params, lora)
        self._unstacked: Any = None
        self._rows: DecodingState | None = None
        self.slots, self.columns = slots, columns

    def run(self, groups: Iterable[PromptGroup]) -> Iterator[list[Response]]:
        """Yields finished responses, a few at a time; the devices continue while the caller works on them.

        The next group is taken from `groups` when enough slots are free on every part of the mesh. All groups must have
        the same number of prompts R, fillers included.
        """
        queue = iter(groups)
        tags_by_slot: dict[int, Any] = {}
        responses: list[Response] = []
        waiting = next(queue, None)
        shards = 1
        if waiting is not None:
            self._allocate(waiting)
            shards = self._shards(len(waiting.tags))
        free = [list(part) for part in _split(range(self.slots), shards)]
        rows = self._rows
        self._rows = None  # the programs reuse their memory from here on
        ahead: SlotStatus | None = None  # of a call that was dispatched before the last status was read
        while waiting is not None or tags_by_slot:
            while waiting is not None and shards * min(map(len, free)) >= len(waiting.tags):
                shard_pairs = zip(free, _split(waiting.tags, shards), strict=True)
                slot_ids = [self.slots if tag is None else part.pop(0) for part, tags in shard_pairs for tag in tags]
                tags_by_slot.update(
                    (slot, tag) for slot, tag in zip(slot_ids, waiting.tags, strict=True) if tag is not None
                )
                rows = fill(*self._static, *self._weights, rows, np.array(slot_ids, np.int32), *waiting[1:])
                waiting = next(queue, None)
            status, ahead = ahead, None
            if status is None:
                rows, status = self._decode(rows)
            if waiting is None:  # no prompt needs a free slot, so the devices need not wait for the host
                rows, ahead = self._decode(rows)
            if responses:
                yield responses
            status = SlotStatus(*map(np.asarray, status))
            responses = [
                _response(tags_by_slot.pop(slot), status, slot) for slot in sorted(tags_by_slot) if status.done[slot]
            ]
            free = [[slot for slot in part if slot not in tags_by_slot] for part in _split(range(self.slots), shards)]
        if responses:
            yield responses

    def _decode(self, rows: DecodingState | None) -> tuple[DecodingState, SlotStatus]:
        """Starts `decode` on all slots; see there."""
        return decode(*self._static, self._params, self._unstacked, rows)

    def _shards(self, group_size: int) -> int:
        """Returns the number of parts into which the mesh splits slots and prompts.

        It is 1 without a mesh, or if slots or prompts cannot be divided evenly. Each part fills only its own slots.
        `group_size` is the number of prompts in a group.
        """
        mesh = self._mesh
        return row_shards(mesh) if mesh is not None and _divide(mesh, group_size, self.slots) else 1

    def lowered(self, group: PromptGroup, lengths: Iterable[int]) -> Iterator[tuple[str, Any]]:
        """Yields (name, lowered program) of `decode`, and of `fill` for each padded prompt length in `lengths`.

        Except for the length, the prompts have the shapes of `group`.
        """
        self._allocate(group)
        yield DECODE, decode.lower(*self._static, self._params, self._unstacked, self._rows)
        slot_ids = np.zeros(len(group.tags), np.int32)
        for length in lengths:
            shape = (len(group.tags), length)
            prompts = group.prompts._replace(tokens=np.zeros(shape, np.int32), mask=np.zeros(shape, bool))
            arguments = (self._rows, slot_ids, prompts, group.encoded, group.prefix)
            yield fill_name(length), fill.lower(*self._static, *self._weights, *arguments)

    def _allocate(self, group: PromptGroup) -> None:
        """Allocates the slots and unstacks the layers, unless an earlier call did so; for `group` see `shapes`."""
        if self._rows is None:
            self._rows = self.empty(group)
        if self._unstacked is None:
            self._unstacked = self._unstack_layers()

    def _unstack_layers(self) -> Any:
        """Returns the decoder's layers as separate arrays, which all decoding steps read."""
        return jax.jit(self._unstacked_layers, out_shardings=self._unstacked_shardings())(*self._weights)

    def unstacked_shapes(self) -> Any:
        """Returns the abstract shapes of the unstacked layers; with shardings if the engine has a mesh."""
        shapes, leaf_shardings = jax.eval_shape(self._unstacked_layers, *self._weights), self._unstacked_shardings()
        return shapes if leaf_shardings is None else placed(shapes, leaf_shardings)

    def _unstacked_shardings(self) -> Any:
        """Returns a pytree with the sharding of each unstacked array, or None without a mesh.

        A layer's array is split as the array of all layers is, without the layer axis.
        """
        mesh = self._mesh
        if mesh is None:
            return None

        def sharding(path: Any, leaf: Any) -> NamedSharding:
            stacked_path = "/".join(part for part in path_name(path).split("/") if not part.isdigit())
            return NamedSharding(mesh, fit(PartitionSpec(*partition_spec(stacked_path)[1:]), leaf.shape, mesh))

        return jax.tree_util.tree_map_with_path(sharding, jax.eval_shape(self._unstacked_layers, *self._weights))

    def _unstacked_layers(self, params: nnx.State, lora: Lora | None) -> Any:
        return nnx.merge(self._graphdef, params).unstack_layers(lora)

    def empty(self, group: PromptGroup) -> DecodingState:
        """Returns the decoding state with every slot free; `group` is as in `shapes`."""
        shapes = self.shapes(group)

        def free_slots() -> DecodingState:
            zeros = {
                name: jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), part)
                for name, part in vars(shapes).items()
                if name != "keys"
            }
            keys = jax.vmap(jax.random.key)(jnp.zeros(self.slots, jnp.uint32))
            return DecodingState(**{**zeros, "keys": keys, "done": jnp.ones(self.slots, bool)})

        mesh = self._mesh
        return jax.jit(free_slots, out_shardings=None if mesh is None else _state_shardings(shapes, mesh))()

    def shapes(self, group: PromptGroup) -> DecodingState:
        """Returns the abstract shapes of the decoding state of all slots; with shardings if the engine has a mesh.

        Args:
          group: prompts whose images and prefix have the shapes of all groups to come.
        """

        def started_rows(*arguments: Any) -> DecodingState:
            """Returns the state of R rows, with as many cache columns as the slots have."""
            rows = _start_rows(self._graphdef, self._sampling, *arguments)
            cache = rows.cache.with_room(self.columns).trim(self.columns)
            return rows.replace(cache=cache)  # type: ignore[attr-defined]

        def for_all_slots(leaf: Any) -> jax.ShapeDtypeStruct:
            return jax.ShapeDtypeStruct((self.slots, *leaf.shape[1:]), leaf.dtype)

        shapes = jax.tree.map(for_all_slots, jax.eval_shape(started_rows, *self._weights, *group[1:]))
        mesh = self._mesh
        return shapes if mesh is None else placed(shapes, _state_shardings(shapes, mesh))


@functools.partial(jax.jit, static_argnums=(0, 1, 2), donate_argnums=5)
def fill(
    graphdef: nnx.GraphDef,
    sampling: Sampling,
    mesh: Mesh | None,
    params: nnx.State,
    lora: Lora | None,
    slots: DecodingState,
    slot_ids: Int[Array, "R"],
    prompts: Prompts,
    encoded: EncodedImages,
    prefix: Cache | None,
) -> DecodingState:
    """Runs R prompts, samples the first token of each, and returns `slots` with these rows in the slots `slot_ids`.

    The slot id of a filler row is the number of slots or more; such a row is not written.
    """
    if mesh is not None:
        prompts = split_rows(prompts, mesh)
    new_rows = _start_rows(graphdef, sampling, params, lora, prompts, encoded, prefix)
    if mesh is None:
        return _write_slots(slots, slot_ids, new_rows)
    if not _divide(mesh, len(slot_ids), len(slots.done)):
        rows = _write_slots(slots, slot_ids, new_rows)
        return jax.lax.with_sharding_constraint(rows, _state_shardings(rows, mesh))

    def write(slots: DecodingState, slot_ids: Array, new_rows: DecodingState) -> DecodingState:
        """Writes the new rows of one part of the mesh into that part's slots; `slot_ids` count over the whole mesh."""
        return _write_slots(slots, slot_ids - jax.lax.axis_index(ROWS) * len(slots.done), new_rows)

    slot_specs, row_specs = (
        jax.tree.map(lambda sharding: sharding.spec, _state_shardings(rows, mesh)) for rows in (slots, new_rows)
    )
    specs = {"in_specs": (slot_specs, PartitionSpec(ROWS), row_specs), "out_specs": slot_specs}
    return jax.shard_map(write, mesh=mesh, check_vma=False, **specs)(slots, slot_ids, new_rows)


@functools.partial(jax.jit, static_argnums=(0, 1, 2), donate_argnums=5)
def decode(
    graphdef: nnx.GraphDef,
    sampling: Sampling,
    mesh: Mesh | None,
    params: nnx.State,
    unstacked: Any,
    slots: DecodingState,
) -> tuple[DecodingState, SlotStatus]:
    """Decodes `STEPS` tokens in every slot, or fewer if all responses end before.

    Returns:
      (new state of the slots, the part of it that the host reads).
    """
    rows = advance_all(nnx.merge(graphdef, params), slots, sampling, unstacked, STEPS)
    status = SlotStatus(rows.tokens, rows.log_probs, rows.count, rows.done)
    if mesh is None:
        return rows, status
    return jax.lax.with_sharding_constraint((rows, status), (_state_shardings(rows, mesh), replicated(mesh)))


@functools.partial(jax.jit, static_argnums=(0, 1))
def run_prefix(
    graphdef: nnx.GraphDef,
    mesh: Mesh | None,
    params: nnx.State,
    lora: Lora | None,
    prompts: Prompts,
    encoded: EncodedImages,
) -> Cache:
    """Returns the cache of R prompts and their images, which other prompts continue.

    The fields `keys` and `limit` of `prompts` are not used.
    """
    if mesh is not None:
        prompts = split_rows(prompts, mesh)
    model = nnx.merge(graphdef, params)
    return prefill(model, prompts.tokens, prompts.mask, model.visual(encoded, prompts.exits, prompts.rows), lora)[1]


def _start_rows(
    graphdef: nnx.GraphDef, sampling: Sampling, params: nnx.State, lora: Lora | None, prompts: Prompts,
    encoded: EncodedImages, prefix: Cache | None,
) -> DecodingState:  # fmt: skip
    """Runs R prompts and returns their decoding state with the first token of each response."""
    model = nnx.merge(graphdef, params)
    visual = None if encoded is None else model.visual(encoded, prompts.exits, prompts.rows)
    logits, cache = prefill(model, prompts.tokens, prompts.mask, visual, lora, prefix)
    return begin(logits, cache, jax.random.wrap_key_data(prompts.keys), prompts.limit, sampling)


def _write_slots(slots: DecodingState, slot_ids: Int[Array, "R"], new_rows: DecodingState) -> DecodingState:
    """Returns `slots` with R new rows in the slots `slot_ids`; rows whose id is beyond the slots are left out."""
    slot_fields, new_fields = ({**vars(rows), "cache": None} for rows in (slots, new_rows))
    fields = jax.tree.map(lambda old, values: old.at[slot_ids].set(values, mode="drop"), slot_fields, new_fields)
    return DecodingState(**{**fields, "cache": slots.cache.replace_rows(slot_ids, new_rows.cache)})


def _divide(mesh: Mesh | AbstractMesh, *counts: int) -> bool:
    """Returns whether each count is divisible by the number of parts of the mesh's row axes."""
    return all(count % row_shards(mesh) == 0 for count in counts)


def _state_shardings(rows: DecodingState, mesh: Mesh | AbstractMesh) -> DecodingState:
    """Returns the shardings of all arrays in `rows`; rows are split over the mesh's row axes if they are divisible."""

    def row_sharding(leaf: Any) -> NamedSharding:
        return NamedSharding(mesh, fit(PartitionSpec(ROWS), leaf.shape, mesh))

    fields = jax.tree.map(row_sharding, {**vars(rows), "cache": None})
    return DecodingState(**{**fields, "cache": shardings(rows.cache, mesh, "cache")})


def _split(items: Sequence[Any], count: int) -> list[Sequence[Any]]:
    """Returns `items` in `count` consecutive parts of equal length."""
    size = len(items) // count
    return [items[start : start + size] for start in range(0, len(items), size)]


def _response(tag: Any, status: SlotStatus, slot: int) -> Response:
    """Returns a copy of the finished response in a slot."""
    count = int(status.count[slot])
    return Response(tag, status.tokens[slot, :count].copy(), status.log_probs[slot, :count].copy())
