"""Conversations as the tokens of a judging language model: one BOS, no token forged by the text, cut to fit."""

import re
from collections.abc import Sequence
from typing import Any, NamedTuple

from icet_jax.errors import UserError
from icet_jax.scorers.prompts import Render, probe_text


class Encoded(NamedTuple):
    """One conversation.

    Attributes:
      ids: token ids, BOS first; none where the prompt alone is too long.
      cut: whether the response's end was left out to fit.
    """

    ids: list[int]
    cut: bool


class Conversations:
    """Prompts and responses to token ids, as HF's `apply_chat_template(tokenize=True)` gives them for a chat template.

    Text that spells one of the tokenizer's special tokens has a space put into it (`<|eot_id|>` becomes `< |eot_id|>`):
    a response must not be able to end its own message and to answer in the judge's place.

    Attributes:
      render: (prompt, response) -> text.
      max_length: most tokens of a conversation.
    """

    def __init__(self, tokenizer: Any, render: Render, *, max_length: int) -> None:
        """`tokenizer` is transformers'.

        Raises:
          UserError: the template puts a second BOS into the text, or leaves no room for a conversation.
        """
        self.tokenizer, self.render, self.max_length = tokenizer, render, max_length
        special = [str(token) for token in tokenizer.added_tokens_decoder.values() if token.special]
        special = sorted({text for text in special if len(text) > 1}, key=len, reverse=True)
        self._special = re.compile("|".join(map(re.escape, special))) if special else None
        probe = self.ids(probe_text(render))
        if tokenizer.bos_token_id is not None and probe.count(tokenizer.bos_token_id) != 1:
            raise UserError(f"the template holds {tokenizer.bos_token} more than once; leave it out")
        if len(probe) > max_length:
            raise UserError(f"the template alone takes {len(probe)} tokens, but the model reads {max_length}")

    def __call__(self, prompts: Sequence[str], responses: Sequence[str]) -> list[Encoded]:
        """Tokens of each conversation; a response that makes it too long loses its end."""
        return [self._encode(self._defuse(p), self._defuse(r)) for p, r in zip(prompts, responses, strict=True)]

    def ids(self, text: str) -> list[int]:
        """Token ids of a rendered text, with exactly one BOS in front where the tokenizer has one."""
        # verbose=False: what is longer than the model's positions is cut here, so the tokenizer need not warn.
        ids = list(self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])
        bos = self.tokenizer.bos_token_id
        if bos is None:
            return ids
        start = next((place for place, token in enumerate(ids) if token != bos), len(ids))
        return [bos, *ids[start:]]

    def _encode(self, prompt: str, response: str) -> Encoded:
        ids = self.ids(self.render(prompt, response))
        if len(ids) <= self.max_length:
            return Encoded(ids, cut=False)
        best: list[int] = []
        low, high = 1, len(response)  # the most characters that fit lie in low - 1 .. high - 1
        while low < high:
            kept = (low + high) // 2
            ids = self.ids(self.render(prompt, response[:kept]))
            if len(ids) <= self.max_length:
                best, low = ids, kept + 1
            else:
                high = kept
        return Encoded(best, cut=True)

    def _defuse(self, text: str) -> str:
        if self._special is None:
            return text
        return self._special.sub(lambda found: f"{found.group()[0]} {found.group()[1:]}", text)
