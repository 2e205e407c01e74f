"""Makes exit pairs from a model's answers to training rows at its default exit and at other exits.

Whether an answer refuses is decided by refusal phrases alone, and never by a judge that measures attack success.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

import jax
import numpy as np

from icet_jax.data.pairs import PairRecord
from icet_jax.data.records import Example
from icet_jax.evaluation.queue import CompileAhead, Queue
from icet_jax.evaluation.scoring import answer_rows
from icet_jax.evaluation.sweep import answer_keys, read_answer
from icet_jax.evaluation.transcripts import TranscriptFile, fingerprint
from icet_jax.generation.sampling import Sampling
from icet_jax.scorers.keywords import refused
from icet_jax.vlm import VLM

Answers = Mapping[tuple[int, int], str]
"""{(row index, exit): answer of the model}."""


def answers_at(
    vlm: VLM,
    examples: Sequence[Example],
    requested_exits: Mapping[int, Sequence[int]],
    *,
    sampling: Sampling,
    batch_size: int,
    path: str | Path,
    progress: Callable[[int], None] | None = None,
    compile_ahead: CompileAhead | None = None,
) -> tuple[dict[tuple[int, int], str], int]:
    """Returns the greedy answers to some rows at some exits, and the number of tokens generated in this call.

    Args:
      vlm: the model before training.
      examples: the rows, with different ids.
      requested_exits: {row index: exits}.
      sampling: how answers are sampled, at temperature 0.
      batch_size: rows decoded at once.
      path: file to which answers are appended. If it exists, only the answers that it lacks are generated.
      progress: called with the number of answers so far.
      compile_ahead: see `evaluation.queue.Queue`.

    Returns:
      ({(row index, exit): answer}, number of tokens).

    Raises:
      UserError: an image cannot be opened, logits are NaN or infinite, or the file belongs to other rows or settings.
    """
    file = TranscriptFile(path, fingerprint("harvest", sampling), "", examples)
    texts: dict[tuple[int, int], str] = {}
    missing: dict[int, list[tuple[int, int]]] = {}
    for number, exits in requested_exits.items():
        for layer in exits:
            known = file.answer(examples[number], layer)
            if known is None:
                missing.setdefault(number, []).append((layer, 0))
            else:
                texts[number, layer] = known["response"]
    tokens = 0
    if not missing:
        return texts, tokens
    keys = answer_keys(jax.random.key(0), len(examples))  # greedy answers use no random numbers
    for ended in Queue(vlm, examples, keys, missing, sampling, batch_size, compile_ahead).answers():
        rows = []
        for item in ended:
            number, layer, _ = item.tag
            answer = read_answer(item, vlm, sampling, examples[number].id)
            rows += answer_rows([examples[number]], layer, [answer.text], [answer.length], [int(answer.truncated)])
            texts[number, layer] = answer.text
            tokens += answer.length
        file.add(rows, judged=False)
        if progress is not None:
            progress(len(texts))
    return texts, tokens


def exit_pairs(
    examples: Sequence[Example],
    fingerprints: Sequence[str],
    drawn: Iterable[tuple[int, int]],
    answers: Answers,
    default_exit: int,
) -> list[PairRecord]:
    """Returns the exit pairs that can be made from the answers to some rows at some exits.

    The chosen answer is always that of the default exit. The rejected answer depends on the kind of the row:

      forbidden: the answer at the pair's exit. The chosen answer must refuse, and the rejected one must not.
      benign, VQA: a refusal that the default exit gave to some forbidden row; the refusals are used in turn. The chosen
        answer must be neither empty nor a refusal.

    A row and exit whose answers do not meet these conditions gives no pair.

    Args:
      examples: the rows.
      fingerprints: hash of each row.
      drawn: (row index, exit) of every pair to make.
      answers: answers at the default exit to all drawn rows, and answers at the drawn exits to the forbidden ones.
      default_exit: the exit that the model was trained on.
    """
    drawn = list(drawn)
    of_forbidden = [row for row, _ in drawn if examples[row].kind == "forbidden"]
    refusals = sorted({text for row in of_forbidden if refused(text := answers[row, default_exit])})
    pairs = []
    for count, (row, layer) in enumerate(drawn):
        chosen, kind = answers[row, default_exit], examples[row].kind
        if kind == "forbidden":
            rejected = answers[row, layer]
            usable = refused(chosen) and not refused(rejected)
        else:
            rejected = refusals[count % len(refusals)] if refusals else ""
            usable = bool(refusals) and bool(chosen.strip()) and not refused(chosen)
        if usable:
            pairs.append(PairRecord(examples[row].id, fingerprints[row], layer, chosen, rejected))
    return pairs


def drawn_exits(
    examples: Sequence[Example], batches: Iterable[tuple[Sequence[Example], np.ndarray]]
) -> list[tuple[int, int]]:
    """Returns every distinct (row index, exit) of some batches, in the order in which they first occur.

    Args:
      examples: all rows, which the row indices refer to.
      batches: (rows of the batch, exit of each row, int [B]).
    """
    numbers = {example.id: number for number, example in enumerate(examples)}
    drawn: dict[tuple[int, int], None] = {}
    for rows, exits in batches:
        drawn |= {(numbers[row.id], int(layer)): None for row, layer in zip(rows, exits, strict=True)}
    return list(drawn)
