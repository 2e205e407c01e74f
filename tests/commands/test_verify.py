"""Verification passes on a faithful port and fails on each kind of mistake."""

import dataclasses
import json
import sys

import numpy as np
import pytest
from PIL import Image

from icet_jax import main
from icet_jax.commands import verify
from icet_jax.models.base import processor, reference
from icet_jax.nn import layers
from tests import tiny, tiny_families, tiny_qwen, tiny_smolvlm

torch = pytest.importorskip("torch")


def verified(directory, *more):
    return main.main(["--mode=verify", f"--checkpoint={directory}", *more])


def test_a_faithful_port_passes(tmp_path, capsys):
    directory = tiny.save_llava(tmp_path / "model", dtype="float16")
    Image.new("RGBA", (50, 20), (1, 2, 3, 4)).save(tmp_path / "mine.png")
    assert verified(directory, f"--image={tmp_path / 'mine.png'}", "--prompt=and this one?", "--exits=1,4") == 0
    table = capsys.readouterr().out
    for line in ("token ids", "pixels", "hidden states 0..4", "logits, exit 4", "32 greedy tokens, exit 1"):
        assert line in table
    assert "FAIL" not in table and "agrees with transformers" in table


def test_a_faithful_port_of_llava_next_passes(tmp_path, capsys):
    directory = tiny_families.save_llava_next(tmp_path, dtype="bfloat16")
    assert verified(directory, "--exits=1,3") == 0
    table = capsys.readouterr().out
    lines = ("token ids", "pixels", "image sizes", "hidden states 0..4", "logits, exit 3", "greedy tokens, exit 1")
    for line in lines:
        assert line in table
    assert "FAIL" not in table and "captured intermediates" not in table


def test_a_faithful_port_of_mllama_passes(tmp_path, capsys):
    assert verified(tiny_families.save_mllama(tmp_path), "--exits=2,6") == 0
    table = capsys.readouterr().out
    lines = (
        "token ids",
        "pixels",
        "aspect ratio ids",
        "aspect ratio mask",
        "cross attention mask",
        "hidden states 0..6",
    )
    for line in (*lines, "logits, exit 2", "greedy tokens, exit 6"):
        assert line in table
    assert "FAIL" not in table and "each block's output, as this transformers has it" in table


@pytest.mark.parametrize(
    ("tiny_family", "sizes", "lines"),
    [
        # Two wide pictures, which need fewer tiles than one group has.
        (tiny_smolvlm, [(10, 100), (20, 112)], ("pixel attention mask", "greedy tokens, exit 1")),
        # One of them has more patches than any of the built-in pictures.
        (tiny_qwen, [(2, 300), (20, 112)], ("image grid thw", "mm token type ids")),
    ],
    ids=["smolvlm", "qwen2_5_vl"],
)
def test_a_faithful_port_passes_with_pictures_of_other_sizes(tmp_path, capsys, tiny_family, sizes, lines):
    directory = tiny_family.save(tmp_path / "model", tiny_family.model(num_hidden_layers=2))
    pictures = [tmp_path / f"{number}.png" for number in range(2)]
    for path, image in zip(pictures, tiny_families.pictures(sizes), strict=True):
        image.save(path)
    assert verified(directory, "--exits=1,4", *(f"--image={path}" for path in pictures)) == 0
    table = capsys.readouterr().out
    for line in ("token ids", "pixels", "hidden states 0..4", *lines):
        assert line in table
    assert "FAIL" not in table


def test_random_rows_where_idefics3_has_no_tokenizer(tmp_path, capsys):
    """Some tiles of these rows have padding."""
    model = tiny_smolvlm.model("idefics3", tied=True, num_hidden_layers=2)
    assert verified(tiny_smolvlm.save(tmp_path, model, processor=False), "--exits=2") == 0
    assert "skipped: no tokenizer files" in capsys.readouterr().out


def test_random_rows_where_qwen_has_no_tokenizer(tmp_path, capsys):
    model = tiny_qwen.model(tied=True, num_hidden_layers=2)
    assert verified(tiny_qwen.save(tmp_path, model, processor=False), "--exits=2") == 0
    assert "skipped: no tokenizer files" in capsys.readouterr().out


@pytest.mark.parametrize("rule", ["E2", "E5"])
def test_random_rows_where_mllama_has_no_tokenizer(tmp_path, capsys, rule):
    directory = tiny_families.save_mllama(tmp_path, processor=False)
    assert verified(directory, "--exits=2", f"--config.model.exit_rule={rule}") == 0
    assert "skipped: no tokenizer files" in capsys.readouterr().out


def test_other_intermediates_fail(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(reference, "transformers_capture", lambda directory: "input")
    assert verified(tiny_families.save_mllama(tmp_path), "--exits=6") == 1
    failed = capsys.readouterr().out.splitlines()[-1]
    assert "logits, exit 6" in failed and "hidden states" not in failed and "pixels" not in failed


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_weights_that_magnify_rounding_pass_in_both_dtypes(tmp_path, capsys, dtype):
    """Attention with large keys makes float32 results of correct programs differ by more than any fixed tolerance."""
    model = tiny.llava()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if name.endswith(("q_proj.weight", "k_proj.weight")):
                weight.mul_(6.0)
    directory = tiny.save_llava(tmp_path, model)
    assert verified(directory, "--exits=1,3", f"--config.model.dtype={dtype}") == 0
    table = capsys.readouterr().out
    assert "logits, exit 3" in table and "FAIL" not in table
    allowed = float(next(line for line in table.splitlines() if "logits, exit 1" in line).split()[4])
    assert allowed > (1.0 if dtype == "bfloat16" else 2e-5), table


def test_random_rows_where_llava_next_has_no_tokenizer(tmp_path, capsys):
    directory = tiny_families.save_llava_next(tmp_path, processor=False)
    assert verified(directory, "--exits=2") == 0
    assert "skipped: no tokenizer files" in capsys.readouterr().out


def test_a_wrong_activation_fails(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(layers.ACTIVATIONS, "quick_gelu", layers.gelu_erf)
    model = tiny.llava(vision={"intermediate_size": 41})  # a shape of its own: nothing is compiled for it yet
    assert verified(tiny.save_llava(tmp_path, model, processor=False), "--exits=4") == 1
    table = capsys.readouterr().out
    assert "skipped: no tokenizer files" in table
    failed = table.splitlines()[-1]
    assert failed.startswith("FAILED") and "hidden states" in failed and "logits, exit 4" in failed


def test_another_template_or_normalisation_shows(tmp_path, capsys, monkeypatch):
    directory = tiny.save_llava(tmp_path)
    template = tiny.CHAT_TEMPLATE.replace("USER: ", "Human: ")
    (directory / "chat_template.json").write_text(json.dumps({"chat_template": template}))
    (directory / "chat_template.jinja").write_text(template)
    monkeypatch.setattr(processor, "own_template", lambda *_: None)
    assert verified(directory, "--exits=4") == 1
    assert "token ids" in capsys.readouterr().out.splitlines()[-1]


def test_without_torch_one_line_says_what_to_install(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    assert verified(tmp_path) == 2
    assert "which is missing: pip install torch" in capsys.readouterr().err


def answers(**changes):
    noise = np.random.default_rng(0)
    hidden, logits = noise.normal(size=(3, 1, 4, 5)), noise.normal(size=(2, 6, 7))
    base = verify.Answers(hidden=hidden, logits={2: logits}, tokens={2: noise.integers(0, 7, (2, 32))})
    return dataclasses.replace(base, **changes)


def failures(ours, error=0.0, gap_of_token_5=1.0, tolerance=2e-5):
    """Names the failed checks, where transformers in the compared dtype is `error` from the yardstick."""
    theirs, gaps = answers(), np.full((2, 32), 1.0)
    gaps[1, 5] = gap_of_token_5
    expected = verify.Expected(theirs.hidden, theirs.logits, theirs.tokens, np.full(3, error), {2: error}, {2: gaps})
    real = np.ones((2, 6), bool)
    real[0, 0] = False
    return [check.what for check in verify.compare(ours, expected, real, tolerance) if not check.passed]


def test_only_what_differs_fails():
    theirs = answers()
    assert failures(answers()) == []
    hidden = theirs.hidden.copy()
    hidden[1, 0, 2, 3] += 1e-4
    assert failures(answers(hidden=hidden)) == ["hidden states 0..2 (worst: 1)"]
    assert failures(answers(hidden=hidden), error=3e-5) == [], "transformers' own error is of this size"
    assert failures(answers(hidden=hidden), error=1e-5) == ["hidden states 0..2 (worst: 1)"]
    assert failures(answers(hidden=hidden), tolerance=3e-2) == []
    logits = theirs.logits[2].copy()
    logits[0, 0] += 5  # padding
    logits[1, 1, 1] += 1e-5  # within the tolerance
    assert failures(answers(logits={2: logits})) == []
    logits[1, 1, logits[1, 1].argmin()] = 9
    assert failures(answers(logits={2: logits})) == ["logits, exit 2", "likeliest token, exit 2"]


def test_a_token_may_differ_at_a_tie_alone():
    tokens = answers().tokens[2].copy()
    tokens[1, 5:] += 1
    assert failures(answers(tokens={2: tokens})) == ["32 greedy tokens, exit 2"]
    assert failures(answers(tokens={2: tokens}), gap_of_token_5=1e-6) == []


def test_an_adapter_is_not_left_out_in_silence(tmp_path, capsys):
    assert verified(tmp_path, f"--config.model.adapter={tmp_path}") == 2
    assert "export the model with its adapter" in capsys.readouterr().err
