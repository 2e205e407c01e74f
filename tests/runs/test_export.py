"""The exported model is the trained policy: adapters merged or masters cast, loadable anywhere."""

import argparse

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import icet_jax
from icet_jax import main
from icet_jax.checkpoints.hf_export import load_value_head
from icet_jax.checkpoints.run_state import RunState
from icet_jax.errors import UserError
from icet_jax.lppo.forward import with_policy
from icet_jax.lppo.settings import from_config
from icet_jax.models.family import merge_lora
from icet_jax.runs import config_files, export, run_dir
from icet_jax.runs.training import initial_state
from tests import tiny

torch = pytest.importorskip("torch")


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    return tiny.save_llava(tmp_path_factory.mktemp("checkpoint"))


def a_run(workdir, directory, rank):
    """A run directory whose newest checkpoint holds a changed policy; returns the policy's merged parameters."""
    overrides = {
        "model.checkpoint": str(directory),
        "model.dtype": "float32",
        "lora.rank": str(rank),
        "lora.alpha": "8",
    }
    config = config_files.load(None, overrides.items())
    run_dir.claim(workdir, config)
    vlm = icet_jax.load(directory)
    settings = from_config(config, eos_ids=vlm.eos_ids, suppress_ids=vlm.suppress_ids, pad_id=vlm.pad_id)
    state = initial_state(config, vlm, settings)
    noise = np.random.default_rng(rank)
    trainable = jax.tree.map(
        lambda leaf: leaf + jnp.asarray(noise.normal(size=leaf.shape) * 0.05, leaf.dtype), state.trainable
    )
    state = state._replace(trainable=trainable, iteration=jnp.int32(3))
    checkpoints = RunState(workdir / "checkpoints", keep=2)
    checkpoints.save(3, state, {})
    checkpoints.close()
    params, lora = with_policy(vlm.params, trainable, settings.lora_scale)
    vlm.params = params if lora is None else merge_lora(params, lora)
    return vlm, trainable


@pytest.mark.parametrize("rank", [4, 0], ids=["adapters", "full"])
def test_the_export_is_the_trained_policy(tmp_path, directory, rank, capsys):
    policy, trainable = a_run(tmp_path / "run", directory, rank)
    code = main.main(["--mode=export", f"--workdir={tmp_path / 'run'}", f"--checkpoint={directory}"])
    assert code == 0
    assert "the model after iteration 3 of 94" in capsys.readouterr().err
    out = tmp_path / "run" / "hf"
    inputs = tiny.batch(tiny.llava_config(), [1, 0, 2])
    real = inputs["attention_mask"] == 1
    expected = np.asarray(policy.logits(inputs, 2))[real]
    exported = icet_jax.load(out)
    np.testing.assert_allclose(np.asarray(exported.logits(inputs, 2))[real], expected, atol=1e-5)
    before = np.asarray(icet_jax.load(directory).logits(inputs, 2))[real]
    assert np.abs(before - expected).max() > 0.1, "the policy must have changed"
    for name, array in load_value_head(out).items():
        np.testing.assert_array_equal(array, trainable["value_head"][name])
    assert exported.processor.decode(np.array([[40, 41]]), np.ones((1, 2))) is not None

    from transformers import LlavaForConditionalGeneration

    model = LlavaForConditionalGeneration.from_pretrained(out, dtype=torch.float32).eval()
    with torch.no_grad():
        tensors = {name: torch.from_numpy(array) for name, array in inputs.items()}
        theirs = model(**tensors, vision_feature_layer=2).logits.numpy()
    np.testing.assert_allclose(theirs[real], expected, atol=2e-5)


def test_another_place(tmp_path, directory):
    a_run(tmp_path / "run", directory, 2)
    options = argparse.Namespace(out=tmp_path / "elsewhere")
    assert export.run(config_files.load(None), tmp_path / "run", options) == 0
    assert (tmp_path / "elsewhere" / "model.safetensors").is_file() and not (tmp_path / "run" / "hf").exists()


def test_what_cannot_be_exported_is_one_line(tmp_path, directory):
    options, config = argparse.Namespace(out=None), config_files.load(None)
    with pytest.raises(UserError, match="needs --workdir"):
        export.run(config, None, options)
    with pytest.raises(UserError, match="no run .config.json. is there"):
        export.run(config, tmp_path, options)
    run_dir.claim(tmp_path, config_files.load(None, [("model.checkpoint", str(directory))]))
    with pytest.raises(UserError, match="has no checkpoints to export"):
        export.run(config, tmp_path, options)
    (tmp_path / "checkpoints").mkdir()
    with pytest.raises(UserError, match="no complete checkpoint yet"):
        export.run(config, tmp_path, options)
