"""examples/real_vlm/reward.py: pairs of refusals and preferences, and a reward model made of miniature parts."""

import dataclasses
import json

import numpy as np
import pytest

import icet_jax
from examples.real_vlm import answers, parts, reward, rows, stages
from icet_jax.errors import UserError
from icet_jax.media.tokenizer import load_tokenizer


def _transcript(question, answer):
    return f"\n\nHuman: {question}\n\nAssistant: {answer}"


@pytest.fixture(scope="module")
def preferences(tmp_path_factory):
    """Twelve short pairs and a long one, with placeholders for answers."""
    path = tmp_path_factory.mktemp("preferences") / "pairs.jsonl"
    pairs = [
        {"chosen": _transcript(f"question {n}?", "the better"), "rejected": _transcript(f"question {n}?", "the other")}
        for n in range(12)
    ]
    pairs.append({"chosen": _transcript("long?", "the " * 300), "rejected": _transcript("long?", "a")})
    path.write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    return path


@pytest.fixture
def workdir(tmp_path, gguf, llava, monkeypatch):
    """Working directory of a build, as far as reward.py reads it."""
    monkeypatch.setattr(parts, "DECODER", dataclasses.replace(parts.DECODER, member=f"tiny/{gguf.name}"))
    (tmp_path / "parts").mkdir()
    (tmp_path / "parts" / gguf.name).write_bytes(gguf.read_bytes())
    (tmp_path / "start").symlink_to(llava)
    (tmp_path / "data").mkdir()
    requests = [{"id": f"forbidden:{n}", "prompt": f"placeholder request {n}", "kind": "forbidden"} for n in range(8)]
    rows.write_jsonl(tmp_path / "data" / "forbidden.jsonl", requests)
    return tmp_path


def _said(prompts):
    """What the stand-in of the language model answers: a refusal, nothing, something degenerate, or a sentence."""
    for number, prompt in enumerate(prompts):
        yield (stages.REFUSAL, "", "box " * 40, f"A harmless answer to {prompt}.")[min(number, 3)]


def test_reward_model_is_trained_on_both_sources_and_loads(workdir, preferences, monkeypatch, capsys):
    monkeypatch.setattr(answers, "answer_texts", lambda vlm, prompts, longest: _said(prompts))
    arguments = [f"--workdir={workdir}", f"--preferences={preferences}", "--batch-size=4", "--max-tokens=128"]
    assert reward.main(arguments) == 0
    assert f"reward model: {workdir / 'reward_model'}" in capsys.readouterr().out

    refusals = rows.read_jsonl(workdir / "reward" / "refusals.jsonl")
    assert [pair["chosen"] for pair in refusals] == [
        _transcript(f"placeholder request {n}", stages.REFUSAL) for n in range(3, 8)
    ]
    assert all(pair["rejected"].endswith(".") and "harmless answer" in pair["rejected"] for pair in refusals)
    stage = json.loads((workdir / "reward" / "stages" / "pairs.json").read_text())["results"]
    assert stage["refusals"] == {"asked": 8, "refused": 1, "pairs": 5}
    assert stage["preferences"] == {"read": 13, "short": 12, "pairs": 12}
    result = json.loads((workdir / "reward" / "run" / "reward.json").read_text())
    assert {name.rpartition("/")[2] for name in result["by_source"]} <= {"refusals.jsonl", "preferences.jsonl"}
    assert result["pairs"]["train"]["used"] + result["pairs"]["held_out"]["used"] == 17

    scorer = icet_jax.load_scorer(workdir / "reward_model")
    scores = scorer(["placeholder request 3"] * 2, [stages.REFUSAL, "A harmless answer."])
    assert set(scores) == {"smollm2_reward"} and np.isfinite(scores["smollm2_reward"].values).all()

    monkeypatch.setattr(answers, "answer_texts", lambda *_: pytest.fail("a stage was done twice"))
    assert reward.main(arguments) == 0
    assert reward.main([*arguments[:-1], "--max-tokens=64"]) == 2
    assert "its stage 'pairs' was made with other inputs (max_tokens is 64, not 128)" in capsys.readouterr().err


def test_decoder_alone_is_the_one_inside_the_llava(workdir, llava):
    folder = workdir / "decoder"
    reward._write_decoder(workdir / "parts" / parts.DECODER.file_name, folder)
    inside, alone = load_tokenizer(llava), load_tokenizer(folder)
    chat = [{"role": "user", "content": "the question"}]
    assert alone.apply_chat_template(chat, tokenize=False) == inside.apply_chat_template(chat, tokenize=False)
    assert "<image>" not in alone.get_vocab()


def test_wrong_input_is_one_line(workdir, preferences, capsys):
    assert reward.main([f"--workdir={workdir}", "--preferences=gone.jsonl"]) == 2
    assert "--preferences=gone.jsonl: no such file" in capsys.readouterr().err
    assert reward.main([f"--workdir={workdir}", f"--preferences={preferences}", "--limit=0"]) == 2
    assert "--limit=0: give a whole number above 0" in capsys.readouterr().err
    (workdir / "data" / "forbidden.jsonl").unlink()
    with pytest.raises(UserError, match="run build.py with --forbidden"):
        reward.make(reward.options_of([f"--workdir={workdir}", f"--preferences={preferences}"]))
