"""Qwen2.5-VL's import and export: layouts of keys, exports, adapters, one exit alone, published sizes, batches."""

import functools
import json

import jax
import numpy as np
import pytest

torch = pytest.importorskip("torch")


import icet_jax  # noqa: E402
from icet_jax import vlm as front  # noqa: E402
from icet_jax.checkpoints.hf_import import abstract_params  # noqa: E402
from icet_jax.checkpoints.published import PUBLISHED  # noqa: E402
from icet_jax.errors import UserError  # noqa: E402
from icet_jax.models import family_of, vlm_config  # noqa: E402
from icet_jax.models.base.image_batches import batch_images  # noqa: E402
from icet_jax.models.loading import load_vlm  # noqa: E402
from icet_jax.models.qwen2_5_vl.network import patch_bucket  # noqa: E402
from icet_jax.models.saving import save_vlm  # noqa: E402
from icet_jax.nn.protocols import count_parameters  # noqa: E402
from icet_jax.parallel import sharding  # noqa: E402
from icet_jax.parallel.distributed import Share  # noqa: E402
from tests import tiny_qwen  # noqa: E402
from tests.checkpoints.test_round_trip import tensors  # noqa: E402
from tests.models import families  # noqa: E402
from tests.models.round_trip import (  # noqa: E402
    assert_an_adapter_of_peft_is_the_start_of_an_export,
    assert_trained_adapters_reach_transformers,
    hf_load,
    hf_logits,
    our_logits,
)

SIZES = [[(30, 50)], [], [(20, 112), (16, 16)]]
SMALL = {"num_hidden_layers": 2, "vision": {"depth": 3}}
MAKERS = {
    "untied": lambda: tiny_qwen.model(seed=1, **SMALL),
    "tied": lambda: tiny_qwen.model(seed=2, tied=True, **SMALL),
}


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    """Each model as on the hub, in float32."""
    folder = tmp_path_factory.mktemp("sources")
    return {name: tiny_qwen.save(folder / name, make()) for name, make in MAKERS.items()}


@pytest.fixture(scope="module")
def config(sources):
    return load_vlm(sources["untied"]).config


@pytest.fixture(scope="module")
def inputs():
    return tiny_qwen.batch(tiny_qwen.config(**SMALL), SIZES)


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("layout", tiny_qwen.LAYOUTS)
@pytest.mark.parametrize("name", MAKERS)
def test_export_is_byte_identical_in_the_published_layout(tmp_path, name, layout, dtype):
    model = MAKERS[name]()
    expected = tiny_qwen.save(tmp_path / "hub", model, dtype=dtype)
    source = tiny_qwen.save(tmp_path / "in", model, dtype=dtype, shards=3, layout=layout)
    loaded = load_vlm(source, dtype="bfloat16")
    out = save_vlm(tmp_path / "out", loaded.config, loaded.params, source_dir=source)
    assert tensors(out) == tensors(expected) and ("lm_head.weight" in tensors(out)) == (name == "untied")
    assert load_vlm(out).config == loaded.config
    before, after = (json.loads((folder / "config.json").read_text()) for folder in (source, out))
    assert after == before | {"vision_config": before["vision_config"] | {"in_channels": 3}}


@pytest.mark.parametrize("name", MAKERS)
def test_transformers_gives_the_same_logits_from_every_export(tmp_path, sources, inputs, name):
    """From the export of what was loaded, of a network made here, and of what transformers itself has written."""
    model = hf_load(sources[name])
    before = hf_logits(model, inputs)
    loaded = load_vlm(sources[name])
    out = save_vlm(tmp_path / "out", loaded.config, loaded.params, source_dir=sources[name], max_shard_bytes=60_000)
    assert len(list(out.glob("model-*-of-*.safetensors"))) > 2
    made = save_vlm(tmp_path / "made", loaded.config, loaded.params)
    directories = [out, made]
    for form in (True, False):
        theirs = tmp_path / f"theirs-{form}"
        model.save_pretrained(theirs, save_original_format=form)
        assert any(key.startswith("model.visual.") for key in tensors(theirs)) != form
        (theirs / "preprocessor_config.json").write_text((sources[name] / "preprocessor_config.json").read_text())
        again = load_vlm(theirs)
        assert again.config == loaded.config
        directories.append(save_vlm(tmp_path / f"back-{form}", again.config, again.params, source_dir=theirs))
        assert tensors(directories[-1]) == tensors(out)
    for directory in directories:
        np.testing.assert_array_equal(hf_logits(hf_load(directory), inputs), before)
    values = json.loads((directories[-1] / "config.json").read_text())
    assert not {"dtype", "rope_parameters", "text_config", "layer_types"} & {*values}
    assert (values["rope_theta"], values["image_token_id"], values["eos_token_id"]) == (1e6, tiny_qwen.IMAGE, 2)
    assert values["vision_start_token_id"] == 3 and values["tie_word_embeddings"] == (name == "tied")
    families.assert_agree(our_logits(icet_jax.load(out), inputs), before, 1e-5)


def test_trained_adapters_reach_transformers_merged_and_as_peft(tmp_path, sources, inputs):
    layers = "model.layers", "model.language_model.layers"
    assert_trained_adapters_reach_transformers(tmp_path, sources["untied"], inputs, *layers, copies=2)


def test_a_peft_adapter_is_the_start_of_what_is_exported(tmp_path, sources, inputs):
    assert_an_adapter_of_peft_is_the_start_of_an_export(tmp_path, sources["tied"], inputs, "language_model")


def test_an_adapter_elsewhere_than_on_the_decoder_is_refused(tmp_path, sources):
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=2, target_modules=r".*(visual\.blocks\.1\.attn\.qkv|layers\.1\..*q_proj)")
    peft.get_peft_model(hf_load(sources["untied"]), config).save_pretrained(tmp_path)
    with pytest.raises(UserError, match=r"not on a decoder projection \(2\): .*visual"):
        load_vlm(sources["untied"], adapter=tmp_path)


@pytest.mark.parametrize("exit_layer", [1, 2])
def test_a_model_with_one_exit_alone_has_its_logits(tmp_path, sources, inputs, exit_layer):
    vlm = icet_jax.load(sources["untied"])
    cut = vlm.save(tmp_path / "cut", exit_layer=exit_layer)
    expected = our_logits(vlm, inputs, exit_layer)
    assert np.abs(expected - our_logits(vlm, inputs)).max() > 0.05, "the exits must matter"
    model = hf_load(cut)
    assert len(model.model.visual.blocks) == exit_layer
    families.assert_agree(expected, hf_logits(model, inputs), 1e-5)
    loaded = icet_jax.load(cut)
    assert (loaded.num_exits, loaded.default_exit) == (exit_layer, exit_layer)
    before = tensors(sources["untied"])
    kept = {key for key in before if not any(f"visual.blocks.{n}." in key for n in range(exit_layer, 3))}
    assert tensors(cut) == {key: before[key] for key in kept}


BAD = [
    (None, "use_sliding_window", True, "sliding_window=1024 is not supported; needs use_sliding_window false"),
    (None, "rope_scaling", {"type": "mrope", "mrope_section": [1, 1, 1]}, "mrope_section=[1, 1, 1] is not supported"),
    (None, "rope_scaling", {"type": "yarn", "factor": 4.0}, "rope_type 'yarn' is not supported"),
    (None, "rope_scaling", "mrope", "rope_scaling='mrope' is not supported; needs a mapping"),
    (None, "tie_word_embeddings", "no", "tie_word_embeddings='no' is not supported; needs True or False"),
    (None, "image_token_id", -1, "image_token_id=-1 is not supported; needs a positive integer"),
    (None, "hidden_act", "gelu", "hidden_act='gelu' is not supported"),
    (None, "vocab_size", 284, "of shape [269, 32] instead of [284, 32]"),
    ("vision_config", "hidden_act", "gelu", "vision_config: hidden_act='gelu' is not supported"),
    ("vision_config", "model_type", "qwen2_vl", "vision_config: model_type='qwen2_vl' is not supported"),
    ("vision_config", "num_heads", 5, "hidden_size=24 is not supported; needs a multiple of 4 * num_heads, 20"),
    ("vision_config", "out_hidden_size", 24, "out_hidden_size=24 is not supported; needs 32, the hidden_size"),
    ("vision_config", "fullatt_block_indexes", 3, "fullatt_block_indexes=3 is not supported; needs a list"),
    ("vision_config", "window_size", 7, "window_size=7 is not supported; needs at least 8 pixels"),
    ("vision_config", "depth", 10**6, "num_hidden_layers=1000000 is not supported"),
]


@pytest.mark.parametrize(("part", "field", "value", "message"), BAD)
def test_configs_that_would_be_another_network_are_refused(tmp_path, sources, part, field, value, message):
    values = json.loads((sources["untied"] / "config.json").read_text())
    (values[part] if part else values)[field] = value
    (tmp_path / "config.json").write_text(json.dumps(values))
    (tmp_path / "model.safetensors").symlink_to(sources["untied"] / "model.safetensors")
    with pytest.raises(UserError) as caught:
        load_vlm(tmp_path)
    assert message in str(caught.value) and "\n" not in str(caught.value)


# Values of published config.json files, and what transformers counts for them on its meta device.
SIZES_PUBLISHED = {
    "Qwen/Qwen2.5-VL-3B-Instruct": (824, 3_754_622_976, 668_684_288),
    "Qwen/Qwen2.5-VL-7B-Instruct": (729, 8_292_166_656, 676_550_144),
    "Qwen/Qwen2.5-VL-32B-Instruct": (1161, 33_452_718_336, 688_841_984),
}


@pytest.mark.parametrize("name", SIZES_PUBLISHED)
def test_sizes_of_the_published_models(name):
    num_tensors, parameters, vision = SIZES_PUBLISHED[name]
    config = vlm_config(PUBLISHED[name])
    family = family_of(config)
    entries = family.table(config).entries
    in_file = [entry for entry in entries if entry.fallback is None]
    assert len(in_file) == num_tensors
    _, params = abstract_params(functools.partial(family.network, config), "bfloat16", "bfloat16")
    # Where the head is tied to the embeddings, the network has both.
    tied = config.text.vocab_size * config.text.hidden_size * config.text.tie_word_embeddings
    assert count_parameters(params) == parameters + tied
    assert count_parameters([params["vision_tower"], params["projector"]]) == vision
    assert (config.vision.num_hidden_layers, config.max_patches, config.vision.window_side) == (32, 65536, 4)
    assert {entry.path for entry in entries} == set(sharding.flatten_with_names(params))


def test_images_are_padded_to_few_numbers_of_patches(config):
    """Up to 24 positions, the largest image of the toy processor, there are eight."""
    buckets = [patch_bucket(config, positions) // 4 for positions in range(1, 100)]
    assert config.max_patches // 4 == 69  # an image of 1 x 69 positions is the largest, 200 times as wide as high
    assert sorted(set(buckets)) == [1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 69]
    assert all(count >= min(positions, 69) for positions, count in enumerate(buckets, start=1))


def test_the_number_of_patches_follows_from_the_prompt_or_from_the_largest_image(config, inputs):
    length = inputs["input_ids"].shape[1]
    assert length == 35 and inputs["image_grid_thw"][:, 1:].tolist() == [[8, 12], [4, 22], [4, 4]]
    fitted, fixed = batch_images(config, inputs, num_rows=3), batch_images(config, inputs, num_rows=4, per_row=2)
    assert fitted.pixels.shape == (3, 4 * 24, 96) and fixed.pixels.shape == (8, 4 * 48, 96)
    assert fitted.rows.tolist() == [0, 2, 2] and fixed.rows.tolist() == [0, 4, 4, 4, 2, 2, 4, 4]
    assert fixed.layout.tolist() == [[8, 12], [0, 0], [0, 0], [0, 0], [4, 22], [4, 4], [0, 0], [0, 0]]
    np.testing.assert_array_equal(fitted.pixels[1, :88], inputs["pixel_values"][96:184])
    np.testing.assert_array_equal(fixed.pixels[[0, 4, 5], :96], fitted.pixels)
    assert not fixed.pixels[5, 16:].any() and not fixed.pixels[6].any()
    with pytest.raises(UserError, match="row 2 has 2 images, but there is room for 1"):
        batch_images(config, inputs, num_rows=3, per_row=1)


def test_images_of_many_sizes_compile_the_encoder_a_few_times(sources):
    """Twenty pictures have fourteen grids, of four to twenty-four positions, and six numbers of patches."""
    vlm = icet_jax.load(sources["untied"])
    noise = np.random.default_rng(0)
    sizes = [tuple(int(side) for side in noise.integers(8, 60, 2)) for _ in range(20)]
    grids, shapes, before = set(), set(), front._encode._cache_size()
    for size in sizes:
        inputs = tiny_qwen.batch(tiny_qwen.config(**SMALL), [[size]])
        grids.add(tuple(inputs["image_grid_thw"][0].tolist()))
        shapes.add(batch_images(vlm.config, inputs, num_rows=1).pixels.shape)
        vlm.encode(inputs)
    assert (front._encode._cache_size() - before, len(shapes), len(grids)) == (6, 6, 14)


def test_shares_of_a_batch_are_its_parts(config):
    """Every row has two images; the parts have the shapes of the whole batch."""
    sizes = [[(20, 112), (112, 20)], [(57, 57), (20, 112)], [(8, 8), (16, 16)], [(30, 50), (30, 50)]]
    inputs = tiny_qwen.batch(tiny_qwen.config(), sizes)
    whole = batch_images(config, inputs, num_rows=4, per_row=2)
    counts = inputs["image_grid_thw"].prod(axis=1)
    parts = []
    for share in (Share(0, 2), Share(1, 2)):
        images = slice(4 * share.index, 4 * share.index + 4)
        patches = slice(counts[: images.start].sum(), counts[: images.stop].sum())
        own = {name: inputs[name][share.rows(4)] for name in ("input_ids", "attention_mask", "mm_token_type_ids")}
        own |= {"pixel_values": inputs["pixel_values"][patches], "image_grid_thw": inputs["image_grid_thw"][images]}
        parts.append(batch_images(config, own, num_rows=4, per_row=2, share=share))
    jax.tree.map(lambda all_rows, *own: np.testing.assert_array_equal(np.concatenate(own), all_rows), whole, *parts)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda x: {"pixel_values_videos": x["pixel_values"]}, "videos are not supported; give images"),
        (lambda x: {"video_grid_thw": x["image_grid_thw"]}, "videos are not supported; give images"),
        (lambda x: {"mm_token_type_ids": 2 * x["mm_token_type_ids"]}, "videos are not supported; give images"),
        (lambda x: {"mm_token_type_ids": 0 * x["mm_token_type_ids"]}, "mark 0 image positions, .* hold 50"),
        (lambda x: {"image_grid_thw": x["image_grid_thw"] * [2, 1, 1]}, r"image 0 has the grid \[2, 8, 12\]"),
        (lambda x: {"image_grid_thw": x["image_grid_thw"] + [0, 1, 0]}, r"image 0 has the grid \[1, 9, 12\]"),
        (lambda x: {"image_grid_thw": x["image_grid_thw"] * [1, 1, 100]}, "image 0 has 9600 patches, but .* up to 276"),
        (lambda x: {"image_grid_thw": x["image_grid_thw"][:, 1:]}, r"shape \(3, 2\); it must be \[images, 3\]"),
        (lambda x: {"image_grid_thw": None}, "'image_grid_thw' is missing"),
        (lambda x: {"pixel_values": x["pixel_values"][1:]}, r"shape \(199, 96\); image_grid_thw needs \(200, 96\)"),
        (lambda x: {"pixel_values": None}, "input_ids hold 50 image placeholders, .* need 0"),
        (lambda x: {"image_grid_thw": x["image_grid_thw"][[1, 0, 2]]}, "placeholders of row 0 are not those of whole"),
    ],
)
def test_inputs_that_do_not_fit_are_one_clear_line(config, inputs, change, message):
    with pytest.raises(UserError, match=message) as caught:
        batch_images(config, inputs | change(inputs), num_rows=3)
    assert "\n" not in str(caught.value)
