"""Files of exit pairs: what is written is read again, and a bad line is one line of error."""

import json

import pytest

from icet_jax.data.pairs import PairRecord, read_exit_pairs, write_exit_pairs
from icet_jax.data.records import Example
from icet_jax.errors import UserError

RECORD = PairRecord("row 1", "0123456789abcdef", 2, "Sorry, n\u00f6.\n", 'step "one"')
LINE = {"id": "row 1", "fingerprint": "0123456789abcdef", "exit": 2, "chosen": "no", "rejected": "yes"}


def test_what_is_written_is_read_again(tmp_path):
    path = tmp_path / "pairs.jsonl"
    write_exit_pairs(path, [RECORD, RECORD._replace(exit_layer=4)])
    assert read_exit_pairs(path, 4) == [RECORD._replace(line=1), RECORD._replace(exit_layer=4, line=2)]
    assert json.loads(path.read_text().splitlines()[0]) == LINE | {"chosen": RECORD.chosen, "rejected": RECORD.rejected}


def test_a_pair_is_its_row_with_two_answers():
    pair = RECORD.of_row(Example("row 1", "placeholder", ("image",), "benign", "an answer", format="a"))
    assert (pair.prompt, pair.images, pair.kind, pair.answer, pair.format) == (
        "placeholder", ("image",), "benign", "an answer", "a"
    )  # fmt: skip
    assert (pair.exit_layer, pair.chosen, pair.rejected) == RECORD[2:5]


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("{", "not JSON"),
        ("[1]", "line 2: not a JSON object"),
        (json.dumps({k: v for k, v in LINE.items() if k != "chosen"}), "chosen is missing"),
        (json.dumps(LINE | {"rejected": 3}), "rejected is not text"),
        (json.dumps(LINE | {"exit": 5}), "exit is '5', but this model's exits are 1 to 4"),
        (json.dumps(LINE | {"exit": True}), "exit is 'True'"),
        (json.dumps(LINE | {"fingerprint": "12"}), "fingerprint is not 16 hexadecimal digits"),
        (json.dumps(LINE | {"chosen": "a\0b"}), "chosen contains a NUL byte"),
        (json.dumps(LINE | {"rejected": "no "}), "chosen and rejected are the same text"),
        (json.dumps(LINE | {"note": "x"}), "note is no field of a pair"),
    ],
)
def test_a_bad_line_is_one_line_of_error(tmp_path, line, says):
    path = tmp_path / "pairs.jsonl"
    path.write_text(f"{json.dumps(LINE)}\n{line}\n")
    with pytest.raises(UserError, match=r"pairs\.jsonl: line 2: ") as error:
        read_exit_pairs(path, 4)
    assert says in str(error.value) and "\n" not in str(error.value)


def test_a_file_without_pairs_is_refused(tmp_path):
    (tmp_path / "empty.jsonl").write_text("\n")
    for name, says in (("empty.jsonl", "has no pairs"), ("none.jsonl", "cannot be read"), ("pairs.csv", "is .jsonl")):
        with pytest.raises(UserError, match=says):
            read_exit_pairs(tmp_path / name, 4)
