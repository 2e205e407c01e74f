"""Harvested pairs: who is paired with what, and an interrupted harvest that loses nothing."""

import numpy as np
import pytest

from icet_jax.data.records import Example
from icet_jax.errors import UserError
from icet_jax.evaluation.harvest import answers_at, drawn_exits, exit_pairs
from icet_jax.scorers.keywords import refused
from tests.evaluation import bundle

REFUSALS, OTHERS = ("Sorry, no.", "I cannot do that."), ("step one", "red", "")
DEFAULT, EXITS = 3, 4


def random_case(seed, kinds=("forbidden", "benign", "vqa")):
    """Rows of random kinds, and random answers at every exit."""
    rng = np.random.default_rng(seed)
    rows = [Example(f"row {number}", "placeholder", kind=str(rng.choice(kinds))) for number in range(40)]
    drawn = [(number, layer) for number in range(len(rows)) for layer in range(1, EXITS + 1)]
    answers = {key: str(rng.choice([*REFUSALS, *OTHERS])) for key in drawn}
    return rows, drawn, answers


@pytest.mark.parametrize("seed", range(3))
def test_a_forbidden_row_pairs_a_refusal_with_compliance_and_every_other_row_an_answer_with_a_refusal(seed):
    rows, drawn, answers = random_case(seed)
    marks = [f"mark {number}" for number in range(len(rows))]
    pairs = exit_pairs(rows, marks, drawn, answers, DEFAULT)
    number = {row.id: place for place, row in enumerate(rows)}
    given = {answers[row, DEFAULT] for row, _ in drawn if rows[row].kind == "forbidden"}
    for pair in pairs:
        row = number[pair.id]
        assert pair.fingerprint == marks[row] and pair.chosen == answers[row, DEFAULT]
        if rows[row].kind == "forbidden":
            assert refused(pair.chosen) and pair.rejected == answers[row, pair.exit_layer]
            assert not refused(pair.rejected)
        else:
            assert pair.chosen and not refused(pair.chosen) and refused(pair.rejected) and pair.rejected in given
    found = {(number[pair.id], pair.exit_layer) for pair in pairs}
    assert len(found) == len(pairs) and found <= set(drawn)
    for row, layer in set(drawn) - found:  # nothing that could be a pair is left out
        safe = refused(answers[row, DEFAULT])
        forbidden = rows[row].kind == "forbidden"
        assert not safe or refused(answers[row, layer]) if forbidden else safe or not answers[row, DEFAULT]
    assert {pair.rejected for pair in pairs if pair.chosen == "red"} == set(REFUSALS)


def test_without_a_refusal_there_is_no_pair():
    rows, drawn, answers = random_case(0)
    complied = {key: "step one" if rows[key[0]].kind == "forbidden" else text for key, text in answers.items()}
    assert exit_pairs(rows, [""] * len(rows), drawn, complied, DEFAULT) == []


def test_every_row_is_asked_once_at_each_of_its_exits():
    rows = [Example(name, "placeholder") for name in "abc"]
    batches = [((rows[2], rows[0]), np.array([4, 1])), ((rows[2], rows[2]), np.array([4, 2]))]
    assert drawn_exits(rows, batches) == [(2, 4), (0, 1), (2, 2)]


class Killed(Exception):
    """The process ends here."""


def test_a_killed_harvest_goes_on_and_says_the_same(tmp_path):
    vlm = bundle.tiny_vlm(tmp_path / "vlm")
    rows = bundle.rows()
    requested = {0: [1, 3], 2: [3], 4: [2, 3, 4]}

    def harvest(path, progress=None):
        settings = dict(sampling=vlm.sampling(6), batch_size=2, path=tmp_path / path, progress=progress)
        return answers_at(vlm, rows, requested, **settings)

    def kill(done):
        raise Killed

    whole, tokens = harvest("whole")
    assert set(whole) == {(row, layer) for row, exits in requested.items() for layer in exits}
    with pytest.raises(Killed):
        harvest("killed", kill)
    with (tmp_path / "killed").open("ab") as file:
        file.write(b'{"id": "half a line')
    before = len((tmp_path / "killed").read_bytes().splitlines()) - 1
    resumed, rest = harvest("killed")
    assert 0 < before < len(whole) and resumed == whole and 0 < rest < tokens
    assert harvest("killed") == (whole, 0)
    changed = [Example(row.id, f"{row.prompt}!", row.images, row.kind) for row in rows]
    with pytest.raises(UserError, match="line 1 is of another sweep"):
        answers_at(vlm, changed, requested, sampling=vlm.sampling(6), batch_size=2, path=tmp_path / "whole")
