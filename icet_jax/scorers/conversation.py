"""Encodes a prompt and a response as the tokens that a judging language model reads."""

from collections.abc import Sequence
from typing import NamedTuple

from icet_jax.errors import UserError
from icet_jax.media.tokenizer import PlainText, Tokenizer
from icet_jax.scorers.prompts import Render, probe_text


class EncodedConversation(NamedTuple):
    """Holds the tokens of one conversation.

    Attributes:
      ids: token ids, BOS first; empty if the prompt alone is too long.
      is_truncated: whether the end of the response was cut off.
    """

    ids: list[int]
    is_truncated: bool


class Conversations:
    """Encodes prompts and responses as token ids, as HF's `apply_chat_template(tokenize=True)` does.

    Text that spells one of the tokenizer's special tokens gets a space (`<|eot_id|>` becomes `< |eot_id|>`), so that a
    response cannot end its own message and answer in place of the judge. A conversation that is too long loses the end
    of its response.

    Attributes:
      tokenizer: transformers' tokenizer.
      render: function of (prompt, response) that returns the text of the conversation.
      max_length: largest number of tokens of a conversation.
    """

    def __init__(
        self, tokenizer: Tokenizer, render: Render, *, max_length: int, is_chat_template: bool = False
    ) -> None:
        """Checks the template that `render` applies.

        Args:
          tokenizer, render, max_length: see the attributes.
          is_chat_template: whether `render` applies the tokenizer's own chat template. Such a template may have several
            BOS: in some checkpoints BOS is the token that begins every message of ChatML.

        Raises:
          UserError: the text rendered by the template contains a second BOS of this tokenizer, or the template with a
            short fixed prompt and response already exceeds `max_length` tokens.
        """
        self.tokenizer, self.render, self.max_length = tokenizer, render, max_length
        self._plain = PlainText(tokenizer)
        probe = self.ids(probe_text(render))
        if not is_chat_template and tokenizer.bos_token_id is not None and probe.count(tokenizer.bos_token_id) != 1:
            raise UserError(f"the template holds {tokenizer.bos_token} more than once; leave it out")
        if len(probe) > max_length:
            raise UserError(f"the template alone takes {len(probe)} tokens, but the model reads {max_length}")

    def __call__(self, prompts: Sequence[str], responses: Sequence[str]) -> list[EncodedConversation]:
        """Returns the tokens of each (prompt, response)."""
        return [
            self._encode(self._plain(prompt), self._plain(response))
            for prompt, response in zip(prompts, responses, strict=True)
        ]

    def ids(self, text: str) -> list[int]:
        """Returns the token ids of a rendered text, beginning with exactly one BOS if the tokenizer has one."""
        # verbose=False: texts that are too long are truncated here, so the tokenizer need not warn.
        ids = list(self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])
        bos = self.tokenizer.bos_token_id
        if bos is None:
            return ids
        start = next((index for index, token in enumerate(ids) if token != bos), len(ids))
        return [bos, *ids[start:]]

    def _encode(self, prompt: str, response: str) -> EncodedConversation:
        """Returns the tokens of a conversation with as much of the response as fits; bisection finds the cut."""
        ids = self.ids(self.render(prompt, response))
        if len(ids) <= self.max_length:
            return EncodedConversation(ids, is_truncated=False)
        best: list[int] = []
        low, high = 1, len(response)  # the largest length that fits is within low - 1 .. high - 1
        while low < high:
            length = (low + high) // 2
            ids = self.ids(self.render(prompt, response[:length]))
            if len(ids) <= self.max_length:
                best, low = ids, length + 1
            else:
                high = length
        return EncodedConversation(best, is_truncated=True)
