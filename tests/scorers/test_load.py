"""Scorers by path: the numbers are transformers', and a saved reward model comes back as it was."""

import json
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from flax import nnx

from icet_jax.errors import UserError
from icet_jax.nn.gpt2 import GPT2Config, GPT2RewardModel
from icet_jax.scorers.decoder_judge import DecoderJudge
from icet_jax.scorers.keywords import RefusalKeywords
from icet_jax.scorers.load import load_defined, load_scorer, save_reward_model
from icet_jax.scorers.reward_model import RewardModel
from tests import tiny, tiny_families, tiny_scorers
from tests.devices import emulating

PROMPTS = ["say hi", "a longer prompt, with a comma", "x", "p" * 70]
RESPONSES = [" hi there", "no", "", "r" * 20]


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    return tiny.save_reward_model(tmp_path_factory.mktemp("scorers") / "Toy-RM_v1")


@pytest.mark.parametrize("template", ["{prompt}", "\n\nHuman: {prompt} \n\nAssistant:"])
def test_scores_are_those_of_transformers_one_pair_at_a_time(directory, template):
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(directory)
    model = AutoModelForSequenceClassification.from_pretrained(directory).eval()
    expected = []
    with torch.no_grad():
        for prompt, response in zip(PROMPTS, RESPONSES, strict=True):
            first = template.replace("{prompt}", prompt)
            inputs = tokenizer(first, response, truncation=True, max_length=64, return_tensors="pt")
            expected.append(model(**inputs).logits[0, 0].item())
    result = load_scorer(directory, template=template)(PROMPTS, RESPONSES)
    assert list(result) == ["toy_rm_v1"]
    np.testing.assert_allclose(result["toy_rm_v1"].values, expected, atol=1e-5)


def test_the_papers_template_is_the_default(directory):
    scorer = load_scorer(directory)
    assert isinstance(scorer, RewardModel) and scorer.metric == "tr"
    assert scorer.pairs.template == "\n\nHuman: {prompt} \n\nAssistant:"


def test_the_keyword_judge_needs_no_files():
    assert isinstance(load_scorer("refusal_keywords"), RefusalKeywords)


def test_saved_reward_model_comes_back_and_loads_in_transformers(tmp_path):
    from transformers import AutoModelForSequenceClassification

    config = GPT2Config(vocab_size=tiny.GPT2_VOCAB, n_positions=64, n_embd=24, n_layer=2, n_head=3, n_inner=40)
    model, tokenizer = GPT2RewardModel(config, rngs=nnx.Rngs(0)), tiny.reward_tokenizer()
    for _ in range(2):
        folder = save_reward_model(tmp_path / "rm", model, tokenizer, name="mine_v2", template="Q: {prompt} A:")
    scorer = load_scorer(folder)
    assert scorer.name == "mine_v2" and scorer.pairs.template == "Q: {prompt} A:"
    direct = RewardModel(model, tokenizer, name="x", template="Q: {prompt} A:")(PROMPTS, RESPONSES)["x"]
    np.testing.assert_array_equal(scorer(PROMPTS, RESPONSES)["mine_v2"].values, direct.values)
    assert AutoModelForSequenceClassification.from_pretrained(folder).config.pad_token_id == tiny.GPT2_EOS
    assert [path.name for path in tmp_path.iterdir()] == ["rm"]


def hf_score(model, ids):
    with torch.no_grad():
        return model(input_ids=torch.tensor([ids]), attention_mask=torch.ones(1, len(ids))).logits[0, 0].item()


def test_deberta_pairs_are_scored_as_transformers_does(tmp_path):
    from transformers import AutoTokenizer

    model = tiny_scorers.deberta(seed=4)
    folder = tiny_scorers.save(tmp_path / "reward-model-deberta", model)
    tokenizer, scorer = AutoTokenizer.from_pretrained(folder), load_scorer(folder, batch_size=3)
    encoded = [
        tokenizer(*pair, truncation=True, max_length=64)["input_ids"] for pair in zip(PROMPTS, RESPONSES, strict=True)
    ]
    assert scorer.pairs(PROMPTS, RESPONSES) == encoded
    assert encoded[0][0] == tokenizer.cls_token_id and encoded[0].count(tokenizer.sep_token_id) == 2
    assert max(map(len, encoded)) == 64, "a pair must be cut"
    values = scorer(PROMPTS, RESPONSES)["reward_model_deberta"].values
    np.testing.assert_allclose(values, [hf_score(model, ids) for ids in encoded], atol=1e-5)
    assert scorer.metric == "tr" and scorer([], [])["reward_model_deberta"].values.shape == (0,)


@pytest.mark.parametrize("template", [None, "Q {prompt} A {response}"])
def test_llama_pairs_are_scored_as_transformers_does(tmp_path, template):
    model = tiny_scorers.llama_reward(seed=4, max_position_embeddings=80)
    folder = tiny_scorers.save(tmp_path / "rm", model)
    tokenizer, scorer = tiny_scorers.tokenizer("llama"), load_scorer(folder, template=template, dtype="float32")
    expected = []
    for prompt, response in zip(PROMPTS[:2], RESPONSES[:2], strict=True):
        messages = [{"role": "user", "content": prompt}, {"role": "assistant", "content": response}]
        text = f"<s>Q {prompt} A {response}"
        ids = tokenizer(text, add_special_tokens=False) if template else tokenizer.apply_chat_template(messages)
        expected.append(hf_score(model, ids["input_ids"]))
    scores = scorer([*PROMPTS[:2], "p" * 90], [*RESPONSES[:2], "r"])["rm"].values
    np.testing.assert_allclose(scores[:2], expected, atol=1e-5)
    assert np.isnan(scores[2]), "a prompt that leaves no room for the response is an error"


def test_a_llama_pair_that_ends_in_padding_is_read_before_it(tmp_path):
    model = tiny_scorers.llama_reward(seed=4, pad_token_id=tiny.EOS)
    scorer = load_scorer(tiny_scorers.save(tmp_path / "rm", model), template="{prompt}{response}</s>", dtype="float32")
    ids = tiny.tokenizer()("pr")["input_ids"]
    np.testing.assert_allclose(scorer(["p"], ["r"])["rm"].values, [hf_score(model, [*ids, tiny.EOS])], atol=1e-5)
    np.testing.assert_allclose(scorer(["p"], ["r"])["rm"].values, [hf_score(model, ids)], atol=1e-5)


def test_kinds_are_told_by_config_name_or_chat_template(tmp_path):
    lm = tiny_scorers.llama_lm()
    plain = tiny_scorers.save(tmp_path / "vicuna", lm)
    with pytest.raises(UserError, match="may judge in several ways; give kind, llama_guard or decoder_judge"):
        load_scorer(plain)
    with pytest.raises(UserError, match="needs a template"):
        load_scorer(plain, kind="decoder_judge")
    with pytest.raises(UserError, match="is a LlamaForCausalLM; a toxicity is one of Bert"):
        load_scorer(plain, kind="toxicity")
    with pytest.raises(UserError, match="has no field 'heads'; it has template, unsafe, safe, max_new_tokens"):
        load_scorer(plain, kind="decoder_judge", heads=("a",))
    asked = load_scorer(
        plain, kind="decoder_judge", template=lambda prompt, response: f"{prompt}/{response}", unsafe="bad"
    )
    assert asked.name == "vicuna" and asked.encode.render("a", "b") == "a/b"
    qwen3 = tiny_scorers.save(tmp_path / "qwen3", tiny_scorers.llama_lm(kind="Qwen3"))
    with pytest.raises(UserError, match="may judge in several ways; give kind, qwen3_guard or decoder_judge"):
        load_scorer(qwen3)
    tokenizer = tiny.tokenizer()
    tokenizer.chat_template = "<BEGIN UNSAFE CONTENT CATEGORIES>{% for m in messages %}{{ m['content'] }}{% endfor %}"
    for folder in (plain, qwen3):
        tokenizer.save_pretrained(folder)
        assert isinstance(load_scorer(folder), DecoderJudge)
    for file in qwen3.glob("*templat*"):
        file.unlink()
    tokenizer.chat_template = None
    tokenizer.save_pretrained(qwen3)
    with pytest.raises(UserError, match="has no chat template; copy chat_template.jinja"):
        load_scorer(qwen3, kind="qwen3_guard")


def test_a_wrong_template_is_named_before_the_weights_are_read(tmp_path):
    folders = [
        (tiny_scorers.save(tmp_path / "llama-guard-3", tiny_scorers.llama_lm()), "once each"),
        (tiny_scorers.save(tmp_path / "rm", tiny_scorers.llama_reward()), "once each"),
        (tiny_scorers.save(tmp_path / "bert", tiny_scorers.bert()), "takes no template"),
    ]
    for folder, error in folders:
        (folder / "model.safetensors").unlink()
        with pytest.raises(UserError, match=f"{folder.name}: .*{error}"):
            load_scorer(folder, template="only {prompt}")


def test_guards_without_a_chat_template_are_told_by_name(tmp_path):
    tokenizer = tiny.tokenizer()
    tokenizer.chat_template = None
    for name, begins in (
        ("LlamaGuard-7b", "[INST]"),
        ("Llama-Guard-3-8B", "<|start_header_id|>"),
        ("llama-guard-x", ""),
    ):
        folder = tiny_scorers.save(tmp_path / name, tiny_scorers.llama_lm(max_position_embeddings=4096))
        for file in folder.glob("*templat*"):
            file.unlink()
        tokenizer.save_pretrained(folder)
        if begins:
            judge = load_scorer(folder)
            assert judge.encode.render("a", "b").startswith(begins)
            assert judge.encode.max_length == 4096 - 20
        else:
            with pytest.raises(UserError, match="give template, llama_guard_1 or llama_guard_3"):
                load_scorer(folder)


def test_a_mistral_judges_texts_within_its_attention_window(tmp_path):
    model = tiny_scorers.llama_lm(kind="Mistral", sliding_window=64)
    judge = load_scorer(tiny_scorers.save(tmp_path / "m", model), template="{prompt}/{response}", max_new_tokens=6)
    assert isinstance(judge, DecoderJudge) and judge.encode.max_length == 64 - 6
    model = tiny_scorers.llama_reward(kind="Mistral", sliding_window=64)
    assert load_scorer(tiny_scorers.save(tmp_path / "rm", model)).pairs.max_length == 64


def test_a_vision_language_model_judges_text(tmp_path):
    model = tiny_families.mllama(seed=1)
    folder = tiny_families.save_mllama(tmp_path / "vision", model)
    judge = load_scorer(folder, template="{prompt}/{response}", dtype="float32", max_new_tokens=4, batch_size=2)
    rows = [conversation.ids for conversation in judge.encode(["say hi", "x"], ["no", "sure, here it is"])]
    answers = judge.network(rows)
    for row, ids in enumerate(rows):
        said = answers["tokens"][row][answers["mask"][row]].tolist()
        for token in said:
            with torch.no_grad():
                assert model(input_ids=torch.tensor([ids])).logits[0, -1].argmax() == token
            ids = [*ids, token]
        assert len(said) == 4 or said[-1] == tiny_families.EOT


def test_fingerprints_follow_what_the_scores_depend_on(directory, tmp_path):
    copy = shutil.copytree(directory, tmp_path / "elsewhere")
    marks = [
        load_scorer(directory).fingerprint,
        load_scorer(directory, template="{prompt}").fingerprint,
        load_scorer(directory, dtype="bfloat16").fingerprint,
    ]
    assert len(set(marks)) == 3 and load_scorer(copy).fingerprint == marks[0]
    tiny.save_reward_model(copy, tiny.reward_model(seed=9))
    assert load_scorer(copy).fingerprint != marks[0]


def test_definitions(directory):
    def resolve(name):
        return load_scorer(directory, template={"a": "{prompt}", "b": "B {prompt}"}[name]) if name in "ab" else None

    one = load_defined("mine", {"kind": "reward_model", "checkpoint": str(directory), "batch_size": 2}, resolve=resolve)
    assert one.name == "toy_rm_v1" and one.network.batch_size == 2
    assert isinstance(load_defined("k", {"kind": "refusal_keywords"}, resolve=resolve), RefusalKeywords)
    with pytest.raises(UserError, match="config.scorers.both: ensemble both: toy_rm_v1 is named twice"):
        load_defined("both", {"kind": "ensemble", "members": {"a": 1.0, "b": 2.0}}, resolve=resolve)
    alone = load_defined("mean", {"kind": "ensemble", "members": {"a": 2.0}}, resolve=resolve)
    scores = alone(PROMPTS, RESPONSES)
    np.testing.assert_array_equal(scores["mean"].values, scores["toy_rm_v1"].values)
    with pytest.raises(UserError, match="config.scorers.gone: .*no such directory"):
        load_defined("gone", {"kind": "toxicity", "checkpoint": str(directory / "gone")}, resolve=resolve)


MESH = """
import sys
import jax, numpy as np
from icet_jax.scorers.load import load_scorer
from icet_jax.parallel.mesh import make_mesh
assert jax.device_count() == 8
prompts, responses = [f"ask {n}" for n in range(11)], [f"say {n * n}" for n in range(11)]
for path, fields in zip(sys.argv[1:], ({"max_new_tokens": 6}, {}, {}), strict=True):
    alone, spread = (
        load_scorer(path, dtype="float32", batch_size=8, mesh=mesh, **fields)
        for mesh in (None, make_mesh(data=2, fsdp=2, tensor=2))
    )
    if fields:
        rows = [conversation.ids for conversation in alone.encode(prompts, responses)]
        one, other = alone.network(rows), spread.network(rows)
        np.testing.assert_array_equal(one["tokens"], other["tokens"])
        assert one["mask"].sum() > 11
    else:
        one, other = alone(prompts, responses), spread(prompts, responses)
        np.testing.assert_allclose(one[alone.name].values, other[alone.name].values, atol=1e-5)
print("agreed")
"""


def test_judges_spread_over_eight_devices_agree_with_one(tmp_path):
    folders = [
        tiny_scorers.save(tmp_path / "llama-guard-3", tiny_scorers.llama_lm(seed=3)),
        tiny_scorers.save(tmp_path / "bert", tiny_scorers.bert()),
        tiny_scorers.save(tmp_path / "rm", tiny_scorers.llama_reward()),
    ]
    environment = emulating(8)
    done = subprocess.run(
        [sys.executable, "-c", MESH, *map(str, folders)], env=environment, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert "agreed" in done.stdout


def test_bad_scorers_are_one_line(directory, tmp_path):
    with pytest.raises(UserError, match="no such directory"):
        load_scorer(tmp_path / "gone")
    with pytest.raises(UserError, match="kind 'oracle'"):
        load_scorer(directory, kind="oracle")
    with pytest.raises(UserError, match="template"):
        load_scorer(directory, template=lambda prompt, response: prompt)
    with pytest.raises(UserError, match="hold {prompt}"):
        load_scorer(directory, template="nothing")
    (tmp_path / "config.json").write_text(json.dumps({"architectures": ["GPT2LMHeadModel"], "model_type": "gpt2"}))
    with pytest.raises(UserError, match="is not a scorer"):
        load_scorer(tmp_path)
