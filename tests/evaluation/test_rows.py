"""Batches of fixed shapes, rows from responses, and the transcript file; no model needed."""

import numpy as np
import pytest

from icet_jax.data.records import Example
from icet_jax.errors import UserError
from icet_jax.evaluation.batching import prompt_batch
from icet_jax.evaluation.scoring import answer_rows, judge
from icet_jax.evaluation.transcripts import TranscriptFile, fingerprint
from icet_jax.models.llava.network import LlavaConfig
from icet_jax.nn.clip import ClipConfig
from icet_jax.nn.llama import LlamaConfig
from icet_jax.scorers.base import Scores
from icet_jax.scorers.keywords import RefusalKeywords
from tests.vlms import vlm_without_weights

VISION = ClipConfig(8, 8, 2, 2, image_size=4, patch_size=2)
TEXT = LlamaConfig(50, 8, 8, 1, 2, 2, 4, 1e-5, 1e4, None)
CONFIG = LlavaConfig(VISION, TEXT, image_token_index=49)


def process(images, prompts, pad_to=None):
    """One token per letter, four per image, left-padded; images are their own pixels."""
    rows = [[49] * 4 * len(row) + [ord(c) - 96 for c in prompt] for row, prompt in zip(images, prompts, strict=True)]
    width = max(map(len, rows)) if pad_to is None else pad_to
    if any(len(row) > width for row in rows):
        raise UserError("too long")
    inputs = {
        "input_ids": np.array([[0] * (width - len(row)) + row for row in rows]),
        "attention_mask": np.array([[0] * (width - len(row)) + [1] * len(row) for row in rows]),
    }
    pixels = [image for row in images for image in row]
    return inputs | ({"pixel_values": np.stack(pixels)} if pixels else {})


VLM = vlm_without_weights(process, CONFIG)


def picture(value):
    return np.full((3, 4, 4), value, np.float32)


def test_a_batch_is_filled_up_with_rows_and_images():
    rows = [Example("a", "abc", (picture(1), picture(2))), Example("b", "d"), Example("c", "e", (picture(3),))]
    batch = prompt_batch(VLM, rows, 5, 2)
    assert batch.tokens.shape == batch.mask.shape == (5, 16)
    assert np.asarray(batch.mask).sum(axis=1).tolist() == [11, 1, 5, 0, 0]
    assert np.asarray(batch.tokens)[0, -3:].tolist() == [1, 2, 3]
    assert np.asarray(batch.images.rows).tolist() == [0, 0, 5, 5, 2, 5, 5, 5, 5, 5]
    assert np.asarray(batch.images.pixels)[:, 0, 0, 0].tolist() == [1, 2, 0, 0, 3, 0, 0, 0, 0, 0]
    assert (batch.images.num_rows, batch.images.per_row) == (5, 2)
    assert [example.id for example in batch.examples] == ["a", "b", "c"]


def test_a_given_length_is_kept_and_text_needs_no_images():
    batch = prompt_batch(VLM, [Example("a", "abc")], 2, 0, length=7)
    assert batch.tokens.shape == (2, 7) and batch.images is None
    with pytest.raises(UserError, match="too long"):
        prompt_batch(VLM, [Example("a", "abc")], 2, 0, length=2)


class Judge:
    name, metric, label_shares = "exact", "asr", {"refused": "refusal", "noise": "degenerate"}

    def __call__(self, prompts, responses):
        labels = [None if r == "?" else r for r in responses]
        values = np.array([np.nan if label is None else label == "complied" for label in labels], np.float32)
        return {"exact": Scores(values, labels)}


def scored(kind, response, answer=None, scorers=(Judge, RefusalKeywords), mixed=False, **fields):
    rows = answer_rows([Example("x", "p", kind=kind, answer=answer, **fields)], 3, [response], [5], [0], mixed=mixed)
    judge(rows, [scorer() for scorer in scorers], mixed=mixed)
    return rows[0]


def test_attacks_are_counted_on_forbidden_rows_alone():
    row = scored("forbidden", "complied", answer="sorry")
    assert row["scores"] == {
        "length": 5.0,
        "empty": 0.0,
        "truncated": 0.0,
        "degenerate/text_rules": 0.0,
        "asr/exact": 1.0,
        "degenerate/exact": 0.0,
        "asr/refusal_keywords": 1.0,
    }
    assert row["labels"] == {"asr/exact": "complied", "asr/refusal_keywords": "complied"}
    assert (row["layer"], row["kind"], row["response"], row["answer"]) == (3, "forbidden", "complied", "sorry")


def test_refusals_and_accuracy_are_counted_on_the_other_rows():
    row = scored("benign", "refused", answer="Refused!")
    assert row["scores"]["refusal/exact"] == 1.0 and row["scores"]["accuracy/benign_exact"] == 1.0
    assert row["scores"]["refusal/refusal_keywords"] == 0.0
    assert not any(name.startswith("asr/") for name in row["scores"])
    assert "accuracy/vqa_exact" in scored("vqa", "noise", answer="red", scorers=())["scores"]
    assert "accuracy/benign_exact" not in scored("benign", "noise")["scores"]


def test_a_judge_without_a_verdict_is_an_error_in_all_its_metrics():
    row = scored("forbidden", "?")
    assert row["scores"]["asr/exact"] is None and row["scores"]["degenerate/exact"] is None
    assert "asr/exact" not in row["labels"]
    assert scored("benign", "?")["scores"]["refusal/exact"] is None


def test_refusals_of_unsafe_rows_have_their_own_name_in_a_mixed_set():
    right, wrong = scored("forbidden", "refused", mixed=True), scored("benign", "refused", mixed=True)
    assert right["scores"]["refusal_unsafe/exact"] == wrong["scores"]["refusal/exact"] == 1.0
    assert right["scores"]["refusal_unsafe/refusal_keywords"] == 0.0
    assert "refusal/exact" not in right["scores"] and "refusal_unsafe/exact" not in wrong["scores"]
    assert "asr/exact" in right["scores"] and "asr/exact" not in wrong["scores"]


def test_rows_with_annotators_have_the_official_metric_alone():
    fields = {"answers": ("yes",) * 9 + ("no",), "answer_type": "yes/no", "category": "odd"}
    row = scored("vqa", "Yes.", answer="yes", scorers=(), **fields)
    assert row["scores"]["vqa/official"] == row["scores"]["vqa/official_yes_no"] == 1.0
    assert not any(name.startswith("accuracy/") for name in row["scores"])
    assert (row["answer"], row["answer_type"], row["policy"]) == ("yes", "yes/no", "odd")


def test_rows_say_which_attack_they_are():
    attack = scored("forbidden", "r", format="Logic", transferred=False)
    assert (attack["format"], attack["transferred"]) == ("Logic", False)
    assert not {"format", "transferred"} & set(scored("forbidden", "r"))


class Graded:
    """Two numbers for a row, of different families."""

    name, metric, families = "guard", "asr", {"guard.p": "p_unsafe"}

    def __call__(self, prompts, responses):
        values = np.array([0.75] * len(prompts), np.float32)
        return {
            "guard": Scores(values.round(), ["unsafe"] * len(prompts)),
            "guard.p": Scores(values, [None] * len(prompts)),
        }


def test_a_result_may_have_a_family_of_its_own():
    row = scored("forbidden", "r", scorers=(Graded,))
    assert (row["scores"]["asr/guard"], row["scores"]["p_unsafe/guard.p"]) == (1.0, 0.75)
    assert row["labels"] == {"asr/guard": "unsafe"}
    assert not any("guard" in name for name in scored("benign", "r", scorers=(Graded,))["scores"])


def row(identity, layer, response="r"):
    return {"id": identity, "layer": layer, "prompt": "p", "kind": "benign", "response": response, "scores": {}}


def test_transcripts_survive_odd_characters_and_a_cut_line(tmp_path):
    path, examples = tmp_path / "deep" / "t.jsonl", [Example("a", "p"), Example("b", "p")]
    file = TranscriptFile(path, "mark", "judges", examples)
    file.add([row("b", 1, "line\u2028sep\x85end\n\u00e9")], judged=True)
    file.add([row("a", 1)], judged=True)
    whole = path.read_bytes()
    for cut in (1, 30):
        path.write_bytes(whole[:-cut])
        again = TranscriptFile(path, "mark", "judges", examples)
        assert again.is_judged(examples[1], 1) and not again.is_judged(examples[0], 1)
        again.add([row("a", 1)], judged=True)
        assert path.read_bytes() == whole
    assert len(path.read_text().splitlines()) == 2
    assert [r["id"] for r in TranscriptFile(path, "mark", "judges", examples).finish([1])] == ["a", "b"]
    assert path.read_text().startswith('{"id": "a"')


def test_answers_wait_for_their_judges(tmp_path):
    path, examples = tmp_path / "t.jsonl", [Example("a", "p"), Example("b", "p")]
    TranscriptFile(path, "mark", "old", examples).add([row("a", 1), row("b", 1)], judged=False)
    for judges in ("old", "new"):
        file = TranscriptFile(path, "mark", judges, examples)
        assert file.answer(examples[0], 1) == row("a", 1) and not file.is_judged(examples[0], 1)
        assert file.answer(examples[0], 2) is None and file.answer(examples[0], 1, attempt=1) is None
        file.add([row("a", 1), row("b", 1)], judged=True)
        assert file.is_judged(examples[0], 1)
    assert TranscriptFile(path, "mark", "new", examples).is_judged(examples[1], 1)


def test_rows_of_earlier_versions_get_the_attack_formats_of_their_data_set(tmp_path):
    path = tmp_path / "t.jsonl"
    TranscriptFile(path, "mark", "judges", [Example("a", "p")]).add([row("a", 1)], judged=True)
    attacks = [Example("a", "p", format="SD", transferred=True)]
    file = TranscriptFile(path, "mark", "judges", attacks)
    assert file.is_judged(attacks[0], 1)
    assert file.finish([1]) == [row("a", 1) | {"format": "SD", "transferred": True}]
    assert '"format": "SD"' in path.read_text()


def test_transcripts_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    file = TranscriptFile(tmp_path / "file" / "t.jsonl", "mark", "judges", [Example("a", "p")])
    with pytest.raises(UserError, match="cannot be written"):
        file.add([row("a", 1)], judged=True)


def test_fingerprint_depends_on_everything():
    assert fingerprint(1, "a") == fingerprint(1, "a") != fingerprint(1, "b")
