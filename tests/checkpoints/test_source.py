"""Finding a checkpoint, and the tokens that end and pad a response."""

import json

import pytest

from icet_jax.checkpoints.source import generation_tokens, local_directory
from icet_jax.errors import UserError


def test_a_directory_is_itself(tmp_path):
    assert local_directory(tmp_path) == tmp_path and local_directory(str(tmp_path)) == tmp_path


@pytest.mark.parametrize("name", ["/no/such/place", "./nowhere", "a/b/c", "with space", ""])
def test_no_directory_and_no_hub_id(name):
    with pytest.raises(UserError, match="no such directory; give"):
        local_directory(name or "/no/such")


def test_a_file_is_no_checkpoint(tmp_path):
    (tmp_path / "model.safetensors").touch()
    with pytest.raises(UserError, match="a file; give the checkpoint's directory"):
        local_directory(tmp_path / "model.safetensors")


def test_the_hub_out_of_reach_is_one_line(monkeypatch, tmp_path):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(UserError, match="nobody/nothing-7b: no such directory, and not to be had") as caught:
        local_directory("nobody/nothing-7b")
    assert "\n" not in str(caught.value)


def test_the_hub_gets_safetensors_alone(monkeypatch, tmp_path):
    import huggingface_hub

    asked = {}
    monkeypatch.setattr(
        huggingface_hub,
        "snapshot_download",
        lambda name, allow_patterns: asked.update({name: allow_patterns}) or tmp_path,
    )
    assert local_directory("someone/model") == tmp_path
    assert "*.safetensors" in asked["someone/model"] and "*.bin" not in asked["someone/model"]


@pytest.mark.parametrize(
    "generation, config, expected",
    [
        ({"eos_token_id": 2, "pad_token_id": 32001}, {"pad_token_id": 5}, ((2,), 32001)),
        ({"eos_token_id": [128001, 128009]}, {}, ((128001, 128009), 128001)),
        (None, {"pad_token_id": 7, "text_config": {"eos_token_id": 9}}, ((9,), 7)),
        (None, {"eos_token_id": None, "text_config": None}, ((2,), 2)),
    ],
)
def test_generation_tokens(tmp_path, generation, config, expected):
    if generation is not None:
        (tmp_path / "generation_config.json").write_text(json.dumps(generation))
    assert generation_tokens(tmp_path, config) == expected


@pytest.mark.parametrize(
    "content, complaint", [("{", "not readable JSON"), ('{"eos_token_id": "x"}', "not a token id")]
)
def test_a_broken_generation_config_is_named(tmp_path, content, complaint):
    (tmp_path / "generation_config.json").write_text(content)
    with pytest.raises(UserError, match=f"generation_config.json: .*{complaint}"):
        generation_tokens(tmp_path, {})
