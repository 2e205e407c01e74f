"""Untrusted text stays text, whatever it is made of."""

import pytest

from icet_jax.report import text

PAYLOADS = [
    "</script><script>alert(1)</script>",
    "<!--<script>",
    "<img src=x onerror=alert(1)>",
    "\u2028\u2029",
    "\u202egnp.exe",
    "\ud800 half a pair",
    "]]>&amp;\"'`",
    "\x00\x1b[31m",
]


@pytest.mark.parametrize("payload", PAYLOADS)
def test_escaped_text_has_no_markup_and_no_hidden_signs(payload):
    escaped = text.escape(payload)
    assert not set("<>\"'") & set(escaped)
    assert not set("\u202e\u2028\u2029\x00\x1b\ud800") & set(escaped)
    escaped.encode("utf-8")


@pytest.mark.parametrize(
    "char", ["\u202a", "\u202e", "\u2066", "\u2069", "\u200f", "\u200b", "\ufeff", "\u00ad", "\x7f"]
)
def test_hidden_signs_become_visible(char):
    assert text.visible(f"a{char}b") == f"a⟨U+{ord(char):04X}⟩b"


def test_ordinary_text_is_kept():
    kept = "Grüße, 你好, العربية, שלום, 🙂\n\ttab"
    assert text.visible(kept) == kept
    assert text.visible("a\r\nb") == "a\nb"


@pytest.mark.parametrize(
    ("value", "shown"),
    [(None, "–"), (0.0, "0%"), (1.0, "100%"), (0.1234, "12.3%"), (0.00001, "0.0%"), (0.9999, "100.0%")],
)
def test_percent(value, shown):
    assert text.percent(value) == shown


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (None, "–"),
        (-1.5, "−1.50"),
        (0.1234, "0.123"),
        (12345.6, "12\u2009346"),
        (1e-7, "1.00e−07"),
        (-0.0001, "−1.00e−04"),
    ],
)
def test_number(value, shown):
    assert text.number(value) == shown


def test_differences_carry_their_sign():
    assert text.points(-0.973) == "−97.3"
    assert text.points(0.021) == "+2.1"
    assert text.points(-0.0001) == "0.0"
    assert text.signed(1.5) == "+1.50"
    assert text.signed(-1.5) == "−1.50"


@pytest.mark.parametrize(
    ("seconds", "shown"),
    [(0.52, "0.5 s"), (43.2, "43 s"), (59.8, "1 min 0 s"), (357.0, "5 min 57 s"), (7380.0, "2 h 3 min")],
)
def test_duration(seconds, shown):
    assert text.duration(seconds) == shown
