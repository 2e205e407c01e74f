"""SmolVLM and Idefics3: import and export keep every byte, adapters, one exit alone, configs, groups of tiles."""

import functools
import json

import jax
import numpy as np
import pytest

torch = pytest.importorskip("torch")

import icet_jax  # noqa: E402
from icet_jax.checkpoints.hf_import import abstract_params  # noqa: E402
from icet_jax.checkpoints.published import PUBLISHED  # noqa: E402
from icet_jax.errors import UserError  # noqa: E402
from icet_jax.models import family_of, vlm_config  # noqa: E402
from icet_jax.models.base.image_batches import batch_images  # noqa: E402
from icet_jax.models.loading import load_vlm  # noqa: E402
from icet_jax.models.saving import save_vlm  # noqa: E402
from icet_jax.nn.protocols import count_parameters  # noqa: E402
from icet_jax.parallel import sharding  # noqa: E402
from icet_jax.parallel.distributed import Share  # noqa: E402
from tests import tiny_smolvlm  # noqa: E402
from tests.checkpoints.test_round_trip import tensors  # noqa: E402
from tests.models import families  # noqa: E402
from tests.models.round_trip import (  # noqa: E402
    assert_an_adapter_of_peft_is_the_start_of_an_export,
    assert_trained_adapters_reach_transformers,
    hf_load,
    hf_logits,
    our_logits,
)

SIZES = [[(30, 50)], [], [(20, 112)]]
SMALL = {"num_hidden_layers": 2, "vision": {"num_hidden_layers": 3}}
MAKERS = {
    "smolvlm": lambda: tiny_smolvlm.model("smolvlm", seed=1, **SMALL),
    "idefics3": lambda: tiny_smolvlm.model("idefics3", seed=2, tied=True, **SMALL),
}


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    """Each model as on the hub, in float32."""
    folder = tmp_path_factory.mktemp("sources")
    return {name: tiny_smolvlm.save(folder / name, make()) for name, make in MAKERS.items()}


@pytest.fixture(scope="module")
def inputs():
    return tiny_smolvlm.batch(tiny_smolvlm.config(**SMALL), SIZES)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
@pytest.mark.parametrize("name", MAKERS)
def test_export_is_byte_identical(tmp_path, name, dtype):
    source = tiny_smolvlm.save(tmp_path / "in", MAKERS[name](), dtype=dtype, shards=3)
    loaded = load_vlm(source, dtype="bfloat16")
    out = save_vlm(tmp_path / "out", loaded.config, loaded.params, source_dir=source)
    assert tensors(out) == tensors(source) and ("lm_head.weight" in tensors(out)) == (name == "smolvlm")
    assert load_vlm(out).config == loaded.config
    before, after = (json.loads((folder / "config.json").read_text()) for folder in (source, out))
    defaults = {"num_channels": 3, "hidden_act": "gelu_pytorch_tanh", "layer_norm_eps": 1e-6}  # of transformers' class
    assert after == before | {"vision_config": before["vision_config"] | defaults}
    assert (out / "processor_config.json").read_text() == (source / "processor_config.json").read_text()


@pytest.mark.parametrize("name", MAKERS)
def test_transformers_gives_the_same_logits_from_every_export(tmp_path, sources, inputs, name):
    """From the export of what was loaded, of a network made here, and of what transformers itself has written."""
    model = hf_load(sources[name])
    before = hf_logits(model, inputs)
    loaded = load_vlm(sources[name])
    out = save_vlm(tmp_path / "out", loaded.config, loaded.params, source_dir=sources[name], max_shard_bytes=60_000)
    assert len(list(out.glob("model-*-of-*.safetensors"))) > 2
    made = save_vlm(tmp_path / "made", loaded.config, loaded.params)
    model.save_pretrained(tmp_path / "theirs")
    again = load_vlm(tmp_path / "theirs")
    assert again.config == loaded.config == load_vlm(made).config
    back = save_vlm(tmp_path / "back", again.config, again.params, source_dir=tmp_path / "theirs")
    for directory in (out, made, back):
        np.testing.assert_array_equal(hf_logits(hf_load(directory), inputs), before)
    values = json.loads((back / "config.json").read_text())
    assert values["tie_word_embeddings"] == values["text_config"]["tie_word_embeddings"] == (name == "idefics3")
    assert not {"dtype", "rope_parameters"} & {*values, *values["text_config"]}
    assert values["text_config"]["rope_theta"] == 1e5 and values["image_token_id"] == tiny_smolvlm.IMAGE
    families.assert_agree(our_logits(icet_jax.load(out), inputs), before, 1e-5)


def test_trained_adapters_reach_transformers_merged_and_as_peft(tmp_path, sources, inputs):
    layers = "model.text_model.layers", "model.text_model.layers"
    assert_trained_adapters_reach_transformers(tmp_path, sources["smolvlm"], inputs, *layers)


def test_a_peft_adapter_is_the_start_of_what_is_exported(tmp_path, sources, inputs):
    assert_an_adapter_of_peft_is_the_start_of_an_export(tmp_path, sources["idefics3"], inputs, "text_model")


def test_an_adapter_elsewhere_than_on_the_decoder_is_refused(tmp_path, sources):
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=2, target_modules=r".*(vision_model\.encoder|text_model)\.layers\.1\..*q_proj")
    peft.get_peft_model(hf_load(sources["smolvlm"]), config).save_pretrained(tmp_path)
    with pytest.raises(UserError, match=r"not on a decoder projection \(2\): .*vision_model"):
        load_vlm(sources["smolvlm"], adapter=tmp_path)


@pytest.mark.parametrize("exit_layer", [1, 2])
def test_a_model_with_one_exit_alone_has_its_logits(tmp_path, sources, inputs, exit_layer):
    vlm = icet_jax.load(sources["smolvlm"])
    cut = vlm.save(tmp_path / "cut", exit_layer=exit_layer)
    expected = our_logits(vlm, inputs, exit_layer)
    assert np.abs(expected - our_logits(vlm, inputs)).max() > 0.05, "the exits must matter"
    model = hf_load(cut)
    assert len(model.model.vision_model.encoder.layers) == exit_layer
    families.assert_agree(expected, hf_logits(model, inputs), 1e-5)
    loaded = icet_jax.load(cut)
    assert (loaded.num_exits, loaded.default_exit) == (exit_layer, exit_layer)
    kept = {
        key
        for key in tensors(sources["smolvlm"])
        if not any(f"encoder.layers.{n}." in key for n in range(exit_layer, 3))
    }
    assert tensors(cut) == {key: tensors(sources["smolvlm"])[key] for key in kept}


BAD = [
    (None, "scale_factor", 3, "scale_factor=3 is not supported; needs a divisor of the 4 patches"),
    (None, "tie_word_embeddings", "no", "tie_word_embeddings='no' is not supported; needs True or False"),
    (None, "image_token_id", -1, "image_token_id=-1 is not supported; needs a positive integer"),
    ("vision_config", "hidden_act", "tanh", "vision_config: hidden_act='tanh' is not supported"),
    ("vision_config", "model_type", "clip_vision_model", "vision_config: model_type='clip_vision_model' is not"),
    ("vision_config", "num_attention_heads", 5, "hidden_size=24 is not a multiple of num_attention_heads=5"),
    ("vision_config", "patch_size", 56, "patch_size=56 is not supported; needs at most image_size=28"),
    ("vision_config", "image_size", [28, 28], "image_size=[28, 28] is not supported; needs a positive integer"),
    ("text_config", "model_type", "qwen2", "text_config: model_type='qwen2' is not supported; needs 'llama'"),
    ("text_config", "vocab_size", 284, "of shape [283, 32] instead of [284, 32]"),
]


@pytest.mark.parametrize(("part", "field", "value", "message"), BAD)
def test_configs_that_would_be_another_network_are_refused(tmp_path, sources, part, field, value, message):
    values = json.loads((sources["smolvlm"] / "config.json").read_text())
    (values[part] if part else values)[field] = value
    (tmp_path / "config.json").write_text(json.dumps(values))
    (tmp_path / "model.safetensors").symlink_to(sources["smolvlm"] / "model.safetensors")
    with pytest.raises(UserError) as caught:
        load_vlm(tmp_path)
    assert message in str(caught.value) and "\n" not in str(caught.value)


# Values of published config.json files, and what transformers counts for them on its meta device.
SIZES_PUBLISHED = {
    "HuggingFaceTB/SmolVLM-256M-Instruct": (471, 256_484_928, 64, 12),
    "HuggingFaceTB/SmolVLM-500M-Instruct": (489, 507_482_304, 64, 12),
    "HuggingFaceTB/SmolVLM-Instruct": (657, 2_246_272_880, 81, 27),
}


@pytest.mark.parametrize("name", SIZES_PUBLISHED)
def test_sizes_of_the_published_models(name):
    num_tensors, parameters, image_tokens, exits = SIZES_PUBLISHED[name]
    config = vlm_config(PUBLISHED[name])
    family = family_of(config)
    entries = family.table(config).entries
    assert len({entry.key for entry in entries}) == len({(entry.path, entry.layer) for entry in entries}) == num_tensors
    _, params = abstract_params(functools.partial(family.network, config), "bfloat16", "bfloat16")
    assert count_parameters(params) == parameters
    assert (config.image_tokens, config.vision.num_hidden_layers) == (image_tokens, exits)
    assert {entry.path for entry in entries} == set(sharding.flatten_with_names(params))


def test_groups_are_as_many_as_images_and_hold_the_tiles_in_order(sources):
    config = vlm_config(json.loads((sources["smolvlm"] / "config.json").read_text()))
    sizes = [[(20, 200), (57, 57)], [], [(20, 112), (112, 20), (5, 112)]]
    inputs = tiny_smolvlm.batch(tiny_smolvlm.config(), sizes)
    images = batch_images(config, inputs, num_rows=4, per_row=3)
    assert images.pixels.shape == (12, 17, 3, 28, 28) and images.layout.positions is None
    assert images.rows.tolist() == [0, 0, 4, 4, 4, 4, 2, 2, 2, 4, 4, 4]
    assert images.layout.num_tiles.tolist() == [17, 5, 0, 0, 0, 0, 15, 0, 0, 0, 0, 0]
    flat = images.pixels.reshape(-1, 3, 28, 28)
    np.testing.assert_array_equal(flat[:22], inputs["pixel_values"][0, :22])
    np.testing.assert_array_equal(flat[6 * 17 : 6 * 17 + 15], inputs["pixel_values"][2, :15])
    assert not images.pixels[6, 15:].any()
    with pytest.raises(UserError, match="row 2 has 3 images, but there is room for 2"):
        batch_images(config, inputs, num_rows=4, per_row=2)


def test_shares_of_a_batch_are_its_parts(sources):
    """Every row has two images, of few tiles or of more than one group."""
    config = vlm_config(json.loads((sources["smolvlm"] / "config.json").read_text()))
    sizes = [[(20, 112), (112, 20)], [(57, 57), (20, 112)], [(20, 112), (20, 112)], [(30, 50), (30, 50)]]
    inputs = tiny_smolvlm.batch(tiny_smolvlm.config(), sizes)
    whole = batch_images(config, inputs, num_rows=4, per_row=2)
    parts = [
        batch_images(
            config, {name: array[share.rows(4)] for name, array in inputs.items()}, num_rows=4, per_row=2, share=share
        )
        for share in (Share(0, 2), Share(1, 2))
    ]
    jax.tree.map(lambda all_rows, *own: np.testing.assert_array_equal(np.concatenate(own), all_rows), whole, *parts)
    assert whole.layout.num_tiles.tolist() == [10, 0, 17, 5, 10, 0, 17, 9]


def without_tile(inputs):
    pixels = inputs["pixel_values"].copy()
    pixels[0, 1] = 0
    return {"pixel_values": pixels}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (without_tile, "row 0 holds placeholders for 13 tiles, pixel_values hold 12"),
        (lambda x: {"input_ids": x["input_ids"][:, 1:]}, None),
        (lambda x: {"input_ids": np.where(np.arange(x["input_ids"].shape[1]) == 8, 5, x["input_ids"])}, "whole tiles"),
        (lambda x: {"pixel_values": x["pixel_values"][:, :, :, :14]}, "pixel_values have shape"),
        (lambda x: {"pixel_attention_mask": x["pixel_attention_mask"][:, :1]}, "pixel_attention_mask has shape"),
        (lambda x: {"pixel_values": np.repeat(x["pixel_values"], 2, 0)}, "pixel_values have 6 rows, input_ids have 3"),
        (lambda x: {"pixel_values": None}, "row 0 holds placeholders for 13 tiles, pixel_values hold 0"),
    ],
)
def test_inputs_that_do_not_fit_are_one_clear_line(sources, inputs, change, message):
    config = vlm_config(json.loads((sources["smolvlm"] / "config.json").read_text()))
    changed = inputs | change(inputs)
    if message is None:
        assert batch_images(config, changed, num_rows=3) is not None
        return
    with pytest.raises(UserError, match=message) as caught:
        batch_images(config, changed, num_rows=3)
    assert "\n" not in str(caught.value)


def test_a_single_black_tile_counts_as_in_transformers(sources):
    """Without normalisation a black picture is all zeros, as is what fills up the array."""
    config = vlm_config(json.loads((sources["smolvlm"] / "config.json").read_text()))
    ids = np.full((2, 5), 9)
    ids[0, 1:] = tiny_smolvlm.IMAGE
    inputs = {"input_ids": ids, "pixel_values": np.zeros((2, 1, 3, 28, 28), np.float32)}
    assert batch_images(config, inputs, num_rows=2).layout.num_tiles.tolist() == [1]
