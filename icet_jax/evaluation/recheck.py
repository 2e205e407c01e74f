"""Some of a sweep's answers once more, with the programs and the random numbers of the sweep."""

from collections.abc import Mapping, Sequence

import jax
import numpy as np

from icet_jax.data.records import Example
from icet_jax.evaluation.queue import CompileAhead, Queue
from icet_jax.evaluation.sweep import Answer, read_answer, row_keys
from icet_jax.generation.sampling import Sampling
from icet_jax.vlm import VLM

# Numbers the generator that chooses; sweeps and training draw from jax's.
_CHOICE_STREAM = 14


def spread_pairs(sizes: Mapping[str, tuple[int, int]], count: int, seed: int) -> dict[str, list[tuple[int, int]]]:
    """`count` (row, exit) pairs, spread over data sets, rows and exits: none twice, and the same for the same seed.

    Every data set gives as many as the others while it has any left. Within one, rows and exits each come in an order
    that is drawn, and none of them comes a second time before all have come once.

    Args:
      sizes: (rows, exits) of each data set; of an exit, its place among those that were measured.
      count: of all pairs; fewer where there are fewer.
      seed: of the orders.

    Returns:
      For each data set its (number of the row, place of the exit).
    """
    rng = np.random.default_rng([_CHOICE_STREAM, seed])
    left = {name: rows * exits for name, (rows, exits) in sizes.items()}
    shares = dict.fromkeys(sizes, 0)
    while count and any(left.values()):
        for name in sizes:
            if count and left[name]:
                shares[name], left[name], count = shares[name] + 1, left[name] - 1, count - 1
    pairs = {}
    for name, (rows, exits) in sizes.items():
        row_order, exit_order = rng.permutation(rows), rng.permutation(exits)
        # After lcm(rows, exits) pairs the two would repeat: from there on they are shifted against each other.
        period = int(np.lcm(max(rows, 1), max(exits, 1)))
        places = [(k % rows, (k + k // period) % exits) for k in range(shares[name])]
        pairs[name] = [(int(row_order[row]), int(exit_order[layer])) for row, layer in places]
    return pairs


def answer_again(
    vlm: VLM,
    examples: Sequence[Example],
    wanted: Mapping[int, Sequence[int]],
    *,
    sampling: Sampling,
    batch_size: int,
    seed: int,
    compile_ahead: CompileAhead | None = None,
) -> dict[tuple[int, int], Answer]:
    """Answers some rows of a data set at some exits, as `sweep` of all of them does.

    The programs are the sweep's and a row's random numbers are its own, so that the same weights give the same answers,
    sampled ones too. What is not the sweep's is which rows run together and how far they are padded: where two tokens
    are equally likely but for rounding, the other one may be taken.

    Args:
      vlm: the model.
      examples: all rows of the data set.
      wanted: exits of each row that is wanted, by its number.
      sampling, batch_size, seed, compile_ahead: see `sweep`.

    Returns:
      The answer of every (row, exit).

    Raises:
      UserError: an image that cannot be opened; logits that are NaN or infinite.
    """
    keys = row_keys(jax.random.key(seed), len(examples))
    queue = Queue(vlm, examples, keys, wanted, sampling, batch_size, compile_ahead)
    return {
        item.tag: read_answer(item, vlm, sampling, examples[item.tag[0]].id)
        for ended in queue.answers()
        for item in ended
    }
