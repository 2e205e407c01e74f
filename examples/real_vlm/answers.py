"""Lets the language model answer the harmless instructions itself, before any training."""

import re
from collections.abc import Iterator, Sequence
from pathlib import Path

from examples.real_vlm.rows import read_jsonl, write_jsonl
from icet_jax.files import JsonObject
from icet_jax.scorers.degenerate import degenerate_reason
from icet_jax.scorers.keywords import refused
from icet_jax.training.progress import Progress
from icet_jax.vlm import VLM

_BATCH = 16
_SENTENCE_END = re.compile(r"(?<=[^\W\d])[.!?](?=\s|$)")  # not that of a list's "2."


def write_answers(vlm: VLM, instructions: Path, out: Path, max_tokens: int) -> JsonObject:
    """Writes the instructions with the model's own answers, greedy and without the photograph; returns counts.

    An answer that is longer than `max_tokens` is cut after its last whole sentence. An instruction is left out if the
    model refuses it, or if what it says is degenerate, has no whole sentence, or leaves no room for EOS.

    Args:
      vlm: the model before training.
      instructions: JSON lines without answers.
      out: file to write.
      max_tokens: longest answer, with EOS.
    """
    rows = read_jsonl(instructions)
    answered, refusals = [], 0
    for row, text in zip(rows, answer_texts(vlm, [row["prompt"] for row in rows], max_tokens), strict=True):
        tokens = vlm.processor.tokenizer(text, add_special_tokens=False)["input_ids"]
        if refused(text):
            refusals += 1
        elif degenerate_reason(text) is None and len(tokens) < max_tokens:
            answered.append({**row, "answer": text})
    write_jsonl(out, answered)
    return {"asked": len(rows), "answered": len(answered), "refused": refusals}


def answer_texts(vlm: VLM, prompts: Sequence[str], max_tokens: int) -> Iterator[str]:
    """Yields the model's greedy answer to each prompt, cut to whole sentences; "" if there is none.

    Args:
      vlm: the model; it gets no image.
      prompts: what users say.
      max_tokens: longest answer, with EOS.
    """
    lengths = [len(ids) for ids in vlm.processor.token_ids([None] * len(prompts), prompts)]
    width = -(-max(lengths, default=1) // 16) * 16
    with Progress("own answers", len(prompts)) as progress:
        for start in range(0, len(prompts), _BATCH):
            batch = list(prompts[start : start + _BATCH])
            count = len(batch)
            batch += batch[:1] * (_BATCH - count)  # one shape, one program
            inputs = vlm.processor(images=[None] * _BATCH, prompts=batch, pad_to=width)
            answers = vlm.generate(inputs, max_new_tokens=max_tokens)
            for row in range(count):
                has_ended = int(answers.tokens[row, answers.mask[row]][-1]) in vlm.eos_ids
                yield whole_sentences(answers.texts[row].strip(), has_ended=has_ended)
            progress.advance(to=start + count)


def whole_sentences(text: str, *, has_ended: bool) -> str:
    """Returns an answer up to its last whole sentence; all of it if the model has ended it itself."""
    ends = [match.end() for match in _SENTENCE_END.finditer(text)]
    return text if has_ended else text[: ends[-1]] if ends else ""
