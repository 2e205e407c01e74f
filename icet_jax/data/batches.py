"""Training batches: a mixture of kinds of rows whose order is a pure function of (seed, global index).

Any batch can be requested at any time, so a resumed run needs only the number of its next batch. The batches do not
depend on the number of processes; each process opens the rows of its `distributed.row_share`.
"""

import math
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

import numpy as np

from icet_jax.data.records import Example
from icet_jax.errors import UserError

_T = TypeVar("_T")
_THREADS = 2  # threads that open the images of the next batches; Pillow decodes without Python's lock
_AHEAD = 2  # batches that are prepared in advance


def quotas(mixture: Mapping[str, float | int], batch_size: int) -> dict[str, int]:
    """Returns the number of rows of each kind in every batch: shares of `batch_size`, rounded by largest remainder.

    Shares are relative (they need not sum to 1); kinds with share 0 are left out. In a tie the kind that is named first
    wins.

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

    Within a kind the rows are shuffled anew in each epoch (`grain.MapDataset`, seeded by (seed, kind)); a kind's order
    does not depend on the other kinds. The rows of a batch are in a seeded random order, so that kinds are independent
    of exits and mini-batches.
    """

    def __init__(
        self,
        examples: Sequence[Example],
        *,
        mixture: Mapping[str, float | int],
        batch_size: int,
        seed: int,
    ) -> None:
        """Splits the examples by kind.

        Args:
          examples: the whole data set, the same on every process.
          mixture: share of each kind in a batch.
          batch_size: number of rows of a batch, over all processes.
          seed: seed of the order.

        Raises:
          UserError: no example has a kind of the mixture; see also `quotas`.
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
        """Returns batch `index` (from 0): `batch_size` examples with exactly the quota of each kind."""
        unordered = [
            self._rows[kind][index * quota + offset] for kind, quota in self.quotas.items() for offset in range(quota)
        ]
        order = np.random.default_rng([self._seed, index]).permutation(len(unordered))
        return [unordered[position] for position in order]

    def load(self, make: Callable[[list[Example]], _T], start: int, stop: int) -> Iterator[_T]:
        """Yields `make` of batches `start` to `stop - 1` in order; threads prepare the next ones while one is used.

        Args:
          make: opens and tokenises a batch's rows; called from several threads. Its errors are raised here at the batch
            that caused them.
          start: first batch.
          stop: the batch after the last.
        """
        return load_ahead(lambda index: make(self.batch(index)), range(start, stop))


def load_ahead(make: Callable[[Any], _T], items: Sequence[Any]) -> Iterator[_T]:
    """Yields `make(item)` of every item in order; threads prepare the next ones while one is used.

    Args:
      make: called from several threads; its errors are raised here at the item that caused them.
      items: the arguments of `make`.
    """
    import grain

    options = grain.ReadOptions(num_threads=_THREADS, prefetch_buffer_size=_AHEAD)
    numbers = grain.MapDataset.range(len(items))
    return iter(numbers.map(lambda index: make(items[int(index)])).to_iter_dataset(options))
