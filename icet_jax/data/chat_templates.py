"""Checkpoints' chat templates: programs by strangers, run within bounds.

transformers renders them in Jinja's sandbox, which keeps them from attributes and calls that could reach the machine.
Nothing there ends a loop, and arithmetic may take any time and memory: both are bounded here.
"""

import functools
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import FrameType
from typing import Any

from icet_jax.errors import UserError

DATE = "26 Jul 2024"
"""Today, in templates that print it: what Llama 3's say where nobody tells them. A real date would change answers."""

MAX_LENGTH = 1 << 18  # characters of a template; the longest published ones have a few ten thousand
MAX_TEXT = 1 << 24  # characters of a rendered conversation
_MAX_LINES = 2_000_000  # of Python, compiling included: Llama 3.2's takes less than a tenth
_MAX_FACTOR = 1024  # of a product


def render(tokenizer: Any, messages: Sequence[dict[str, Any]], *, template: str | None = None, answer: bool) -> str:
    """The text of a conversation in a checkpoint's template.

    Args:
      tokenizer: transformers', whose special tokens the template may use.
      messages: `{"role": ..., "content": ...}` each.
      template: in Jinja; None is the tokenizer's own.
      answer: whether the text ends where the model is to answer.

    Raises:
      UserError: the template cannot be rendered (for these messages), or takes more than any honest one does.
    """
    try:
        text = tokenizer.get_chat_template() if template is None else template
        _check(text)
        with _bounded_lines(_MAX_LINES):
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
    """Refuses arithmetic that no chat needs, before Jinja's compiler works it out."""
    from jinja2 import Environment, nodes
    from jinja2.exceptions import TemplateError

    if len(template) > MAX_LENGTH:
        raise UserError(f"the checkpoint's chat template has {len(template)} characters; give a template")
    try:
        tree = Environment(extensions=[_generation(), "jinja2.ext.loopcontrols"]).parse(template)
    except (TemplateError, RecursionError) as error:
        raise UserError(f"the checkpoint's chat template is no Jinja ({str(error)[:200]}); give a template") from error
    for node in tree.find_all((nodes.Pow, nodes.Mul)):
        if isinstance(node, nodes.Pow) or not any(_is_small(side) for side in (node.left, node.right)):
            raise UserError("the checkpoint's chat template computes powers or products; give a template")
    for const in tree.find_all(nodes.Const):
        if isinstance(const.value, int | float) and abs(const.value) > MAX_TEXT:
            raise UserError("the checkpoint's chat template holds a number that no chat needs; give a template")


def _is_small(node: Any) -> bool:
    value = getattr(node, "value", None)
    return isinstance(value, int | float) and abs(value) <= _MAX_FACTOR


@functools.cache
def _generation() -> type:
    """transformers' own block, around what the assistant says, for Jinja's parser."""
    from jinja2.ext import Extension

    class Generation(Extension):
        tags = {"generation"}

        def parse(self, parser: Any) -> Any:
            next(parser.stream)
            return parser.parse_statements(("name:endgeneration",), drop_needle=True)

    return Generation


@contextmanager
def _bounded_lines(most: int) -> Iterator[None]:
    """Ends the block with a `UserError` after `most` lines of Python, in this thread; a debugger's tracing pauses."""
    before, left = sys.gettrace(), most

    def count(frame: FrameType, event: str, argument: Any) -> Any:
        nonlocal left
        left -= 1
        if left < 0:
            raise UserError("the checkpoint's chat template does not come to an end; give a template")
        return count

    sys.settrace(count)
    try:
        yield
    finally:
        sys.settrace(before)
