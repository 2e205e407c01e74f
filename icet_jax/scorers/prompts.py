"""Templates that turn a prompt and a response into the text that a judge or a Llama reward model reads."""

import re
from collections.abc import Callable
from importlib import resources
from typing import TypeAlias

from icet_jax.errors import UserError
from icet_jax.media import chat_templates
from icet_jax.media.tokenizer import Tokenizer

Render: TypeAlias = Callable[[str, str], str]
"""Function of (prompt, response) that returns everything that the scorer reads, with or without BOS."""

BUILT_IN = ("llama_guard_1", "llama_guard_3", "harmbench")
"""Names of the templates with which judges were published, for checkpoints without a chat template. They are files in
scorers/templates."""

_PROBE = ("first probe 5f1c", "second probe 9a72")


def built_in(name: str) -> Render:
    """Returns the template with a name in `BUILT_IN`.

    Llama Guard's templates strip white space around prompt and response, as the checkpoints' chat templates do.

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
    """Returns the function that puts a prompt and a response into a text with `{prompt}` and `{response}`.

    Both are replaced in one pass, so that a "{response}" inside the prompt is not replaced.

    Raises:
      UserError: `{prompt}` or `{response}` is missing or occurs more than once.
    """
    if any(text.count(placeholder) != 1 for placeholder in ("{prompt}", "{response}")):
        raise UserError(f"template {text[:80]!r} must hold {{prompt}} and {{response}} once each")
    pieces = re.split(r"(\{prompt\}|\{response\})", text)

    def render(prompt: str, response: str) -> str:
        replacements = {"{prompt}": prompt, "{response}": response}
        return "".join(replacements.get(piece, piece) for piece in pieces)

    return render


def named_or_text(template: str) -> Render:
    """Returns the template for a setting, which is a text with `{prompt}` and `{response}` or a name in `BUILT_IN`.

    Raises:
      UserError: see `built_in` and `text_template`.
    """
    if "{prompt}" in template or "{response}" in template:
        return text_template(template)
    return built_in(template)


def chat_template(tokenizer: Tokenizer, *, answer: bool) -> Render:
    """Returns a function that fills the checkpoint's chat template with the prompt and the response.

    The prompt becomes the user's message and the response the assistant's. Messages are passed to the template as texts
    or, for templates that fail on texts (Llama Guard 3 1B), as lists of text parts.

    Args:
      tokenizer: transformers' tokenizer, with a chat template.
      answer: True to end the text where the judge's answer begins (guards), False to end it after the assistant's
        message (reward models).

    Raises:
      UserError: the template fails, or does not show both messages once each.
    """
    for as_parts in (False, True):

        def render(prompt: str, response: str, as_parts: bool = as_parts) -> str:
            messages = [
                {"role": role, "content": [{"type": "text", "text": text}] if as_parts else text}
                for role, text in (("user", prompt), ("assistant", response))
            ]
            text = chat_templates.render(tokenizer, messages, answer=answer)
            # Some copies of Llama Guard 3's template end here and expect the blank line from the model.
            return f"{text}\n\n" if answer and text.endswith("<|end_header_id|>") else text

        try:
            rendered = render(*_PROBE)
        except UserError:
            if not as_parts:
                continue
            raise
        if all(rendered.count(text) == 1 for text in _PROBE):
            return render
    raise UserError("the checkpoint's chat template does not show the user's and the assistant's message; give one")


def categories(render: Render) -> frozenset[str]:
    """Returns the category codes that a Llama Guard template defines: "S1" if one of its lines begins with "S1:"."""
    return frozenset(re.findall(r"^\s*([SO]\d{1,2}):", render(*_PROBE), re.MULTILINE))


def category_names(render: Render) -> frozenset[str]:
    """Returns the categories that a Qwen3Guard template defines, one a line, without the full stop at their ends."""
    found = re.search(
        r"<BEGIN UNSAFE CONTENT CATEGORIES>\n(.*?)<END UNSAFE CONTENT CATEGORIES>", render(*_PROBE), re.DOTALL
    )
    lines = found[1].splitlines() if found else []
    return frozenset(filter(None, (line.strip().rstrip(".") for line in lines)))


def probe_text(render: Render) -> str:
    """Returns the template filled with a fixed prompt and response, to compare or examine templates."""
    return render(*_PROBE)


_WORDS = {"harmbench": ("Yes", "No")}  # {built-in template: its words for unsafe and safe}, where they are others


def judge_words(
    template: Callable[[str, str], str] | str | None, unsafe: str | None, safe: str | None
) -> tuple[str, str]:
    """Returns a judge's words for unsafe and for safe.

    Args:
      template: the judge's template; a built-in one may have words of its own.
      unsafe, safe: words chosen by the user; None takes the template's words, by default "unsafe" and "safe".
    """
    words = _WORDS.get(template, ("unsafe", "safe")) if isinstance(template, str) else ("unsafe", "safe")
    return unsafe or words[0], safe or words[1]
