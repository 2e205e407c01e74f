"""Generates some of a sweep's responses again, with the programs and random numbers of the sweep."""

from collections.abc import Mapping, Sequence

import jax
import numpy as np

from icet_jax.data.records import Example
from icet_jax.evaluation.queue import CompileAhead, Queue
from icet_jax.evaluation.sweep import Answer, answer_keys, read_answer
from icet_jax.generation.sampling import Sampling
from icet_jax.vlm import VLM

# Seed of numpy's generator for the choice of rows; sweeps and training use jax's generators.
_CHOICE_STREAM = 14


def spread_pairs(sizes: Mapping[str, tuple[int, int]], count: int, seed: int) -> dict[str, list[tuple[int, int]]]:
    """Chooses `count` different (row, exit) pairs, spread over data sets, rows and exits; equal seeds give equal pairs.

    Every data set gets as many pairs as the others, as long as it has any left. Within a data set rows and exits each
    come in a random order, and none comes a second time before all have come once.

    Args:
      sizes: (number of rows, number of measured exits) of each data set.
      count: number of pairs in total; fewer if there are not enough.
      seed: seed of the orders.

    Returns:
      For each data set a list of (number of the row, index of the exit).
    """
    rng = np.random.default_rng([_CHOICE_STREAM, seed])
    remaining = {name: rows * exits for name, (rows, exits) in sizes.items()}
    shares = dict.fromkeys(sizes, 0)
    while count and any(remaining.values()):
        for name in sizes:
            if count and remaining[name]:
                shares[name], remaining[name], count = shares[name] + 1, remaining[name] - 1, count - 1
    pairs = {}
    for name, (rows, exits) in sizes.items():
        row_order, exit_order = rng.permutation(rows), rng.permutation(exits)
        # After lcm(rows, exits) pairs the two would repeat, so they are then shifted against each other.
        period = int(np.lcm(max(rows, 1), max(exits, 1)))
        places = [(k % rows, (k + k // period) % exits) for k in range(shares[name])]
        pairs[name] = [(int(row_order[row]), int(exit_order[layer])) for row, layer in places]
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
    """Generates the responses of some rows at some exits as `sweep` of the whole data set does.

    The programs are those of the sweep and each row has its own random numbers, so the same weights give the same
    responses, also sampled ones. Only which rows run together and how far they are padded may differ; where two tokens
    are equally likely except for rounding, the other one may be chosen.

    Args:
      vlm: the model.
      examples: all rows of the data set.
      sampling, batch_size, seed, compile_ahead: see `sweep`.
      requested_exits: exits of each requested row, by its number. Of several attempts the first is generated.

    Returns:
      The response of every (row, exit).

    Raises:
      UserError: an image cannot be opened, or logits are NaN or infinite.
    """
    keys = answer_keys(jax.random.key(seed), len(examples))
    first = {row: [(layer, 0) for layer in layers] for row, layers in requested_exits.items()}
    queue = Queue(vlm, examples, keys, first, sampling, batch_size, compile_ahead)
    return {
        item.tag[:2]: read_answer(item, vlm, sampling, examples[item.tag[0]].id)
        for ended in queue.answers()
        for item in ended
    }
