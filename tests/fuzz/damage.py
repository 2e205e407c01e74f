"""Damaged and hostile input, and what a reader may do with it: give a result, or one line that says what is wrong.

The cases are the same in every run. `ICET_FUZZ_EXAMPLES=100000` draws that many new ones for each reader instead.
"""

import contextlib
import copy
import json
import os
import random
import resource
import signal
import struct
from pathlib import Path

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

from icet_jax.errors import UserError

_ASKED = os.environ.get("ICET_FUZZ_EXAMPLES")
# For one case, far more than any takes: of computing, and of waiting too.
_LIMITS = ((signal.ITIMER_PROF, signal.SIGPROF, 10), (signal.ITIMER_REAL, signal.SIGALRM, 120))
_MEMORY = 2**30  # bytes that one case may add to the process
_PEAK = Path("/proc/self/clear_refs")  # Linux: "5" forgets the largest resident size so far


def cases(count, part=1):
    """Settings of a test: `count` fixed cases, or as many new ones as the environment asks for.

    `part`: of how many tests of one reader this is one; they share what is asked for.
    """
    return settings(
        max_examples=count if _ASKED is None else max(1, int(_ASKED) // part),
        derandomize=_ASKED is None,
        database=None,
        deadline=None,
        suppress_health_check=list(HealthCheck),
    )


class TooLong(BaseException):
    """A reader hangs; no `except Exception` hides it."""


@contextlib.contextmanager
def time_limit():
    def ring(*_):
        raise TooLong

    before = [signal.signal(number, ring) for _, number, _ in _LIMITS]
    for timer, _, seconds in _LIMITS:
        signal.setitimer(timer, seconds)
    try:
        yield
    finally:
        for (timer, number, _), handler in zip(_LIMITS, before, strict=True):
            signal.setitimer(timer, 0)
            signal.signal(number, handler)


@contextlib.contextmanager
def memory_limit(limit=_MEMORY):
    """Fails when the resident memory grew by more than `limit` bytes at any moment within; counts on Linux only."""
    if not _PEAK.exists():
        yield
        return
    _PEAK.write_bytes(b"5")
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    yield
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024
    assert grown <= limit, f"{grown / 2**20:.0f} MiB more memory"


def outcome(read, *arguments, **options):
    """(result, None) or (None, the one line) of a reader; whatever else it raises is the test's failure."""
    with time_limit(), memory_limit():
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


def seeded(make):
    """A strategy of `make(random.Random)`. hypothesis draws and reports; that it draws a seed alone makes a case ten
    times as cheap as one whose every part is drawn."""
    return st.binary(min_size=8, max_size=8).map(lambda seed: make(random.Random(seed)))


def _deep(kind):
    value = [] if kind is list else {}
    for _ in range(200):
        value = [value] if kind is list else {"a": value}
    return value


def some_text(draw, most=8):
    """Characters of any plane, lone surrogates and controls too; half of them ASCII."""
    ends = (128, 128, 0x300, 0x3000, 0x110000)
    return "".join(chr(draw.randrange(draw.choice(ends))) for _ in range(draw.randint(0, most)))


def some_value(draw, depth=2):
    """Anything that JSON can say, the awkward more often than not."""
    kind = draw.randrange(14 if depth else 11)
    if kind > 12:
        return {some_text(draw, 3): some_value(draw, depth - 1) for _ in range(draw.randrange(3))}
    if kind > 10:
        return [some_value(draw, depth - 1) for _ in range(draw.randrange(3))]
    if kind > 8:
        return draw.choice(TRICKS)
    if kind > 6:
        return draw.choice(NUMBERS)
    return (
        None, draw.random() < 0.5, draw.randint(-3, 5000), draw.randint(-3, 10), some_text(draw),
        struct.unpack("d", draw.randbytes(8))[0],
        draw.choice(("bert", "llama", "gelu", [], {}, _deep(list), _deep(dict))),
    )[kind]  # fmt: skip


def some_mutation(draw, value, most=3):
    """A valid value with up to `most` of its parts replaced, removed, doubled or added to."""
    value = copy.deepcopy(value)
    for _ in range(draw.randint(1, most)):
        value = _mutate(draw, value)
    return value


def _mutate(draw, value):
    if not isinstance(value, dict | list) or not value or draw.randrange(10) == 0:
        return some_value(draw)
    key = draw.choice(sorted(value, key=str)) if isinstance(value, dict) else draw.randrange(len(value))
    action = draw.choice(("go in", "go in", "replace", "remove", "double"))
    if action == "go in":
        value[key] = _mutate(draw, value[key])
    elif action == "replace":
        value[key] = some_value(draw)
    elif action == "remove":
        del value[key]
    elif isinstance(value, dict):
        value[draw.choice(TRICKS)] = copy.deepcopy(value[key])
    else:
        value.append(copy.deepcopy(value[key]))
    return value


def some_tear(draw, data, most=4):
    """Bytes with up to `most` places cut, flipped, doubled or filled with something else."""
    data = bytearray(data)
    for _ in range(draw.randint(1, most)):
        at = draw.randint(0, max(len(data) - 1, 0))
        end = min(len(data), at + draw.choice((1, 1, 2, 8, 64)))
        action = draw.choice(("flip", "flip", "cut", "end", "double", "insert"))
        if action == "flip" and data:
            data[at] ^= 1 << draw.randrange(8)
        elif action == "cut":
            del data[at:end]
        elif action == "end":
            del data[at:]
        elif action == "double":
            data[at:at] = data[at:end]
        else:
            text = draw.choice(TRICKS).encode("utf-8", "replace")
            data[at:at] = draw.choice((draw.randbytes(draw.randint(0, 8)), text))
    return bytes(data)


def some_rows(draw, cells, most=5, columns=None):
    """Rows of a table: cells out of `cells` or any text, `columns` of them or up to six."""
    return [
        [draw.choice((draw.choice(cells), some_text(draw))) for _ in range(columns or draw.randint(0, 6))]
        for _ in range(draw.randint(0, most))
    ]


def joined(parts, most=6):
    """Up to `most` of `parts` one after the other, or any text."""
    return seeded(lambda draw: "".join(draw.choices(parts, k=draw.randint(0, most))) or some_text(draw, 20))


def values():
    return seeded(some_value)


def mutated(value, most=3):
    return seeded(lambda draw: some_mutation(draw, value, most))


def torn(data, most=4):
    return seeded(lambda draw: some_tear(draw, data, most))


def as_json(value):
    """UTF-8 of a value; lone surrogates and NaN as Python's JSON writes them."""
    return json.dumps(value).encode()


NOT_JSON = (b"", b"[" * 100_000, b'{"a":' * 100_000, b"\xff\xfe", b"nul", b"9" * 5000, b"\xef\xbb\xbf{}")


def files(valid):
    """Content of a JSON file: the valid value damaged as a value or as bytes, or nothing like it."""
    text = as_json(valid)

    def some_file(draw):
        kind = draw.randrange(32)
        if kind == 0:
            return draw.choice(NOT_JSON)
        return some_tear(draw, text) if kind < 11 else as_json(some_mutation(draw, valid))

    return seeded(some_file)


def snapshot(folder):
    """Every file below `folder` with its content: what a reader may not change."""
    return {path: path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}
