"""Training batches: a mixture of kinds of rows whose order is a pure function of (seed, global index).

Any batch can be requested at any time, so a resumed run needs only the index of its next batch. The batches do not
depend on the number of processes; each process opens the images of its own share of the rows (`distributed.row_share`).
"""

import math
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TypeVar

import numpy as np

from icet_jax.data.records import Example
from icet_jax.errors import UserError

_T = TypeVar("_T")
_Item = TypeVar("_Item")
_THREADS = 2  # threads that open the images of the next batches; Pillow releases Python's lock while it decodes
_PREFETCHED = 2  # batches that are prepared in advance


def quotas(mixture: Mapping[str, float | int], batch_size: int) -> dict[str, int]:
    """Returns the number of rows of each kind in every batch.

    Shares are rounded to whole rows by the largest-remainder method; in a tie the kind that is named first wins.

    Args:
      mixture: relative share of each kind; the shares need not sum to 1. A kind with share 0 is left out.
      batch_size: number of rows of a batch.

    Raises:
      UserError: a share is negative or too small to get a row, or no share is positive.
    """
    shares = {kind: float(share) for kind, share in mixture.items()}
    for kind, share in shares.items():
        if not math.isfinite(share) or share < 0:
            raise UserError(f"config.data.mixture: the share of '{kind}' is {share}; give a number >= 0")
    total = sum(shares.values())
    if total <= 0:
        raise UserError("config.data.mixture: no kind has a share above 0; give one, for example forbidden: 1.0")
    exact = {kind: batch_size * share / total for kind, share in shares.items() if share > 0}
    counts = {kind: math.floor(rows) for kind, rows in exact.items()}
    by_remainder = sorted(exact, key=lambda kind: counts[kind] - exact[kind])
    for kind in by_remainder[: batch_size - sum(counts.values())]:
        counts[kind] += 1
    for kind, count in counts.items():
        if count == 0:
            raise UserError(
                f"config.data.mixture: '{kind}' gets no row of a batch of {batch_size}; "
                "raise its share or config.data.batch_size"
            )
    return counts


class Batches:
    """Provides random access to an endless sequence of batches.

    The rows of each kind are shuffled anew in each epoch (`grain.MapDataset`), in an order that depends on the seed and
    the kind alone. Within a batch the rows are in a random order that also depends on the seed, because a row's exit
    and mini-batch depend on its position and must not depend on its kind.
    """

    def __init__(
        self, examples: Sequence[Example], *, mixture: Mapping[str, float | int], batch_size: int, seed: int
    ) -> None:
        """Splits the rows by kind.

        Args:
          examples: all rows of the data set, the same on every process.
          mixture: relative share of each kind in a batch (see `quotas`).
          batch_size: number of rows of a batch, over all processes.
          seed: seed of the order.

        Raises:
          UserError: a kind of the mixture has no rows; see also `quotas`.
        """
        import grain

        self.batch_size = batch_size
        self.quotas = quotas(mixture, batch_size)
        self._seed = seed
        self._rows = {}
        for kind in self.quotas:
            rows = [example for example in examples if example.kind == kind]
            if not rows:
                raise UserError(f"config.data.mixture: the training data has no '{kind}' rows; set its share to 0")
            kind_seed = int(np.random.SeedSequence([seed, zlib.crc32(kind.encode())]).generate_state(1)[0])
            self._rows[kind] = grain.MapDataset.source(rows).seed(kind_seed).shuffle().repeat()

    def batch(self, index: int) -> list[Example]:
        """Returns the rows of batch `index` (from 0): of each kind exactly as many as `quotas` says."""
        unordered = [
            self._rows[kind][index * quota + offset] for kind, quota in self.quotas.items() for offset in range(quota)
        ]
        order = np.random.default_rng([self._seed, index]).permutation(len(unordered))
        return [unordered[position] for position in order]

    def load(self, prepare: Callable[[list[Example]], _T], start: int, stop: int) -> Iterator[_T]:
        """Yields `prepare(rows)` of batches `start` to `stop - 1` in order, working ahead as `load_ahead` does.

        Args:
          prepare: opens and tokenises the rows of a batch.
          start: index of the first batch.
          stop: index after the last batch.
        """
        return load_ahead(lambda index: prepare(self.batch(index)), range(start, stop))


def load_ahead(prepare: Callable[[_Item], _T], items: Sequence[_Item]) -> Iterator[_T]:
    """Yields `prepare(item)` of every item in order; threads prepare the next ones while the caller uses one.

    Args:
      prepare: called from several threads; an error is raised to the caller when its item is due.
      items: the arguments of `prepare`.
    """
    import grain

    options = grain.ReadOptions(num_threads=_THREADS, prefetch_buffer_size=_PREFETCHED)
    indices = grain.MapDataset.range(len(items))
    return iter(indices.map(lambda index: prepare(items[int(index)])).to_iter_dataset(options))
