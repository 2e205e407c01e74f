"""PEFT adapters written here load in peft, and a start adapter is part of whatever is exported."""

import json
import os
import signal
import subprocess
import sys
import time
import warnings

import jax
import numpy as np
import pytest

torch = pytest.importorskip("torch")
peft = pytest.importorskip("peft")

from icet_jax.errors import UserError  # noqa: E402
from icet_jax.models.adapter_export import save_adapter  # noqa: E402
from icet_jax.models.adapters import read_adapter  # noqa: E402
from icet_jax.models.loading import load_vlm  # noqa: E402
from icet_jax.models.saving import save_vlm  # noqa: E402
from icet_jax.nn.heads import init_value_head  # noqa: E402
from tests import tiny  # noqa: E402
from tests.checkpoints.test_round_trip import hf_load, hf_logits, tensors  # noqa: E402
from tests.models import parity  # noqa: E402
from tests.models.references import load_value_head, merge_lora  # noqa: E402
from tests.models.test_adapters import TARGETS, random_lora  # noqa: E402

START = ("k_proj", "v_proj")


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return tiny.save_llava(tmp_path_factory.mktemp("source"), tiny.llava(seed=2), processor=False)


@pytest.fixture(scope="module")
def loaded(source):
    return load_vlm(source)


@pytest.fixture(scope="module")
def inputs(loaded):
    return tiny.batch(tiny.llava_config(), [1, 0, 2])


def start_adapter(folder, loaded):
    """A PEFT directory to start from: other targets, rank and scale than the adapters that are trained on it."""
    from icet_jax.nn.protocols import init_lora

    fresh = init_lora(loaded.config.lora_shapes(), rank=3, alpha=2.0, targets=START, key=jax.random.key(5))
    lora = jax.tree.map(lambda x: 0.2 * jax.random.normal(jax.random.key(x.shape[-1]), x.shape), fresh)
    return save_adapter(folder, lora, loaded.config, base="x/y")


def peft_logits(source, directory, inputs):
    """The base with the adapter in peft, which must not miss a tensor."""
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        model = peft.PeftModel.from_pretrained(hf_load(source), directory).eval()
    assert not [warning for warning in said if "missing" in str(warning.message)]
    return hf_logits(model, inputs)


def far(ours, theirs, inputs):
    return np.abs(ours - theirs)[inputs["attention_mask"] == 1].max()


def test_peft_computes_our_merged_model(tmp_path, source, loaded, inputs):
    lora = random_lora(loaded.config)
    save_adapter(tmp_path, lora, loaded.config, base=str(source))
    ours = parity.our_logits(loaded, inputs, params=merge_lora(loaded.params, lora))
    parity.assert_logits_agree(ours, peft_logits(source, tmp_path, inputs), inputs)
    assert far(ours, parity.our_logits(loaded, inputs), inputs) > 0.1


def test_transformers_load_adapter_computes_it_too(tmp_path, source, loaded, inputs):
    lora = random_lora(loaded.config)
    save_adapter(tmp_path, lora, loaded.config, base=str(source))
    model = hf_load(source)
    model.load_adapter(str(tmp_path))
    ours = parity.our_logits(loaded, inputs, params=merge_lora(loaded.params, lora))
    parity.assert_logits_agree(ours, hf_logits(model, inputs), inputs)


def test_the_files_are_what_every_version_reads(tmp_path, loaded):
    head = init_value_head(32)
    lora = random_lora(loaded.config)
    out = save_adapter(
        tmp_path / "a",
        lora,
        loaded.config,
        base="x/y",
        revision="v1",
        value_head=head,
        texts={"README.md": "hi\n"},
    )
    config = json.loads((out / "adapter_config.json").read_text())
    assert config == {
        "peft_type": "LORA", "r": 4, "lora_alpha": 8, "lora_dropout": 0.0, "bias": "none", "fan_in_fan_out": False,
        "inference_mode": True, "task_type": None, "base_model_name_or_path": "x/y", "revision": "v1",
        "target_modules": r"(model\.language_model|language_model\.model)\.layers\."
        r"(\d+\.mlp\.down_proj|\d+\.self_attn\.q_proj|\d+\.self_attn\.v_proj)",
    }  # fmt: skip
    from safetensors.numpy import load_file

    state = load_file(out / "adapter_model.safetensors")
    assert len(state) == 2 * 2 * 3 * len(TARGETS)
    roots = ("base_model.model.language_model.model", "base_model.model.model.language_model")
    old, new = (f"{root}.layers.1.mlp.down_proj.lora_B.weight" for root in roots)
    np.testing.assert_array_equal(state[old], state[new])
    np.testing.assert_array_equal(state[old], np.asarray(lora.weights["down_proj"]["b"])[1].T)
    assert load_value_head(out)["kernel"].shape == (32, 1) and (out / "README.md").read_text() == "hi\n"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a"]


def test_an_adapter_comes_back_as_it_went(tmp_path, loaded):
    lora = random_lora(loaded.config)
    adapter = read_adapter(save_adapter(tmp_path / "a", lora, loaded.config, base="x/y"), loaded.config)
    assert adapter.targets == tuple(sorted(TARGETS)) and adapter.scale == lora.scale and adapter.rank == 4
    for side, array in zip("ab", adapter.factors("v_proj", 2), strict=True):
        np.testing.assert_array_equal(array, np.asarray(lora.weights["v_proj"][side])[2])


def test_foreign_folders_are_refused(tmp_path, loaded):
    lora = random_lora(loaded.config)
    (tmp_path / "thesis.tex").write_text("x")
    with pytest.raises(UserError, match="contains something other"):
        save_adapter(tmp_path, lora, loaded.config, base="x/y")


def test_both_exports_of_a_run_that_began_from_an_adapter_are_its_final_model(tmp_path, source, loaded, inputs):
    begun = load_vlm(source, adapter=start_adapter(tmp_path / "start", loaded))
    lora = random_lora(loaded.config)  # shares v_proj with the start adapter
    ours = parity.our_logits(begun, inputs, params=merge_lora(begun.params, lora))
    common = {"start": begun.adapter, "lora": lora}
    merged = save_vlm(tmp_path / "m", begun.config, begun.params, source_dir=source, trained=(), **common)
    parity.assert_logits_agree(ours, hf_logits(hf_load(merged), inputs), inputs)
    compared = save_vlm(tmp_path / "c", begun.config, begun.params, source_dir=source, **common)
    assert tensors(compared) == tensors(merged)
    adapter = save_adapter(tmp_path / "a", lora, loaded.config, base=str(source), start=begun.adapter)
    assert json.loads((adapter / "adapter_config.json").read_text())["r"] == 7
    parity.assert_logits_agree(ours, peft_logits(source, adapter, inputs), inputs)
    for part in (parity.our_logits(begun, inputs), parity.our_logits(loaded, inputs)):
        assert far(ours, part, inputs) > 0.1


def test_a_model_with_a_start_adapter_alone_is_saved_with_it(tmp_path, source, loaded, inputs):
    begun = load_vlm(source, adapter=start_adapter(tmp_path / "start", loaded), dtype="bfloat16")
    out = save_vlm(tmp_path / "out", begun.config, begun.params, source_dir=source, start=begun.adapter)
    exact = load_vlm(source, adapter=tmp_path / "start")
    parity.assert_logits_agree(parity.our_logits(exact, inputs), hf_logits(hf_load(out), inputs), inputs)


KILLED = """
import sys, time
import numpy as np
from icet_jax.checkpoints import safetensors_io
from icet_jax.models.saving import save_vlm
from icet_jax.models.loading import load_vlm
loaded = load_vlm(sys.argv[1])
real, count = safetensors_io.TensorReader.read, 0
def read(self, key):
    global count
    count += 1
    if count == 40:
        print("half", flush=True)
        time.sleep(600)
    return real(self, key)
safetensors_io.TensorReader.read = read
save_vlm(sys.argv[2], loaded.config, loaded.params, source_dir=sys.argv[1], max_shard_bytes=40_000)
"""


def test_a_killed_export_leaves_nothing_to_load_and_the_next_one_cleans_up(tmp_path, source, loaded):
    out = tmp_path / "hf"
    environment = os.environ | {"JAX_PLATFORMS": "cpu"}
    process = subprocess.Popen(
        [sys.executable, "-c", KILLED, str(source), str(out)], stdout=subprocess.PIPE, text=True, env=environment
    )
    assert process.stdout.readline() == "half\n"
    time.sleep(0.1)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not out.exists()
    (left,) = tmp_path.iterdir()
    assert list(left.glob("*.safetensors")) and not (left / "config.json").exists()
    with pytest.raises(UserError, match="config.json: not found"):
        load_vlm(left)
    save_vlm(out, loaded.config, loaded.params, source_dir=source)
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]
    assert tensors(out) == tensors(source)
