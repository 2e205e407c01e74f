"""Renders checkpoints' chat templates, which are programs by strangers, within limits.

transformers renders them in Jinja's sandbox, which blocks attributes and calls that could reach the machine. The
sandbox does not stop loops, and arithmetic may take any time and memory; this module limits both.
"""

import functools
import os
import re
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import FrameType
from typing import Any

from icet_jax.errors import UserError
from icet_jax.files import JsonObject

DATE = "26 Jul 2024"
"""The date in templates that print it, which is Llama 3's default. The real date would change responses."""

MAX_LENGTH = 1 << 16  # characters of a template; published ones have up to a few ten thousand
MAX_TEXT = 1 << 22  # characters of a rendered conversation
_MAX_STEPS = 1_000_000  # lines of the template and calls: compiling 8,000 characters takes a tenth
_MAX_FACTOR = 64  # of a product
_WIDTH = re.compile(r"[%:{][^a-zA-Z]{0,8}[0-9]{6,}")  # in the pattern of `%` or `format`
_GENERATED = "<template>"  # how Jinja names the code that it makes of a template
_LOOPING = tuple(os.path.join("jinja2", f"{name}.py") for name in ("runtime", "filters", "utils", "sandbox"))
_STORES = ("__setitem__", "str_join", "markup_join")  # where a namespace keeps a value, and where texts are joined


def render(tokenizer: Any, messages: Sequence[JsonObject], *, template: str | None = None, answer: bool) -> str:
    """Returns the text of a conversation in a checkpoint's template.

    Args:
      tokenizer: transformers' tokenizer, whose special tokens the template may use.
      messages: messages, each `{"role": ..., "content": ...}`.
      template: Jinja source; None means the tokenizer's own template.
      answer: whether the text ends where the model responds.

    Raises:
      UserError: the template cannot be rendered (for these messages), or needs more than any honest template does.
    """
    try:
        text = tokenizer.get_chat_template() if template is None else template
        _check(text)
        with _bounded():
            shown = tokenizer.apply_chat_template(
                list(messages), chat_template=text, tokenize=False, add_generation_prompt=answer, date_string=DATE
            )
    except UserError:
        raise
    # Jinja's errors, and whatever a template that expects other messages runs into.
    except (Exception, MemoryError) as error:
        reason = str(error) or type(error).__name__
        raise UserError(f"the checkpoint's chat template fails ({reason[:200]}); give a template") from error
    if len(shown) > MAX_TEXT:
        raise UserError(f"the checkpoint's chat template makes a text of {len(shown)} characters; give a template")
    return shown


@functools.lru_cache(maxsize=64)
def _check(template: str) -> None:
    """Rejects arithmetic that no chat needs, before Jinja's compiler evaluates it."""
    from jinja2 import Environment, nodes
    from jinja2.exceptions import TemplateError

    if len(template) > MAX_LENGTH:
        raise UserError(f"the checkpoint's chat template has {len(template)} characters; give a template")
    try:
        tree = Environment(extensions=[_generation(), "jinja2.ext.loopcontrols"]).parse(template)
    except (TemplateError, RecursionError) as error:
        raise UserError(f"the checkpoint's chat template is no Jinja ({str(error)[:200]}); give a template") from error
    for node in tree.find_all((nodes.Pow, nodes.Mul)):
        nested = any(side.find(nodes.Mul) or isinstance(side, nodes.Mul) for side in (node.left, node.right))
        if nested or isinstance(node, nodes.Pow) or not (_is_small(node.left) or _is_small(node.right)):
            raise UserError("the checkpoint's chat template computes powers or products; give a template")
    if any(_WIDTH.search(const.value) for const in tree.find_all(nodes.Const) if isinstance(const.value, str)):
        raise UserError("the checkpoint's chat template formats a text too wide; give a template")
    for const in tree.find_all(nodes.Const):
        if isinstance(const.value, int | float) and abs(const.value) > MAX_TEXT:
            raise UserError("the checkpoint's chat template holds a number that no chat needs; give a template")


def _is_small(node: object) -> bool:
    value = getattr(node, "value", None)
    return isinstance(value, int | float) and abs(value) <= _MAX_FACTOR


@functools.cache
def _generation() -> type:
    """Returns a Jinja extension for transformers' `generation` block around the assistant's text."""
    from jinja2.ext import Extension

    class Generation(Extension):
        tags = {"generation"}

        def parse(self, parser: Any) -> Any:
            next(parser.stream)
            return parser.parse_statements(("name:endgeneration",), drop_needle=True)

    return Generation


@contextmanager
def _bounded() -> Iterator[None]:
    """Raises a `UserError` if a template in the block takes too long or creates an endless text or list.

    It applies to this thread; a debugger's tracing pauses.
    """
    before, left = sys.gettrace(), _MAX_STEPS

    def step(frame: FrameType, event: str, argument: Any) -> Any:
        nonlocal left
        left -= 1
        if left < 0:
            raise UserError("the checkpoint's chat template does not come to an end; give a template")
        name = frame.f_code.co_filename
        # A text at most doubles on a line, so every fourth one is soon enough.
        if name == _GENERATED and left % 4 == 0 or frame.f_code.co_name in _STORES:
            for value in frame.f_locals.values():
                if isinstance(value, str | list | tuple) and len(value) > MAX_TEXT:
                    raise UserError("the checkpoint's chat template makes too long a text; give a template")
        # Lines count where a template's own loops run, elsewhere (in Jinja's compiler) calls are enough.
        return step if name == _GENERATED or name.endswith(_LOOPING) else None

    sys.settrace(step)
    try:
        yield
    finally:
        sys.settrace(before)
