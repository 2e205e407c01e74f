"""Generates some of a sweep's responses again to check them, with the programs and random numbers of the sweep."""

from collections.abc import Mapping, Sequence

import jax
import numpy as np

from icet_jax.data.records import Example
from icet_jax.evaluation.queue import CompileAhead, Queue
from icet_jax.evaluation.sweep import Answer, answer_keys, read_answer
from icet_jax.generation.sampling import Sampling
from icet_jax.vlm import VLM

_SEED_OF_CHOICE = 14  # distinguishes the generator that chooses rows from all other generators with the same seed


def sample_pairs(sizes: Mapping[str, tuple[int, int]], count: int, seed: int) -> dict[str, list[tuple[int, int]]]:
    """Chooses `count` different (row, exit) pairs at random, evenly over data sets, rows and exits.

    Every data set gets equally many pairs, or all of its pairs if it has fewer. Within a data set, every row is chosen
    once before any is chosen again, and so is every exit.

    Args:
      sizes: {data set: (number of rows, number of measured exits)}.
      count: number of pairs in total; fewer are chosen if there are not enough.
      seed: seed of the random choice.

    Returns:
      {data set: list of (row index, index of the exit)}.
    """
    rng = np.random.default_rng([_SEED_OF_CHOICE, seed])
    remaining = {name: rows * exits for name, (rows, exits) in sizes.items()}
    counts = dict.fromkeys(sizes, 0)
    while count and any(remaining.values()):
        for name in sizes:
            if count and remaining[name]:
                counts[name], remaining[name], count = counts[name] + 1, remaining[name] - 1, count - 1
    pairs = {}
    for name, (rows, exits) in sizes.items():
        row_order, exit_order = rng.permutation(rows), rng.permutation(exits)
        # After lcm(rows, exits) pairs the same pairs would come again, so exits are then shifted by one.
        period = int(np.lcm(max(rows, 1), max(exits, 1)))
        indices = [(k % rows, (k + k // period) % exits) for k in range(counts[name])]
        pairs[name] = [(int(row_order[row]), int(exit_order[exit_index])) for row, exit_index in indices]
    return pairs


def answer_again(
    vlm: VLM,
    examples: Sequence[Example],
    requested_exits: Mapping[int, Sequence[int]],
    *,
    sampling: Sampling,
    batch_size: int,
    seed: int,
    compile_ahead: CompileAhead | None = None,
) -> dict[tuple[int, int], Answer]:
    """Returns the responses of some rows at some exits, generated as in `sweep` of the whole data set.

    The programs and each row's random numbers are those of the sweep, so the same weights give the same responses, also
    with a temperature. There is one exception: rows may be batched and padded differently, which changes rounding and
    can decide between two almost equally likely tokens.

    Args:
      vlm: the model.
      examples: all rows of the data set.
      sampling, batch_size, seed, compile_ahead: see `sweep`.
      requested_exits: {row index: exits}. If the sweep has several attempts, only the first one is generated.

    Returns:
      {(row index, exit): response}.

    Raises:
      UserError: an image cannot be opened, or logits are NaN or infinite.
    """
    keys = answer_keys(jax.random.key(seed), len(examples))
    first_attempts = {row: [(layer, 0) for layer in layers] for row, layers in requested_exits.items()}
    queue = Queue(vlm, examples, keys, first_attempts, sampling, batch_size, compile_ahead)
    return {
        response.tag[:2]: read_answer(response, vlm, sampling, examples[response.tag[0]].id)
        for responses in queue.answers()
        for response in responses
    }
