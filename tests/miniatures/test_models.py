"""Toy models in their published formats: transformers loads them, and reads the same tokens, pixels and logits."""

import json

import numpy as np
import pytest

import icet_jax
from icet_jax import miniatures as toy
from icet_jax.errors import UserError

PROMPTS = ["placeholder request 1", "another, longer placeholder request"]
TOLERANCE = 1e-3  # 24 or 40 random blocks make more of rounding than trained ones; tests/models has the parity
SIZES = ((28, 28), (40, 30), (31, 57))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("toys")


def images():
    from PIL import Image

    noise = np.random.default_rng(0)
    return [Image.fromarray(noise.integers(0, 256, (*size, 3), dtype=np.uint8)) for size in SIZES]


def hf_text(processor, prompt, count):
    content = [{"type": "image"}] * count + [{"type": "text", "text": prompt}]
    return processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)


def hf_processor(name, directory):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(directory, padding_side="left")
    if name == "llava_next":
        from transformers import LlavaNextProcessor
        from transformers.models.llava_next.image_processing_pil_llava_next import LlavaNextImageProcessorPil as Images

        kind, more = LlavaNextProcessor, {
            "patch_size": 14, "vision_feature_select_strategy": "default", "num_additional_image_tokens": 1,
        }  # fmt: skip
    elif name == "smolvlm":
        from transformers import Idefics3Processor
        from transformers.models.smolvlm.image_processing_pil_smolvlm import SmolVLMImageProcessorPil as Images

        kind, more = Idefics3Processor, {"image_seq_len": 4}
    elif name == "qwen2_5_vl":
        from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil as Images

        from icet_jax.models.qwen2_5_vl.reference import image_only_processor

        kind, more = image_only_processor(), {}
    else:
        from transformers import MllamaProcessor
        from transformers.models.mllama.image_processing_pil_mllama import MllamaImageProcessorPil as Images

        kind, more = MllamaProcessor, {}
    template = json.loads((directory / "chat_template.json").read_text())["chat_template"]
    return kind(Images.from_pretrained(directory), tokenizer, chat_template=template, **more)


@pytest.mark.parametrize("name", ["llava_next", "mllama", "smolvlm", "qwen2_5_vl"])
def test_transformers_reads_the_same(name, folder):
    import torch
    from transformers import AutoModelForImageTextToText

    directory = toy.checkpoint(name, folder)
    # transformers captures the intermediates that leave their blocks, see docs/families.md.
    vlm = icet_jax.load(directory, dtype="float32", capture="output" if name == "mllama" else None)
    first, second, third = images()
    rows = [[first], [second, third]]
    ours = vlm.processor(images=rows, prompts=PROMPTS)
    processor = hf_processor(name, directory)
    texts = [hf_text(processor, prompt, len(row)) for prompt, row in zip(PROMPTS, rows, strict=True)]
    nested = rows if name == "mllama" else [image for row in rows for image in row]
    special = {"add_special_tokens": not texts[0].startswith("<|begin_of_text|>")}
    theirs = processor(images=nested, text=texts, padding=True, return_tensors="np", **special)
    for key, value in theirs.items():
        np.testing.assert_array_equal(ours[key], value, err_msg=key)
    model = AutoModelForImageTextToText.from_pretrained(directory, dtype=torch.float32).eval()
    logits = np.asarray(vlm.logits(ours))
    # One by one: in a batch, transformers lets a token before the first image see the fillers of shorter rows too.
    for index, (row, text) in enumerate(zip(rows, texts, strict=True)):
        alone = processor(images=[row] if name == "mllama" else row, text=[text], return_tensors="np", **special)
        with torch.no_grad():
            wanted = model(**{key: torch.tensor(np.asarray(value)) for key, value in alone.items()}).logits[0].numpy()
        np.testing.assert_allclose(logits[index, -len(wanted) :], wanted, atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize(
    ("name", "exits", "default"),
    [("llava_next", 24, 23), ("mllama", 32, 32), ("smolvlm", 12, 12), ("qwen2_5_vl", 32, 32)],
)
def test_exits_and_images_change_the_answer(name, exits, default, folder):
    vlm = icet_jax.load(toy.checkpoint(name, folder), dtype="float32")
    assert (vlm.num_exits, vlm.default_exit) == (exits, default)
    first, _, third = images()
    inputs, others = (vlm.processor(images=[image], prompts=PROMPTS[:1]) for image in (first, third))
    last = [np.asarray(vlm.logits(inputs, exit_layer=layer))[0, -1] for layer in (1, exits // 2, exits)]
    assert min(np.abs(last[0] - last[1]).max(), np.abs(last[1] - last[2]).max()) > 0.1
    assert np.abs(last[2] - np.asarray(vlm.logits(others, exit_layer=exits))[0, -1]).max() > 0.1


def test_an_unknown_toy_is_one_line(folder):
    known = "llava15, llava_next, mllama, smolvlm, qwen2_5_vl"
    with pytest.raises(UserError, match=f"toy:llama: no such toy checkpoint; there are {known}"):
        toy.checkpoint("llama", folder)
