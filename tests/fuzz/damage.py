"""Damaged and hostile input, and what a reader may do with it: give a result, or one line that says what is wrong.

The cases are the same in every run. `ICET_FUZZ_EXAMPLES=100000` draws that many new ones for each test instead.
"""

import contextlib
import copy
import json
import os
import signal

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

from icet_jax.errors import UserError

_ASKED = os.environ.get("ICET_FUZZ_EXAMPLES")
_SECONDS = 10  # for one case: far more than any takes


def cases(count):
    """Settings of a test: `count` fixed cases, or as many new ones as the environment asks for."""
    return settings(
        max_examples=int(_ASKED or count),
        derandomize=_ASKED is None,
        database=None,
        deadline=None,
        suppress_health_check=list(HealthCheck),
    )


class TooLong(BaseException):
    """A reader hangs; no `except Exception` hides it."""


@contextlib.contextmanager
def time_limit(seconds=_SECONDS):
    def ring(*_):
        raise TooLong

    before = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def outcome(read, *arguments, **options):
    """(result, None) or (None, the one line) of a reader; whatever else it raises is the test's failure."""
    with time_limit():
        try:
            return read(*arguments, **options), None
        except UserError as error:
            line = str(error)
    assert line and len(line.splitlines()) == 1 and line.isprintable(), line
    return None, line


TRICKS = (
    "", " ", "\0", "a\0b", "\ud800", "\u2028", "\u202egnp.exe", "\x1b[31m", "a\nb", "\ufeff", "\xa0", "x" * 300,
    "../../etc/passwd", "/etc/passwd", "..\\..\\x", "C:\\x", "NaN", "1e999", "-0", "٣", "9" * 5000,
    "<script>alert(1)</script>", "{{ 9**9 }}",
    "default", "none", "all", "__class__", "%s%n", "'\"", "=1+1", "https://example.invalid/x", "~", ".",
)  # fmt: skip
NUMBERS = (0, 1, -1, 2, 3, 7, 10**6, 2**31, 2**63, 2**64, 10**30, 10**400, -(10**400), 0.5, 1e-300, 1e300, float("inf"))


def _deep(kind):
    value = [] if kind is list else {}
    for _ in range(200):
        value = [value] if kind is list else {"a": value}
    return value


def values():
    """Anything that JSON can say, the awkward more often than not."""
    plain = st.one_of(
        st.none(), st.booleans(), st.sampled_from(NUMBERS), st.sampled_from(TRICKS), st.integers(-3, 5000), st.floats(),
        st.text(max_size=8), st.sampled_from(("bert", "llama", "gelu", [], {}, _deep(list), _deep(dict))),
    )  # fmt: skip
    return st.recursive(
        plain,
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
        max_leaves=4,
    )


@st.composite
def mutated(draw, value, most=3):
    """A valid value with up to `most` of its parts replaced, removed, doubled or added to."""
    value = copy.deepcopy(value)
    for _ in range(draw(st.integers(1, most))):
        value = _mutate(draw, value)
    return value


def _mutate(draw, value):
    if not isinstance(value, dict | list) or not value or draw(st.integers(0, 9)) == 0:
        return draw(values())
    key = draw(st.sampled_from(sorted(value, key=str) if isinstance(value, dict) else range(len(value))))
    action = draw(st.sampled_from(("go in", "go in", "replace", "remove", "double")))
    if action == "go in":
        value[key] = _mutate(draw, value[key])
    elif action == "replace":
        value[key] = draw(values())
    elif action == "remove":
        del value[key]
    elif isinstance(value, dict):
        value[draw(st.sampled_from(TRICKS))] = copy.deepcopy(value[key])
    else:
        value.append(copy.deepcopy(value[key]))
    return value


def as_json(value):
    """UTF-8 of a value; lone surrogates and NaN as Python's JSON writes them."""
    return json.dumps(value).encode()


@st.composite
def torn(draw, data, most=4):
    """Bytes with up to `most` places cut, flipped, doubled or filled with something else."""
    data = bytearray(data)
    for _ in range(draw(st.integers(1, most))):
        at = draw(st.integers(0, max(len(data) - 1, 0)))
        end = min(len(data), at + draw(st.sampled_from((1, 1, 2, 8, 64))))
        action = draw(st.sampled_from(("flip", "flip", "cut", "end", "double", "insert")))
        if action == "flip" and data:
            data[at] ^= 1 << draw(st.integers(0, 7))
        elif action == "cut":
            del data[at:end]
        elif action == "end":
            del data[at:]
        elif action == "double":
            data[at:at] = data[at:end]
        else:
            data[at:at] = draw(
                st.binary(max_size=8) | st.sampled_from([text.encode("utf-8", "replace") for text in TRICKS])
            )
    return bytes(data)


def files(valid):
    """Content of a JSON file: the valid value damaged as a value or as bytes, or nothing like it."""
    return st.one_of(
        mutated(valid).map(as_json),
        mutated(valid).map(as_json),
        torn(as_json(valid)),
        st.sampled_from((b"", b"[" * 100_000, b'{"a":' * 100_000, b"\xff\xfe", b"nul", b"9" * 5000, b"\xef\xbb\xbf{}")),
    )


def snapshot(folder):
    """Every file below `folder` with its content: what a reader may not change."""
    return {path: path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}
