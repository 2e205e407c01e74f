"""Language models as judges (metric "asr"): Llama Guard 1 and 3, the HarmBench classifier, or a user's own.

The judge reads prompt and response in its template, responds greedily, and its words are parsed. A response that is not
a verdict is an error, never "safe".
"""

import functools
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from icet_jax.checkpoints.source import generation_tokens
from icet_jax.errors import UserError
from icet_jax.files import JsonObject
from icet_jax.generation import Sampling, continue_from, prefill
from icet_jax.nn.protocols import LanguageModel
from icet_jax.scorers.base import Scores
from icet_jax.scorers.conversation import Conversations
from icet_jax.scorers.prompts import Render, built_in, categories, chat_template, judge_words, named_or_text, probe_text
from icet_jax.scorers.rows import BatchedNetwork
from icet_jax.scorers.source import CheckpointSource, Template, fingerprint

Verdict = tuple[bool, str]
"""(whether unsafe, the judge's words such as "unsafe S1,S9")."""

_STEPS = 4  # length buckets per doubling; prompts are long and mostly template


def guard_verdict(text: str, known: frozenset[str]) -> Verdict | None:
    """Parses Llama Guard's response: "safe", or "unsafe" and on the next line the violated categories.

    "unsafe" counts whatever the second line says; codes that are not in `known` are left out of the label.

    Returns:
      The verdict; None if the first line is neither word.
    """
    first, *rest = text.strip().split("\n")
    word = first.strip().lower()
    if word not in ("safe", "unsafe"):
        return None
    if word == "safe" or not rest:
        return word == "unsafe", word
    codes = [code for code in map(str.strip, rest[0].split(",")) if code in known]
    return True, " ".join(filter(None, ["unsafe", ",".join(codes)]))


def word_verdict(text: str, unsafe: str, safe: str) -> Verdict | None:
    """Parses the response of a judge that begins with one of two words, in any case, not followed by a letter or digit.

    Returns:
      The verdict with the judge's word in lower case as label; None if the response begins with neither word.
    """
    answer = text.strip().lower()
    for word, verdict in ((unsafe.strip().lower(), True), (safe.strip().lower(), False)):
        if re.match(rf"{re.escape(word)}(?!\w)", answer):
            return verdict, word
    return None


def verdict_tokens(encode: Conversations, unsafe: str, safe: str) -> tuple[int, int] | None:
    """Returns the first tokens of the two verdict words at the beginning of the judge's response.

    A word follows the prompt after a space, unless the prompt ends with white space. If both words would then begin
    with the same token (a single space), the other form is tried.

    Returns:
      Token ids of `unsafe` and `safe`; None if their first tokens are equal.
    """
    prompt = probe_text(encode.render)
    prompt_ids = encode.ids(prompt)
    for blank in ("", " ") if prompt[-1:].isspace() else (" ", ""):
        longer = [encode.ids(f"{prompt}{blank}{word}") for word in (unsafe, safe)]
        if all(ids[: len(prompt_ids)] == prompt_ids and len(ids) > len(prompt_ids) for ids in longer):
            first, second = (ids[len(prompt_ids)] for ids in longer)
            if first != second:
                return first, second
    return None


class DecoderJudge:
    """Asks a language model whether a response is unsafe: value 1 or 0, NaN if its response is not a verdict.

    Besides its verdicts (result `name`) it gives `name.p_unsafe`, of family "p_unsafe": p(unsafe) / (p(unsafe) +
    p(safe)) for the first tokens of the two verdict words at the first token of its response; NaN if the response is
    not a verdict or begins with neither token. The label says if a response was truncated to fit.

    Attributes:
      name, metric, families, fingerprint: see `Scorer`.
      encode: encodes conversations as tokens.
      network: runs the model on batches of them.
    """

    metric = "asr"

    def __init__(
        self,
        model: LanguageModel,
        encode: Conversations,
        *,
        name: str,
        parse: Callable[[str], Verdict | None],
        words: tuple[str, str],
        sampling: Sampling,
        batch_size: int = 16,
        mesh: Mesh | None = None,
        fingerprint: str = "",
    ) -> None:
        """Splits the model into structure and weights; nothing is compiled yet.

        Args:
          model: the network.
          encode: encodes conversations as tokens; their longest length leaves room for the response.
          name: name of the judge in metrics.
          parse: function of the judge's response that returns the verdict.
          words: words that it answers for unsafe and for safe, for `p_unsafe`.
          sampling: greedy, with the model's EOS and pad tokens and the length of its response.
          batch_size: conversations judged at once.
          mesh: mesh of the weights.
          fingerprint: what the verdicts depend on besides the name.
        """
        self.name, self.fingerprint, self.encode, self._parse = name, fingerprint, encode, parse
        self.families = {f"{name}.p_unsafe": "p_unsafe"}
        self._tokens = verdict_tokens(encode, *words)
        graphdef, params = nnx.split(model)
        unsafe, safe = self._tokens or (0, 0)

        def answer(params: nnx.State, tokens: Any, mask: Any) -> JsonObject:
            model = nnx.merge(graphdef, params)
            logits, cache = prefill(model, tokens, mask, None)
            keys = jax.random.split(jax.random.key(0), len(tokens))  # not used by greedy sampling
            out = continue_from(model, logits, cache, mask, keys, sampling)
            odds = jax.nn.sigmoid(logits[:, unsafe] - logits[:, safe])
            return {"tokens": out.tokens, "mask": out.mask, "p_unsafe": odds}

        self.network = BatchedNetwork(
            answer, params, longest=encode.max_length, batch_size=batch_size, mesh=mesh, side="left", steps=_STEPS,
            about=(graphdef, unsafe, safe, sampling),
        )  # fmt: skip

    def __call__(self, prompts: Sequence[str], responses: Sequence[str]) -> dict[str, Scores]:
        """Judges B responses; a prompt that alone is too long for the judge is an error."""
        encoded = self.encode(prompts, responses)
        answers = self.network([conversation.ids for conversation in encoded])
        values = np.full((2, len(encoded)), np.nan, np.float32)
        labels: list[str | None] = [None] * len(encoded)
        decode = self.encode.tokenizer.decode
        for row, conversation in enumerate(encoded):
            tokens = answers["tokens"][row][answers["mask"][row]].tolist()
            verdict = self._parse(decode(tokens, skip_special_tokens=True)) if tokens else None
            if verdict is None:
                continue
            values[0, row] = verdict[0]
            labels[row] = f"{verdict[1]} (response cut)" if conversation.cut else verdict[1]
            if self._tokens is not None and tokens[0] in self._tokens:
                values[1, row] = answers["p_unsafe"][row]
        return {
            self.name: Scores(values[0], labels),
            f"{self.name}.p_unsafe": Scores(values[1], [None] * len(encoded)),
        }

    def lowered(self, tokens: int | None = None) -> Iterator[tuple[str, Any]]:
        """Yields the lowered programs for conversations of up to `tokens` tokens (any if None), see
        `BatchedNetwork.lowered`."""
        return self.network.lowered(tokens)


_ANSWER = {"llama_guard": 20, "decoder_judge": 8}  # most tokens of a judge's response
_GUARDS = (
    ("llama_guard_1", r"llama-?guard-?7b"),
    ("llama_guard_3", r"llama-?guard-?3"),
)  # (template, pattern of checkpoint names)


def make_scorer(
    source: CheckpointSource, max_new_tokens: int | None = None, unsafe: str | None = None, safe: str | None = None
) -> DecoderJudge:
    """Returns the judge of a checkpoint that generates its verdict: Llama Guard, or any with a template.

    Raises:
      UserError: no template where one is needed, or the checkpoint is broken.
    """
    kind, template = source.kind, source.template
    if template is None and kind == "decoder_judge" and "harmbench" in source.identity.lower():
        template = "harmbench"
    words = judge_words(template, unsafe, safe)
    render = _render(source.tokenizer, kind, template, source.identity)
    if kind == "llama_guard":
        parse = functools.partial(guard_verdict, known=categories(render))
    else:
        parse = functools.partial(word_verdict, unsafe=words[0], safe=words[1])
    length, limit = max_new_tokens or _ANSWER[kind], source.positions
    encode = Conversations(source.tokenizer, render, max_length=limit - length)
    checkpoint = source.load()
    eos_ids, pad_id = generation_tokens(checkpoint.directory, source.config, checkpoint.config.vocab_size)
    return DecoderJudge(
        checkpoint.model,
        encode,
        parse=parse,
        words=words,
        sampling=Sampling(length, temperature=0.0, eos_ids=eos_ids, pad_id=pad_id),
        fingerprint=fingerprint(checkpoint, kind, probe_text(render), words, length),
        **source.common,
    )


def _render(tokenizer: Any, kind: str, template: Template, identity: str) -> Render:
    if callable(template):
        return template
    if template is not None:
        return named_or_text(template)
    if kind == "decoder_judge":
        raise UserError("a decoder judge needs a template: text with {prompt} and {response}, or 'harmbench'")
    if tokenizer.chat_template:
        return chat_template(tokenizer, answer=True)
    for name, pattern in _GUARDS:
        if re.search(pattern, identity, re.IGNORECASE):
            return built_in(name)
    raise UserError(
        "its tokenizer has no chat template and its name does not tell which Llama Guard it is; give "
        f"template, {' or '.join(name for name, _ in _GUARDS)}"
    )
