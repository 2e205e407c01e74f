"""What may be seen of the responses."""

import base64
import gzip
import json

import numpy as np
import pytest
from PIL import Image

from icet_jax.data.records import Example
from icet_jax.report import pictures, transcripts
from icet_jax.report.loading import load_runs
from icet_jax.report.packing import REDACTED, SPLIT, compress, pack
from icet_jax.report.study import Study
from tests.report import synthetic


@pytest.fixture
def run(tmp_path):
    return synthetic.write_run(tmp_path / "run")


def collect(run, reveal_unsafe=False):
    return transcripts.collect(Study(load_runs(run)), reveal_unsafe=reveal_unsafe).prompts


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
        "verdict": "unsafe",
        "split": False,
        "scores": {"asr/world_exact": 1.0, "asr/refusal_keywords": 1.0, "tr/organism_reward_model": -1.5},
        "labels": {},
    }
    shown = collect(run, reveal_unsafe=True)[0]["before"]["1"]
    assert (shown["text"], shown["verdict"], shown["redacted"]) == (synthetic.UNSAFE_TEXT, "unsafe", False)


def test_one_judge_is_enough_to_redact(run):
    rewrite(run, "before.forbidden", response=synthetic.UNSAFE_TEXT, scores={"asr/a": 0.0, "asr/b": 1.0})
    responses = collect(run)[0]["before"].values()
    assert {response["text"] for response in responses} == {"[redacted: judged unsafe by b]"}
    assert all(response["split"] for response in responses)


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
        file.write('{"id": "z", "layer": 9, "response": "the model has eight exits"}\n')
    assert len(collect(run)) == 12


def write_rows(run, count):
    rows = [
        {"id": f"p{index}", "layer": 1, "prompt": "how to mend a lumo", "response": f"step {index}", "kind": "benign"}
        for index in range(count)
    ]
    for phase in ("before", "after"):
        synthetic._write_jsonl(run / f"transcripts/{phase}.benign.jsonl", rows)
    return [row["id"] for row in rows]


def test_all_rows_of_a_run_are_shown(run):
    ids = write_rows(run, 3000)
    assert [prompt["id"] for prompt in collect(run) if prompt["dataset"] == "benign"] == ids


def test_rows_beyond_what_a_browser_can_search_are_thinned_evenly(run, monkeypatch):
    write_rows(run, 100)
    monkeypatch.setattr(transcripts, "MOST_RESPONSES", 148)  # half of 96 forbidden responses and 200 benign ones
    shown = transcripts.collect(Study(load_runs(run)), reveal_unsafe=False)
    assert (len(shown.prompts), shown.num_rows) == (53, 106)
    assert [prompt["id"] for prompt in shown.prompts][:5] == [
        *(f"forbidden-{index}" for index in (0, 2, 4)),
        "p0",
        "p2",
    ]


@pytest.mark.parametrize(
    ("scores", "verdict"),
    [
        ({"asr/a": 0.0}, "safe"),
        ({"asr/a": 0.0, "asr/b": 0.5}, "unsafe"),
        ({"asr/a": 0.0, "refusal_unsafe/a": 1.0}, "safe"),
        ({"refusal/a": 0.0, "refusal/b": 1.0}, "refused"),
        ({"refusal/a": 0.0}, "answered"),
        ({"refusal/a": 0.0, "accuracy/a": 1.0}, "right"),
        ({"vqa/official": 0.3}, "wrong"),
        ({"tr/a": 3.0}, "none"),
    ],
)
def test_the_verdict_is_that_of_the_scorers(run, scores, verdict):
    rewrite(run, "after.benign", scores=scores)
    assert {response["verdict"] for response in collect(run)[6]["after"].values()} == {verdict}


def start(run):
    shown = transcripts.collect(Study(load_runs(run)), reveal_unsafe=False)
    return transcripts.first_difference(shown, synthetic.DEFAULT_EXIT)


def rewrite_one(run, name, row_id, layer, **changes):
    path = run / f"transcripts/{name}.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    rows = [row | changes if (row["id"], row["layer"]) == (row_id, layer) else row for row in rows]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_the_page_opens_where_training_changed_a_verdict(run):
    for side in ("before", "after"):
        rewrite(run, f"{side}.forbidden", scores={"asr/a": 0.0})
    assert start(run) is None
    rewrite_one(run, "after.forbidden", "forbidden-1", 3, scores={"asr/a": 1.0})
    assert start(run) == (1, 3)
    rewrite_one(run, "before.forbidden", "forbidden-4", 6, scores={"asr/a": 1.0})
    assert start(run) == (4, 6), "a repaired response comes before a spoilt one"
    rewrite_one(run, "after.forbidden", "forbidden-4", 6, scores={"asr/a": 1.0})
    assert start(run) == (1, 3)


def test_without_training_the_page_opens_at_an_exit_that_differs_from_the_default_one(run):
    for path in (run / "transcripts").glob("after.*"):
        path.unlink()
    rewrite(run, "before.forbidden", scores={"asr/a": 0.0})
    rewrite_one(run, "before.forbidden", "forbidden-2", 5, scores={"asr/a": 1.0})
    assert start(run) == (2, 5)


def unpack(data, row, side, layer):
    text, verdict, bits, scores, *_ = data["rows"][row][side][layer - 1]
    return data["texts"][text], data["verdicts"][verdict], bits, dict(zip(data["metrics"], scores, strict=True))


def test_packed_rows_are_those_that_were_collected(run):
    rewrite(run, "before.forbidden", scores={"asr/a": 0.0, "asr/b": 1.0}, labels={"asr/b": "unsafe"}, policy="Theft")
    shown = transcripts.collect(Study(load_runs(run)), reveal_unsafe=False)
    data = pack(shown, synthetic.NUM_EXITS)
    assert json.loads(gzip.decompress(base64.b64decode(compress(data)))) == json.loads(json.dumps(data))
    assert len(data["rows"]) == 12 and data["phases"] == ["before", "after"]
    text, verdict, bits, scores = unpack(data, 0, "before", 1)
    assert (text, verdict, bits) == ("[redacted: judged unsafe by b]", "unsafe", REDACTED + SPLIT)
    assert {name: score for name, score in scores.items() if score is not None} == {"asr/a": 0.0, "asr/b": 1.0}
    assert data["rows"][0]["before"][0][4] == {"asr/b": "unsafe"}
    assert data["categories"][data["rows"][0]["category"]] == "Theft" and data["rows"][6]["category"] is None
    assert unpack(data, 6, "after", 8)[:3] == ("step one take the lumo step two stir the lumo", "answered", 0)
    assert len(data["texts"]) == len(set(data["texts"]))


def test_an_exit_without_a_response_is_empty(run):
    path = run / "transcripts/after.benign.jsonl"
    path.write_text("".join(line for line in path.open() if json.loads(line)["layer"] != 3))
    data = pack(transcripts.collect(Study(load_runs(run)), reveal_unsafe=False), synthetic.NUM_EXITS)
    assert [entry is None for entry in data["rows"][6]["after"]] == [layer == 3 for layer in range(1, 9)]


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
    earlier = pictures.picture_path(run, "forbidden", "forbidden-0").with_suffix(".png")
    assert collect(run)[0]["image"].startswith("data:image/png;base64,"), "earlier versions saved PNG files"
    earlier.write_text("<svg onload=alert(1)>")
    assert collect(run)[0]["image"] is None
    earlier.unlink()
    assert collect(run)[0]["image"] is None
    examples = [Example("forbidden-0", "prompt", images=(np.zeros((8, 8, 3), np.uint8),))]
    pictures.save_pictures(run, "forbidden", examples)
    assert collect(run)[0]["image"].startswith("data:image/webp;base64,")


def test_pictures_are_thinned_to_what_a_page_may_hold(run, monkeypatch):
    sizes = [path.stat().st_size for path in (run / "transcripts/images").iterdir()]
    monkeypatch.setattr(transcripts, "MOST_PICTURE_BYTES", sum(sizes) // 2)
    assert [prompt["image"] is not None for prompt in collect(run)] == [True, False] * 6


def test_drawings_keep_their_pixels(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 255, (32, 32, 3), np.uint8)
    pictures.save_pictures(tmp_path, "a", [Example("id", "prompt", images=(pixels,))])
    with Image.open(pictures.picture_path(tmp_path, "a", "id")) as image:
        np.testing.assert_array_equal(np.asarray(image.convert("RGB")), pixels)


def test_pictures_of_a_row_are_saved_small_and_side_by_side(tmp_path, monkeypatch):
    monkeypatch.setattr(pictures, "MOST_PICTURES", 16)
    wide, tall = np.zeros((100, 600, 3), np.uint8), np.full((40, 20, 3), 255, np.uint8)
    examples = [Example(f"id/{index}", "prompt", images=(wide, tall)) for index in range(40)]
    examples[0] = Example("id/0", "prompt", images=())
    pictures.save_pictures(tmp_path, "a/b", examples)
    saved = [pictures.picture_path(tmp_path, "a/b", example.id) for example in examples]
    assert sum(path.exists() for path in saved) == 15
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
