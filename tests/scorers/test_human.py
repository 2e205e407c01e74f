"""What people get to label, and what is taken from what they send back."""

import csv
import io

import pytest

from icet_jax.errors import UserError
from icet_jax.scorers.human import COLUMNS, Answer, read_labels, sample, to_csv


def answer(number=1, layer=1, phase="before", dataset="red", run="", prompt="p", response="r", **scores):
    row = {"id": f"row-{number}", "layer": layer, "prompt": prompt, "response": response}
    return Answer(run, dataset, phase, row | {"scores": {f"asr/{k}": v for k, v in scores.items()} | {"length": 3.0}})


def grid(ids=20, layers=6, datasets=("red", "mini")):
    return [
        answer(number, layer, phase, dataset)
        for dataset in datasets
        for layer in range(1, layers + 1)
        for phase in ("before", "after")
        for number in range(ids)
    ]


def table(text):
    assert text.startswith("\ufeff")
    return list(csv.DictReader(io.StringIO(text[1:], newline="")))


def test_a_sample_is_even_over_exits_and_data_sets_and_paired():
    chosen = sample(grid(), 48, seed=3)
    counts = {}
    for one in chosen:
        place = one.dataset, one.row["layer"], one.phase
        counts[place] = counts.get(place, 0) + 1
    assert len(chosen) == 48 and len(counts) == 24 and set(counts.values()) == {2}
    units = [(one.dataset, one.row["layer"], one.row["id"]) for one in chosen]
    assert all(units.count(unit) == 2 for unit in units), "each with its other phase"
    assert len({one.key for one in chosen}) == 48


def test_a_sample_depends_on_the_seed_and_not_on_the_order():
    def keys(answers, seed):
        return [one.key for one in sample(answers, 30, seed)]

    assert keys(grid(), 1) == keys(grid()[::-1], 1) != keys(grid(), 2)


def test_attempts_are_answers_of_their_own():
    """Two attempts that say the same have two keys, and pairs are those of one attempt."""
    answers = [
        Answer(one.run, one.dataset, one.phase, {**one.row, "attempt": attempt})
        for one in grid(5, 2, ("red",)) for attempt in range(3)
    ]  # fmt: skip
    assert len({one.key for one in answers}) == len(answers) == 60
    assert {one.key for one in answers if not one.attempt} == {one.key for one in grid(5, 2, ("red",))}
    chosen = sample(answers, 20, 0)
    units = [(one.row["layer"], one.row["id"], one.attempt) for one in chosen]
    assert len(units) == 20 and all(units.count(unit) == 2 for unit in units) and len({unit[2] for unit in units}) > 1


def test_small_and_large_samples():
    assert sample([], 10, 0) == []
    assert sample(grid(), 1, 0) == [], "a pair does not fit"
    assert len(sample(grid(1, 2, ("red",)), 100, 0)) == 4
    assert len(sample([answer()], 1, 0)) == 1
    assert len(sample(grid(), 7, 0)) == 6


def test_the_file_hides_verdicts_unless_told():
    one = answer(guard=1.0, keywords=0.0, broken=None, human=1.0)
    (row,) = table(to_csv([one]))
    assert tuple(row) == COLUMNS and row["unsafe"] == "" and row["key"] == one.key
    assert (row["id"], row["layer"], row["dataset"], row["phase"]) == ("row-1", "1", "red", "before")
    (row,) = table(to_csv([one], verdicts=True))
    shown = {name: row[name] for name in row if name not in COLUMNS}
    assert shown == {"asr/guard": "unsafe", "asr/keywords": "safe", "asr/broken": "error"} and row["unsafe"] == ""


@pytest.mark.parametrize("start", ["=", "+", "-", "@", "\t", "\r", "\n"])
def test_no_cell_is_a_formula(start):
    one = answer(prompt=f"{start}1+1", response=f"{start}cmd|' /C calc'!A0", dataset="red", run="")
    (row,) = table(to_csv([one]))
    assert row["prompt"] == f"'{start}1+1" and row["response"].startswith(f"'{start}")
    assert all(not cell or cell[0] not in "=+-@\t\r\n" for cell in row.values())


def test_odd_texts_stay_in_their_cells():
    text = 'a "quoted", comma;\r\nnew line\u2028 naïve \ud800 \x00'
    (row,) = table(to_csv([answer(response=text)]))
    assert row["response"] == text.replace("\ud800", "?")


def test_a_key_is_of_everything_that_was_judged():
    other = [
        answer(2),
        answer(layer=2),
        answer(phase="after"),
        answer(dataset="mini"),
        answer(run="seed_1"),
        answer(prompt="q"),
        answer(response="s"),
    ]
    assert len({one.key for one in [answer(), *other]}) == 8 and answer(guard=1.0).key == answer().key
    assert all(one.key[0] == "k" and one.key.isalnum() for one in other)


ANSWERS = [answer(number) for number in range(6)]
KEYS = [one.key for one in ANSWERS]


def filled(path, words, keys=KEYS):
    path.write_text("key,unsafe\n" + "".join(f"{key},{word}\n" for key, word in zip(keys, words, strict=False)))
    return read_labels(path, KEYS)


def test_words_for_yes_and_no(tmp_path):
    path = tmp_path / "labels.csv"
    for word in ("yes", "Y", " 1 ", "1.0", "TRUE", "unsafe"):
        assert filled(path, [word]).unsafe == {KEYS[0]: True}
    for word in ("no", "N", "0", "0.0", "False", "Safe"):
        assert filled(path, [word]).unsafe == {KEYS[0]: False}


def test_rows_without_a_verdict_are_counted_by_reason(tmp_path):
    keys = [KEYS[0], KEYS[1], KEYS[2], "", "kfff", KEYS[3], KEYS[3], KEYS[3], KEYS[4], KEYS[4]]
    labels = filled(tmp_path / "l.csv", ["yes", "", "perhaps", "yes", "yes", "yes", "no", "yes", "no", "no"], keys)
    assert labels.unsafe == {KEYS[0]: True, KEYS[4]: False}
    assert labels.dropped == {
        "not labelled": 1,
        "unsafe is neither yes nor no": 1,
        "no key": 1,
        "not an answer of this run, or the answer has changed": 1,
        "labelled both yes and no": 3,
        "repeated": 1,
    }
    assert labels.dropped.total() + len(labels.unsafe) == len(keys)


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "cp1252"])
@pytest.mark.parametrize("separator", [",", ";", "\t"])
def test_whatever_a_spreadsheet_made_of_it(tmp_path, encoding, separator):
    text = io.StringIO()
    writer = csv.writer(text, delimiter=separator)
    writer.writerow(["Comment", " Unsafe ", "KEY"])
    writer.writerow(["naïve, odd; words\nand a line", "yes", KEYS[0]])
    writer.writerow(["", "", ""])
    writer.writerow(["x", "no", KEYS[1]])
    (tmp_path / "l.csv").write_bytes(text.getvalue().encode(encoding))
    labels = read_labels(tmp_path / "l.csv", KEYS)
    assert labels.unsafe == {KEYS[0]: True, KEYS[1]: False} and not labels.dropped


def test_a_short_line_is_a_row_without_a_verdict(tmp_path):
    (tmp_path / "l.csv").write_text(f"key,prompt,unsafe\n{KEYS[0]}\n{KEYS[1]},p,yes,more,cells\n")
    labels = read_labels(tmp_path / "l.csv", KEYS)
    assert labels.unsafe == {KEYS[1]: True} and labels.dropped == {"not labelled": 1}


def test_a_large_cell(tmp_path):
    (tmp_path / "l.csv").write_text(f"key,prompt,unsafe\n{KEYS[0]},{'x' * 200_000},yes\n")
    assert read_labels(tmp_path / "l.csv", KEYS).unsafe == {KEYS[0]: True}


@pytest.mark.parametrize("content", ["", "id,unsafe\n1,yes\n", "no table at all", "key\nk1\n"])
def test_no_table_of_labels_is_one_line(tmp_path, content):
    (tmp_path / "l.csv").write_text(content)
    with pytest.raises(UserError, match="has no columns 'key' and 'unsafe'"):
        read_labels(tmp_path / "l.csv", KEYS)


@pytest.mark.parametrize("header", ["key,unsafe,unsafe", "Key,key,unsafe"])
def test_a_column_that_stands_twice_is_one_line(tmp_path, header):
    path = tmp_path / "labels.csv"
    path.write_text(f"{header}\na,yes,no\n")
    with pytest.raises(UserError, match=r"labels\.csv: column '\w+' stands 2 times in its first line"):
        read_labels(path, ["a"])


def test_no_file_is_one_line(tmp_path):
    for path in (tmp_path / "none.csv", tmp_path):
        with pytest.raises(UserError, match="cannot be read"):
            read_labels(path, KEYS)


def test_what_was_written_reads_back(tmp_path):
    answers = [answer(number, response='=1;2,3\n"4"') for number in range(4)]
    text = to_csv(answers).replace("\r\n", "yes\r\n").replace("unsafeyes", "unsafe")
    (tmp_path / "l.csv").write_bytes(text.encode())
    assert read_labels(tmp_path / "l.csv", [one.key for one in answers]).unsafe == {one.key: True for one in answers}
