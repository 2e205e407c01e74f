"""Inputs of SmolVLM and Idefics3 equal those of HF's processors: token ids, tiles, masks, for any size of image."""

import json
import shutil
import subprocess
import sys

import numpy as np
import pytest

from icet_jax.errors import UserError
from icet_jax.models.base.processor import load_processor
from icet_jax.models.smolvlm.processor import image_text, smolvlm_template
from icet_jax.models.smolvlm.tiles import most_tiles, tile_grid
from tests import tiny_families, tiny_smolvlm

ROWS = [
    ([(31, 57)], "what is this?"),
    ([], "no picture, ünïcode and <image inside"),
    ([(28, 28), (90, 200)], "which one is larger\nand why "),
    ([(3, 2)], ""),
    ([(40, 300), (12, 13), (60, 60)], "  three"),
]


def write(folder, kind, **images):
    """Config, tokenizer and processor files of a toy checkpoint; returns the HF config."""
    config = tiny_smolvlm.config(kind)
    tiny_smolvlm.save_processor(folder, config, **images)
    (folder / "config.json").write_text(json.dumps(tiny_smolvlm.hub_config(config)))
    return config


@pytest.fixture(scope="module")
def directories(tmp_path_factory):
    folders = {kind: tmp_path_factory.mktemp(kind) for kind in ("smolvlm", "idefics3")}
    for kind, folder in folders.items():
        write(folder, kind)
    return folders


@pytest.fixture(scope="module", params=["smolvlm", "idefics3"])
def pair(request, directories):
    """(our processor, HF's)."""
    return load_processor(directories[request.param]), tiny_smolvlm.processor(tiny_smolvlm.config(request.param))


def hf_inputs(hf, images, prompts):
    texts = []
    for row, prompt in zip(images, prompts, strict=True):
        content = [{"type": "image"}] * len(row) + [{"type": "text", "text": prompt}]
        texts.append(hf.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True))
    arrays = hf(text=texts, images=images if any(images) else None, padding=True, return_tensors="np")
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
    assert ((ours["input_ids"] == tiny_smolvlm.BOS).sum(axis=1) == 1).all()


SIZES = [
    (28, 28), (29, 28), (28, 57), (333, 71), (71, 333), (1, 40), (40, 1), (1, 300), (480, 640), (97, 131), (9, 9),
    (3, 2), (640, 427), (1000, 999),
]  # fmt: skip
SETTINGS = {
    "published proportions": ({}, 17),
    "a longer edge that is no multiple of the tile's": ({"size": {"longest_edge": 95}}, 17),
    "two rows of two tiles at most": ({"size": {"longest_edge": 56}}, 5),
    "more tiles": ({"size": {"longest_edge": 140}}, 26),
    "no larger than a tile": ({"size": {"longest_edge": 28}}, 1),
    "without splitting": ({"do_image_splitting": False}, 1),
    "without normalisation": ({"do_normalize": False}, 17),
}
"""{name: (settings, largest number of tiles of an image)}."""


@pytest.mark.parametrize("setting", SETTINGS)
def test_pixels_and_ids_of_any_size_equal_hf(tmp_path, setting):
    settings, most = SETTINGS[setting]
    config = write(tmp_path, "smolvlm", **settings)
    processor, hf = load_processor(tmp_path), tiny_smolvlm.processor(config, **settings)
    assert processor.config.max_tiles == most
    seen = set()
    for size in SIZES:
        images = [tiny_families.pictures([size], sum(size))]
        theirs = hf_inputs(hf, images, ["x"])
        assert_equal(processor(images=images, prompts=["x"]), theirs)
        seen.add(theirs["pixel_values"].shape[1])
    assert max(seen) == most and (len(seen) > 1) == (most > 1)


def test_grids_of_every_size_are_those_of_the_image_processor():
    """Also above 4,096 pixels, where HF limits the longer edge."""
    from transformers.models.smolvlm import image_processing_pil_smolvlm as hf

    processor, noise = hf.SmolVLMImageProcessorPil(), np.random.default_rng(0)
    processor.resize = lambda image, size, resample=None: np.empty((0, size.height, size.width), np.uint8)
    sizes = [(1, 5000), (5000, 1), (4096, 4095), *map(tuple, noise.integers(1, 6000, (60, 2)).tolist())]
    for longest, tile in ((2048, 512), (1536, 384), (1456, 364), (5000, 512), (300, 364)):
        for size in sizes:
            image = np.empty((0, *size), np.uint8)
            image = np.empty((0, *hf.get_resize_output_image_size(image, longest)), np.uint8)
            image = processor.resize_for_vision_encoder(image, tile)
            _, *expected = processor.split_images(image, {"longest_edge": tile})
            assert tile_grid(size, longest, tile) == tuple(expected), (size, longest, tile)


@pytest.mark.parametrize(("rows", "columns"), [(0, 0), (1, 1), (1, 4), (3, 2)])
def test_the_text_of_an_image_is_hf_s(rows, columns):
    from transformers.models.smolvlm.processing_smolvlm import get_image_prompt_string

    theirs = get_image_prompt_string(rows, columns, 3, "<fake_token_around_image>", "<image>", "<global-img>")
    assert image_text(rows, columns, "<image>" * 3) == theirs


@pytest.mark.parametrize("count", [0, 1, 3])
def test_the_published_template_is_hf_s(count):
    from transformers.models.smolvlm.processing_smolvlm import DEFAULT_CHAT_TEMPLATE

    content = [{"type": "image"}] * count + [{"type": "text", "text": "why?"}]
    theirs = tiny_smolvlm.tokenizer().apply_chat_template(
        [{"role": "user", "content": content}], chat_template=DEFAULT_CHAT_TEMPLATE, tokenize=False,
        add_generation_prompt=True,
    )  # fmt: skip
    assert smolvlm_template("why?", count) == theirs


def test_without_a_template_smolvlm_has_the_published_one_and_idefics3_none(directories, tmp_path):
    for kind, folder in directories.items():
        copy = shutil.copytree(folder, tmp_path / kind)
        for name in ("chat_template.json", "chat_template.jinja"):
            (copy / name).unlink(missing_ok=True)
        settings = json.loads((copy / "tokenizer_config.json").read_text())
        (copy / "tokenizer_config.json").write_text(json.dumps(settings | {"chat_template": None}))
    assert load_processor(tmp_path / "smolvlm").template is smolvlm_template
    with pytest.raises(UserError, match="idefics3: the checkpoint has no chat template.*chat_template.json"):
        load_processor(tmp_path / "idefics3")


def test_files_that_transformers_5_writes(directories, tmp_path):
    """One processor_config.json holds the image processor's settings too."""
    config = write(tmp_path, "idefics3")
    for name in ("preprocessor_config.json", "processor_config.json", "chat_template.json"):
        (tmp_path / name).unlink()
    tiny_smolvlm.processor(config).save_pretrained(tmp_path)
    assert not (tmp_path / "preprocessor_config.json").exists()
    images, prompts = [tiny_families.pictures(sizes) for sizes, _ in ROWS], [prompt for _, prompt in ROWS]
    ours, theirs = (
        load_processor(folder)(images=images, prompts=prompts) for folder in (tmp_path, directories["idefics3"])
    )
    assert_equal(ours, theirs)


DAMAGE = [
    ({"max_image_size": {"longest_edge": 32}}, "max_image_size.longest_edge must be 28, the model's image_size"),
    ({"max_image_size": None}, "max_image_size.longest_edge must be 28"),
    ({"size": {"height": 28, "width": 28}}, "size.longest_edge is missing"),
    ({"do_resize": False}, "do_resize must be true"),
    ({"do_pad": False}, "do_pad must be true"),
    ({"image_processor_type": "CLIPImageProcessor"}, "'CLIPImageProcessor' is unknown here; known: SmolVLM"),
]


@pytest.mark.parametrize(("changes", "complaint"), DAMAGE)
def test_bad_settings_are_one_clear_line(directories, tmp_path, changes, complaint):
    shutil.copytree(directories["smolvlm"], tmp_path, dirs_exist_ok=True)
    path = tmp_path / "preprocessor_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    with pytest.raises(UserError, match=complaint) as caught:
        load_processor(tmp_path)
    assert "\n" not in str(caught.value)


def test_a_model_keeps_the_number_of_tiles_that_it_was_loaded_for(directories, tmp_path):
    folder = shutil.copytree(directories["smolvlm"], tmp_path / "copy")
    config = load_processor(folder).config
    path = folder / "preprocessor_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"size": {"longest_edge": 140}}))
    with pytest.raises(UserError, match="cut into up to 26 tiles, but the model was loaded for 17"):
        load_processor(folder, config)
    path.unlink()
    assert most_tiles(folder, 28) == 17


def test_a_prompt_with_a_placeholder_is_refused(pair):
    with pytest.raises(UserError, match="row 0: the prompt holds '<image>'"):
        pair[0](images=[None], prompts=["a <image>"])


def test_the_processor_needs_no_torch(directories):
    code = (
        "import sys; sys.modules['torch'] = None\n"
        "import numpy as np\n"
        "from icet_jax.models.base.processor import load_processor\n"
        f"processor = load_processor({str(directories['smolvlm'])!r})\n"
        "inputs = processor(images=[np.zeros((30, 50, 3), np.uint8)], prompts=['x'])\n"
        "assert inputs['pixel_values'].shape == (1, 13, 3, 28, 28)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
