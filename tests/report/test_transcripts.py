"""What may be seen of the responses."""

import json

import numpy as np
import pytest
from PIL import Image

from icet_jax.data.records import Example
from icet_jax.report import pictures, transcripts
from icet_jax.report.loading import load_runs
from icet_jax.report.study import Study
from tests.report import synthetic


@pytest.fixture
def run(tmp_path):
    return synthetic.write_run(tmp_path / "run")


def collect(run, reveal_unsafe=False):
    return transcripts.collect(Study(load_runs(run)), reveal_unsafe=reveal_unsafe)


def rewrite(run, name, **changes):
    path = run / f"transcripts/{name}.jsonl"
    rows = [json.loads(line) | changes for line in path.read_text().splitlines()]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_every_prompt_has_every_exit_on_both_sides(run):
    prompts = collect(run)
    assert [prompt["dataset"] for prompt in prompts] == ["forbidden"] * 6 + ["benign"] * 6
    for prompt in prompts:
        assert len(prompt["before"]) == len(prompt["after"]) == synthetic.NUM_EXITS


def test_the_first_of_several_attempts_is_shown(run):
    path, first = run / "transcripts/before.benign.jsonl", collect(run)
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    further = [row | {"attempt": 1, "response": "another answer"} for row in rows]
    path.write_text("".join(json.dumps(row) + "\n" for row in [*rows, *further]))
    assert collect(run) == first


def test_unsafe_text_is_gone_unless_asked_for(run):
    assert synthetic.UNSAFE_TEXT not in json.dumps(collect(run))
    assert collect(run)[0]["before"]["1"] == {
        "text": "[redacted: judged unsafe by world_exact, refusal_keywords]",
        "redacted": True,
        "unsafe": True,
        "scores": {"asr/world_exact": 1.0, "asr/refusal_keywords": 1.0, "tr/organism_reward_model": -1.5},
        "labels": {},
    }
    shown = collect(run, reveal_unsafe=True)[0]["before"]["1"]
    assert (shown["text"], shown["unsafe"], shown["redacted"]) == (synthetic.UNSAFE_TEXT, True, False)


def test_one_judge_is_enough_to_redact(run):
    rewrite(run, "before.forbidden", response=synthetic.UNSAFE_TEXT, scores={"asr/a": 0.0, "asr/b": 1.0})
    assert {side["text"] for side in collect(run)[0]["before"].values()} == {"[redacted: judged unsafe by b]"}


@pytest.mark.parametrize("scores", [{"asr/a": None}, {}, {"tr/a": 1.0}])
def test_an_answer_to_a_forbidden_request_that_nobody_judged_is_not_shown(run, scores):
    rewrite(run, "before.forbidden", response=synthetic.UNSAFE_TEXT, scores=scores)
    assert {side["text"] for side in collect(run)[0]["before"].values()} == {"[redacted: no judge gave a verdict]"}


def test_a_benign_answer_judged_unsafe_is_redacted_too(run):
    rewrite(run, "after.benign", scores={"asr/a": 1.0})
    assert all(side["redacted"] for side in collect(run)[6]["after"].values())


def test_rows_that_are_no_transcripts_are_left_out(run):
    with (run / "transcripts/after.benign.jsonl").open("a") as file:
        file.write('{"id": "x"}\n{"id": "y", "layer": "1", "response": ""}\n')
    assert len(collect(run)) == 12


def test_many_prompts_are_thinned_evenly(run):
    rows = [
        {"id": f"p{index}", "layer": 1, "prompt": "how to mend a lumo", "response": "step one", "kind": "benign"}
        for index in range(100)
    ]
    for phase in ("before", "after"):
        synthetic._write_jsonl(run / f"transcripts/{phase}.benign.jsonl", rows)
    chosen = [prompt["id"] for prompt in collect(run) if prompt["dataset"] == "benign"]
    assert len(chosen) == pictures.PROMPTS_PER_DATASET
    assert chosen[:3] == ["p0", "p6", "p12"]


def test_long_text_is_cut_and_says_so(run):
    rewrite(run, "after.benign", response="x" * 5000)
    text = collect(run)[6]["after"]["1"]["text"]
    assert text == "x" * transcripts.MAX_TEXT + " […3000 more characters]"


def test_hidden_signs_are_visible(run):
    rewrite(run, "after.benign", response="a\u202eb", prompt="c\u2066d", labels={"asr/a": "e\u200bf"})
    prompt = collect(run)[6]
    assert prompt["after"]["1"]["text"] == "a⟨U+202E⟩b"
    assert prompt["after"]["1"]["labels"] == {"asr/a": "e⟨U+200B⟩f"}


def test_pictures_are_what_the_run_saved(run, tmp_path):
    assert collect(run)[0]["image"].startswith("data:image/png;base64,")
    path = pictures.picture_path(run, "forbidden", "forbidden-0")
    path.write_text("<svg onload=alert(1)>")
    assert collect(run)[0]["image"] is None
    path.unlink()
    assert collect(run)[0]["image"] is None


def test_pictures_of_the_shown_rows_are_saved_small_and_side_by_side(tmp_path):
    wide, tall = np.zeros((100, 600, 3), np.uint8), np.full((40, 20, 3), 255, np.uint8)
    examples = [Example(f"id/{index}", "prompt", images=(wide, tall)) for index in range(40)]
    examples[0] = Example("id/0", "prompt", images=())
    pictures.save_pictures(tmp_path, "a/b", examples)
    saved = [pictures.picture_path(tmp_path, "a/b", example.id) for example in examples]
    assert sum(path.exists() for path in saved) == pictures.PROMPTS_PER_DATASET - 1
    with Image.open(saved[2]) as image:
        assert image.size == (256 + 20, 43)


def test_the_right_answer_is_told_of_benign_rows_only(run):
    rewrite(run, "after.benign", answer="step one\u202e")
    rewrite(run, "after.forbidden", answer=synthetic.UNSAFE_TEXT)
    rewrite(run, "before.benign", answer="step one\u202e")
    prompts = collect(run)
    assert (prompts[0]["answer"], prompts[6]["answer"]) == (None, "step one⟨U+202E⟩")
    assert synthetic.UNSAFE_TEXT not in json.dumps(prompts)


def test_only_odd_forms_are_mentioned(run):
    rewrite(run, "after.benign", scores={"length": 9.0, "empty": 0.0, "truncated": 1.0, "degenerate/text_rules": 0.0})
    assert collect(run)[6]["after"]["1"]["scores"] == {"truncated": 1.0}
