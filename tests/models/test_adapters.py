"""LoRA: merged exports, and PEFT adapters merged at load."""

import json

import jax
import numpy as np
import pytest

torch = pytest.importorskip("torch")

from icet_jax.errors import UserError  # noqa: E402
from icet_jax.models.adapters import read_adapter  # noqa: E402
from icet_jax.models.loading import load_vlm  # noqa: E402
from icet_jax.models.saving import save_vlm  # noqa: E402
from icet_jax.nn.protocols import init_lora  # noqa: E402
from tests import tiny  # noqa: E402
from tests.checkpoints.test_round_trip import hf_load, hf_logits, tensors  # noqa: E402
from tests.models import parity  # noqa: E402
from tests.models.references import merge_lora  # noqa: E402

TARGETS = ("q_proj", "v_proj", "down_proj")
REGEX = r"(model\.language_model|language_model\.model)\.layers\.\d+\.(self_attn|mlp)\.(q_proj|v_proj|down_proj)"


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """LLaVA whose decoder projections have biases, which adapters leave alone."""
    model = tiny.llava(seed=2, attention_bias=True, mlp_bias=True)
    return tiny.save_llava(tmp_path_factory.mktemp("source"), model, processor=False)


def random_lora(config, targets=TARGETS):
    lora = init_lora(config.lora_shapes(), rank=4, alpha=8.0, targets=targets, key=jax.random.key(0))
    leaves, structure = jax.tree.flatten(lora)
    keys = jax.random.split(jax.random.key(1), len(leaves))
    return jax.tree.unflatten(
        structure, [0.1 * jax.random.normal(key, x.shape) for key, x in zip(keys, leaves, strict=True)]
    )


def test_merged_export_matches_our_merged_model(tmp_path, source):
    loaded = load_vlm(source)
    lora = random_lora(loaded.config)
    out = save_vlm(tmp_path / "out", loaded.config, loaded.params, source_dir=source, lora=lora)
    model = hf_load(out)
    inputs = tiny.batch(model.config, [1, 0, 2])
    theirs = hf_logits(model, inputs)
    merged = parity.our_logits(loaded, inputs, params=merge_lora(loaded.params, lora))
    parity.assert_logits_agree(merged, theirs, inputs)
    assert np.abs(theirs - parity.our_logits(loaded, inputs))[inputs["attention_mask"] == 1].max() > 0.1
    touched = {key for key, tensor in tensors(out).items() if tensor != tensors(source)[key]}
    assert len(touched) == 3 * len(TARGETS)
    assert all(any(target in key for target in TARGETS) and "language_model" in key for key in touched)


def test_merge_is_float32_arithmetic_on_the_source_not_on_rounded_parameters(tmp_path):
    model = tiny.llava(seed=1)
    source = tiny.save_llava(tmp_path / "in", model, dtype="float16", processor=False)
    whole, half = load_vlm(source), load_vlm(source, dtype="bfloat16")
    lora = random_lora(whole.config)
    exports = [
        save_vlm(tmp_path / name, loaded.config, loaded.params, source_dir=source, lora=lora)
        for name, loaded in (("whole", whole), ("half", half))
    ]
    assert tensors(exports[0]) == tensors(exports[1])
    assert {dtype for dtype, _, _ in tensors(exports[0]).values()} == {np.dtype(np.float16)}


def test_an_adapter_that_adds_nothing_changes_no_byte(tmp_path, source):
    loaded = load_vlm(source)
    lora = init_lora(loaded.config.lora_shapes(), rank=4, alpha=8.0, targets=TARGETS, key=jax.random.key(0))
    out = save_vlm(tmp_path / "out", loaded.config, loaded.params, source_dir=source, lora=lora)
    assert tensors(out) == tensors(source)


def peft_adapter(directory, source, **options):
    """A PEFT adapter on the decoder with random halves; returns the adapted torch model."""
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(**({"r": 4, "lora_alpha": 8, "target_modules": REGEX} | options))
    torch.manual_seed(0)
    model = peft.get_peft_model(hf_load(source), config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.copy_(0.1 * torch.randn_like(parameter))
    model.save_pretrained(directory)
    return model


@pytest.mark.parametrize("names", ["new", "old", "both"])
@pytest.mark.parametrize("rslora", [False, True])
def test_peft_adapter_is_merged_at_load(tmp_path, source, names, rslora):
    from safetensors.torch import load_file, save_file

    model = peft_adapter(tmp_path, source, use_rslora=rslora)
    file = tmp_path / "adapter_model.safetensors"
    new = load_file(file)
    old = {
        key.replace("model.model.language_model.", "model.language_model.model."): x.clone() for key, x in new.items()
    }
    assert set(new).isdisjoint(old)
    save_file({"new": new, "old": old, "both": new | old}[names], file, metadata={"format": "pt"})
    inputs = tiny.batch(model.config, [1, 0])
    ours = parity.our_logits(load_vlm(source, adapter=tmp_path), inputs)
    parity.assert_logits_agree(ours, hf_logits(model, inputs), inputs)
    assert np.abs(ours - parity.our_logits(load_vlm(source), inputs))[inputs["attention_mask"] == 1].max() > 0.1


def test_layers_without_tensors_are_left_alone(tmp_path, source):
    peft_adapter(tmp_path, source, target_modules=r".*language_model\.layers\.1\.self_attn\.q_proj")
    adapter = read_adapter(tmp_path, load_vlm(source).config)
    assert adapter.targets == ("q_proj",)
    assert [bool(adapter.factors("q_proj", layer)[1].any()) for layer in range(3)] == [False, True, False]


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"use_dora": True}, "use_dora=True"),
        ({"rank_pattern": {"q_proj": 2}}, "rank_pattern"),
        ({"layers_to_transform": [0], "target_modules": ["o_proj"]}, "layers_to_transform"),
        ({"bias": "lora_only"}, "bias='lora_only'"),
        ({"modules_to_save": ["multi_modal_projector"]}, "modules_to_save"),
    ],
)
def test_unsupported_features_are_refused_by_name(tmp_path, source, options, named):
    peft_adapter(tmp_path, source, **options)
    with pytest.raises(UserError, match=named):
        load_vlm(source, adapter=tmp_path)


def test_a_feature_of_the_future_is_refused_by_name(tmp_path, source):
    peft_adapter(tmp_path, source)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps(config | {"use_something_new": True}))
    with pytest.raises(UserError, match="use_something_new=True is not supported"):
        load_vlm(source, adapter=tmp_path)


def test_tensors_that_do_not_fit_are_listed_together(tmp_path, source):
    from safetensors.torch import load_file, save_file

    peft_adapter(tmp_path, source, target_modules=["q_proj"])  # a list also hits the vision tower
    file = tmp_path / "adapter_model.safetensors"
    state = load_file(file)
    prefix = "base_model.model.model.language_model.layers."
    del state[prefix + "0.self_attn.q_proj.lora_B.weight"]
    state[prefix + "1.self_attn.q_proj.lora_A.weight"] = torch.zeros(4, 5)
    save_file(state, file, metadata={"format": "pt"})
    with pytest.raises(UserError) as caught:
        load_vlm(source, adapter=tmp_path)
    line = str(caught.value)
    assert "vision_tower" in line and "layers.{0-3}.self_attn.q_proj.lora_A.weight" in line
    assert "without its other half (2): layers.0.q_proj.lora_A, layers.1.q_proj.lora_B" in line
    assert "[4, 5] instead of floating [4, 32]" in line and "\n" not in line


def test_two_names_with_different_tensors_are_refused(tmp_path, source):
    from safetensors.torch import load_file, save_file

    peft_adapter(tmp_path, source)
    file = tmp_path / "adapter_model.safetensors"
    new = load_file(file)
    old = {key.replace("model.model.language_model.", "model.language_model.model."): 2 * x for key, x in new.items()}
    save_file(new | old, file, metadata={"format": "pt"})
    with pytest.raises(UserError, match="different under its two names"):
        load_vlm(source, adapter=tmp_path)


def test_a_pickled_adapter_is_told_how_to_convert(tmp_path, source):
    peft_adapter(tmp_path, source)
    (tmp_path / "adapter_model.safetensors").rename(tmp_path / "adapter_model.bin")
    with pytest.raises(UserError, match="scripts/convert_pickle.py"):
        load_vlm(source, adapter=tmp_path)
