"""Finding a checkpoint, and the tokens that end and pad a response."""

import json

import pytest

from icet_jax.checkpoints import source
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


def test_a_directory_has_no_revision(tmp_path):
    with pytest.raises(UserError, match="has no revision .v2.; leave the revision unset"):
        local_directory(tmp_path, "v2")


def test_offline_and_not_in_the_cache_is_one_line(monkeypatch, tmp_path):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(UserError, match="nobody/nothing-7b: no such directory, and not in the local cache") as caught:
        local_directory("nobody/nothing-7b")
    assert "HF_HUB_OFFLINE is set" in str(caught.value) and "\n" not in str(caught.value)


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """Stands in for the download; its `error`, if set, is raised, and `asked` holds what it was called with."""
    import huggingface_hub

    class Hub:
        error = None
        asked = None
        times = 0
        folder = tmp_path

        def download(self, name, **options):
            self.times += 1
            self.asked = {"name": name, **options}
            if self.error is not None:
                raise self.error
            return str(self.folder)

    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.setattr(source, "_RETRY_DELAYS", (0.0, 0.0))
    (tmp_path / "model.safetensors").touch()
    hub = Hub()
    monkeypatch.setattr(huggingface_hub, "snapshot_download", hub.download)
    return hub


def test_only_what_a_loader_reads_is_downloaded(hub, tmp_path):
    from huggingface_hub.utils import filter_repo_objects

    assert local_directory("someone/model") == tmp_path
    files = [
        "config.json", "model-00001-of-00002.safetensors", "model.safetensors.index.json", "tokenizer.model",
        "chat_template.jinja", "merges.txt", "pytorch_model.bin", "consolidated.safetensors", "original/params.json",
        "onnx/model.onnx", "fp16/model.safetensors", "README.md", "adapter_model.safetensors",
    ]  # fmt: skip
    wanted = {name: hub.asked[f"{name}_patterns"] for name in ("allow", "ignore")}
    kept = filter_repo_objects(files, allow_patterns=wanted["allow"], ignore_patterns=wanted["ignore"])
    assert list(kept) == files[:6] + ["adapter_model.safetensors"]


def test_the_revision_and_the_token_of_the_environment_are_used_and_no_other_token(hub, monkeypatch):
    local_directory("someone/model", "abc123")
    assert hub.asked["revision"] == "abc123" and hub.asked["token"] is False
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    local_directory("someone/model")
    assert hub.asked["revision"] is None and hub.asked["token"] == "hf_secret"


def hub_error(kind):
    """An error of the hub's client, made without the HTTP library that this version of it happens to use."""
    from huggingface_hub import errors

    made = getattr(errors, kind).__new__(getattr(errors, kind))
    Exception.__init__(made, "hf_secret was refused\nsecond line")
    return made


@pytest.mark.parametrize(
    ("kind", "says"),
    [
        ("GatedRepoError", "someone/model: is gated: accept its terms at https://huggingface.co/someone/model"),
        ("RevisionNotFoundError", "someone/model: has no revision v9 on the Hugging Face hub"),
        ("RepositoryNotFoundError", "no such repository on the Hugging Face hub .of a private one, set HF_TOKEN."),
        ("HfHubHTTPError", r"download from the Hugging Face hub at revision v9 failed .HfHubHTTPError: HF_TOKEN"),
    ],
)
def test_what_the_hub_says_is_one_line_without_the_token(hub, monkeypatch, kind, says):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    hub.error = hub_error(kind)
    with pytest.raises(UserError, match=says) as caught:
        local_directory("someone/model", "v9")
    assert "hf_secret" not in str(caught.value) and "\n" not in str(caught.value)
    assert caught.value.__cause__ is None and caught.value.__suppress_context__
    passing = kind == "HfHubHTTPError"
    assert (hub.times, caught.value.exit_code) == ((3, 75) if passing else (1, 2))


def test_a_repository_with_pickled_weights_alone_is_told_how_to_convert(hub, tmp_path):
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(UserError, match="scripts/convert_pickle.py someone/model --out DIR, and give DIR"):
        local_directory("someone/model")
    with pytest.raises(UserError, match="scripts/convert_pickle.py someone/model --revision v9 --out DIR"):
        local_directory("someone/model", "v9")


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
    "generation, config, says",
    [
        ({"eos_token_id": 320}, {"eos_token_id": 2}, r"generation_config\.json: eos_token_id is 320, but .* 0\.\.319"),
        ({"eos_token_id": [2, 999]}, {}, r"generation_config\.json: eos_token_id is 999"),
        (None, {"eos_token_id": 320}, r"/config\.json: eos_token_id is 320"),
        (None, {"text_config": {"eos_token_id": 320}}, r"/config\.json: text_config\.eos_token_id is 320"),
    ],
)
def test_an_end_that_the_model_has_no_token_for_is_one_line(tmp_path, generation, config, says):
    if generation is not None:
        (tmp_path / "generation_config.json").write_text(json.dumps(generation))
    with pytest.raises(UserError, match=says):
        generation_tokens(tmp_path, config, 320)
    generation_tokens(tmp_path, config, 1000)


@pytest.mark.parametrize(
    "content, complaint", [("{", "not readable JSON"), ('{"eos_token_id": "x"}', "not a token id")]
)
def test_a_broken_generation_config_is_named(tmp_path, content, complaint):
    (tmp_path / "generation_config.json").write_text(content)
    with pytest.raises(UserError, match=f"generation_config.json: .*{complaint}"):
        generation_tokens(tmp_path, {})
