"""Scorers by path: the numbers are transformers', and a saved reward model comes back as it was."""

import json

import numpy as np
import pytest
import torch
from flax import nnx

from icet_jax.errors import UserError
from icet_jax.judges.keywords import RefusalKeywords
from icet_jax.judges.load import load_scorer, save_reward_model
from icet_jax.judges.reward_model import RewardModel
from icet_jax.models.gpt2 import GPT2Config, GPT2RewardModel
from tests import tiny

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
