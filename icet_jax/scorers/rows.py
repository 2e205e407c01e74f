"""Runs rows of tokens through a network: padded to few lengths, batched, split over the mesh, compiled once per
length."""

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from icet_jax.data.padding import bucket, pad_rows
from icet_jax.parallel.programs import Program
from icet_jax.parallel.sharding import ROWS, place_rows, replicated

_FULL_BATCH = 1024  # a batch of rows with more positions is smaller, because attention over them takes more memory


class BatchedNetwork:
    """Applies a pure function of rows of tokens to any number of rows; a row's result depends only on that row.

    Attributes:
      longest: most tokens of a row.
      batch_size: rows per call, halved for each doubling of their length beyond 1024; a shorter last batch is filled up
        with rows that are all padding.
      compiled: the jitted function.
    """

    def __init__(
        self,
        function: Callable[[Any, Any, Any], Any],
        params: Any,
        *,
        longest: int,
        batch_size: int,
        mesh: Mesh | None = None,
        side: str = "right",
        steps: int = 1,
        about: Sequence[Any] | None = None,
    ) -> None:
        """Stores the function and the weights; nothing is compiled yet.

        Args:
          function: function of (params, tokens int32 [B, T], mask bool [B, T]) that returns a pytree of arrays whose
            first axis is B.
          params: weights of the network, already placed.
          longest: most tokens of a row.
          batch_size: rows per call of up to 1024 tokens each.
          mesh: mesh of `params`, over which rows are split; None for the default device.
          side: side of the padding, "left" or "right".
          steps: see `data.padding.bucket`.
          about: values that `function` closes over, see `parallel.programs.Program`.
        """
        self.longest, self.batch_size = longest, batch_size
        self._params, self._mesh, self._side, self._steps = params, mesh, side, steps
        self._shards = 1 if mesh is None else math.prod(mesh.shape[axis] for axis in ROWS)
        # Every process of a run needs every row's result.
        everywhere = None if mesh is None else replicated(mesh)
        self.compiled = Program(function, about=about, out_sharding=everywhere)

    def __call__(self, rows: Sequence[Sequence[int]]) -> Any:
        """Returns the function's results for N rows as numpy arrays [N, ...]; rows of similar length share a batch.

        A row without tokens is all padding and gets the function's result for that.
        """
        order = sorted(range(len(rows)), key=lambda index: -len(rows[index]))
        pending = []
        while order:
            length = bucket(len(rows[order[0]]), self.longest, self._steps)
            count = self._rows_at_once(length)
            batch, order = order[:count], order[count:]
            pending.append((batch, self._run([rows[index] for index in batch], length)))
        shapes = pending[0][1] if pending else self._shapes()
        results = jax.tree.map(lambda leaf: np.zeros((len(rows), *leaf.shape[1:]), leaf.dtype), shapes)
        for batch, values in pending:
            for result, value in zip(jax.tree.leaves(results), jax.tree.leaves(values), strict=True):
                result[batch] = np.asarray(value)[: len(batch)]
        return results

    def lowered(self, tokens: int | None = None) -> Iterator[tuple[str, Any]]:
        """Yields the lowered programs for rows of up to `tokens` tokens (of any length if None), ready to be compiled.

        Yields:
          (length, `jax.stages.Lowered`); once it is compiled, rows of that length compile nothing.
        """
        last = bucket(min(tokens or self.longest, self.longest), self.longest, self._steps)
        length = 0
        while length < last:
            length = bucket(length + 1, self.longest, self._steps)
            batch = pad_rows([], length, self._rows_at_once(length), self._side)
            yield str(length), self.compiled.lower(self._params, *place_rows(batch, self._mesh))

    def _rows_at_once(self, length: int) -> int:
        count = self.batch_size
        while count > self._shards and count * length > self.batch_size * _FULL_BATCH:
            count //= 2
        return count

    def _run(self, rows: Sequence[Sequence[int]], length: int) -> Any:
        batch = pad_rows(rows, length, self._rows_at_once(length), self._side)
        return self.compiled(self._params, *place_rows(batch, self._mesh))

    def _shapes(self) -> Any:
        return self.compiled.eval_shape(self._params, *pad_rows([], bucket(0, self.longest), self.batch_size))
