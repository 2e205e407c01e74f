"""The exported model is the trained policy: adapters merged or masters cast, loadable anywhere."""

import argparse

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import icet_jax
from icet_jax import main
from icet_jax.algorithms.forward import with_policy
from icet_jax.algorithms.settings import from_config
from icet_jax.checkpoints.run_state import RunState
from icet_jax.commands import export
from icet_jax.errors import UserError
from icet_jax.models.adapter_export import save_adapter
from icet_jax.nn.protocols import init_lora
from icet_jax.runs import config_files, model_card, run_dir
from icet_jax.training.loop import initial_state
from tests import tiny
from tests.models.references import load_value_head, merge_lora

torch = pytest.importorskip("torch")


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    return tiny.save_llava(tmp_path_factory.mktemp("checkpoint"))


def a_run(workdir, directory, rank, **more):
    """A run directory whose newest checkpoint holds a changed policy; returns the policy's merged parameters."""
    overrides = {
        "model.checkpoint": str(directory),
        "model.dtype": "float32",
        "lora.rank": str(rank),
        "lora.alpha": "8",
    }
    config = config_files.load(None, (overrides | more).items())
    run_dir.claim(workdir, config)
    vlm = icet_jax.load(directory, adapter=config.model.adapter)
    settings = from_config(config, vlm.sampling(config.lppo.max_new_tokens, config.lppo.temperature))
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


def start_adapter(folder, directory):
    vlm = icet_jax.load(directory)
    fresh = init_lora(vlm.config.lora_shapes(), rank=2, alpha=2.0, targets=("k_proj", "o_proj"), key=jax.random.key(3))
    lora = jax.tree.map(lambda x: 0.2 * jax.random.normal(jax.random.key(x.shape[-1]), x.shape), fresh)
    return save_adapter(folder, lora, vlm.config, base=str(directory))


def test_both_forms_with_a_start_adapter_are_the_trained_policy(tmp_path, directory, capsys):
    begun = start_adapter(tmp_path / "start", directory)
    run = tmp_path / "run"
    policy, _ = a_run(
        run, directory, 4, **{"model.adapter": str(begun), "export.form": "both", "export.shard_gigabytes": "0.0001"}
    )
    assert main.main(["--mode=export", f"--workdir={run}"]) == 0
    said = capsys.readouterr().err
    assert f"{run / 'hf'}: the model" in said and f"{run / 'hf' / 'adapter'}: the model" in said
    assert len(list((run / "hf").glob("model-*.safetensors"))) > 1
    inputs = tiny.batch(tiny.llava_config(), [1, 0, 2])
    real = inputs["attention_mask"] == 1
    expected = np.asarray(policy.logits(inputs))[real]
    full = np.asarray(icet_jax.load(run / "hf").logits(inputs))[real]
    adapted = np.asarray(icet_jax.load(directory, adapter=run / "hf" / "adapter").logits(inputs))[real]
    np.testing.assert_allclose(full, expected, atol=2e-5)
    np.testing.assert_allclose(adapted, expected, atol=2e-5)
    for other in (icet_jax.load(directory), icet_jax.load(directory, adapter=begun)):
        assert np.abs(np.asarray(other.logits(inputs))[real] - expected).max() > 0.1
    for folder, form in ((run / "hf", "full"), (run / "hf" / "adapter", "adapter")):
        assert (folder / "README.md").read_text() == model_card.text(run, form=form)
        assert load_value_head(folder).keys() == {"kernel", "bias"}


def test_a_finished_export_is_left_alone_and_a_missing_one_made(tmp_path, directory):
    run = tmp_path / "run"
    a_run(run, directory, 2, **{"export.form": "adapter"})
    assert main.main(["--mode=export", f"--workdir={run}"]) == 0
    assert [path.name for path in (run / "hf").iterdir()] == ["adapter"]
    config = run_dir.read_config(run / "config.json")
    vlm = icet_jax.load(directory)
    settings = from_config(config, vlm.sampling(config.lppo.max_new_tokens, config.lppo.temperature))
    state = initial_state(config, vlm, settings)  # not the trained one: it must not be written over it

    def write():
        return export.write_exports(config, vlm, state.trainable, settings.lora_scale, run, run / "hf", again=False)

    weights = run / "hf" / "adapter" / "adapter_model.safetensors"
    before = weights.read_bytes()
    assert write() == [run / "hf" / "adapter"] and weights.read_bytes() == before
    (run / "hf" / "adapter" / "adapter_config.json").unlink()
    weights.unlink()
    for path in (run / "hf" / "adapter").iterdir():
        path.unlink()
    write()
    assert weights.is_file() and weights.read_bytes() != before


def test_full_fine_tuning_has_no_adapter(tmp_path, directory):
    a_run(tmp_path, directory, 0, **{"export.form": "both"})
    with pytest.raises(UserError, match="export.form=both needs LoRA"):
        export.run(config_files.load(None), tmp_path, argparse.Namespace(out=None, exit=None, checkpoint=None))


def test_another_place(tmp_path, directory):
    a_run(tmp_path / "run", directory, 2, **{"mesh.fsdp": "16"})  # trained on sixteen devices, exported on one
    options = argparse.Namespace(out=tmp_path / "elsewhere", exit=None, checkpoint=None)
    assert export.run(config_files.load(None), tmp_path / "run", options) == 0
    assert (tmp_path / "elsewhere" / "model.safetensors").is_file() and not (tmp_path / "run" / "hf").exists()


def test_what_cannot_be_exported_is_one_line(tmp_path, directory):
    options, config = argparse.Namespace(out=None, exit=None, checkpoint=None), config_files.load(None)
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
