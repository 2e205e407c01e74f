"""The reward model as a scorer (metric "tr"): GPT-2 with a scalar head reads prompt and response, text only.

Source: HF `GPT2ForSequenceClassification`; the prompt format is that of `Ray2333/gpt2-large-harmless-reward_model`.
"""

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from flax import nnx

from icet_jax.errors import UserError
from icet_jax.judges.base import Scores
from icet_jax.models.gpt2 import GPT2RewardModel
from icet_jax.typing import Array, Bool, Float, Int

HH_TEMPLATE = "\n\nHuman: {prompt} \n\nAssistant:"
"""First segment of a pair, as the model card of the paper's reward model writes it; the response is the second."""

_SHORTEST_BUCKET = 32  # positions


class PairTokenizer:
    """(prompt, response) pairs to token ids as HF's `tokenizer(first, second, truncation=True)` gives them for GPT-2.

    The segments are tokenised apart and joined without any special token; pairs longer than `max_length` lose tokens at
    the right end of the longer segment first. A trailing EOS of the response is dropped, so that the score is read at
    the last token of the text, whichever transformers version trained the model.
    """

    def __init__(self, tokenizer: Any, *, template: str, max_length: int) -> None:
        """`tokenizer` is transformers'; `template` holds `{prompt}` once.

        Raises:
          UserError: a template without `{prompt}`.
        """
        if template.count("{prompt}") != 1:
            raise UserError(f"reward-model template {template!r} must hold {{prompt}} once")
        self.tokenizer, self.template, self.max_length = tokenizer, template, max_length

    def __call__(self, prompts: Sequence[str], responses: Sequence[str]) -> list[list[int]]:
        """Token ids of each pair, at most `max_length`."""
        firsts = self._ids([self.template.replace("{prompt}", prompt) for prompt in prompts])
        seconds = self._ids(responses)
        rows = []
        for first, second in zip(firsts, seconds, strict=True):
            while second and second[-1] == self.tokenizer.eos_token_id:
                second.pop()
            kept = longest_first(len(first), len(second), self.max_length)
            rows.append(first[: kept[0]] + second[: kept[1]])
        return rows

    def _ids(self, texts: Sequence[str]) -> list[list[int]]:
        if not texts:
            return []
        # verbose=False: a text longer than the model's positions is cut here, so the tokenizer need not warn.
        return [list(ids) for ids in self.tokenizer(list(texts), add_special_tokens=False, verbose=False)["input_ids"]]


def longest_first(first: int, second: int, limit: int) -> tuple[int, int]:
    """How many tokens of each segment HF's "longest_first" truncation keeps, at most `limit` together."""
    if first + second <= limit:
        return first, second
    short, long = sorted((first, second))
    if 2 * short <= limit:
        long = limit - short
    else:
        short, long = limit // 2, limit - limit // 2
    return (short, long) if first <= second else (long, short)


def bucket(length: int, longest: int) -> int:
    """The padded length for texts of up to `length` tokens: a power of two from 32, at most `longest`."""
    return min(longest, max(_SHORTEST_BUCKET, 1 << max(length - 1, 0).bit_length()))


def pad_rows(rows: Sequence[Sequence[int]], length: int, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Right-pads rows to tokens int32 [count, length] and mask bool; missing and empty rows are all padding."""
    tokens = np.zeros((count, length), np.int32)
    mask = np.zeros((count, length), bool)
    for index, ids in enumerate(rows):
        tokens[index, : len(ids)] = ids
        mask[index, : len(ids)] = True
    return tokens, mask


class RewardModel:
    """Scores pairs with a GPT-2 reward model; compiled once per length bucket.

    Attributes:
      name: see `Scorer`.
      model: the network.
      pairs: how pairs become tokens.
      batch_size: rows per call of the network; a shorter last batch is filled up.
    """

    metric = "tr"

    def __init__(
        self,
        model: GPT2RewardModel,
        tokenizer: Any,
        *,
        name: str,
        template: str = HH_TEMPLATE,
        batch_size: int = 64,
    ) -> None:
        """`tokenizer` is transformers'; see `PairTokenizer` for `template`."""
        self.name, self.model, self.batch_size = name, model, batch_size
        self.pairs = PairTokenizer(tokenizer, template=template, max_length=model.config.n_positions)
        graphdef, self._params = nnx.split(model)

        def score(params: nnx.State, tokens: Int[Array, "B T"], mask: Bool[Array, "B T"]) -> Float[Array, "B"]:
            return nnx.merge(graphdef, params)(tokens, mask)

        self._score = jax.jit(score)

    def __call__(self, prompts: Sequence[str], responses: Sequence[str]) -> dict[str, Scores]:
        """Raw rewards (no sigmoid); a pair without any token, or a score that is not finite, is NaN."""
        values = self.score_tokens(self.pairs(prompts, responses))
        return {self.name: Scores(values, [None] * len(values))}

    def warm_up(self, tokens: int | None = None) -> None:
        """Compiles every length bucket for pairs of up to `tokens` tokens (all buckets if None)."""
        longest = self.model.config.n_positions
        last, length = bucket(min(tokens or longest, longest), longest), 0
        while length < last:
            length = bucket(length + 1, longest)
            self._score(self._params, *pad_rows([], length, self.batch_size))

    def score_tokens(self, rows: Sequence[Sequence[int]]) -> np.ndarray:
        """Scores float32 [B] of token rows. Rows of similar length share a batch."""
        values = np.full(len(rows), np.nan, np.float32)
        order = sorted(range(len(rows)), key=lambda index: len(rows[index]))
        pending = []
        for start in range(0, len(order), self.batch_size):
            chosen = order[start : start + self.batch_size]
            length = bucket(len(rows[chosen[-1]]), self.model.config.n_positions)
            batch = pad_rows([rows[index] for index in chosen], length, self.batch_size)
            pending.append((chosen, self._score(self._params, *batch)))
        for chosen, scores in pending:
            values[chosen] = np.asarray(scores)[: len(chosen)]
        values[[not row for row in rows]] = np.nan
        values[~np.isfinite(values)] = np.nan
        return values
