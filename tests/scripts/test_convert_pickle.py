"""The conversion keeps every bit of every tensor, runs no code, and leaves nothing that loads when it fails."""

import importlib.util
import json
import os
from pathlib import Path

import pytest
from safetensors import safe_open

from tests import tiny

torch = pytest.importorskip("torch")

SCRIPT = Path(__file__).parents[2] / "scripts" / "convert_pickle.py"


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("convert_pickle", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def tensors():
    """Every dtype of checkpoints, a scalar, an empty one, one in another memory order, three that share memory."""
    block = torch.randn(4, 6)
    return {
        "half": torch.randn(3, 5).half(),
        "brain": torch.randn(3, 5).bfloat16(),
        "double": torch.randn(2).double(),
        "ids": torch.arange(7),
        "mask": torch.tensor([True, False]),
        "scalar": torch.tensor(1.5),
        "empty": torch.zeros(0, 3),
        "turned": torch.randn(5, 2).t(),
        "embeddings": block,
        "tied": block,
        "part": block[1:3],
        "trained": torch.nn.Parameter(torch.randn(2, 2)),
    }


def read(path):
    with safe_open(path, framework="pt") as file:
        return {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118


def assert_same(found, expected):
    assert set(found) == set(expected)
    for key, tensor in expected.items():
        assert found[key].dtype == tensor.dtype and found[key].shape == tensor.shape
        assert torch.equal(found[key], tensor), key


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("wrapper", [None, "state_dict"])
def test_every_tensor_is_kept(script, tmp_path, zipped, wrapper):
    state = tensors()
    content = state if wrapper is None else {wrapper: state, "epoch": 3}
    torch.save(content, tmp_path / "pytorch_model.bin", _use_new_zipfile_serialization=zipped)
    assert script.main([str(tmp_path)]) == 0
    assert_same(read(tmp_path / "model.safetensors"), state)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model.safetensors", "pytorch_model.bin"]


def test_shards_stay_shards_and_load_in_transformers(script, tmp_path, capsys):
    from transformers import AutoModelForSequenceClassification

    model = tiny.reward_model()
    source = tiny.save_reward_model(tmp_path / "source", model)
    (source / "model.safetensors").unlink()
    state = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    keys = sorted(state)
    parts = {"pytorch_model-00001-of-00002.bin": keys[::2], "pytorch_model-00002-of-00002.bin": keys[1::2]}
    for name, part in parts.items():
        torch.save({key: state[key] for key in part}, source / name)
    weight_map = {key: name for name, part in parts.items() for key in part}
    (source / script.INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))

    out = tmp_path / "out"
    assert script.main([str(source), "--out", str(out)]) == 0
    assert "model-00002-of-00002.safetensors" in capsys.readouterr().out
    assert {path.name for path in out.iterdir()} >= {"config.json", "tokenizer.json", "model.safetensors.index.json"}
    assert not list(out.glob("*.bin*")) and sorted(path.name for path in tmp_path.iterdir()) == ["out", "source"]
    loaded = AutoModelForSequenceClassification.from_pretrained(out)
    assert_same(loaded.state_dict(), state)

    from icet_jax.scorers.networks import load_scorer_network

    assert load_scorer_network(out).config.n_layer == 2


def test_adapters_and_converted_checkpoints(script, tmp_path, capsys):
    torch.save({"a": torch.ones(2)}, tmp_path / "adapter_model.bin")
    assert script.main([str(tmp_path)]) == 0
    assert_same(read(tmp_path / "adapter_model.safetensors"), {"a": torch.ones(2)})
    before = (tmp_path / "adapter_model.safetensors").stat().st_mtime_ns
    assert script.main([str(tmp_path)]) == 0
    assert "nothing to convert" in capsys.readouterr().out
    assert (tmp_path / "adapter_model.safetensors").stat().st_mtime_ns == before


class Hostile:
    def __reduce__(self):
        return os.mkdir, (str(Path(os.environ["HOSTILE_TARGET"])),)


def test_no_code_runs(script, tmp_path, monkeypatch, capsys):
    target = tmp_path / "made-by-a-pickle"
    monkeypatch.setenv("HOSTILE_TARGET", str(target))
    torch.save({"a": torch.ones(2), "b": Hostile()}, tmp_path / "pytorch_model.bin")
    assert script.main([str(tmp_path)]) == 2
    assert "not a weights-only pickle" in capsys.readouterr().err and not target.exists()


def test_an_old_torch_is_refused(script, tmp_path, monkeypatch, capsys):
    torch.save({"a": torch.ones(2)}, tmp_path / "pytorch_model.bin")
    monkeypatch.setattr(torch, "__version__", "2.5.1+cpu")
    assert script.main([str(tmp_path)]) == 2
    assert "2.6 or newer" in capsys.readouterr().err


def broken(folder, damage, script):
    """A checkpoint directory with one thing wrong."""
    weights = folder / "pytorch_model.bin"
    torch.save({"a": torch.ones(200), "b": torch.zeros(3)}, weights)
    if damage == "truncated":
        weights.write_bytes(weights.read_bytes()[:-300])
    elif damage == "text":
        weights.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 3\n")
    elif damage == "not tensors":
        torch.save({"a": torch.ones(2), "epoch": 3}, weights)
    elif damage == "a list":
        torch.save([torch.ones(2)], weights)
    elif damage == "sparse":
        torch.save({"a": torch.eye(3).to_sparse()}, weights)
    elif damage == "nothing":
        weights.unlink()
    else:
        weights.rename(folder / "one.bin")
        names = {"missing shard": {"a": "one.bin", "b": "two.bin"}, "other keys": {"a": "one.bin"}}
        names["outside"] = {"a": "../one.bin", "b": "../one.bin"}
        (folder / script.INDEX).write_text(json.dumps({"weight_map": names.get(damage)}))
    return folder


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        ("truncated", "not a weights-only pickle"),
        ("text", "not a weights-only pickle"),
        ("not tensors", "entry 'epoch'"),
        ("a list", "holds a list"),
        ("sparse", "sparse"),
        ("nothing", "holds none of"),
        ("missing shard", "missing shards two.bin"),
        ("other keys", "does not fit"),
        ("outside", "names no shards of this directory"),
        ("no map", "not an index"),
    ],
)
@pytest.mark.parametrize("beside", [True, False])
def test_damage_is_one_line_and_leaves_nothing(script, tmp_path, capsys, damage, says, beside):
    folder = tmp_path / "source"
    folder.mkdir()
    broken(folder, damage, script)
    files = sorted(folder.iterdir())
    assert script.main([str(folder)] + ([] if beside else ["--out", str(tmp_path / "out")])) == 2
    error = capsys.readouterr().err
    assert says in error and error.count("\n") == 1
    assert sorted(folder.iterdir()) == files and [path.name for path in tmp_path.iterdir()] == ["source"]


def test_an_interrupted_write_leaves_nothing_that_loads(script, tmp_path, monkeypatch):
    import safetensors.torch

    torch.save(tensors(), tmp_path / "pytorch_model.bin")

    def stop(state, path, metadata):
        Path(path).write_bytes(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(safetensors.torch, "save_file", stop)
    with pytest.raises(KeyboardInterrupt):
        script.main([str(tmp_path)])
    assert [path.name for path in tmp_path.iterdir()] == ["pytorch_model.bin"]


def test_usage_errors_are_one_line(script, tmp_path, capsys):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    torch.save({"a": torch.ones(2)}, tmp_path / "pytorch_model.bin")
    for arguments, says in (
        ([], "DIR"),
        (["nobody/nothing"], "give --out"),
        ([str(tmp_path), "--revision", "main"], "revisions are of hub ids"),
        ([str(tmp_path), "--out", str(tmp_path / "full")], "is there already"),
    ):
        assert script.main(arguments) == 2
        error = capsys.readouterr().err
        assert says in error and error.count("\n") == 1


def test_a_hub_id_is_fetched_with_its_pickles(script, tmp_path, monkeypatch, capsys):
    import huggingface_hub

    source = tmp_path / "snapshot"
    source.mkdir()
    torch.save({"a": torch.ones(2)}, source / "pytorch_model.bin")
    (source / "config.json").write_text("{}")
    asked = []

    def fetch(name, revision, allow_patterns):
        asked.append((name, revision, "pytorch_model*.bin" in allow_patterns))
        return str(source)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fetch)
    out = tmp_path / "out"
    assert script.main(["somebody/something", "--revision", "abc", "--out", str(out)]) == 0
    assert asked == [("somebody/something", "abc", True)]
    assert sorted(path.name for path in out.iterdir()) == ["config.json", "model.safetensors"]
    assert not (source / "model.safetensors").exists()

    def fail(*args, **keywords):
        raise ConnectionError("no\nnetwork")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    assert script.main(["somebody/something", "--out", str(tmp_path / "other")]) == 2
    assert "not to be had from the hub (ConnectionError: no network)" in capsys.readouterr().err
