"""`--mode=reward` on a Llama: ChatML's chat template, transformers' scores, and the accuracy of every source."""

import json

import jax.numpy as jnp
import numpy as np
import pytest

from icet_jax import main
from icet_jax.errors import UserError
from icet_jax.files import parse_json
from icet_jax.scorers.load import load_scorer
from icet_jax.scorers.pairs import HH_TEMPLATE
from icet_jax.scorers.reward_base import load_reward_base
from icet_jax.scorers.reward_model import pair_tokenizer, template_to_train
from tests import tiny, tiny_scorers
from tests.commands.test_reward import arguments, rows

torch = pytest.importorskip("torch")

START, END = 1, 2
CHATML = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nBe helpful<|im_end|>\n' }}{% endif %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def chatml_tokenizer(template=CHATML):
    """As SmolLM2-Instruct has it: BOS begins every message, and the end of a message is EOS and padding."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {"<unk>": 0, "<|im_start|>": START, "<|im_end|>": END} | {c: i for i, c in enumerate(letters, 3)}
    inner = Tokenizer(models.BPE(vocab=vocab, merges=[], unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    inner.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in list(vocab)[:3]])
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, unk_token="<unk>", bos_token="<|im_start|>", eos_token="<|im_end|>",
        pad_token="<|im_end|>", model_max_length=512, chat_template=template,
    )  # fmt: skip


def save_base(folder, *, kind="Llama", tied=True, template=CHATML):
    """A language model with grouped-query attention, its files as transformers writes them."""
    model = tiny_scorers.llama_lm(seed=4, kind=kind, tie_word_embeddings=tied, max_position_embeddings=256)
    state = {key: tensor for key, tensor in model.state_dict().items() if not (tied and key == "lm_head.weight")}
    tiny_scorers.save(folder, model, state=state, config={"pad_token_id": END, "eos_token_id": END, "bos_token_id": 1})
    chatml_tokenizer(template).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A base checkpoint and pairs of two sources; the second repeats a pair of the first."""
    folder = tmp_path_factory.mktemp("llama")
    for name, lines in {"one": rows(24), "two": [*rows(1), *rows(16, 200)], "test_one": rows(12, 100)}.items():
        (folder / f"{name}.jsonl").write_text("\n".join(lines))
    (folder / "test_two.jsonl").write_text("\n".join(rows(6, 300)))
    return {
        "model__checkpoint": save_base(folder / "base"),
        "rm__train": f"{folder}/one.jsonl + {folder}/two.jsonl",
        "rm__held_out": f"{folder}/test_one.jsonl + {folder}/test_two.jsonl",
        "rm__max_tokens": "128",
    }


@pytest.fixture(scope="module")
def finished(files, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("runs") / "llama_rm"
    assert main.main(arguments(workdir, **files)) == 0
    return workdir


def transformers_scores(folder, texts, side):
    """Scores of rendered texts in one batch that is padded on this side."""
    from transformers import AutoModelForSequenceClassification, AutoTokenizer, LlamaForSequenceClassification

    tokenizer = AutoTokenizer.from_pretrained(folder, padding_side=side)
    model = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    assert isinstance(model, LlamaForSequenceClassification) and model.config.num_labels == 1
    inputs = tokenizer(texts, add_special_tokens=False, padding=True, return_tensors="pt")
    with torch.no_grad():
        return model(**{name: inputs[name] for name in ("input_ids", "attention_mask")}).logits[:, 0].numpy()


PROMPTS = ["say 3", "a much longer question, with more words", "", "what does <|im_end|> do"]
ANSWERS = ["kind 3", "no", "an answer that is longer than its question was", "<|im_start|>user"]


@pytest.mark.parametrize("side", ["left", "right"])
def test_transformers_gives_the_exported_model_the_same_scores(finished, side):
    scorer = load_scorer(finished / "hf", dtype="float32")
    assert scorer.name == "llama_rm" and scorer.metric == "tr"
    ours = scorer(PROMPTS, ANSWERS)["llama_rm"].values
    breaking = [(text.replace("<|", "< |") for text in pair) for pair in zip(PROMPTS, ANSWERS, strict=True)]
    texts = [
        "<|im_start|>system\nBe helpful<|im_end|>\n"
        f"<|im_start|>user\n{prompt}<|im_end|>\n<|im_start|>assistant\n{answer}<|im_end|>\n"
        for prompt, answer in breaking
    ]
    theirs = transformers_scores(finished / "hf", texts, side)
    assert np.ptp(theirs) > 1e-3, "the scores must differ"
    np.testing.assert_allclose(ours, theirs, atol=2e-5)


def test_the_export_keeps_the_bases_sizes_and_says_one_label(finished, files):
    exported, base = (
        parse_json((folder / "config.json").read_text()) for folder in (finished / "hf", files["model__checkpoint"])
    )
    assert exported["architectures"] == ["LlamaForSequenceClassification"] and exported["id2label"] == {"0": "LABEL_0"}
    for name in ("max_position_embeddings", "num_key_value_heads", "tie_word_embeddings", "vocab_size"):
        assert exported[name] == base[name]
    assert exported["pad_token_id"] == END and exported["icet_jax"] == {"name": "llama_rm", "template": None}


def test_the_accuracy_is_told_for_every_source(finished, files):
    result = json.loads((finished / "reward.json").read_text())
    one, two = files["rm__held_out"].split(" + ")
    assert {source: part["accuracy"]["n"] for source, part in result["by_source"].items()} == {one: 12, two: 6}
    scorer = load_scorer(finished / "hf", dtype="float32")
    for source, numbers in ((one, range(100, 112)), (two, range(300, 306))):
        prompts = [f"say {i}" for i in numbers]
        kind, rude = (
            scorer(prompts, [f"{word} {i % n}" for i in numbers])["llama_rm"].values
            for word, n in (("kind", 7), ("rude", 5))
        )
        part = result["by_source"][source]
        assert part["accuracy"]["mean"] == pytest.approx(np.mean(kind > rude))
        assert part["margin"]["mean"] == pytest.approx(np.mean(kind - rude), abs=1e-5)
    total = sum(part["accuracy"]["mean"] * part["accuracy"]["n"] for part in result["by_source"].values())
    assert result["accuracy"]["mean"] == pytest.approx(total / 18)
    train = result["pairs"]["train"]
    assert (train["read"], train["used"], train["dropped"]) == (41, 40, {"repeats an earlier pair": 1})


def test_the_summary_names_every_source(files, finished, capsys):
    assert main.main(arguments(finished, **files)) == 0
    printed = capsys.readouterr().err
    assert "test_one.jsonl" in printed and "% of 12" in printed and "% of 6" in printed


def test_training_moves_the_decoder_and_the_head(finished, files):
    trained, base = (load_reward_base(folder) for folder in (finished / "hf", files["model__checkpoint"]))
    kernel = lambda checkpoint: np.asarray(checkpoint.model.language_model.layers.q_proj.kernel[...])  # noqa: E731
    assert np.abs(kernel(trained) - kernel(base)).max() > 1e-4


@pytest.mark.parametrize(
    ("own", "given", "expected"),
    [
        (CHATML, None, None),
        (CHATML, "Q: {prompt} A: ", "Q: {prompt} A: {response}"),
        (CHATML, "{response} answers {prompt}", "{response} answers {prompt}"),
        (None, None, HH_TEMPLATE + " {response}"),
    ],
)
def test_the_chat_template_is_the_default_where_there_is_one(tmp_path, own, given, expected):
    config = load_reward_base(save_base(tmp_path / "base", template=own)).config
    tokenizer = chatml_tokenizer(own)
    template = template_to_train(config, tokenizer, given)
    assert template == expected
    encode = pair_tokenizer(config, tokenizer, template, max_length=100, pad_id=END)
    text = tokenizer.decode(encode(["ab"], ["cd"])[0])
    assert "ab" in text and "cd" in text and ("<|im_start|>assistant" in text) == (expected is None)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("kind", ["Llama", "Mistral", "Qwen2", "Qwen3"])
def test_a_base_scores_as_transformers_does_with_the_same_head(tmp_path, kind, tied, side):
    import transformers

    folder = save_base(tmp_path / "base", kind=kind, tied=tied)
    checkpoint = load_reward_base(folder, seed=3)
    model = getattr(transformers, f"{kind}ForSequenceClassification").from_pretrained(folder, num_labels=1).eval()
    head = np.asarray(checkpoint.model.score.kernel[...])
    assert head.shape == (24, 1) and 0.01 < head.std() < 0.04
    model.score.weight.data = torch.from_numpy(head.T.copy())
    lengths = (3, 17, 1, 9)
    ids, mask = np.full((4, 20), END), np.zeros((4, 20), bool)
    for row, length in enumerate(lengths):
        where = slice(20 - length, 20) if side == "left" else slice(0, length)
        ids[row, where], mask[row, where] = np.random.default_rng(row).integers(3, 259, length), True
    with torch.no_grad():
        theirs = model(torch.from_numpy(ids), attention_mask=torch.from_numpy(mask.astype(np.int64))).logits[:, 0]
    np.testing.assert_allclose(
        checkpoint.model(jnp.asarray(ids, jnp.int32), jnp.asarray(mask)), theirs.numpy(), atol=2e-5
    )


def test_a_base_of_another_kind_is_one_line(tmp_path):
    with pytest.raises(UserError, match="model_type 'llava' cannot become a reward model; give one of gpt2, llama"):
        load_reward_base(tiny.save_llava(tmp_path / "llava", processor=False))


def test_a_missing_source_is_one_line(files, tmp_path, capsys):
    assert main.main(arguments(tmp_path / "run", **files | {"rm__train": "one.jsonl + "})) == 2
    assert "a source is missing beside" in capsys.readouterr().err.splitlines()[-1]
