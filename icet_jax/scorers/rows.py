"""Runs rows of tokens through a network in batches, which are padded to a few lengths so that few programs compile."""

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh
from jax.stages import Lowered

from icet_jax.data.padding import bucket, pad_rows
from icet_jax.parallel.programs import Program
from icet_jax.parallel.sharding import ROWS, place_rows, replicated
from icet_jax.typing import Array, PyTree

_FULL_BATCH_LENGTH = 1024  # positions; batches of longer rows have fewer rows, because attention takes more memory


class BatchedNetwork:
    """Applies a network to any number of rows of tokens; a row's result does not depend on the other rows.

    Attributes:
      longest: largest number of tokens of a row.
      batch_size: number of rows per call if they are padded to at most `_FULL_BATCH_LENGTH` tokens. Each doubling of
        the padded length beyond that halves the number of rows, but not below one row per shard of the mesh. A batch
        with fewer rows is filled up with padding.
      compiled: the jitted function.
    """

    def __init__(
        self,
        function: Callable[[PyTree, Array, Array], PyTree],
        params: PyTree,
        *,
        longest: int,
        batch_size: int,
        mesh: Mesh | None = None,
        padding_side: str = "right",
        buckets_per_doubling: int = 1,
        cache_key: Sequence[Any] | None = None,
    ) -> None:
        """Stores the function and the weights; nothing is compiled yet.

        Args:
          function: pure function of (params, tokens int32 [B, T], mask bool [B, T]) that returns a pytree of arrays
            whose first axis is B.
          params: weights of the network, on their devices.
          longest: largest number of tokens of a row.
          batch_size: see the class.
          mesh: mesh of `params`, over which rows are split; None for the default device.
          padding_side: side of the padding, "left" or "right".
          buckets_per_doubling: number of padded lengths from one power of two to the next: 1 pads to powers of two, 4
            wastes at most a quarter of the positions.
          cache_key: values that `function` closes over, see `parallel.programs.Program`.
        """
        self.longest, self.batch_size = longest, batch_size
        self._params, self._mesh = params, mesh
        self._padding_side, self._buckets_per_doubling = padding_side, buckets_per_doubling
        self._shards = 1 if mesh is None else math.prod(mesh.shape[axis] for axis in ROWS)
        # Every process of a run needs every row's result.
        everywhere = None if mesh is None else replicated(mesh)
        self.compiled = Program(function, cache_key=cache_key, out_sharding=everywhere)

    def __call__(self, rows: Sequence[Sequence[int]]) -> PyTree:
        """Returns the function's results for N rows as a pytree of numpy arrays [N, ...].

        Rows of similar length share a batch. A row without tokens gets the function's result for a row of padding.
        """
        order = sorted(range(len(rows)), key=lambda index: -len(rows[index]))
        pending = []
        while order:
            length = bucket(len(rows[order[0]]), self.longest, self._buckets_per_doubling)
            batch_size = self._batch_size_at(length)
            batch, order = order[:batch_size], order[batch_size:]
            pending.append((batch, self._run([rows[index] for index in batch], length)))
        shapes = pending[0][1] if pending else self._shapes()
        results = jax.tree.map(lambda leaf: np.zeros((len(rows), *leaf.shape[1:]), leaf.dtype), shapes)
        for batch, values in pending:
            for result, value in zip(jax.tree.leaves(results), jax.tree.leaves(values), strict=True):
                result[batch] = np.asarray(value)[: len(batch)]
        return results

    def lowered(self, tokens: int | None = None) -> Iterator[tuple[str, Lowered]]:
        """Yields the programs for rows of up to `tokens` tokens (None: of any length), to compile them in advance.

        Yields:
          (padded length as text, program to compile); once it is compiled, rows of that length compile nothing.
        """
        last = bucket(min(tokens or self.longest, self.longest), self.longest, self._buckets_per_doubling)
        length = 0
        while length < last:
            length = bucket(length + 1, self.longest, self._buckets_per_doubling)
            batch = pad_rows([], length, self._batch_size_at(length), self._padding_side)
            yield str(length), self.compiled.lower(self._params, *place_rows(batch, self._mesh))

    def _batch_size_at(self, length: int) -> int:
        """Returns the number of rows per call that are padded to `length` tokens."""
        size = self.batch_size
        while size > self._shards and size * length > self.batch_size * _FULL_BATCH_LENGTH:
            size //= 2
        return size

    def _run(self, rows: Sequence[Sequence[int]], length: int) -> PyTree:
        """Returns the results on the devices for one batch of rows, padded to `length` tokens."""
        batch = pad_rows(rows, length, self._batch_size_at(length), self._padding_side)
        return self.compiled(self._params, *place_rows(batch, self._mesh))

    def _shapes(self) -> PyTree:
        """Returns the shapes and dtypes of a batch's results, without computing them."""
        return self.compiled.eval_shape(self._params, *pad_rows([], bucket(0, self.longest), self.batch_size))
