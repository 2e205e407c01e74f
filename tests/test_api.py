"""The Python surface against transformers, on random LLaVA-1.5 checkpoints written to disk."""

import copy
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

import icet_jax
from icet_jax.data.records import Example
from icet_jax.errors import UserError
from icet_jax.nn.protocols import init_lora
from icet_jax.parallel.compilations import CompilationCounter
from icet_jax.parallel.mesh import make_mesh
from tests import tiny

torch = pytest.importorskip("torch")
IMAGES = [1, 0, 2]


@pytest.fixture(scope="module")
def hf_model():
    return tiny.llava(seed=5)


@pytest.fixture(scope="module")
def directory(tmp_path_factory, hf_model):
    return tiny.save_llava(tmp_path_factory.mktemp("checkpoint"), hf_model)


@pytest.fixture(scope="module")
def vlm(directory):
    return icet_jax.load(directory)


def as_torch(inputs):
    return {name: torch.from_numpy(np.asarray(array)) for name, array in inputs.items()}


def hf_logits(model, inputs, exit_layer):
    with torch.no_grad():
        return model(**as_torch(inputs), vision_feature_layer=exit_layer).logits.numpy()


def test_names(vlm, directory):
    assert (vlm.num_exits, vlm.default_exit) == (4, 3)
    assert (vlm.eos_ids, vlm.pad_id, vlm.directory) == ((tiny.EOS,), tiny.PAD, directory)
    assert "CLIP" in vlm.exit_definition


@pytest.mark.parametrize("pad", ["left", "right"])
@pytest.mark.parametrize("images", [IMAGES, [1], [0, 0]], ids=str)
def test_logits_equal_transformers_at_every_exit(vlm, hf_model, images, pad):
    inputs = tiny.batch(hf_model.config, images, pad=pad)
    real = inputs["attention_mask"] == 1
    for exit_layer in [1, 2, 3, 4, None]:
        got = vlm.logits(inputs, exit_layer=exit_layer)
        expected = hf_logits(hf_model, inputs, exit_layer or 3)
        assert got.dtype == jnp.float32 and got.shape == expected.shape
        np.testing.assert_allclose(np.asarray(got)[real], expected[real], atol=1e-5)


def test_hidden_states_equal_transformers(vlm, hf_model):
    inputs = tiny.batch(hf_model.config, IMAGES)
    with torch.no_grad():
        tower = hf_model.model.vision_tower(as_torch(inputs)["pixel_values"], output_hidden_states=True)
    expected = np.stack([state.numpy() for state in tower.hidden_states])
    got = vlm.hidden_states(inputs)
    assert got.shape == (5, 3, 17, 24)
    np.testing.assert_allclose(got, expected, atol=1e-5)


def test_generate_equals_transformers_and_speaks(vlm, hf_model):
    images = [Image.new("RGB", (40, 30), (200, 30, 60)), None]
    inputs = vlm.processor(images=images, prompts=["what colour?", "hello"])
    expected = hf_model.generate(
        **as_torch(inputs), do_sample=False, max_new_tokens=12, suppress_tokens=[tiny.IMAGE, tiny.PAD]
    ).numpy()[:, inputs["input_ids"].shape[1] :]
    out = vlm.generate(inputs, max_new_tokens=12)
    np.testing.assert_array_equal(out.tokens[:, : expected.shape[1]], expected)
    assert out.log_probs.shape == out.mask.shape == (2, 12) and out.mask.dtype == bool
    assert out.texts == vlm.processor.tokenizer.batch_decode(
        [row[keep].tolist() for row, keep in zip(out.tokens, out.mask, strict=True)], skip_special_tokens=True
    )


def test_what_the_hf_processor_returns_is_taken_as_it_is(vlm, directory):
    from transformers import AutoTokenizer, CLIPImageProcessorPil, LlavaProcessor

    processor = LlavaProcessor(
        CLIPImageProcessorPil.from_pretrained(directory),
        AutoTokenizer.from_pretrained(directory),
        patch_size=7,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
    )
    image = Image.new("RGB", (40, 30), (200, 30, 60))
    theirs = processor(images=[image], text=["USER: <image>\nwhat? ASSISTANT:"], return_tensors="pt")
    ours = vlm.processor(images=[image], prompts=["what?"])
    np.testing.assert_array_equal(vlm.logits(theirs), vlm.logits(ours))


def test_sampling_depends_on_the_seed_alone(vlm, hf_model):
    inputs = tiny.batch(hf_model.config, IMAGES)
    first, again, other = (
        vlm.generate(inputs, exit_layer=2, max_new_tokens=8, temperature=1.0, seed=seed).tokens for seed in (0, 0, 1)
    )
    np.testing.assert_array_equal(first, again)
    assert (first != other).any()


def test_damaged_weights_do_not_answer(vlm, hf_model):
    params = jax.tree_util.tree_map_with_path(
        lambda path, leaf: leaf * np.nan if "projector" in jax.tree_util.keystr(path) else leaf, vlm.params
    )
    inputs = tiny.batch(hf_model.config, [0, 1, 2])  # the row without an image is sound
    with pytest.raises(UserError, match="^exit 2, row 1: the model's logits are NaN or infinite; the checkpoint is"):
        vlm.with_weights(params).generate(inputs, exit_layer=2, max_new_tokens=8)


def test_one_encoding_serves_every_exit_and_no_exit_compiles(vlm, hf_model):
    inputs = tiny.batch(hf_model.config, IMAGES, seed=2)
    encoded = vlm.encode(inputs)
    vlm.logits(inputs, exit_layer=1), vlm.generate(inputs, exit_layer=1, max_new_tokens=4)
    with CompilationCounter() as compilations:
        for exit_layer in (2, 3, 4, None):
            fresh = vlm.logits(inputs, exit_layer=exit_layer)
            np.testing.assert_array_equal(vlm.logits(inputs, exit_layer=exit_layer, encoded=encoded), fresh)
            vlm.generate(inputs, exit_layer=exit_layer, max_new_tokens=4)
    assert compilations.count == 0


def test_a_shorter_encoding_serves_its_exits(vlm, hf_model):
    inputs = tiny.batch(hf_model.config, IMAGES)
    encoded = vlm.encode(inputs, upto=2)
    for exit_layer in (1, 2):
        expected = vlm.logits(inputs, exit_layer=exit_layer)
        np.testing.assert_allclose(vlm.logits(inputs, exit_layer=exit_layer, encoded=encoded), expected, atol=1e-5)
    for exit_layer in (3, None):
        with pytest.raises(UserError, match="3 is beyond `upto`"):
            vlm.logits(inputs, exit_layer=exit_layer, encoded=encoded)
    with pytest.raises(UserError, match="upto: exit 5 is out of range"):
        vlm.encode(inputs, upto=5)


def test_bfloat16_and_meshes(directory, vlm, hf_model):
    inputs = tiny.batch(hf_model.config, IMAGES)
    real = inputs["attention_mask"] == 1
    expected = np.asarray(vlm.logits(inputs))[real]
    on_mesh = icet_jax.load(directory, mesh=make_mesh(devices=jax.devices()[:1]))
    np.testing.assert_allclose(np.asarray(on_mesh.logits(inputs))[real], expected, atol=1e-5)
    half = icet_jax.load(directory, dtype=jnp.bfloat16)
    logits = half.logits(inputs)
    assert logits.dtype == jnp.float32 and np.abs(np.asarray(logits)[real] - expected).max() < 0.15
    assert {leaf.dtype for leaf in jax.tree.leaves(half.params)} == {jnp.dtype("bfloat16")}


def test_without_tokenizer_files_everything_but_text_works(tmp_path, hf_model, vlm):
    bare = icet_jax.load(tiny.save_llava(tmp_path / "bare", hf_model, processor=False))
    inputs = tiny.batch(hf_model.config, IMAGES)
    np.testing.assert_array_equal(bare.logits(inputs), vlm.logits(inputs))
    out = bare.generate(inputs, max_new_tokens=4)
    np.testing.assert_array_equal(out.tokens, vlm.generate(inputs, max_new_tokens=4).tokens)
    with pytest.raises(UserError, match="no tokenizer files"):
        out.texts  # noqa: B018
    again = icet_jax.load(bare.save(tmp_path / "again"))
    np.testing.assert_array_equal(again.logits(inputs), vlm.logits(inputs))


def test_a_saved_model_loads_in_transformers(tmp_path, vlm, hf_model):
    from transformers import AutoProcessor, LlavaForConditionalGeneration

    vlm.save(tmp_path / "out")
    reloaded = LlavaForConditionalGeneration.from_pretrained(tmp_path / "out", dtype=torch.float32).eval()
    inputs = tiny.batch(hf_model.config, IMAGES)
    real = inputs["attention_mask"] == 1
    np.testing.assert_array_equal(hf_logits(reloaded, inputs, 2)[real], hf_logits(hf_model, inputs, 2)[real])
    assert AutoProcessor.from_pretrained(tmp_path / "out").tokenizer.pad_token_id == tiny.PAD


@pytest.mark.parametrize("exit_layer", [0, 5, -1, True])
def test_an_exit_out_of_range_is_named(vlm, hf_model, exit_layer):
    inputs = tiny.batch(hf_model.config, [0])
    for call in (vlm.logits, vlm.generate):
        with pytest.raises(UserError, match=r"exit_layer: .*1\.\.4"):
            call(inputs, exit_layer=exit_layer)


def changed(inputs, **arrays):
    return {name: array for name, array in (inputs | arrays).items() if array is not None}


@pytest.mark.parametrize(
    "change, complaint",
    [
        (lambda x: changed(x, input_ids=None), "'input_ids' is missing"),
        (lambda x: changed(x, input_ids=x["input_ids"] + 100), "tokens are 0..262"),
        (lambda x: changed(x, attention_mask=x["attention_mask"][:, 1:]), "must both be"),
        (lambda x: changed(x, pixel_values=None), "3 images, pixel_values hold 0"),
        (lambda x: changed(x, pixel_values=x["pixel_values"][:2]), "3 images, pixel_values hold 2"),
        (lambda x: changed(x, pixel_values=x["pixel_values"][:, :, :14]), r"needs \('I', 3, 28, 28\)"),
    ],
)
def test_inputs_that_do_not_fit_are_named(vlm, hf_model, change, complaint):
    with pytest.raises(UserError, match=complaint):
        vlm.logits(change(tiny.batch(hf_model.config, IMAGES)))


def test_a_prompt_and_answer_longer_than_the_model_takes_are_named(vlm, hf_model):
    inputs = tiny.batch(hf_model.config, IMAGES)
    small, length = copy.copy(vlm), int(np.asarray(inputs["attention_mask"]).sum(axis=1).max())
    small.max_positions = length + 3
    says = rf"row \d: the prompt takes {length} positions, .* up to 4 .* model has {length + 3} "
    with pytest.raises(UserError, match=says):
        small.generate(inputs, max_new_tokens=4)
    small.max_positions = length - 1
    with pytest.raises(UserError, match=rf"row \d: the prompt takes {length} positions, images included, but"):
        small.logits(inputs)


def test_hidden_states_need_images(vlm, hf_model):
    with pytest.raises(UserError, match="no images"):
        vlm.hidden_states(tiny.batch(hf_model.config, [0, 0]))


@pytest.mark.parametrize(
    "arguments, complaint",
    [
        (("/no/such/place",), "no such directory"),
        (("nobody/nothing-7b",), "not in the local cache while HF_HUB_OFFLINE is set"),
        (("organism:dragon",), "the shipped checkpoints are organism:vlm"),
        (("here", "float16"), "dtype: float16"),
        (("here", "no-such"), "dtype: no-such"),
    ],
)
def test_what_cannot_be_loaded_is_one_line(directory, arguments, complaint):
    path, *rest = arguments
    with pytest.raises(UserError, match=complaint) as caught:
        icet_jax.load(directory if path == "here" else path, *rest)
    assert "\n" not in str(caught.value)


def test_a_model_is_not_saved_over_itself(tmp_path, hf_model):
    vlm = icet_jax.load(tiny.save_llava(tmp_path / "model", hf_model, processor=False))
    with pytest.raises(UserError, match="loaded from this directory; export to another one"):
        vlm.save(tmp_path / "model")
    shutil.rmtree(tmp_path / "model")


def test_scorers_are_loaded_by_name_or_directory(tmp_path):
    keywords = icet_jax.load_scorer("refusal_keywords")(["a", "b"], ["I'm sorry, I can't.", "Sure, here it is."])
    assert keywords["refusal_keywords"].values.tolist() == [0.0, 1.0]
    (scores,) = icet_jax.load_scorer(tiny.save_reward_model(tmp_path / "rm"))(["what?"], ["this"]).values()
    assert scores.values.shape == (1,) and np.isfinite(scores.values).all()
    with pytest.raises(UserError, match="the shipped checkpoints are"):
        icet_jax.load_scorer("organism:dragon")


@pytest.fixture(scope="module")
def trained(vlm):
    """The model with adapters that do something."""
    fresh = init_lora(vlm.lora_shapes, rank=2, alpha=4.0, targets=("q_proj", "up_proj"), key=jax.random.key(0))
    noisy = jax.tree.map(lambda x: 0.3 * jax.random.normal(jax.random.key(1), x.shape), fresh.weights)
    return vlm.with_weights(vlm.params, fresh.replace(weights=noisy))


def test_adapters_answer_and_are_saved(tmp_path, vlm, trained, hf_model):
    inputs = tiny.batch(hf_model.config, IMAGES)
    real = inputs["attention_mask"] == 1
    before, after = (np.asarray(model.logits(inputs, exit_layer=2))[real] for model in (vlm, trained))
    assert np.abs(after - before).max() > 0.1 and vlm.lora is None
    merged = icet_jax.load(trained.save(tmp_path / "merged"))
    np.testing.assert_allclose(np.asarray(merged.logits(inputs, exit_layer=2))[real], after, atol=1e-5)
    said = [model.generate(inputs, max_new_tokens=6).tokens.tolist() for model in (trained, merged, vlm)]
    assert said[0] == said[1] != said[2]


def test_a_sweep_says_what_the_model_says_and_gives_its_curves(trained):
    picture = np.random.default_rng(0).integers(0, 256, (30, 40, 3), dtype=np.uint8)
    rows = [Example(str(i), f"question {i}", (picture,), kind="benign") for i in range(3)]
    scorers = [icet_jax.load_scorer("refusal_keywords")]
    found = icet_jax.sweep(trained, rows, exits=[1, 3], sampling=trained.sampling(4), scorers=scorers, batch_size=2)
    inputs = trained.processor(images=[[picture]], prompts=["question 1"])
    said = {row["layer"]: row["response"] for row in found.rows if row["id"] == "1"}
    assert said == {layer: trained.generate(inputs, layer, 4).texts[0] for layer in (1, 3)}
    curve = found.curve("length")
    lengths = [[row["scores"]["length"] for row in found.rows if row["layer"] == layer] for layer in (1, 3)]
    assert [point.mean for point in curve.values()] == [np.mean(of) for of in lengths] and list(curve) == [1, 3]
    assert all(point.low <= point.mean <= point.high for point in curve.values())
    with pytest.raises(UserError, match="asr/nobody: not measured by this sweep, which has .*refusal/refusal_keywords"):
        found.curve("asr/nobody")


def test_one_row_has_no_interval(vlm):
    rows = [Example("a", "alone", kind="benign")]
    found = icet_jax.sweep(vlm, rows, exits=[1], sampling=vlm.sampling(2), scorers=[], batch_size=1)
    point = found.curve("length")[1]
    assert point.mean >= 1 and np.isnan([point.low, point.high]).all()


def test_configs_take_values_as_the_command_line_takes_text():
    values = {
        "lppo.iterations": 3,
        "optimizer.learning_rate": 1e-3,
        "log.tensorboard": False,
        "reward.model": None,
        "data.mixture": {"forbidden": 0.5, "benign": 0.5},
        "sweep.scorers": ("refusal_keywords", "organism:judge"),
        "sweep.exits": (1, 3),
    }
    config = icet_jax.load_config("configs/organism_lppo.py", values)
    assert {name: config[name] for name in values if name != "data.mixture"} == {
        name: value for name, value in values.items() if name != "data.mixture"
    }
    assert config.data.mixture.to_dict() == values["data.mixture"]
    with pytest.raises(UserError, match="config.lppo.iteration"):
        icet_jax.load_config("configs/organism_lppo.py", {"lppo.iteration": 3})


def test_judge_and_rows_of_the_organism():
    rows = icet_jax.load_rows("organism:test:forbidden:5")
    judge = icet_jax.load_scorer("organism:judge")
    labels = judge([row.prompt for row in rows], [row.answer for row in rows])["world_exact"].labels
    assert labels == ["refused"] * 5


def test_every_name_of_the_surface_is_there():
    for name in icet_jax.SURFACE:
        assert callable(getattr(icet_jax, name)) and name in dir(icet_jax)
