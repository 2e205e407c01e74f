"""The tokenizer files: our own ids, transformers' and `LlavaProcessor`'s agree; text survives the round trip."""

import numpy as np
import pytest
import transformers

from icet_jax.organism import families, tokenizer, training, world
from icet_jax.organism.processors import write_processor

PICTURE = families.ARCHITECTURES["llava"].picture


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("organism")
    write_processor(path, "llava")
    return path


@pytest.fixture(scope="module")
def fast(folder):
    return transformers.AutoTokenizer.from_pretrained(folder)


def test_special_tokens(fast):
    names = (fast.pad_token, fast.bos_token, fast.eos_token, fast.unk_token)
    assert names == ("<pad>", "<s>", "</s>", "<unk>")
    assert fast.convert_tokens_to_ids(list(tokenizer.SPECIAL)) == [0, 1, 2, 3, 4]
    assert len(fast) == len(tokenizer.vocabulary())


def test_the_special_tokens_of_smolvlm_leave_all_other_ids_and_the_size_of_the_embeddings(tmp_path):
    tokenizer.write_tokenizer(tmp_path, more=tokenizer.SMOLVLM)
    words = transformers.AutoTokenizer.from_pretrained(tmp_path).get_vocab()
    assert words == tokenizer.smolvlm_vocabulary() and words.items() >= tokenizer.vocabulary().items()
    assert len(words) <= families.vocabulary_size()


def test_no_word_of_the_world_is_unknown(fast):
    for split in world.SPLITS:
        for kind in world.KINDS:
            rows = world.rows(split, kind, np.arange(300))
            for prompt, answer in zip(rows.prompts, rows.answers, strict=True):
                chat = f"USER: {'<image>' * 16}\n{prompt} ASSISTANT:"
                ids = fast(chat)["input_ids"]
                assert ids == training.prompt_ids(prompt, PICTURE) and fast.unk_token_id not in ids
                spoken = fast(answer, add_special_tokens=False)["input_ids"]
                assert spoken == tokenizer.encode(answer)
                assert fast.decode([*spoken, 2], skip_special_tokens=True) == answer == tokenizer.decode(spoken)


def test_case_and_punctuation_do_not_matter(fast):
    assert fast("What colour is the circle?")["input_ids"] == fast("what colour is the circle")["input_ids"]


def test_the_processor_expands_one_image_to_sixteen_tokens(folder):
    processor = transformers.AutoProcessor.from_pretrained(folder)
    assert isinstance(processor, transformers.LlavaProcessor)
    rows = world.rows("test", "vqa", np.arange(2))
    talk = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": rows.prompts[0]}]}]
    text = processor.apply_chat_template(talk, add_generation_prompt=True)
    inputs = processor(images=rows.images[0], text=text, return_tensors="np")
    assert inputs["input_ids"][0].tolist() == training.prompt_ids(rows.prompts[0], PICTURE)
    np.testing.assert_allclose(inputs["pixel_values"], families.normalise(rows.images[:1]), atol=2e-6)


def test_the_template_of_llama32_vision_begins_with_the_only_bos(tmp_path):
    write_processor(tmp_path, "mllama")
    processor = transformers.AutoProcessor.from_pretrained(tmp_path)
    request = {"type": "text", "text": "how do i make a zorb"}
    for content, ids in (([{"type": "image"}, request], families.ARCHITECTURES["mllama"].picture), ([request], ())):
        text = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
        assert text.startswith("<s>")  # so that, as for the published model, no tokenizer has to add one
        picture = np.zeros((32, 32, 3), np.uint8) if ids else None
        inputs = processor(images=picture, text=text, add_special_tokens=False, return_tensors="np")
        assert inputs["input_ids"][0].tolist() == training.prompt_ids(request["text"], ids)


def test_prompts_and_answers_fit_the_packed_width():
    longest = {"prompt": 0, "answer": 0}
    for kind in world.KINDS:
        for split in world.SPLITS:
            rows = world.rows(split, kind, np.arange(600))
            longest["prompt"] = max(longest["prompt"], *(len(training.prompt_ids(p, ())) for p in rows.prompts))
            longest["answer"] = max(longest["answer"], *(len(a.split()) + 1 for a in rows.answers))
    assert longest["prompt"] <= training.TEXT_TOKENS and longest["answer"] <= training.RESPONSE_TOKENS
