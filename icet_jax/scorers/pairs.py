"""Encodes (prompt, response) pairs as the tokens that a reward model reads, as transformers does for each family."""

from collections.abc import Sequence

from icet_jax.errors import UserError
from icet_jax.media.tokenizer import Tokenizer
from icet_jax.scorers.conversation import Conversations
from icet_jax.scorers.prompts import Render

HH_TEMPLATE = "\n\nHuman: {prompt} \n\nAssistant:"
"""First segment of a pair in the model card of the paper's GPT-2 reward model; the response is the second segment."""


class GPT2PairTokenizer:
    """Encodes pairs as HF's `tokenizer(first, second, truncation=True)` does for GPT-2.

    The first segment is the template with the prompt, the second is the response. They are tokenised separately and
    concatenated without special tokens. In a pair that is too long, the ends of the segments are cut off as
    `longest_first` says. A trailing EOS of the response is dropped. The score is thus read at the last token of the
    text, with whichever version of transformers the model was trained.
    """

    def __init__(self, tokenizer: Tokenizer, *, template: str, max_length: int) -> None:
        """Stores transformers' tokenizer, the template and the largest number of tokens of a pair.

        Raises:
          UserError: the template does not contain `{prompt}` once.
        """
        self.tokenizer, self.template, self.max_length = tokenizer, _check_first_segment(template), max_length

    def __call__(self, prompts: Sequence[str], responses: Sequence[str]) -> list[list[int]]:
        """Returns the token ids of each pair, at most `max_length`."""
        firsts = self._ids([self.template.replace("{prompt}", prompt) for prompt in prompts])
        seconds = self._ids(responses)
        rows = []
        for first, second in zip(firsts, seconds, strict=True):
            while second and second[-1] == self.tokenizer.eos_token_id:
                second.pop()
            lengths = longest_first(len(first), len(second), self.max_length)
            rows.append(first[: lengths[0]] + second[: lengths[1]])
        return rows

    def _ids(self, texts: Sequence[str]) -> list[list[int]]:
        """Returns the token ids of each text, without special tokens."""
        if not texts:
            return []
        # verbose=False: texts that are too long are truncated here, so the tokenizer need not warn.
        return [list(ids) for ids in self.tokenizer(list(texts), add_special_tokens=False, verbose=False)["input_ids"]]


class DebertaPairTokenizer:
    """Encodes pairs as `[CLS] prompt [SEP] response [SEP]` (HF's `tokenizer(first, second, truncation=True)`)."""

    def __init__(self, tokenizer: Tokenizer, *, template: str, max_length: int) -> None:
        """Stores transformers' tokenizer, the template and the largest number of tokens of a pair.

        The template of the model card is "{prompt}".

        Raises:
          UserError: the template does not contain `{prompt}` once.
        """
        self.tokenizer, self.template, self.max_length = tokenizer, _check_first_segment(template), max_length

    def __call__(self, prompts: Sequence[str], responses: Sequence[str]) -> list[list[int]]:
        """Returns the token ids of each pair, at most `max_length`; the longer segment is truncated first.

        Pairs are encoded one by one, because in a batch the tokenizer would encode an empty response differently: as an
        empty second segment instead of no second segment.
        """
        options = {"truncation": "longest_first", "max_length": self.max_length}
        firsts = [self.template.replace("{prompt}", prompt) for prompt in prompts]
        encoded = [
            self.tokenizer(first, text_pair=second, **options) for first, second in zip(firsts, responses, strict=True)
        ]
        return [list(row["input_ids"]) for row in encoded]


class LlamaPairTokenizer:
    """Encodes pairs as a conversation (see `Conversations`) for Llama reward models.

    Trailing pad tokens are dropped, because transformers reads the score at the last token that is not padding.
    """

    def __init__(
        self, tokenizer: Tokenizer, render: Render, *, max_length: int, pad_id: int | None,
        is_chat_template: bool = False,
    ) -> None:  # fmt: skip
        """Stores how to encode pairs.

        Args:
          tokenizer: transformers' tokenizer.
          render: function of (prompt, response) that returns the text of the conversation.
          max_length: largest number of tokens of a pair.
          pad_id: pad_token_id of config.json, or None.
          is_chat_template: see `Conversations`.

        Raises:
          UserError: see `Conversations`.
        """
        self.template, self.max_length, self._pad_id = render, max_length, pad_id
        self._encode = Conversations(tokenizer, render, max_length=max_length, is_chat_template=is_chat_template)

    def __call__(self, prompts: Sequence[str], responses: Sequence[str]) -> list[list[int]]:
        """Returns the token ids of each pair, at most `max_length`.

        The end of a response that is too long is cut off. A pair whose prompt alone is too long gets no tokens.
        """
        rows = [encoded.ids for encoded in self._encode(prompts, responses)]
        for ids in rows:
            while ids and ids[-1] == self._pad_id:
                ids.pop()
        return rows


def longest_first(first: int, second: int, limit: int) -> tuple[int, int]:
    """Returns how many tokens two segments keep under HF's "longest_first" truncation.

    The longer segment loses tokens until both are equally long; then both lose tokens in turn.

    Args:
      first, second: lengths of the segments in tokens.
      limit: largest number of tokens of both segments together.
    """
    if first + second <= limit:
        return first, second
    short, long = sorted((first, second))
    if 2 * short <= limit:
        long = limit - short
    else:
        short, long = limit // 2, limit - limit // 2
    return (short, long) if first <= second else (long, short)


def _check_first_segment(template: str) -> str:
    """Returns the template unchanged; raises a UserError if it does not contain `{prompt}` once."""
    if template.count("{prompt}") != 1:
        raise UserError(f"reward-model template {template!r} must hold {{prompt}} once")
    return template
