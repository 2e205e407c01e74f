"""LLaVA-NeXT and Llama 3.2 Vision: import and export keep every byte, transformers and PEFT agree on what we write."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

torch = pytest.importorskip("torch")

from safetensors.numpy import load_file  # noqa: E402

from icet_jax.errors import UserError  # noqa: E402
from icet_jax.models import family_of, vlm_config  # noqa: E402
from icet_jax.models.adapter_export import save_adapter  # noqa: E402
from icet_jax.models.adapters import hf_modules, read_adapter  # noqa: E402
from icet_jax.models.loading import load_vlm  # noqa: E402
from icet_jax.models.saving import save_vlm  # noqa: E402
from tests import tiny, tiny_families  # noqa: E402
from tests.checkpoints.test_round_trip import tensors  # noqa: E402
from tests.models import families as parity  # noqa: E402
from tests.models.references import load_value_head, merge_lora  # noqa: E402
from tests.models.round_trip import hf_load, saved_random_adapter  # noqa: E402
from tests.models.test_adapters import random_lora  # noqa: E402

SIZES = [[(30, 50)], [], [(20, 60), (57, 57)]]
MAKERS = {
    "next": lambda: tiny_families.llava_next(seed=1),
    "mistral": lambda: tiny_families.llava_next(seed=2, backbone="mistral"),
    "mllama": lambda: tiny_families.mllama(seed=3, vision={"num_hidden_layers": 5}),
}
# Those of `tiny.in_layout` that differ: Llama 3.2 Vision's tower has one name only.
LAYOUTS = [("next", name) for name in ("old", "native4", "native5", "hybrid5")]
LAYOUTS += [("mistral", "native5"), ("mllama", "old"), ("mllama", "native4")]
STORED = [(name, layout, "float16") for name, layout in LAYOUTS]
STORED += [(name, "old", dtype) for name in ("next", "mllama") for dtype in ("bfloat16", "float32")]


@pytest.fixture(scope="module")
def models():
    return {name: make() for name, make in MAKERS.items()}


@pytest.fixture(scope="module")
def sources(models, tmp_path_factory):
    """Each model as on the hub, in float32."""
    folder = tmp_path_factory.mktemp("sources")
    return {name: save(folder / name, model) for name, model in models.items()}


def save(directory, model, layout="old", **options):
    if model.config.model_type == "mllama":
        tiny_families.save_mllama(directory, model, processor=False, **options)
    else:
        tiny_families.save_llava_next(directory, model, processor=False, **options)
    if layout != "old":
        dtype = getattr(torch, options.get("dtype", "float32"))
        state = tiny.in_layout(tiny.old_keys(model.state_dict()), layout)
        assert any(key.startswith("model.") for key in state) == layout.startswith("native")
        tiny.save_state(directory, {key: tensor.to(dtype).contiguous() for key, tensor in state.items()})
    return directory


def load(source, **options):
    """As transformers since 4.56 reads it, so that logits can be compared."""
    is_mllama = json.loads((source / "config.json").read_text())["model_type"] == "mllama"
    return load_vlm(source, **({"capture": "output"} if is_mllama else {}), **options)


def hf_rows(model):
    """transformers' own inputs of each row."""
    if model.config.model_type == "mllama":
        return tiny_families.mllama_rows(model.config, SIZES)
    return [tiny_families.next_batch(model.config, [row], seed=number) for number, row in enumerate(SIZES)]


def hf_logits(model, rows):
    return parity.hf_row_logits(model, rows)


def our_logits(loaded, rows, params=None):
    """Our logits of each row [T, V], of the loaded parameters or others."""
    if params is not None:
        loaded = type(loaded)(loaded.graphdef, params, loaded.config, loaded.hf_config, loaded.directory)
    if family_of(loaded.config).name == "mllama":
        batch = parity.mllama_batch(rows, "left")
        out, real = parity.our_logits(loaded, batch), np.asarray(batch.mask)
        return [row[mask] for row, mask in zip(out, real, strict=True)]
    return [parity.our_logits(loaded, parity.next_batch(row, loaded.config))[0] for row in rows]


def assert_agree(ours, theirs):
    for mine, other in zip(ours, theirs, strict=True):
        parity.assert_agree(mine, other, tolerance=2e-5)


def far(ours, theirs):
    return min(np.abs(mine - other).max() for mine, other in zip(ours, theirs, strict=True))


@pytest.mark.parametrize(("name", "layout", "dtype"), STORED)
def test_export_is_byte_identical_in_the_old_layout(tmp_path, models, name, layout, dtype):
    old = save(tmp_path / "old", models[name], dtype=dtype, shards=3)
    source = save(tmp_path / "in", models[name], layout, dtype=dtype)
    loaded = load_vlm(source)
    out = save_vlm(tmp_path / "out", loaded.config, loaded.params, source_dir=source)
    assert tensors(out) == tensors(old)
    assert load_vlm(out).config == loaded.config


@pytest.mark.parametrize("name", MAKERS)
def test_a_half_precision_load_still_exports_the_source_bytes(tmp_path, sources, name):
    loaded = load_vlm(sources[name], dtype="bfloat16")
    assert {str(leaf.dtype) for leaf in jax.tree.leaves(loaded.params)} == {"bfloat16"}
    out = save_vlm(tmp_path / "out", loaded.config, loaded.params, source_dir=sources[name])
    assert tensors(out) == tensors(sources[name])


@pytest.mark.parametrize("name", MAKERS)
def test_transformers_gives_the_same_logits_from_every_export(tmp_path, sources, name):
    """From the export of what was loaded, in shards, and of a network made here, whose config.json is ours alone."""
    model = hf_load(sources[name])
    rows = hf_rows(model)
    before = hf_logits(model, rows)
    loaded = load_vlm(sources[name])
    out = save_vlm(
        tmp_path / "out", loaded.config, loaded.params, source_dir=sources[name], max_shard_bytes=60_000,
        value_head={"kernel": jnp.ones((32, 1)), "bias": jnp.ones(1)},
    )  # fmt: skip
    assert len(list(out.glob("model-*-of-*.safetensors"))) > 2 and load_value_head(out)["kernel"].shape == (32, 1)
    made = save_vlm(tmp_path / "made", loaded.config, loaded.params)
    assert load_vlm(made).config == loaded.config
    for directory in (out, made):
        for mine, other in zip(hf_logits(hf_load(directory), rows), before, strict=True):
            np.testing.assert_array_equal(mine, other)
    assert_agree(our_logits(load(out), rows), before)


def test_a_qwen3_decoder_is_read_and_written(tmp_path):
    model = tiny_families.llava_next(seed=4, backbone="qwen3", head_dim=10)
    source = save(tmp_path / "in", model)
    loaded = load_vlm(source)
    rows = hf_rows(model)[:1]
    assert_agree(our_logits(loaded, rows), hf_logits(model, rows))
    out = save_vlm(tmp_path / "out", loaded.config, loaded.params, source_dir=source)
    assert tensors(out) == tensors(source) and load_vlm(out).config == loaded.config


def test_the_exported_configs_speak_the_old_dialect(tmp_path, sources):
    for name, source in sources.items():
        values = json.loads((source / "config.json").read_text()) | {"house": "kept"}
        text = values["text_config"]
        theta, scaling = text.pop("rope_theta"), text.pop("rope_scaling")
        text["rope_parameters"] = {"rope_type": "default", **(scaling or {}), "rope_theta": theta}
        values["dtype"], values["image_token_id"] = values.pop("torch_dtype"), values.pop("image_token_index")
        changed = tmp_path / name
        changed.mkdir()
        (changed / "model.safetensors").symlink_to(source / "model.safetensors")
        (changed / "config.json").write_text(json.dumps(values))
        loaded = load_vlm(changed)
        assert loaded.config == load_vlm(source).config
        out = save_vlm(tmp_path / f"{name}-out", loaded.config, loaded.params, source_dir=changed)
        written = json.loads((out / "config.json").read_text())
        assert written["house"] == "kept" and written["torch_dtype"] == "float32"
        assert not {"dtype", "image_token_id", "rope_parameters"} & {*written, *written["text_config"]}
        assert written["text_config"]["rope_theta"] == theta
        if name == "mistral":
            assert written["text_config"]["model_type"] == "mistral" and theta == 1e6
            assert written["text_config"]["sliding_window"] is None and "sliding_window" in written["text_config"]
        if name == "mllama":
            assert written["text_config"]["rope_scaling"] == scaling and scaling["rope_type"] == "llama3"
            assert written["vision_config"]["intermediate_layers_indices"] == [1, 2, 4]
            assert (
                written["vision_config"]["attention_heads"] == 3 and written["vision_config"]["vision_output_dim"] == 96
            )
        else:
            assert written["image_grid_pinpoints"] == tiny_families.PINPOINTS
            assert written["use_image_newline_parameter"] is True and written["image_seq_length"] == 16


@pytest.mark.parametrize("capture", ["input", "output"])
def test_the_captured_intermediates_are_written_as_they_were_read(tmp_path, sources, capture):
    loaded = load_vlm(sources["mllama"], capture=capture)
    shift = int(capture == "output")
    assert loaded.config.vision.intermediate_layers_indices == (1 + shift, 2 + shift, 4 + shift)
    out = save_vlm(tmp_path, loaded.config, loaded.params, source_dir=sources["mllama"])
    assert json.loads((out / "config.json").read_text())["vision_config"]["intermediate_layers_indices"] == [1, 2, 4]


@pytest.mark.parametrize("name", ["next", "mllama"])
def test_trained_adapters_reach_transformers_merged_and_as_peft(tmp_path, sources, name):
    peft = pytest.importorskip("peft")
    source, loaded = sources[name], load(sources[name])
    lora = random_lora(loaded.config)
    crossed = {f"cross_layers/{target}" for target in ("q_proj", "v_proj", "down_proj")} if name == "mllama" else set()
    assert set(lora.weights) == {"q_proj", "v_proj", "down_proj"} | crossed
    model = hf_load(source)
    rows = hf_rows(model)
    ours = our_logits(loaded, rows, merge_lora(loaded.params, lora))
    assert far(ours, our_logits(loaded, rows)) > 0.1
    merged = save_vlm(tmp_path / "m", loaded.config, loaded.params, source_dir=source, lora=lora, trained=())
    assert_agree(ours, hf_logits(hf_load(merged), rows))
    touched = {key for key, tensor in tensors(merged).items() if tensor != tensors(source)[key]}
    assert len(touched) == 3 * loaded.config.lora_shapes()["q_proj"][0] + len(crossed) * 2
    adapter = save_adapter(tmp_path / "a", lora, loaded.config, base=str(source))
    adapted = peft.PeftModel.from_pretrained(model, adapter).eval()
    injected = {key.rpartition(".lora_A")[0] for key in adapted.state_dict() if ".lora_A." in key}
    assert injected == {
        f"base_model.model.model.language_model.layers.{number}.{module}"
        for (target, _), (number, module) in hf_modules(loaded.config).items()
        if target in lora.weights
    }
    assert_agree(ours, hf_logits(adapted, rows))
    assert_agree(ours, our_logits(load(source, adapter=adapter), rows))


@pytest.mark.parametrize("name", ["next", "mllama"])
def test_a_peft_adapter_is_the_start_of_what_is_exported(tmp_path, sources, name):
    """PEFT made it, on the decoder's cross-attention too; the export holds it and what was trained on top of it."""
    peft = pytest.importorskip("peft")
    source = sources[name]
    modules = r".*language_model\.layers\.\d+\.((self|cross)_attn\.(k_proj|o_proj)|mlp\.up_proj)"
    theirs = saved_random_adapter(tmp_path / "start", hf_load(source), modules)
    rows = hf_rows(theirs.base_model.model)
    begun = load(source, adapter=tmp_path / "start")
    assert_agree(our_logits(begun, rows), hf_logits(theirs, rows))
    if name == "mllama":
        assert {"cross_layers/k_proj", "cross_layers/up_proj", "o_proj"} < set(begun.adapter.targets)
    lora = random_lora(begun.config)
    ours = our_logits(begun, rows, merge_lora(begun.params, lora))
    assert min(far(ours, our_logits(begun, rows)), far(ours, our_logits(load(source), rows))) > 0.1
    common = {"start": begun.adapter, "lora": lora}
    merged = save_vlm(tmp_path / "m", begun.config, begun.params, source_dir=source, trained=(), **common)
    assert_agree(ours, hf_logits(hf_load(merged), rows))
    both = save_adapter(tmp_path / "a", lora, begun.config, base=str(source), start=begun.adapter)
    assert json.loads((both / "adapter_config.json").read_text())["r"] == 7
    assert_agree(ours, hf_logits(peft.PeftModel.from_pretrained(hf_load(source), both).eval(), rows))


def test_an_adapter_of_one_stack_leaves_the_other_alone(tmp_path, sources):
    """The MLPs of both stacks go by one name in HF; the layers that are meant are listed."""
    peft = pytest.importorskip("peft")
    loaded = load(sources["mllama"])
    lora = random_lora(loaded.config, targets=("up_proj",))
    lora = lora.replace(weights={"cross_layers/up_proj": lora.weights["cross_layers/up_proj"]})
    adapter = save_adapter(tmp_path / "up", lora, loaded.config, base="x/y")
    assert read_adapter(adapter, loaded.config).targets == ("cross_layers/up_proj",)
    lora, kinds = random_lora(loaded.config, targets=("k_proj",)), ("self", "cross", "self", "self", "cross")
    both = load_file(save_adapter(tmp_path / "k", lora, loaded.config, base="x/y") / "adapter_model.safetensors")
    assert set(both) == {
        f"base_model.model.{decoder}.layers.{number}.{kinds[number]}_attn.k_proj.lora_{side}.weight"
        for decoder in ("language_model.model", "model.language_model")
        for number in range(5)
        for side in "AB"
    }
    model = peft.PeftModel.from_pretrained(hf_load(sources["mllama"]), adapter)
    assert {int(key.split("layers.")[1].split(".")[0]) for key in model.state_dict() if ".lora_A." in key} == {1, 4}


def test_an_adapter_elsewhere_than_on_the_decoder_is_refused(tmp_path, sources):
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=2, target_modules=r".*(vision_model\.transformer|language_model)\.layers\.1\..*q_proj")
    peft.get_peft_model(hf_load(sources["mllama"]), config).save_pretrained(tmp_path)
    with pytest.raises(UserError, match=r"not on a decoder projection \(2\): .*vision_model"):
        load_vlm(sources["mllama"], adapter=tmp_path)


BAD = [
    ("mistral", "text_config", "sliding_window", 4096, "text_config: sliding_window=4096 is not supported; needs null"),
    ("mistral", "text_config", "sliding_window", ..., "sliding_window=4096 (the default) is not supported"),
    ("next", "text_config", "model_type", "gemma", "model_type='gemma' is not supported"),
    ("next", None, "image_grid_pinpoints", [[28, 50]], "image_grid_pinpoints=[[28, 50]] is not supported; needs pairs"),
    ("next", None, "vision_feature_select_strategy", "full", "='full' is not supported; needs 'default'"),
    ("next", None, "image_grid_pinpoints", [28, 56], "needs pairs (height, width), multiples of image_size=28"),
    ("next", None, "vision_feature_layer", [-2, -4], "vision_feature_layer=[-2, -4] is not supported"),
    ("next", None, "model_type", "llava", "unexpected (1): image_newline"),
    ("mllama", "text_config", "cross_attention_layers", [1, 9], "cross_attention_layers=[1, 9] is not supported"),
    ("mllama", "text_config", "vocab_size", 264, "of shape [271, 32] instead of [272, 32]"),
    ("mllama", "vision_config", "intermediate_layers_indices", [1, 5], "different block numbers in order, below 5"),
    ("mllama", "vision_config", "vision_output_dim", 97, "vision_output_dim=97 is not supported; needs 96"),
    ("mllama", "vision_config", "hidden_act", "tanh", "vision_config: hidden_act='tanh' is not supported"),
    ("mllama", None, "tie_word_embeddings", True, "tie_word_embeddings=True is not supported; needs False"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "part", "field", "value", "message"), BAD)
def test_configs_that_would_be_another_network_are_refused(tmp_path, sources, name, part, field, value, message):
    values = json.loads((sources[name] / "config.json").read_text())
    place = values[part] if part else values
    place[field] = value
    if value is ...:
        del place[field]
    (tmp_path / "config.json").write_text(json.dumps(values))
    (tmp_path / "model.safetensors").symlink_to(sources[name] / "model.safetensors")
    with pytest.raises(UserError) as caught:
        load_vlm(tmp_path)
    assert message in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("next", {"exit_rule": "E1"}, "LLaVA-NeXT has one kind of exit; leave out the exit_rule E1"),
        ("next", {"capture": "output"}, "leave out the capture output"),
        ("mllama", {"exit_rule": "E3"}, "exit_rule='E3': give one of E1, E2, E5"),
        ("mllama", {"capture": "middle"}, "capture='middle': give one of input, output"),
    ],
)
def test_readings_of_an_exit_that_a_family_lacks_are_refused(sources, name, options, message):
    with pytest.raises(UserError, match=message):
        load_vlm(sources[name], **options)


def test_the_reading_of_an_exit_is_part_of_the_network(sources):
    for rule in ("E1", "E2", "E5"):
        assert load_vlm(sources["mllama"], exit_rule=rule).model.exit_definition.startswith(f"{rule}:")
    assert load_vlm(sources["mllama"]).model.exit_definition.startswith("E1:")
    assert load_vlm(sources["next"], capture="input").config == load_vlm(sources["next"]).config


# What the hub's config.json of these say, where they say it; the rest is class defaults.
HUB_VISION = {
    "hidden_size": 1024, "image_size": 336, "intermediate_size": 4096, "model_type": "clip_vision_model",
    "num_attention_heads": 16, "num_hidden_layers": 24, "patch_size": 14, "projection_dim": 768, "vocab_size": 32000,
}  # fmt: skip
HUB = {
    "next-vicuna": {
        "model_type": "llava_next", "vision_config": HUB_VISION, "image_token_index": 32000,
        "text_config": {"model_type": "llama", "rms_norm_eps": 1e-5, "vocab_size": 32064},
    },
    "next-mistral": {
        "model_type": "llava_next", "vision_config": HUB_VISION, "image_token_index": 32000,
        "text_config": {
            "model_type": "mistral", "rms_norm_eps": 1e-5, "vocab_size": 32064, "rope_theta": 1e6,
            "max_position_embeddings": 32768, "sliding_window": None,
        },
    },
    "mllama": {
        "model_type": "mllama", "vision_config": {"image_size": 560, "model_type": "mllama_vision_model"},
        "text_config": {
            "model_type": "mllama_text_model", "rope_theta": 5e5,
            "rope_scaling": {"rope_type": "llama3", **tiny_families.LLAMA3_ROPE},
        },
    },
}  # fmt: skip


@pytest.mark.parametrize(
    ("name", "count", "text"),
    [
        ("next-vicuna", 687, (4096, 11008, 32, 32, 128, 1e-5, 1e4)),
        ("next-mistral", 687, (4096, 14336, 32, 8, 128, 1e-5, 1e6)),
        ("mllama", 906, (4096, 14336, 40, 8, 128, 1e-5, 5e5)),
    ],
)
def test_sparse_hub_configs_mean_the_class_defaults(name, count, text):
    config = vlm_config(HUB[name])
    decoder = config.text.llama if name == "mllama" else config.text
    assert text == (
        decoder.hidden_size, decoder.intermediate_size, decoder.num_hidden_layers, decoder.num_key_value_heads,
        decoder.head_dim, decoder.rms_norm_eps, decoder.rope_theta,
    )  # fmt: skip
    entries = family_of(config).table(config).entries
    assert (
        len({entry.key for entry in entries})
        == len({(entry.path, entry.layer) for entry in entries})
        == len(entries)
        == count
    )
    if name == "mllama":
        assert config.text.cross_attention_layers == (3, 8, 13, 18, 23, 28, 33, 38)
        assert config.vision.output_dim == 7680 and config.vision.tokens_per_tile == 1601
        assert config.vision.intermediate_layers_indices == (3, 7, 15, 23, 30) and config.image_token_index == 128256
    else:
        assert config.image_grid_pinpoints == ((336, 672), (672, 336), (672, 672), (1008, 336), (336, 1008))
        assert config.max_tiles == 5
