"""Renders the chat templates of checkpoints, which are untrusted programs, within limits of time and memory.

transformers renders them in Jinja's sandbox, which blocks attributes and calls that could reach the machine, but allows
endless loops and arithmetic on huge numbers. This module stops both.

The limits hold in this process: a worker process with a time limit would first import transformers, which takes 1.1 s
of processor time in every run, while `sys.settrace` takes 0.4 ms per conversation (a Llama Guard conversation of 400
characters). Only runs of more than 2,500 conversations would gain.
"""

import functools
import os
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import FrameType
from typing import Any, TypeAlias

from icet_jax.errors import UserError
from icet_jax.files import JsonObject

DATE = "26 Jul 2024"
"""The date for templates that print one: Llama 3's default, because answers must not depend on the day."""

MAX_LENGTH = 1 << 16  # largest number of characters of a template; published ones have up to some ten thousand
MAX_TEXT = 1 << 22  # largest number of characters of a rendered conversation
_MAX_STEPS = 1_000_000  # most executed lines and calls; compiling a template of 8,000 characters takes a tenth of this
_MAX_FACTOR = 64  # one factor of every product must be a constant of at most this size
_WIDTH = re.compile(r"[%:{][^a-zA-Z]{0,8}[0-9]{6,}")  # a width of a million or so in a pattern for `%` or `format`
_GENERATED = "<template>"  # file name of the Python code that Jinja generates from a template
_LOOPING = tuple(os.path.join("jinja2", f"{name}.py") for name in ("runtime", "filters", "utils", "sandbox"))
_STORES = ("__setitem__", "str_join", "markup_join")  # functions of Jinja that store a value or join texts


TraceFunction: TypeAlias = Callable[[FrameType, str, Any], Any]
"""A function for `sys.settrace`."""


def render(tokenizer: Any, messages: Sequence[JsonObject], *, template: str | None = None, answer: bool) -> str:
    """Returns a conversation as text in the format of a chat template.

    Args:
      tokenizer: transformers' tokenizer, whose special tokens the template may use.
      messages: messages, each `{"role": ..., "content": ...}`.
      template: Jinja source; None for the tokenizer's own template.
      answer: whether to end the text where the model's answer begins.

    Raises:
      UserError: the template cannot be rendered (with these messages), or exceeds a limit.
    """
    try:
        source = tokenizer.get_chat_template() if template is None else template
        _check(source)
        with _limited():
            text = tokenizer.apply_chat_template(
                list(messages), chat_template=source, tokenize=False, add_generation_prompt=answer, date_string=DATE
            )
    except UserError:
        raise
    # Jinja's errors, and any error of a template that expects other messages.
    except (Exception, MemoryError) as error:
        reason = str(error) or type(error).__name__
        raise UserError(f"the checkpoint's chat template fails ({reason[:200]}); give a template") from error
    if len(text) > MAX_TEXT:
        raise UserError(f"the checkpoint's chat template makes a text of {len(text)} characters; give a template")
    return text


@functools.lru_cache(maxsize=64)
def _check(template: str) -> None:
    """Raises a `UserError` for a template with arithmetic on huge numbers, which Jinja's compiler might evaluate."""
    from jinja2 import Environment, nodes
    from jinja2.exceptions import TemplateError

    if len(template) > MAX_LENGTH:
        raise UserError(f"the checkpoint's chat template has {len(template)} characters; give a template")
    try:
        tree = Environment(extensions=[_generation(), "jinja2.ext.loopcontrols"]).parse(template)
    except (TemplateError, RecursionError) as error:
        raise UserError(f"the checkpoint's chat template is not Jinja ({str(error)[:200]}); give a template") from error
    for node in tree.find_all((nodes.Pow, nodes.Mul)):
        nested = any(side.find(nodes.Mul) or isinstance(side, nodes.Mul) for side in (node.left, node.right))
        if nested or isinstance(node, nodes.Pow) or not (_is_small(node.left) or _is_small(node.right)):
            raise UserError("the checkpoint's chat template computes powers or products; give a template")
    if any(_WIDTH.search(const.value) for const in tree.find_all(nodes.Const) if isinstance(const.value, str)):
        raise UserError("the checkpoint's chat template formats a text too wide; give a template")
    for const in tree.find_all(nodes.Const):
        if isinstance(const.value, int | float) and abs(const.value) > MAX_TEXT:
            raise UserError("the checkpoint's chat template has a number that no chat needs; give a template")


def _is_small(node: object) -> bool:
    """Returns whether a node of a template's syntax tree is a number of at most `_MAX_FACTOR`."""
    value = getattr(node, "value", None)
    return isinstance(value, int | float) and abs(value) <= _MAX_FACTOR


@functools.cache
def _generation() -> type:
    """Returns a Jinja extension that accepts transformers' `generation` block, which marks the assistant's text."""
    from jinja2.ext import Extension

    class Generation(Extension):
        tags = {"generation"}

        def parse(self, parser: Any) -> Any:
            next(parser.stream)
            return parser.parse_statements(("name:endgeneration",), drop_needle=True)

    return Generation


@contextmanager
def _limited() -> Iterator[None]:
    """Raises a `UserError` if a template that is rendered in the block runs too long, or makes a text or list too long.

    The block is traced with `sys.settrace` in this thread, so a debugger does not work inside it.
    """
    previous_trace, steps_left = sys.gettrace(), _MAX_STEPS

    def trace(frame: FrameType, event: str, argument: object) -> TraceFunction | None:
        nonlocal steps_left
        steps_left -= 1
        if steps_left < 0:
            raise UserError("the checkpoint's chat template does not come to an end; give a template")
        name = frame.f_code.co_filename
        # A line can at most double a text, so checking every fourth one is enough.
        if name == _GENERATED and steps_left % 4 == 0 or frame.f_code.co_name in _STORES:
            for value in frame.f_locals.values():
                if isinstance(value, str | list | tuple) and len(value) > MAX_TEXT:
                    raise UserError("the checkpoint's chat template makes too long a text; give a template")
        # Count lines where the loops of a template run. Elsewhere, in Jinja's compiler, counting calls is enough.
        return trace if name == _GENERATED or name.endswith(_LOOPING) else None

    sys.settrace(trace)
    try:
        yield
    finally:
        sys.settrace(previous_trace)
