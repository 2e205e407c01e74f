"""Inputs of Qwen2.5-VL equal those of HF's processor: token ids, types, patches and grids, for any size of image."""

import json
import shutil
import subprocess
import sys

import numpy as np
import pytest

from icet_jax.errors import UserError
from icet_jax.models.base.processor import load_processor
from icet_jax.models.qwen2_5_vl.processor import qwen_template
from icet_jax.models.qwen2_5_vl.resize import most_patches, smart_resize
from tests import tiny_families, tiny_qwen

ROWS = [
    ([(31, 57)], "what is this?"),
    ([], "no picture, ünïcode and <image inside"),
    ([(28, 28), (90, 200)], "which one is larger\nand why "),
    ([(3, 2)], ""),
    ([(40, 300), (12, 13), (60, 60)], "  three"),
]


def write(folder, **images):
    """Config, tokenizer and processor files of a toy checkpoint; returns the HF config."""
    config = tiny_qwen.config()
    tiny_qwen.save_processor(folder, config, **images)
    (folder / "config.json").write_text(json.dumps(tiny_qwen.hub_config(config)))
    return config


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    folder = tmp_path_factory.mktemp("qwen")
    write(folder)
    return folder


@pytest.fixture(scope="module")
def pair(directory):
    """(our processor, HF's)."""
    return load_processor(directory), tiny_qwen.processor(tiny_qwen.config())


def hf_inputs(hf, images, prompts):
    texts = []
    for row, prompt in zip(images, prompts, strict=True):
        content = [{"type": "image"}] * len(row) + [{"type": "text", "text": prompt}]
        texts.append(hf.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True))
    flat = [image for row in images for image in row]
    arrays = hf(text=texts, images=flat or None, padding=True, return_tensors="np")
    return {name: np.asarray(array) for name, array in arrays.items()}


def assert_equal(ours, theirs):
    assert set(ours) == set(theirs)
    for name in theirs:
        assert ours[name].shape == theirs[name].shape and ours[name].dtype == theirs[name].dtype, name
        np.testing.assert_array_equal(ours[name], theirs[name], err_msg=name)


@pytest.mark.parametrize("chosen", [[0], [1], [2], [0, 1, 2, 3, 4], [1, 4, 3]])
def test_inputs_equal_hf(pair, chosen):
    processor, hf = pair
    images = [tiny_families.pictures(sizes, number) for number, (sizes, _) in enumerate(ROWS[i] for i in chosen)]
    prompts = [ROWS[i][1] for i in chosen]
    ours = processor(images=images, prompts=prompts)
    assert_equal(ours, hf_inputs(hf, images, prompts))
    rows = zip(ours["input_ids"], ours["attention_mask"].astype(bool), strict=True)
    assert processor.token_ids(images, prompts) == [ids[real].tolist() for ids, real in rows]


SIZES = [
    (28, 28), (29, 28), (28, 57), (333, 71), (71, 333), (1, 40), (40, 1), (1, 200), (480, 640), (97, 131), (9, 9),
    (3, 2), (640, 427), (1000, 999), (4, 4), (12, 12), (20, 20), (12, 4),
]  # fmt: skip
SETTINGS = {
    "toy": ({}, 69),
    "small limits": ({"min_pixels": 64, "max_pixels": 128}, 20),
    "an enlarging minimum": ({"min_pixels": 6400, "max_pixels": 12800}, 252),
    "the form of transformers 5": (
        {"min_pixels": None, "max_pixels": None, "size": {"shortest_edge": 1000, "longest_edge": 9000}}, 167,
    ),
    "without normalisation": ({"do_normalize": False}, 69),
}  # fmt: skip
"""{name: (settings, limit of an image's positions)}."""


@pytest.mark.parametrize("setting", SETTINGS)
def test_patches_and_ids_of_any_size_equal_hf(tmp_path, setting):
    settings, most = SETTINGS[setting]
    config = write(tmp_path, **settings)
    processor, hf = load_processor(tmp_path), tiny_qwen.processor(config, **settings)
    assert processor.config.max_patches == 4 * most
    seen = set()
    for size in SIZES:
        images = [tiny_families.pictures([size], sum(size))]
        theirs = hf_inputs(hf, images, ["x"])
        assert_equal(processor(images=images, prompts=["x"]), theirs)
        seen.add(tuple(theirs["image_grid_thw"][0].tolist()))
    assert len(seen) > 5


def test_sizes_are_those_of_the_image_processor():
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import smart_resize as theirs

    noise = np.random.default_rng(0)
    sizes = [(10, 10), (28, 28), (1, 200), (200, 1), (14, 14), (42, 70), *noise.integers(1, 5000, (300, 2)).tolist()]
    for limits in ((3136, 12845056), (3136, 1003520), (256 * 784, 1280 * 784), (784, 1568)):
        for size in sizes:
            if max(size) <= 200 * min(size):
                assert smart_resize(tuple(size), 28, *limits, "x") == theirs(*size, 28, *limits), (size, limits)


def test_no_image_has_more_patches_than_the_limit(pair):
    config = pair[0].config.vision
    for limits in ((64, 64), (64, 1536), (256, 1536), (1000, 1024), (64, 10**6)):
        most, largest = most_patches(config, limits), 0
        for high in (*range(1, 40), 97, 500):
            for wide in {*range(high, 60), 50 * high, 200 * high}:
                rows, columns = smart_resize((high, wide), 8, *limits, "x")
                largest = max(largest, rows * columns // 16)
        assert largest <= most


def test_published_sizes():
    """The table of Qwen2.5-VL's own examples: rows and columns of patches with the published limits."""
    grids = {(480, 640): (34, 46), (28, 28): (4, 4), (10, 10): (4, 4), (1080, 1920): (78, 138)}
    for size, (rows, columns) in grids.items():
        assert smart_resize(size, 28, 3136, 12845056, "x") == (14 * rows, 14 * columns)


def test_an_elongated_image_is_one_clear_line(pair):
    with pytest.raises(UserError, match="row 0 image 0: an image of 1 x 201 pixels is too elongated .* 200 : 1") as e:
        pair[0].token_ids([tiny_families.pictures([(1, 201)])], ["x"])
    assert "\n" not in str(e.value)


@pytest.mark.parametrize("count", [0, 1, 3])
def test_without_a_template_the_published_one_is_used(directory, tmp_path, count):
    copy = shutil.copytree(directory, tmp_path / "copy")
    for name in ("chat_template.json", "chat_template.jinja"):
        (copy / name).unlink(missing_ok=True)
    settings = json.loads((copy / "tokenizer_config.json").read_text())
    (copy / "tokenizer_config.json").write_text(json.dumps(settings | {"chat_template": None}))
    assert load_processor(copy).template is qwen_template
    assert load_processor(directory).template("why?", count) == qwen_template("why?", count)


def test_files_that_transformers_5_writes(directory, tmp_path):
    """One processor_config.json holds the image processor's settings too."""
    config = write(tmp_path)
    for name in ("preprocessor_config.json", "chat_template.json"):
        (tmp_path / name).unlink()
    tiny_qwen.processor(config).save_pretrained(tmp_path)
    assert not (tmp_path / "preprocessor_config.json").exists()
    images, prompts = [tiny_families.pictures(sizes) for sizes, _ in ROWS], [prompt for _, prompt in ROWS]
    ours, theirs = (load_processor(folder)(images=images, prompts=prompts) for folder in (tmp_path, directory))
    assert_equal(ours, theirs)


DAMAGE = [
    ({"patch_size": 14}, r"patch_size, temporal_patch_size and merge_size must be \(4, 2, 2\), the model's"),
    ({"merge_size": 1}, "patch_size, temporal_patch_size and merge_size"),
    ({"do_resize": False}, "do_resize must be true"),
    ({"max_pixels": -5}, "min_pixels and max_pixels must be positive integers"),
    ({"image_processor_type": "CLIPImageProcessor"}, "'CLIPImageProcessor' is unknown here; known: Qwen2VL"),
]


@pytest.mark.parametrize(("changes", "complaint"), DAMAGE)
def test_bad_settings_are_one_clear_line(directory, tmp_path, changes, complaint):
    shutil.copytree(directory, tmp_path, dirs_exist_ok=True)
    path = tmp_path / "preprocessor_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    with pytest.raises(UserError, match=complaint) as caught:
        load_processor(tmp_path)
    assert "\n" not in str(caught.value)


def test_a_model_keeps_the_number_of_patches_that_it_was_loaded_for(directory, tmp_path):
    folder = shutil.copytree(directory, tmp_path / "copy")
    config = load_processor(folder).config
    path = folder / "preprocessor_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"max_pixels": 6400}))
    with pytest.raises(UserError, match="up to 564 patches, but the model was loaded for 276"):
        load_processor(folder, config)


def test_a_prompt_with_a_placeholder_is_refused(pair):
    with pytest.raises(UserError, match=r"row 0: the prompt holds '<\|image_pad\|>'"):
        pair[0](images=[None], prompts=["a <|image_pad|>"])


def test_the_processor_needs_no_torch(directory):
    code = (
        "import sys; sys.modules['torch'] = None\n"
        "import numpy as np\n"
        "from icet_jax.models.base.processor import load_processor\n"
        f"processor = load_processor({str(directory)!r})\n"
        "inputs = processor(images=[np.zeros((30, 50, 3), np.uint8)], prompts=['x'])\n"
        "assert inputs['pixel_values'].shape == (96, 96)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
