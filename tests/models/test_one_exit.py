"""A model with one exit alone has, here and in transformers, the logits of the whole model at that exit."""

import json

import numpy as np
import pytest

import icet_jax
from icet_jax.checkpoints.safetensors_io import TensorReader, safetensors_files
from icet_jax.errors import UserError
from icet_jax.models.loading import load_shapes
from icet_jax.models.saving import save_vlm
from tests import tiny, tiny_families

torch = pytest.importorskip("torch")

IMAGES = [2, 0, 1]
SIZES = [[(40, 60)], [], [(28, 28)]]


def llava(folder, strategy="default"):
    """A LLaVA checkpoint and inputs for it."""
    model = tiny.llava(seed=11)
    model.config.vision_feature_select_strategy = strategy
    model.config.image_seq_length = 17 if strategy == "full" else 16
    tiny.save_llava(folder, model, processor=False)
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"vision_feature_select_strategy": strategy}))
    return tiny.batch(model.config, IMAGES)


def llava_next(folder):
    """A LLaVA-NeXT checkpoint and inputs for it."""
    model = tiny_families.llava_next(seed=12)
    tiny_families.save_llava_next(folder, model)
    return tiny_families.next_batch(model.config, SIZES)


CASES = {
    "llava": llava,
    "llava with the class token": lambda folder: llava(folder, "full"),
    "llava_next": llava_next,
}


@pytest.fixture(scope="module", params=CASES)
def whole(request, tmp_path_factory):
    """(directory, model, inputs) of a whole model with exits 1..4."""
    directory = tmp_path_factory.mktemp("whole")
    inputs = CASES[request.param](directory)
    return directory, icet_jax.load(directory), inputs


def in_transformers(directory, inputs, **options):
    """transformers' logits of a directory, which must have every tensor that the class needs, and no other."""
    from transformers import AutoModelForImageTextToText

    model, report = AutoModelForImageTextToText.from_pretrained(
        directory, dtype=torch.float32, output_loading_info=True
    )
    assert not any(report.values()), report
    with torch.no_grad():
        tensors = {name: torch.from_numpy(array) for name, array in inputs.items()}
        return model.eval()(**tensors, **options).logits.numpy(), model


@pytest.mark.parametrize("exit_layer", [1, 2, 3, 4], ids=["first", "second", "default", "last"])
def test_the_logits_are_those_of_the_whole_model_at_that_exit(tmp_path, whole, exit_layer):
    directory, vlm, inputs = whole
    real = inputs["attention_mask"] == 1
    cut = vlm.save(tmp_path / "cut", exit_layer=exit_layer)

    theirs, model = in_transformers(cut, inputs)
    theirs_whole, _ = in_transformers(directory, inputs, vision_feature_layer=exit_layer)
    np.testing.assert_array_equal(theirs[real], theirs_whole[real])
    ours_whole = np.asarray(vlm.logits(inputs, exit_layer))[real]
    np.testing.assert_allclose(theirs[real], ours_whole, atol=1e-5)
    tower = model.model.vision_tower
    assert model.config.vision_config.num_hidden_layers == exit_layer == len(tower.encoder.layers)

    loaded = icet_jax.load(cut)
    assert (loaded.num_exits, loaded.default_exit) == (exit_layer, exit_layer)
    np.testing.assert_allclose(np.asarray(loaded.logits(inputs))[real], ours_whole, atol=1e-6)
    for earlier in range(1, exit_layer):  # an earlier exit can still be measured
        expected = np.asarray(vlm.logits(inputs, earlier))[real]
        np.testing.assert_allclose(np.asarray(loaded.logits(inputs, earlier))[real], expected, atol=1e-6)
        assert np.abs(expected - ours_whole).max() > 0.05, "the exits must matter"


def tensors(directory):
    """{key: bytes} of a directory's tensors."""
    with TensorReader(safetensors_files(directory)) as reader:
        return {key: (reader.dtypes[key], reader.read(key).tobytes()) for key in reader.shapes}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_other_tensors_are_the_sources_bytes_and_those_behind_the_exit_are_not_written(tmp_path, dtype):
    directory = tiny.save_llava(tmp_path / "whole", dtype="float16", layout="native5", shards=3)
    icet_jax.load(directory, dtype=dtype).save(tmp_path / "cut", exit_layer=2)
    tiny.save_llava(tmp_path / "old", dtype="float16")
    source = tensors(tmp_path / "old")
    behind = {key for key in source if "encoder.layers.2." in key or "encoder.layers.3." in key}
    assert len(behind) == 2 * 16
    assert tensors(tmp_path / "cut") == {key: value for key, value in source.items() if key not in behind}
    config = json.loads((tmp_path / "cut" / "config.json").read_text())
    assert config["vision_feature_layer"] == -1 and config["vision_config"]["num_hidden_layers"] == 2
    before = json.loads((directory / "config.json").read_text())
    changed = {"vision_feature_layer", "vision_config", "text_config"}  # the text config gets a dtype
    assert {key: config[key] for key in before if key not in changed} == {
        key: before[key] for key in before if key not in changed
    }


def test_an_exit_of_a_model_with_one_exit(tmp_path):
    directory = tiny.save_llava(tmp_path / "whole")
    vlm = icet_jax.load(directory)
    cut = icet_jax.load(vlm.save(tmp_path / "cut", exit_layer=3))
    again = cut.save(tmp_path / "again", exit_layer=3)
    assert tensors(again) == tensors(cut.directory)
    assert (again / "config.json").read_text() == (cut.directory / "config.json").read_text()
    shorter = cut.save(tmp_path / "shorter", exit_layer=2)
    assert tensors(shorter) == tensors(vlm.save(tmp_path / "direct", exit_layer=2))
    with pytest.raises(UserError, match=r"exit_layer: exit 4 is out of range; this model has exits 1\.\.3"):
        cut.save(tmp_path / "longer", exit_layer=4)
    assert not (tmp_path / "longer").exists()


@pytest.mark.parametrize("exit_layer", [0, -1, 5, True])
def test_there_is_no_such_exit(tmp_path, exit_layer):
    vlm = icet_jax.load(tiny.save_llava(tmp_path / "whole"))
    with pytest.raises(UserError, match=r"exit_layer: .*this model has exits 1\.\.4"):
        vlm.save(tmp_path / "cut", exit_layer=exit_layer)
    assert not (tmp_path / "cut").exists()


def test_llama_32_vision_is_refused_with_the_reason(tmp_path):
    vlm = icet_jax.load(tiny_families.save_mllama(tmp_path / "whole"))
    for exit_layer in (1, vlm.default_exit):
        with pytest.raises(UserError, match="config.json cannot name an exit: .*fixed blocks.*global blocks"):
            vlm.save(tmp_path / "cut", exit_layer=exit_layer)
    assert not (tmp_path / "cut").exists()


def test_files_are_copied_without_loading_the_weights(tmp_path):
    directory = tiny.save_llava(tmp_path / "whole", dtype="bfloat16")
    checkpoint = load_shapes(directory)
    assert (checkpoint.model.num_exits, checkpoint.model.default_exit) == (4, 3)
    copied = save_vlm(
        tmp_path / "copied", checkpoint.config, checkpoint.params, source_dir=directory, trained=(), exit_layer=1
    )
    saved = icet_jax.load(directory).save(tmp_path / "saved", exit_layer=1)
    assert tensors(copied) == tensors(saved)
    assert (copied / "config.json").read_text() == (saved / "config.json").read_text()
