"""HH-RLHF's format: transcripts come apart at the last answer; every bad row is counted with its reason."""

import gzip
import json

import pytest

from icet_jax.data.hh_rlhf import read_pairs, split_by_prompt, without_prompts
from icet_jax.errors import UserError
from icet_jax.scorers.pairs import HH_TEMPLATE


def transcript(*turns):
    return "".join(f"\n\n{('Human', 'Assistant')[i % 2]}: {turn}" for i, turn in enumerate(turns))


def row(chosen, rejected):
    return json.dumps({"chosen": chosen, "rejected": rejected})


GOOD = row(transcript("placeholder question 1", "kind"), transcript("placeholder question 1", "rude"))
LONG = row(
    transcript("q1", "a1", "q2\n\nwith a blank line", " b "), transcript("q1", "a1", "q2\n\nwith a blank line", "c")
)

DAMAGE = {
    "not JSON": '{"chosen": "half a li',
    "not UTF-8": b'{"chosen": "\xff\xfe"}',
    "not a JSON object": '["chosen", "rejected"]',
    "field 'chosen' more than once": '{"chosen": "x", ' + GOOD[1:],
    "chosen is no text": row(3, transcript("q", "a")),
    "rejected is no text": json.dumps({"chosen": transcript("q", "a")}),
    "chosen is no transcript of Human and Assistant": row("just text", transcript("q", "a")),
    "rejected is no transcript of Human and Assistant": row(transcript("q", "a"), transcript("q")),
    "rejected does not end with the assistant's turn": row(transcript("q", "a"), transcript("q", "a", "q2")),
    "chosen has an empty question": row(transcript("  ", "a"), transcript("q", "b")),
    "rejected has an empty answer": row(transcript("q", "a"), transcript("q", " \n")),
    "the transcripts differ before the last answer": row(transcript("q", "a"), transcript("other", "b")),
    "both answers are the same": row(transcript("q", "a"), transcript("q", "a ")),
    "repeats an earlier pair": GOOD,
    "chosen is not valid Unicode": '{"chosen": "\\n\\nHuman: q\\n\\nAssistant: \\ud800", "rejected": "x"}',
}


def write(path, lines):
    data = b"\n".join(line if isinstance(line, bytes) else line.encode() for line in lines) + b"\n"
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)
    return path


@pytest.mark.parametrize("name", ["pairs.jsonl", "pairs.jsonl.gz"])
def test_good_rows_load_and_the_template_restores_the_transcript(tmp_path, name):
    found = read_pairs(write(tmp_path / name, [GOOD, "", LONG]))
    assert found.pairs == [
        ("placeholder question 1", "kind", "rude"),
        ("q1\n\nAssistant: a1\n\nHuman: q2\n\nwith a blank line", "b", "c"),
    ]
    assert (found.read, found.dropped.total()) == (2, 0)
    text = HH_TEMPLATE.replace("{prompt}", found.pairs[1][0]) + " b"
    assert text == transcript("q1", "a1", "q2\n\nwith a blank line ", "b")


@pytest.mark.parametrize("reason", DAMAGE)
def test_a_bad_row_is_counted_with_its_reason(tmp_path, reason):
    found = read_pairs(write(tmp_path / "pairs.jsonl", [GOOD, "", DAMAGE[reason], LONG]))
    assert dict(found.dropped) == {reason: 1} and found.first_line == {reason: 3}
    assert len(found.pairs) == 2 and found.read == 3


def test_the_report_counts_every_row(tmp_path):
    found = read_pairs(write(tmp_path / "pairs.jsonl", [GOOD, *DAMAGE.values(), "[]", LONG]))
    assert found.read == len(found.pairs) + found.dropped.total() == len(DAMAGE) + 3
    assert found.report().startswith(
        "pairs.jsonl: 2 pairs of 18 rows, 16 left out (not a JSON object: 2 (first on line 4)"
    )


def test_files_that_are_none_are_one_line(tmp_path):
    with pytest.raises(UserError, match=r"\.jsonl or \.jsonl\.gz"):
        read_pairs(write(tmp_path / "pairs.csv", [GOOD]))
    with pytest.raises(UserError, match="cannot be read"):
        read_pairs(tmp_path / "gone.jsonl")
    with pytest.raises(UserError, match="the file is empty"):
        read_pairs(write(tmp_path / "empty.jsonl", [""]))
    with pytest.raises(UserError, match="no usable preference pair: bad.jsonl: 0 pairs of 1 rows"):
        read_pairs(write(tmp_path / "bad.jsonl", ["{}"]))
    whole = write(tmp_path / "whole.jsonl.gz", [GOOD, LONG] * 50)
    for damage in (whole.read_bytes()[:-12], b"not gzip", whole.read_bytes()[:40] + b"\0\xff" * 40):
        whole.write_bytes(damage)
        with pytest.raises(UserError, match="a damaged or truncated gzip file"):
            read_pairs(whole)


def test_prompts_are_held_out_whole_and_for_good():
    pairs = [(f"prompt {i % 200}", f"kind {i}", "rude") for i in range(400)]
    train, held_out = split_by_prompt(pairs, 0.25, seed=3)
    assert len(train) + len(held_out) == 400 and 70 <= len(held_out) <= 130
    assert not {prompt for prompt, *_ in train} & {prompt for prompt, *_ in held_out}
    assert split_by_prompt(pairs[:100], 0.25, seed=3)[1] == [pair for pair in held_out if pair in pairs[:100]]
    assert split_by_prompt(pairs, 0.25, seed=4)[1] != held_out


def test_held_out_pairs_about_training_prompts_are_taken_out():
    pairs = [("a", "x", "y"), ("b", "x", "y")]
    assert without_prompts(pairs, [("b", "u", "v")]) == pairs[:1]
