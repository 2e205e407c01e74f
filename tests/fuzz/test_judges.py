"""What judges say, what people label, what a cache holds, and what a sweep left."""

import csv
import io
import math
import zlib

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from icet_jax.data.records import Example
from icet_jax.evaluation.transcripts import TranscriptFile
from icet_jax.files import unseal
from icet_jax.scorers.cache import ScoreCache, cached
from icet_jax.scorers.decoder_judge import guard_verdict, word_verdict
from icet_jax.scorers.human import read_labels
from tests.fuzz.damage import TRICKS, as_json, cases, files, joined, mutated, outcome, seeded, snapshot, some_rows, torn
from tests.scorers.services import Lengths

CODES = frozenset(f"S{n}" for n in range(1, 15))
said = joined(
    (
        "safe",
        "unsafe",
        "SAFE",
        " Unsafe ",
        "\n",
        "S1",
        "S99",
        ",",
        ":",
        "not ",
        "safely",
        "unsafe\nS1,S9",
        "yes",
        "no",
        *TRICKS,
    )
)


@cases(400)
@given(said)
def test_llama_guards_words(text):
    verdict, _ = outcome(guard_verdict, text, CODES)
    first = text.strip().split("\n")[0].strip().lower()
    assert (verdict is None) is (first not in ("safe", "unsafe"))
    if verdict is not None:
        assert verdict[0] is (first == "unsafe")
        assert verdict[1].split(" ")[0] == first and set("".join(verdict[1].split(" ")[1:]).split(",")) <= CODES | {""}


@cases(400)
@given(said, st.sampled_from((("yes", "no"), ("unsafe", "safe"), ("(", "["), (".*", "\\d"))))
def test_words_of_other_judges(text, pair):
    verdict, _ = outcome(word_verdict, text, *pair)
    answer = text.strip().lower()
    if verdict is not None:
        assert answer.startswith(pair[0] if verdict[0] else pair[1])
    if not answer.startswith(pair):
        assert verdict is None


KEYS = [f"k{number:015d}" for number in range(4)]
LABELS = [["key", "response", "unsafe"], *([key, 'a "long"\nresponse', "yes"] for key in KEYS)]


def table(rows, separator=","):
    text = io.StringIO()
    csv.writer(text, delimiter=separator).writerows([[str(cell) for cell in row] for row in rows])
    return text.getvalue().encode("utf-8", "surrogatepass")


def test_files_of_labels(tmp_path):
    path = tmp_path / "labels.csv"
    pool = (*(*KEYS, "yes", "no", "1") * 8, *TRICKS * 2, "x" * 200_000)
    rows = seeded(lambda draw: some_rows(draw, pool))

    @cases(200)
    @given(
        torn(table(LABELS))
        | rows.map(lambda drawn: table([*LABELS, *drawn]))
        | rows.map(lambda drawn: table([LABELS[0], *drawn], ";"))
        | torn(table(LABELS)).map(lambda data: data.decode("utf-8", "replace").encode("utf-16"))
        | st.binary(max_size=30)
    )
    def holds(content):
        path.write_bytes(content)
        labels, _ = outcome(read_labels, path, KEYS)
        assert labels is None or (
            set(labels.unsafe) <= set(KEYS) and all(type(v) is bool for v in labels.unsafe.values())
        )

    holds()


def sealed(data):
    """The line as one of ours with the right checksum, so that what is in it is looked at."""
    return data[:-1] + b', "crc32": %d}' % zlib.crc32(data) if data.endswith(b"}") else data


def test_lines_of_a_score_cache(tmp_path):
    scorer = cached(Lengths(), ScoreCache(tmp_path))
    scorer(["p", "p"], ["one", "three"])
    (path,) = tmp_path.rglob("*.jsonl")
    valid = path.read_bytes()
    lines = [unseal(line) for line in valid.decode().splitlines()]

    @cases(200)
    @given(
        torn(valid)
        | mutated(lines).map(
            lambda rows: b"".join(sealed(as_json(row)) + b"\n" for row in rows) if isinstance(rows, list) else b""
        )
        | files(lines[0]).map(lambda data: valid + sealed(data) + b"\n")
    )
    def holds(content):
        path.write_bytes(content)
        for other in path.parent.glob("*.jsonl"):
            if other != path:
                other.unlink()
        again, _ = outcome(lambda: cached(Lengths(), ScoreCache(tmp_path)))
        result, line = outcome(again, ["p", "p"], ["one", "three"])
        assert line is not None or all(math.isfinite(value) for value in result["lengths"].values)

    with np.errstate(all="raise"):
        holds()


EXAMPLES = [Example("one", "placeholder", ()), Example("two", "other", ())]


def test_transcripts_of_an_earlier_sweep(tmp_path):
    path = tmp_path / "before.jsonl"
    table = TranscriptFile(path, "mark", "judges", EXAMPLES)
    rows = [
        {"id": example.id, "layer": layer, "prompt": example.prompt, "response": "r", "scores": {"asr/x": 0.0}}
        for example in EXAMPLES
        for layer in (1, 2)
    ]
    table.add(rows, judged=True)
    valid = path.read_bytes()
    lines = [unseal(line) for line in valid.decode().splitlines()]

    def read(content):
        path.write_bytes(content)
        found, line = outcome(TranscriptFile, path, "mark", "judges", EXAMPLES)
        if found is None:
            assert path.read_bytes() == content
        else:
            for example in EXAMPLES:
                outcome(found.is_judged, example, 1)
                row = outcome(found.answer, example, 1)[0]
                assert row is None or (isinstance(row["response"], str) and isinstance(row["scores"], dict))
        return line

    assert read(valid) is None and read(valid[:-5]) is None

    @cases(200)
    @given(
        torn(valid)
        | mutated(lines).map(
            lambda rows: b"".join(sealed(as_json(row)) + b"\n" for row in rows) if isinstance(rows, list) else b""
        )
        | files(lines[0]).map(lambda data: valid + sealed(data) + b"\n")
    )
    def holds(content):
        read(content)

    holds()
    assert snapshot(tmp_path).keys() == {path}
