"""`--mode=reward` from a file of pairs to a model that scores: counted rows, an honest accuracy, bit-exact resume."""

import gzip
import json

import numpy as np
import pytest
from safetensors.numpy import load_file

from icet_jax import main
from icet_jax.commands.reward import load_sets
from icet_jax.runs import config_files
from icet_jax.scorers.load import load_scorer
from icet_jax.scorers.pairs import HH_TEMPLATE, GPT2PairTokenizer
from icet_jax.training.reward_model import RewardTrainer
from tests import tiny

SETTINGS = {
    "model.dtype": "float32",
    "model.remat": "none",
    "rm.batch_size": "8",
    "rm.accumulation": "2",
    "rm.length_window": "2",
    "rm.max_tokens": "64",
    "optimizer.learning_rate": "3e-3",
    "checkpoint.every": "2",
    "log.every": "1",
    "log.tensorboard": "false",
}


def arguments(workdir, **changes):
    settings = SETTINGS | {name.replace("__", "."): str(value) for name, value in changes.items()}
    flags = ["--mode=reward", "--config=configs/rm_gpt2.py", f"--workdir={workdir}"]
    return flags + [f"--config.{name}={value}" for name, value in settings.items()]


def row(prompt, chosen, rejected):
    texts = [f"\n\nHuman: {prompt}\n\nAssistant: {answer}" for answer in (chosen, rejected)]
    return json.dumps(dict(zip(("chosen", "rejected"), texts, strict=True)))


def rows(count, start=0):
    return [row(f"say {i}", f"kind {i % 7}", f"rude {i % 5}") for i in range(start, start + count)]


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A base checkpoint, training pairs (two rows are bad) and held-out pairs (one has a training prompt)."""
    folder = tmp_path_factory.mktemp("reward")
    base = tiny.save_reward_model(folder / "base", tiny.reward_model(seed=5))
    train, held_out = folder / "train.jsonl.gz", folder / "test.jsonl"
    train.write_bytes(gzip.compress("\n".join([*rows(48), "{}", row("say 1", "same", "same")]).encode()))
    held_out.write_text("\n".join([*rows(20, 100), row("say 3", "kind", "rude")]))
    return {"model__checkpoint": base, "rm__train": train, "rm__held_out": held_out}


@pytest.fixture(scope="module")
def finished(files, tmp_path_factory):
    """A run that was never interrupted."""
    workdir = tmp_path_factory.mktemp("runs") / "My-RM 1"
    assert main.main(arguments(workdir, **files)) == 0
    return workdir


def test_the_result_says_what_was_used_and_reached(finished):
    result = json.loads((finished / "reward.json").read_text())
    assert result["name"] == "my_rm_1" and result["steps"] == 6
    train, held_out = result["pairs"]["train"], result["pairs"]["held_out"]
    assert (train["read"], train["used"]) == (50, 48)
    assert train["dropped"] == {"chosen is no text": 1, "both answers are the same": 1}
    assert (held_out["read"], held_out["used"]) == (21, 20)
    assert held_out["dropped"] == {"a prompt of the training pairs": 1}
    low, high = result["accuracy"]["ci95"]
    assert 0 <= low <= result["accuracy"]["mean"] <= high <= 1 and result["accuracy"]["n"] == 20
    written = [json.loads(line) for line in (finished / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in written] == [1, 2, 3, 4, 5, 6]
    assert {"reward_model/loss", "reward_model/accuracy", "lr"} <= set(written[0])
    assert written[5]["reward_model/loss"] == result["last_step"]["loss"] < written[0]["reward_model/loss"]


def test_the_accuracy_is_that_of_the_exported_model(finished):
    torch = pytest.importorskip("torch")
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    scorer = load_scorer(finished / "hf")
    assert scorer.name == "my_rm_1" and scorer.pairs.template == HH_TEMPLATE
    prompts = [f"say {i}" for i in range(100, 120)]
    answers = {word: [f"{word} {i % n}" for i in range(100, 120)] for word, n in (("kind", 7), ("rude", 5))}
    scores = {word: scorer(prompts, texts)["my_rm_1"].values for word, texts in answers.items()}
    result = json.loads((finished / "reward.json").read_text())
    assert result["accuracy"]["mean"] == pytest.approx(np.mean(scores["kind"] > scores["rude"]))
    assert result["margin"]["mean"] == pytest.approx(np.mean(scores["kind"] - scores["rude"]), abs=1e-5)

    tokenizer = AutoTokenizer.from_pretrained(finished / "hf")
    model = AutoModelForSequenceClassification.from_pretrained(finished / "hf").eval()
    inputs = tokenizer(HH_TEMPLATE.replace("{prompt}", prompts[0]), answers["kind"][0], return_tensors="pt")
    with torch.no_grad():
        assert model(**inputs).logits[0, 0].item() == pytest.approx(scores["kind"][0], abs=1e-4)


def test_killed_and_resumed_equals_never_killed(files, finished, tmp_path, monkeypatch):
    workdir = tmp_path / "my_rm_1"
    step = RewardTrainer.step
    calls = []

    def killed(self, state):
        calls.append(state.step)
        if len(calls) == 6:
            raise KeyboardInterrupt
        return step(self, state)

    monkeypatch.setattr(RewardTrainer, "step", killed)
    assert main.main(arguments(workdir, **files)) == 130
    assert not (workdir / "hf").exists() and not (workdir / "reward.json").exists()
    assert main.main(arguments(workdir, **files)) == 0
    assert calls == [0, 1, 2, 3, 4, 5, 4, 5]
    whole, resumed = (load_file(folder / "hf" / "model.safetensors") for folder in (finished, workdir))
    assert whole.keys() == resumed.keys()
    for name, tensor in whole.items():
        np.testing.assert_array_equal(tensor, resumed[name])
    assert (workdir / "metrics.jsonl").read_text() == (finished / "metrics.jsonl").read_text()
    assert (workdir / "reward.json").read_text() == (finished / "reward.json").read_text()


def test_a_finished_run_is_not_trained_again(files, finished, monkeypatch, capsys):
    monkeypatch.setattr(RewardTrainer, "__init__", None)
    assert main.main(arguments(finished, **files)) == 0
    assert "my_rm_1: ranks" in capsys.readouterr().err
    assert main.main(arguments(finished, **files, rm__epochs=2)) == 2
    assert "another config: rm.epochs" in capsys.readouterr().err


def test_a_finished_run_is_refused_with_other_pairs_or_another_base(files, finished, monkeypatch, capsys):
    monkeypatch.setattr(RewardTrainer, "__init__", None)
    held_out, config = files["rm__held_out"], files["model__checkpoint"] / "config.json"
    changed = {held_out: b"\n".join([row("say 9", "kind", "rude").encode()] * 2), config: config.read_bytes() + b"\n"}
    says = {held_out: "(held_out: 1 changed (1), 20 removed (", config: "(model: 1 changed (config.json))"}
    for path, content in changed.items():
        before = path.read_bytes()
        path.write_bytes(content)
        try:
            assert main.main(arguments(finished, **files)) == 2
        finally:
            path.write_bytes(before)
        assert says[path] in capsys.readouterr().err
    assert main.main(arguments(finished, **files)) == 0


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"rm__train": "none"}, "config.rm.train is not set"),
        ({"rm__train": "gone.jsonl"}, "gone.jsonl: cannot be read"),
        ({"rm__train": "organism:all"}, "write organism:train[:COUNT]"),
        ({"rm__held_out": "TRAIN"}, "no pair is left (chosen is no text: 1, both answers are the same: 1, a prompt of"),
        ({"rm__max_tokens": "1"}, "config.rm.train: no pair is left"),
        ({"rm__template": "no place"}, "text that holds {prompt} once"),
        ({"rm__name": "Tr/x"}, "part of metrics' names"),
        ({"rm__accumulation": "3"}, "does not divide into 3 slices"),
        ({"rm__held_out_share": "1.5"}, "above 0 and below 1"),
        ({"seeds": "1,2"}, "trains one model"),
        ({"mesh__fsdp": "2"}, "config.mesh.fsdp=2: mesh (data=-1, fsdp=2, tensor=1) does not fit 1 device"),
        ({"model__checkpoint": "SMALL"}, "its tokenizer gives token"),
    ],
)
def test_bad_input_is_one_line(files, tmp_path, capsys, changes, says):
    changes = {name: files["rm__train"] if value == "TRAIN" else value for name, value in changes.items()}
    if changes.get("model__checkpoint") == "SMALL":
        changes["model__checkpoint"] = tiny.save_reward_model(tmp_path / "small", tiny.reward_model(vocab_size=100))
    assert main.main(arguments(tmp_path / "run", **files | changes)) == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert says in last and not (tmp_path / "run" / "checkpoints").exists()


def test_prompts_are_held_out_where_no_file_is_named(files):
    changes = {"rm.train": str(files["rm__train"]), "rm.held_out_share": "0.3"}
    config = config_files.load("configs/rm_gpt2.py", changes.items())
    encode = GPT2PairTokenizer(tiny.reward_tokenizer(), template=HH_TEMPLATE, max_length=64)
    learned, held_out = load_sets(config, encode, tiny.GPT2_VOCAB)
    apart = {prompt for prompt, *_ in learned.pairs}, {prompt for prompt, *_ in held_out.pairs}
    assert len(apart[0]) + len(apart[1]) == 48 and not apart[0] & apart[1] and 8 <= len(apart[1]) <= 20
    assert learned.facts["dropped"]["held out"] == held_out.facts["used"] == len(held_out.tokens)


def test_the_flag_needs_a_workdir(capsys):
    assert main.main(["--mode=reward", "--config=configs/rm_gpt2.py"]) == 2
    assert "--mode=reward needs --workdir" in capsys.readouterr().err
