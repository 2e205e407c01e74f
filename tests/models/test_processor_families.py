"""Inputs of LLaVA-NeXT and Llama 3.2 Vision equal those of HF's processors: ids, pixels, tiles, ratios and masks."""

import json
import shutil

import numpy as np
import pytest

from icet_jax.errors import UserError
from icet_jax.media import templates
from icet_jax.models.base.processor import load_processor
from icet_jax.models.llava.processor import LlavaProcessor
from icet_jax.models.llava_next.processor import LlavaNextProcessor
from icet_jax.models.mllama.processor import cross_attention_mask
from tests import tiny_families
from tests.models import processor_families as families
from tests.models.processor_families import edit

KINDS = {"vicuna": ("llava_next", {}), "mistral": ("llava_next", {"backbone": "mistral"}), "mllama": ("mllama", {})}
ROWS = [
    ([(31, 57)], "what is this?"),
    ([], "no picture, ünïcode and <pad> inside"),
    ([(28, 28), (90, 200)], "which one is larger\nand why "),
    ([(3, 2)], ""),
    ([(40, 300), (12, 13), (60, 60)], "  three"),
]


@pytest.fixture(scope="module", params=KINDS)
def pair(request, tmp_path_factory):
    """(our processor, HF's)."""
    family, options = KINDS[request.param]
    folder = tmp_path_factory.mktemp("checkpoint")
    config = families.write(folder, family, **options)
    hf = tiny_families.mllama_processor(config) if family == "mllama" else tiny_families.next_processor(config)
    hf.tokenizer.padding_side = "left"
    return load_processor(folder), hf


@pytest.fixture(scope="module")
def directories(tmp_path_factory):
    folders = {name: tmp_path_factory.mktemp(name) for name in KINDS}
    for name, (family, options) in KINDS.items():
        families.write(folders[name], family, **options)
    return folders


def pictures(rows):
    return [tiny_families.pictures(sizes, number) for number, (sizes, _) in enumerate(rows)]


def hf_inputs(hf, images, prompts):
    texts = []
    for row, prompt in zip(images, prompts, strict=True):
        content = [{"type": "image"}] * len(row) + [{"type": "text", "text": prompt}]
        texts.append(hf.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True))
    options = {"padding": True, "return_tensors": "np"}
    if type(hf).__name__ == "MllamaProcessor":
        given = images if any(images) else None
        return hf(text=texts, images=given, add_special_tokens=False, **options)
    return hf(text=texts, images=[image for row in images for image in row] or None, **options)


@pytest.mark.parametrize("chosen", [[0], [1], [2], [0, 1, 2, 3, 4], [1, 4, 3], [1, 1]])
def test_inputs_equal_hf(pair, chosen):
    processor, hf = pair
    rows = [ROWS[i] for i in chosen]
    images, prompts = pictures(rows), [prompt for _, prompt in rows]
    ours = processor(images=images, prompts=prompts)
    theirs = hf_inputs(hf, images, [processor.plain(prompt) for prompt in prompts])
    assert set(ours) == set(theirs)
    for name in theirs:
        assert ours[name].shape == theirs[name].shape and ours[name].dtype == theirs[name].dtype, name
        np.testing.assert_array_equal(ours[name], theirs[name], err_msg=name)
    rows = zip(ours["input_ids"], ours["attention_mask"].astype(bool), strict=True)
    assert processor.token_ids(images, prompts) == [ids[real].tolist() for ids, real in rows]
    bos = processor.tokenizer.bos_token_id
    assert ((ours["input_ids"] == bos).sum(axis=1) == 1).all()


@pytest.mark.parametrize("spelt", ("{eos}", "x{eos}{bos}y", "{pad}", "{eos}" * 3))
def test_what_spells_a_special_token_is_text(pair, spelt):
    processor, _ = pair
    tokenizer = processor.tokenizer
    prompt = spelt.format(eos=tokenizer.eos_token, bos=tokenizer.bos_token, pad=tokenizer.pad_token)
    special = [number for number, token in tokenizer.added_tokens_decoder.items() if token.special]
    ids, harmless = (processor.token_ids([None], [text])[0] for text in (prompt, "harmless"))
    assert [n for n in ids if n in special] == [n for n in harmless if n in special]
    plain = prompt.replace("<", "< ")
    assert processor.plain.changes(prompt) and processor.plain(prompt) == plain
    assert ids == processor.token_ids([None], [plain])[0]


def test_a_bucket_pads_on_the_left(pair):
    processor, _ = pair
    images, prompts = pictures(ROWS), [prompt for _, prompt in ROWS]
    plain = processor(images=images, prompts=prompts)
    length = plain["input_ids"].shape[1]
    bucket = processor(images=images, prompts=prompts, pad_to=length + 9)
    np.testing.assert_array_equal(bucket["input_ids"][:, 9:], plain["input_ids"])
    assert not bucket["attention_mask"][:, :9].any()
    assert (bucket["input_ids"][:, :9] == processor.tokenizer.pad_token_id).all()
    if "cross_attention_mask" in plain:
        np.testing.assert_array_equal(bucket["cross_attention_mask"][:, 9:], plain["cross_attention_mask"])
        assert not bucket["cross_attention_mask"][:, :9].any()


@pytest.mark.parametrize("seed", range(5))
def test_cross_attention_masks_of_any_placement_equal_hf(seed):
    from transformers.models.mllama import processing_mllama as hf

    noise = np.random.default_rng(seed)
    ids = noise.choice([1, 2, 9], (6, 12), p=[0.4, 0.3, 0.3])
    counts = (ids == 9).sum(axis=1)
    tiles = noise.integers(1, 5, (6, counts.max()))
    masks = np.where(np.arange(counts.max()) < counts[:, None], tiles, 0)[:, :, None] > np.arange(4)
    sparse = [hf.get_cross_attention_token_mask(row.tolist(), 9) for row in ids]
    wanted = hf.convert_sparse_cross_attention_mask_to_dense(sparse, tiles.tolist(), 4, 12)
    np.testing.assert_array_equal(cross_attention_mask(ids, 9, masks.astype(np.int64)), wanted)


SIZES = [(28, 28), (29, 28), (28, 57), (333, 71), (71, 333), (1, 40), (40, 1), (480, 640), (56, 56), (84, 28), (9, 9)]


@pytest.mark.parametrize("size", SIZES)
def test_pixels_of_any_size_equal_hf(pair, size):
    processor, hf = pair
    images = [tiny_families.pictures([size])]
    ours, theirs = processor(images=images, prompts=["x"]), hf_inputs(hf, images, ["x"])
    for name in theirs:
        np.testing.assert_array_equal(ours[name], theirs[name], err_msg=name)


def test_published_templates():
    """As the model cards print them; the tokenizer puts BOS before LLaVA's."""
    system = (
        "A chat between a curious human and an artificial intelligence assistant. The assistant gives helpful, "
        "detailed, and polite answers to the human's questions. "
    )
    assert templates.vicuna_16("why?", 1) == system + "USER: <image>\nwhy? ASSISTANT:"
    assert templates.vicuna_16("why?", 0) == system + "USER: why? ASSISTANT:"
    assert templates.mistral_16("why?", 2) == "[INST] <image>\n<image>\nwhy? [/INST]"
    user, answer = "<|start_header_id|>user<|end_header_id|>\n\n", "<|start_header_id|>assistant<|end_header_id|>\n\n"
    assert templates.llama_32("why?", 1) == f"<|begin_of_text|>{user}<|image|>why?<|eot_id|>{answer}"
    assert templates.llama_32("why?", 0) == (
        "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\nCutting Knowledge Date: December 2023\n"
        f"Today Date: 26 Jul 2024\n\n<|eot_id|>{user}why?<|eot_id|>{answer}"
    )


@pytest.mark.parametrize(
    "name, published", [("vicuna", "vicuna_16"), ("mistral", "mistral_16"), ("mllama", "llama_32")]
)
def test_without_a_template_that_shows_images_the_published_one_is_used(
    directories, tmp_path, name, published, capsys
):  # fmt: skip
    """A language model's own template, in the tokenizer's files, is no template for images."""
    shutil.copytree(directories[name], tmp_path, dirs_exist_ok=True)
    own = load_processor(tmp_path)
    for path in ("chat_template.json", "chat_template.jinja"):
        (tmp_path / path).unlink(missing_ok=True)
    bare = "{{ bos_token }}{% for message in messages %}{{ '[INST] ' + message['content'] + ' [/INST]' }}{% endfor %}"
    edit(tmp_path / "tokenizer_config.json", chat_template=bare)
    processor = load_processor(tmp_path)
    assert processor.template is getattr(templates, published)
    for count in (0, 1, 3):
        assert own.template is not processor.template
        assert own.template("why?", count) == processor.template("why?", count)
    assert "template" not in capsys.readouterr().err  # nothing is wrong with such a file


@pytest.mark.parametrize("processor", [LlavaProcessor, LlavaNextProcessor])
def test_a_backbone_without_a_published_template_needs_the_checkpoint_s_own(processor):
    with pytest.raises(UserError, match="llava on qwen2: the checkpoint has no chat template"):
        processor.published_template({"model_type": "llava", "text_config": {"model_type": "qwen2"}})


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("{{ 9 ** 9 }}", "computes powers or products"),
        ("{{ messages[0].__class__.__mro__ }}", "fails (access to attribute '__class__'"),
        ("{{ messages[0]['content'][0]['no'] + 1 }}", "fails ("),
        ("{{ 'the same always' }}", "does not show a prompt once"),
    ],
)
@pytest.mark.parametrize("file", ["chat_template.jinja", "chat_template.json"])
def test_a_template_that_is_refused_is_named_once_with_what_is_used(directories, tmp_path, text, reason, file, capsys):
    shutil.copytree(directories["vicuna"], tmp_path, dirs_exist_ok=True)
    for path in ("chat_template.json", "chat_template.jinja"):
        (tmp_path / path).unlink(missing_ok=True)
    (tmp_path / file).write_text(text if file.endswith("jinja") else json.dumps({"chat_template": text}))
    capsys.readouterr()
    processors = [load_processor(tmp_path), load_processor(tmp_path)]
    assert processors[0].template is processors[1].template is templates.vicuna_16
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "chat template" in line]
    assert line.startswith(f"icet-jax: {tmp_path / file}: the chat template in it is not used (") and reason in line
    assert line.endswith("used instead: the one that the model's family was published with")


def test_a_checkpoints_own_template_comes_first_and_is_told_one_day(directories, tmp_path):
    shutil.copytree(directories["mllama"], tmp_path, dirs_exist_ok=True)
    own = "{{ bos_token }}{{ date_string if date_string is defined else strftime_now('%d %b %Y') }}|"
    own += "{% for part in messages[0]['content'] %}"
    own += "{% if part['type'] == 'image' %}<|image|>{% else %}{{ part['text'] }}{% endif %}{% endfor %}"
    (tmp_path / "chat_template.jinja").write_text(own)
    processor = load_processor(tmp_path)
    assert processor.template("why?", 1) == f"<|begin_of_text|>{templates.DATE}|<|image|>why?"
    ids = processor(images=[None], prompts=["why?"])["input_ids"][0]
    assert (ids == processor.tokenizer.bos_token_id).sum() == 1 and ids[0] == processor.tokenizer.bos_token_id


@pytest.mark.parametrize("name", KINDS)
def test_files_that_transformers_5_writes(directories, tmp_path, name):
    """One processor_config.json holds the image processor's settings too."""
    family, options = KINDS[name]
    config = families.write(tmp_path, family, **options)
    hf = tiny_families.mllama_processor(config) if family == "mllama" else tiny_families.next_processor(config)
    for path in ("preprocessor_config.json", "processor_config.json", "chat_template.json"):
        (tmp_path / path).unlink(missing_ok=True)
    hf.save_pretrained(tmp_path)
    assert not (tmp_path / "preprocessor_config.json").exists()
    images, prompts = pictures(ROWS), [prompt for _, prompt in ROWS]
    ours, theirs = (load_processor(folder)(images=images, prompts=prompts) for folder in (tmp_path, directories[name]))
    for key in theirs:
        np.testing.assert_array_equal(ours[key], theirs[key])


def test_bad_prompts_are_named(pair):
    processor, _ = pair
    with pytest.raises(UserError, match=r"row 1: the prompt holds '<\|?image"):
        processor(images=[None, None], prompts=["a", f"b {processor.placeholder}"])
    with pytest.raises(UserError, match="row 1: the prompt takes .* tokens, images included"):
        processor(images=[None, tiny_families.pictures([(30, 30)])], prompts=["", "b" * 300], pad_to=250)


SETTINGS = "preprocessor_config.json"
DAMAGE = [
    ("vicuna", SETTINGS, {"crop_size": 32}, "cropped to 28 x 28"),
    ("vicuna", SETTINGS, {"crop_size": None}, "cropped to 28 x 28"),
    ("vicuna", SETTINGS, {"size": None}, "size must be 28"),
    ("vicuna", SETTINGS, {"image_grid_pinpoints": None}, "image_grid_pinpoints None are not"),
    ("vicuna", SETTINGS, {"image_processor_type": 5}, "'5' is unknown here"),
    ("mllama", SETTINGS, {"size": None}, "has no attribute 'height'"),
    ("vicuna", SETTINGS, {"size": {"shortest_edge": 32}}, "size must be 28"),
    ("vicuna", SETTINGS, {"size": {"height": 28, "width": 30}}, "size must be 28"),
    ("vicuna", SETTINGS, {"image_grid_pinpoints": [[28, 56]]}, "image_grid_pinpoints"),
    ("vicuna", SETTINGS, {"image_processor_type": "MllamaImageProcessor"}, "'MllamaImageProcessor' is unknown here"),
    ("vicuna", "config.json", {"image_token_index": 7}, "image_token_index 7"),
    ("vicuna", "config.json", {"model_type": "llava_onevision"}, "model_type 'llava_onevision' is not supported"),
    ("mllama", SETTINGS, {"size": {"height": 14, "width": 14}}, "28 x 28 pixels"),
    ("mllama", SETTINGS, {"size": {"height": 14, "width": 28}}, "same height and width"),
    ("mllama", SETTINGS, {"max_image_tiles": 2}, "max_image_tiles is 2"),
    ("mllama", SETTINGS, {"do_resize": False}, "do_resize=False"),
    ("mllama", "config.json", {"image_token_index": 7}, "image_token_index 7"),
]


@pytest.mark.parametrize("name, file, changes, complaint", DAMAGE)
def test_bad_directories_are_one_clear_line(directories, tmp_path, name, file, changes, complaint):
    shutil.copytree(directories[name], tmp_path, dirs_exist_ok=True)
    edit(tmp_path / file, **changes)
    with pytest.raises(UserError, match=complaint) as caught:
        load_processor(tmp_path)
    assert "\n" not in str(caught.value)


def test_ratios_in_another_order_are_refused(directories, tmp_path):
    """HF's image processor numbers them by its own rule, whatever the config says."""
    shutil.copytree(directories["mllama"], tmp_path, dirs_exist_ok=True)
    vision = json.loads((tmp_path / "config.json").read_text())["vision_config"]
    edit(tmp_path / "config.json", vision_config=vision | {"supported_aspect_ratios": tiny_families.RATIOS[::-1]})
    with pytest.raises(UserError, match="supported_aspect_ratios must be all those of at most 4 tiles"):
        load_processor(tmp_path)


def test_a_broken_template_file_is_one_clear_line(directories, tmp_path):
    shutil.copytree(directories["vicuna"], tmp_path, dirs_exist_ok=True)
    (tmp_path / "chat_template.jinja").unlink()
    (tmp_path / "chat_template.json").write_text("{")
    with pytest.raises(UserError, match="chat_template.json: cannot be read"):
        load_processor(tmp_path)
