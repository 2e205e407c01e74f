"""Our inputs equal those of HF's LlavaProcessor: token ids, masks, and pixels with difference 0."""

import json
import shutil

import numpy as np
import pytest
from PIL import Image

from icet_jax.errors import UserError
from icet_jax.models.base.processor import load_processor
from icet_jax.models.llava.images import image_rows
from tests import tiny


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoint")
    config = tiny.llava_config()
    (folder / "config.json").write_text(json.dumps(tiny.old_config(config)))
    tiny.save_processor(folder, config)
    return folder


@pytest.fixture(scope="module")
def processor(directory):
    return load_processor(directory)


@pytest.fixture(scope="module")
def hf_processor(directory):
    from transformers import AutoTokenizer, CLIPImageProcessorPil, LlavaProcessor

    return LlavaProcessor(
        CLIPImageProcessorPil.from_pretrained(directory),
        AutoTokenizer.from_pretrained(directory, padding_side="left"),
        patch_size=7,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=tiny.CHAT_TEMPLATE,
    )


def picture(width, height, seed=0):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def hf_inputs(hf_processor, images, prompts, **options):
    """HF's own chat template, written by jinja, and HF's processor."""
    texts = []
    for row, prompt in zip(images, prompts, strict=True):
        content = [{"type": "image"}] * len(row) + [{"type": "text", "text": prompt}]
        message = [{"role": "user", "content": content}]
        texts.append(hf_processor.apply_chat_template(message, add_generation_prompt=True))
    flat = [image for row in images for image in row]
    return hf_processor(text=texts, images=flat or None, return_tensors="np", padding=True, **options)


ROWS = [
    ([picture(31, 57, 1)], "what is this?"),
    ([], "no picture, ünïcode and <pad> inside"),
    ([picture(28, 28, 2), picture(200, 90, 3)], "which one is larger\nand why"),
    ([picture(3, 2, 4).convert("L")], ""),
]


@pytest.mark.parametrize("chosen", [[0], [1], [0, 1, 2, 3], [2, 3, 0]])
def test_inputs_equal_hf(processor, hf_processor, chosen):
    images, prompts = zip(*[ROWS[i] for i in chosen], strict=True)
    ours = processor(images=images, prompts=prompts)
    theirs = hf_inputs(hf_processor, images, [processor.plain(prompt) for prompt in prompts])
    assert set(ours) == set(theirs)
    for name in theirs:
        assert ours[name].shape == theirs[name].shape and ours[name].dtype == theirs[name].dtype
        np.testing.assert_array_equal(ours[name], theirs[name])


@pytest.mark.parametrize("size", [(28, 28), (29, 28), (28, 41), (333, 71), (71, 333), (1, 40), (640, 480)])
def test_pixels_of_any_size_equal_hf(processor, hf_processor, size):
    image = picture(*size)
    np.testing.assert_array_equal(
        processor(images=[image], prompts=["x"])["pixel_values"],
        hf_inputs(hf_processor, [[image]], ["x"])["pixel_values"],
    )


def test_a_bucket_pads_on_the_left(processor):
    images, prompts = zip(*ROWS, strict=True)
    plain, bucket = processor(images=images, prompts=prompts), processor(images=images, prompts=prompts, pad_to=128)
    length = plain["input_ids"].shape[1]
    assert bucket["input_ids"].shape == (4, 128)
    np.testing.assert_array_equal(bucket["input_ids"][:, 128 - length :], plain["input_ids"])
    np.testing.assert_array_equal(bucket["attention_mask"][:, 128 - length :], plain["attention_mask"])
    assert (bucket["input_ids"][:, : 128 - length] == tiny.PAD).all() and not bucket["attention_mask"][:, 0].any()


def test_a_row_may_be_none_an_image_or_a_list(processor):
    image = picture(40, 40)
    one = processor(images=[image, None], prompts=["a", "b"])
    many = processor(images=[[image], []], prompts=["a", "b"])
    for name in many:
        np.testing.assert_array_equal(one[name], many[name])


def test_image_rows(processor):
    images, prompts = zip(*ROWS, strict=True)
    inputs = processor(images=images, prompts=prompts)
    np.testing.assert_array_equal(image_rows(inputs["input_ids"], 4, processor.config), [0, 2, 2, 3])
    with pytest.raises(UserError, match="4 images, pixel_values hold 3"):
        image_rows(inputs["input_ids"], 3, processor.config)
    inputs["input_ids"][2, inputs["input_ids"][2].tolist().index(tiny.IMAGE)] = tiny.BOS
    with pytest.raises(UserError, match="row 2 does not hold placeholders for whole images"):
        image_rows(inputs["input_ids"], 4, processor.config)


def test_full_strategy_keeps_the_class_token(directory, tmp_path):
    shutil.copytree(directory, tmp_path, dirs_exist_ok=True)
    edit(tmp_path / "config.json", vision_feature_select_strategy="full")
    inputs = load_processor(tmp_path)(images=[picture(28, 28)], prompts=["x"])
    assert (inputs["input_ids"] == tiny.IMAGE).sum() == 17


def test_decoding_stops_at_the_mask_and_skips_special_tokens(processor):
    ids = processor.tokenizer("hello wörld", add_special_tokens=False)["input_ids"]
    tokens = np.array([[*ids, tiny.EOS, *ids], [tiny.BOS, *ids, *ids]])
    mask = np.zeros(tokens.shape, bool)
    mask[0, : len(ids) + 1] = mask[1, : len(ids) + 1] = True
    assert processor.decode(tokens, mask) == ["hello wörld", "hello wörld"]
    assert processor.decode(tokens, np.zeros(tokens.shape, bool)) == ["", ""]


@pytest.mark.parametrize(
    "images, prompts, options, complaint",
    [
        ([None], ["a", "b"], {}, "2 prompts but 1 images"),
        ([None, None], ["a", "<image> b"], {}, "row 1: the prompt holds '<image>'"),
        ([None, picture(9, 9)], ["a", "b" * 40], {"pad_to": 40}, "row 1: the prompt takes .* tokens"),
        ([None, b"nothing"], ["a", "b"], {}, "row 1 image 0: not an image"),
        ([[picture(9, 9), "/no/such.png"]], ["a"], {}, "/no/such.png: no such image file"),
        ([picture(1, 600)], ["a"], {}, "row 0 image 0: 1 x 600 pixels is too long and thin"),
        ([np.zeros((4, 4, 3))], ["a"], {}, "row 0 image 0: an array of float64"),
    ],
)
def test_bad_rows_are_named(processor, images, prompts, options, complaint):
    with pytest.raises(UserError, match=complaint):
        processor(images=images, prompts=prompts, **options)


def edit(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def break_tokenizer(folder):
    (folder / "tokenizer.json").write_text("{")


@pytest.mark.parametrize(
    "damage, complaint",
    [
        (lambda folder: (folder / "tokenizer.json").unlink(), "no tokenizer files"),
        (break_tokenizer, "tokenizer files cannot be read"),
        (lambda folder: (folder / "preprocessor_config.json").unlink(), "preprocessor_config.json: no such file"),
        (lambda folder: (folder / "preprocessor_config.json").write_text("]"), "not a JSON file"),
        (lambda folder: edit(folder / "preprocessor_config.json", image_processor_type="Dream"), "'Dream' is unknown"),
        (lambda folder: edit(folder / "preprocessor_config.json", crop_size=32), "cropped to 28 x 28"),
        (lambda folder: edit(folder / "config.json", image_token_index=7), "image_token_index 7"),
        (lambda folder: (folder / "config.json").unlink(), "config.json"),
    ],
)
def test_bad_directories_are_one_clear_line(directory, tmp_path, damage, complaint):
    shutil.copytree(directory, tmp_path, dirs_exist_ok=True)
    damage(tmp_path)
    with pytest.raises(UserError, match=complaint) as caught:
        load_processor(tmp_path)
    assert "\n" not in str(caught.value)


def test_a_hub_style_file_with_plain_sizes(directory, tmp_path, processor):
    shutil.copytree(directory, tmp_path, dirs_exist_ok=True)
    edit(tmp_path / "preprocessor_config.json", crop_size=28, size=28, feature_extractor_type="CLIPFeatureExtractor")
    image = picture(50, 30)
    np.testing.assert_array_equal(
        load_processor(tmp_path)(images=[image], prompts=["x"])["pixel_values"],
        processor(images=[image], prompts=["x"])["pixel_values"],
    )


# What `conv_vicuna_v1` of the original LLaVA code returns for one question, with `<image>` and a line break before it.
VICUNA_V1 = (
    "A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, detailed, "
    "and polite answers to the user's questions. USER: <image>\nwhat is this? ASSISTANT:"
)
LLAVA_V1 = (
    "A chat between a curious human and an artificial intelligence assistant. The assistant gives helpful, detailed, "
    "and polite answers to the human's questions. USER: <image>\nwhat is this? ASSISTANT:"
)


@pytest.mark.parametrize("name, text", [("vicuna_v1", VICUNA_V1), ("llava_v1", LLAVA_V1)])
def test_templates_by_name_are_those_of_the_original_code(name, text, directory):
    processor = load_processor(directory, template=name)
    assert processor.template("what is this?", 1) == text
    assert processor.template("what is this?", 0) == text.replace("<image>\n", "")


def test_an_unknown_template_is_one_line(directory):
    with pytest.raises(UserError, match="config.data.template=vicuna: unknown; choose vicuna_v1 or llava_v1"):
        load_processor(directory, template="vicuna")
