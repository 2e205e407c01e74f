"""Templates that turn a prompt and a response into a judge's text: from checkpoints, built in, or a user's own."""

import re
from collections.abc import Callable
from importlib import resources
from typing import Any, TypeAlias

from icet_jax.errors import UserError
from icet_jax.media import chat_templates

Render: TypeAlias = Callable[[str, str], str]
"""Function of (prompt, response) that returns the judge's whole text, with or without BOS."""

BUILT_IN = ("llama_guard_1", "llama_guard_3", "harmbench")
"""Texts with which judges were published (files in scorers/templates), for checkpoints without a chat template."""

_PROBE = ("first probe 5f1c", "second probe 9a72")


def built_in(name: str) -> Render:
    """Returns one of the texts in `BUILT_IN`; Llama Guard's strip the messages, as the checkpoints' chat templates do.

    Raises:
      UserError: the name is unknown.
    """
    if name not in BUILT_IN:
        raise UserError(f"template '{name}' is none of {', '.join(BUILT_IN)} and holds no {{prompt}} and {{response}}")
    text = resources.files("icet_jax.scorers").joinpath("templates", f"{name}.txt").read_text(encoding="utf-8")
    render = text_template(text.removesuffix("\n"))
    if name == "harmbench":
        return render
    return lambda prompt, response: render(prompt.strip(), response.strip())


def text_template(text: str) -> Render:
    """Returns the template of a text that contains `{prompt}` and `{response}` once each.

    Both are replaced at the same time, so their content is never replaced itself.

    Raises:
      UserError: either is missing or occurs more than once.
    """
    if any(text.count(place) != 1 for place in ("{prompt}", "{response}")):
        raise UserError(f"template {text[:80]!r} must hold {{prompt}} and {{response}} once each")
    pieces = re.split(r"(\{prompt\}|\{response\})", text)

    def render(prompt: str, response: str) -> str:
        places = {"{prompt}": prompt, "{response}": response}
        return "".join(places.get(piece, piece) for piece in pieces)

    return render


def named_or_text(template: str) -> Render:
    """Returns the template of a built-in text by its name, or of the text itself.

    Raises:
      UserError: see `built_in` and `text_template`.
    """
    if "{prompt}" in template or "{response}" in template:
        return text_template(template)
    return built_in(template)


def chat_template(tokenizer: Any, *, answer: bool) -> Render:
    """Returns the checkpoint's own template for a user's and an assistant's message, rendered as transformers does.

    Messages are given as text or, for templates that need it (Llama Guard 3 1B), as lists of text parts.

    Args:
      tokenizer: transformers' tokenizer, with a chat template.
      answer: whether the text ends where the judge responds (Llama Guard), or after the assistant's message (reward
        models).

    Raises:
      UserError: the template fails, or does not show both messages once each.
    """
    for parts in (False, True):

        def render(prompt: str, response: str, parts: bool = parts) -> str:
            messages = [
                {"role": role, "content": [{"type": "text", "text": text}] if parts else text}
                for role, text in (("user", prompt), ("assistant", response))
            ]
            text = chat_templates.render(tokenizer, messages, answer=answer)
            # Some copies of Llama Guard 3's template end here and expect the blank line from the model.
            return f"{text}\n\n" if answer and text.endswith("<|end_header_id|>") else text

        try:
            shown = render(*_PROBE)
        except UserError:
            if not parts:
                continue
            raise
        if all(shown.count(text) == 1 for text in _PROBE):
            return render
    raise UserError("the checkpoint's chat template does not show the user's and the assistant's message; give one")


def categories(render: Render) -> frozenset[str]:
    """Returns the category codes that a Llama Guard prompt defines ("S1", "O3"): lines that begin with one and a
    colon."""
    return frozenset(re.findall(r"^\s*([SO]\d{1,2}):", render(*_PROBE), re.MULTILINE))


def probe_text(render: Render) -> str:
    """Returns the text of a fixed conversation, from which a template's fingerprint is computed."""
    return render(*_PROBE)


_WORDS = {"harmbench": ("Yes", "No")}  # words for unsafe and safe of templates that do not use these


def judge_words(
    template: Callable[[str, str], str] | str | None, unsafe: str | None, safe: str | None
) -> tuple[str, str]:
    """Returns a judge's words for unsafe and for safe: the given ones, or those of its built-in template."""
    words = _WORDS.get(template, ("unsafe", "safe")) if isinstance(template, str) else ("unsafe", "safe")
    return unsafe or words[0], safe or words[1]
