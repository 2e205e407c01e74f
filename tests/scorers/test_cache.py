"""A cached score is the scorer's own, of exactly this scorer and pair; errors and half lines are asked again."""

import json
import math
import subprocess
import sys

import numpy as np
import pytest

from icet_jax.errors import UserError
from icet_jax.files import seal, unseal
from icet_jax.scorers import cache
from icet_jax.scorers.base import Scorer, Scores
from icet_jax.scorers.cache import ScoreCache, cached, directory_fingerprint
from icet_jax.scorers.keywords import RefusalKeywords
from tests.scorers.services import Lengths

ODD = ["a\u2028b", "line\nend", '"quoted"', "\ud800", "naïve ", ""]


def values(result, name="lengths"):
    return result[name].values.tolist()


def test_a_second_run_asks_nothing_and_says_the_same(tmp_path):
    prompts, responses = [f"p{i}" for i in range(5)], ODD[:5]
    first = Lengths()
    expected = cached(first, ScoreCache(tmp_path))(prompts, responses)
    second = Lengths()
    again = cached(second, ScoreCache(tmp_path))
    result = again(prompts, responses)
    assert second.asked == [] and (again.hits, again.misses) == (5, 0)
    np.testing.assert_array_equal(result["lengths"].values, expected["lengths"].values)
    assert result["lengths"].values.dtype == np.float32 and isinstance(again, Scorer)


def test_only_new_pairs_are_asked_and_keep_their_places(tmp_path):
    scorer = cached(Lengths(), ScoreCache(tmp_path))
    scorer(["p", "p"], ["one", "three"])
    assert values(scorer(["p", "p", "pp", "p"], ["two!", "three", "three", "one"])) == [5, 6, 7, 4]
    assert scorer.scorer.asked[2:] == [("p", "two!"), ("pp", "three")]
    assert values(scorer([], [])) == []


def test_errors_are_not_stored(tmp_path):
    scorer = cached(Lengths(), ScoreCache(tmp_path))
    assert math.isnan(values(scorer(["p"], [""]))[0])
    scorer.scorer.asked.clear()
    scorer(["p"], [""])
    assert scorer.scorer.asked == [("p", "")] and not list(tmp_path.rglob("*.jsonl"))


class Heads:
    """A judge with a side result, which it lacks for "?"; "junk" is an error."""

    name, metric, fingerprint = "judge", "asr", "x"
    label_shares, families = {"refused": "refusal"}, {"judge.p": "p_unsafe"}

    def __init__(self):
        self.asked = []

    def __call__(self, prompts, responses):
        self.asked += responses
        first = [np.nan if response == "junk" else 1.0 for response in responses]
        second = [np.nan if response in ("?", "junk") else 0.25 for response in responses]
        return {
            "judge": Scores(np.array(first, np.float32), [None if np.isnan(value) else "unsafe S1" for value in first]),
            "judge.p": Scores(np.array(second, np.float32), [None] * len(prompts)),
        }


def test_labels_and_side_results_come_back(tmp_path):
    responses = ["a", "?", "junk"]
    for asked in (responses, ["junk"]):
        scorer = cached(Heads(), ScoreCache(tmp_path))
        result = scorer(["p"] * 3, responses)
        assert list(result) == ["judge", "judge.p"] and scorer.scorer.asked == asked
        np.testing.assert_array_equal(result["judge"].values, np.array([1, 1, np.nan], np.float32))
        np.testing.assert_array_equal(result["judge.p"].values, np.array([0.25, np.nan, np.nan], np.float32))
        assert result["judge"].labels == ["unsafe S1", "unsafe S1", None] and result["judge.p"].labels == [None] * 3
        assert scorer.label_shares == Heads.label_shares and scorer.families == Heads.families


@pytest.mark.parametrize("other", [{"name": "other"}, {"fingerprint": "2"}])
def test_another_scorer_never_answers(tmp_path, other):
    cached(Lengths(), ScoreCache(tmp_path))(["p"], ["r"])
    scorer = cached(Lengths(**other, factor=2.0), ScoreCache(tmp_path))
    assert values(scorer(["p"], ["r"]), scorer.name) == [4]


def test_a_scorer_that_does_not_say_what_it_depends_on_is_not_cached(tmp_path):
    keywords = RefusalKeywords()
    assert cached(keywords, ScoreCache(tmp_path)) is keywords
    nothing = Lengths(fingerprint=None)
    assert cached(nothing, ScoreCache(tmp_path)) is nothing


def test_what_reads_no_prompts_is_asked_once_per_response(tmp_path):
    class Response(Lengths):
        reads_prompts = False

    scorer = cached(Response(), ScoreCache(tmp_path))
    scorer(["p"], ["r"])
    scorer(["another prompt"], ["r"])
    assert len(scorer.scorer.asked) == 1


def test_a_killed_process_costs_its_last_line_alone(tmp_path):
    cached(Lengths(), ScoreCache(tmp_path))(["p", "p", "p"], ["a", "bb", "ccc"])
    (path,) = tmp_path.rglob("*.jsonl")
    whole = path.read_bytes()
    third = len(whole.splitlines(keepends=True)[2])
    for cut in range(1, third + 1):
        path.write_bytes(whole[:-cut])
        scorer = cached(Lengths(), ScoreCache(tmp_path))
        assert values(scorer(["p", "p", "p"], ["a", "bb", "ccc"])) == [2, 3, 4]
        assert scorer.misses == 1
        for extra in set(tmp_path.rglob("*.jsonl")) - {path}:
            extra.unlink()


@pytest.mark.parametrize(
    "line",
    [
        "not json",
        "[1]",
        '{"key": 1, "scores": {"lengths": [9, null]}}',
        '{"key": "KEY", "scores": {}}',
        '{"key": "KEY", "scores": {"lengths": [NaN, null]}}',
        '{"key": "KEY", "scores": {"lengths": [null, null]}}',
        '{"key": "KEY", "scores": {"widths": [9, null]}}',
        '{"key": "KEY", "scores": {"lengths": [true, null]}}',
        '{"key": "KEY", "scores": {"lengths": [9, 9]}}',
        '{"key": "KEY", "scores": {"lengths": ["9", null]}}',
        '{"key": "KEY", "scores": {"lengths": 9}}',
        '{"key": "KEY"}',
    ],
)
def test_a_damaged_line_is_scored_again(tmp_path, line):
    cached(Lengths(), ScoreCache(tmp_path))(["p"], ["r"])
    (path,) = tmp_path.rglob("*.jsonl")
    path.write_text(line.replace("KEY", json.loads(path.read_text())["key"]) + "\n")
    scorer = cached(Lengths(), ScoreCache(tmp_path))
    assert values(scorer(["p"], ["r"])) == [2] and scorer.misses == 1


def test_entries_of_other_heads_are_one_line(tmp_path):
    cached(Lengths(), ScoreCache(tmp_path))(["p"], ["r"])
    (path,) = tmp_path.rglob("*.jsonl")
    row = unseal(path.read_text().rstrip("\n"))
    path.write_text(seal(row | {"scores": {"widths": [1, None], **row["scores"]}}) + "\n")
    with pytest.raises(UserError, match="remove it"):
        cached(Lengths(), ScoreCache(tmp_path))(["p", "p"], ["r", "new"])


def test_no_text_is_stored(tmp_path):
    cached(Lengths(), ScoreCache(tmp_path))(["placeholder prompt"], ["placeholder response"])
    assert "placeholder" not in "".join(path.read_text() for path in tmp_path.rglob("*.jsonl"))


def test_several_processes_at_once(tmp_path):
    code = (
        "import sys; from icet_jax.scorers.cache import ScoreCache, cached\n"
        "from tests.scorers.services import Lengths\n"
        "scorer = cached(Lengths(), ScoreCache(sys.argv[1])); scorer.scorer.remote = True\n"
        "for i in range(300): scorer(['p'] * 2, [f'{i % 200} {sys.argv[2]}', f'shared {i % 200}'])"
    )
    children = [subprocess.Popen([sys.executable, "-c", code, str(tmp_path), str(n)]) for n in range(2)]
    assert [child.wait(timeout=120) for child in children] == [0, 0]
    scorer = cached(Lengths(), ScoreCache(tmp_path))
    responses = [f"{i} {n}" for i in range(200) for n in range(2)] + [f"shared {i}" for i in range(200)]
    assert values(scorer(["p"] * 600, responses)) == [1 + len(response) for response in responses]
    assert scorer.hits == 600


def test_processes_of_a_run_ask_what_the_first_one_does_not_know(tmp_path, monkeypatch):
    first = cached(Lengths(), ScoreCache(tmp_path / "own"))
    first(["p"], ["a"])
    monkeypatch.setattr(cache, "is_writer", lambda: False)
    other = cached(Lengths(), ScoreCache(tmp_path / "own"))
    word = [{"lengths": [2.0, None]}, {}]
    monkeypatch.setattr(cache, "on_first", lambda function: (function(), word)[1])
    assert values(other(["p", "p"], ["a", "bb"])) == [2, 3]
    assert other.scorer.asked == [("p", "bb")]
    assert len(list((tmp_path / "own").glob("*/*.jsonl"))) == 1, "the first process alone writes"


def test_an_unwritable_cache_is_one_line(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be written"):
        cached(Lengths(), ScoreCache(tmp_path / "file"))(["p"], ["r"])


def checkpoint(folder, size=3 << 20):
    folder.mkdir()
    (folder / "config.json").write_text('{"a": 1}')
    (folder / "model.safetensors").write_bytes(np.random.default_rng(0).bytes(size))
    return folder


def test_a_fingerprint_is_of_the_content(tmp_path):
    first, copy = checkpoint(tmp_path / "a"), checkpoint(tmp_path / "b")
    mark = directory_fingerprint(first)
    assert directory_fingerprint(copy) == mark
    (copy / "README.md").write_text("words")
    (copy / ".cache").mkdir()
    (copy / ".cache" / "lock").write_text("")
    assert directory_fingerprint(copy) == mark
    (copy / "config.json").write_text('{"a": 2}')
    assert directory_fingerprint(copy) != mark
    linked = tmp_path / "c"
    linked.mkdir()
    for path in first.iterdir():
        (linked / path.name).symlink_to(path)
    assert directory_fingerprint(linked) == mark


@pytest.mark.parametrize("place", [0, (1 << 20) - 1, 1 << 20, (3 << 20) - 1])
def test_a_changed_weight_is_seen(tmp_path, place):
    folder = checkpoint(tmp_path / "a")
    before, path = directory_fingerprint(folder), folder / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[place] ^= 1
    path.write_bytes(data)
    assert directory_fingerprint(folder) != before


def test_a_fingerprint_of_any_size(tmp_path):
    marks = set()
    for number, size in enumerate([0, 1, 1 << 20, (1 << 20) + 1, (1 << 20) + 4096, (1 << 20) + 5000]):
        marks.add(directory_fingerprint(checkpoint(tmp_path / str(number), size)))
    assert len(marks) == 6
