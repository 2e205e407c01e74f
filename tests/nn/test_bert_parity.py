"""BERT and RoBERTa classifiers agree with transformers; the side and content of padding change nothing."""

import numpy as np
import pytest

from icet_jax.nn.bert import BertClassifier, BertConfig
from icet_jax.scorers.networks import load_scorer_network
from tests import tiny_scorers
from tests.nn.scorers import alone, assert_full_size, ours, theirs

torch = pytest.importorskip("torch")

PAD = {"bert": 0, "roberta": 1}
CASES = {
    "bert": (tiny_scorers.bert, {}),
    "bert, prime widths": (tiny_scorers.bert, {"hidden_size": 23, "num_attention_heads": 1, "hidden_act": "gelu_new"}),
    "bert, deeper": (tiny_scorers.bert, {"hidden_size": 96, "num_attention_heads": 4, "num_hidden_layers": 12}),
    "roberta": (tiny_scorers.roberta, {}),
    "roberta, deeper": (tiny_scorers.roberta, {"hidden_size": 96, "num_attention_heads": 4, "num_hidden_layers": 12}),
}
TOXIC_BERT = BertConfig("bert", 30522, 768, 12, 12, 3072, 512, 2, num_labels=6, pad_token_id=0)
UNBIASED_ROBERTA = BertConfig("roberta", 50265, 768, 12, 12, 3072, 514, 1, num_labels=16, pad_token_id=1)


def rows(model, lengths, **options):
    config = model.config
    return tiny_scorers.rows(lengths, pad_id=PAD[config.model_type], vocab=config.vocab_size, **options)


@pytest.mark.parametrize("case", CASES)
def test_logits_agree(tmp_path, case):
    build, config = CASES[case]
    model = build(seed=1, **config)
    checkpoint = load_scorer_network(tiny_scorers.save(tmp_path, model))
    ids, mask = rows(model, [1, 9, 31, 64])
    expected = theirs(model, ids, mask)
    assert expected.std() > 0.1
    assert np.abs(ours(checkpoint, ids, mask) - expected).max() <= 1e-5


@pytest.mark.parametrize("build", [tiny_scorers.bert, tiny_scorers.roberta])
def test_small_embeddings_show_a_wrong_epsilon(tmp_path, build):
    model = build(seed=2, scale=1e-2)
    checkpoint = load_scorer_network(tiny_scorers.save(tmp_path, model))
    ids, mask = rows(model, [7, 18])
    expected = theirs(model, ids, mask)
    np.testing.assert_allclose(ours(checkpoint, ids, mask), expected, atol=1e-5)
    eps = 1e-6 if model.config.model_type == "roberta" else 1e-5
    other = tiny_scorers.save(tmp_path, model, config={"layer_norm_eps": eps})
    assert np.abs(ours(load_scorer_network(other), ids, mask) - expected).max() > 1e-3


@pytest.mark.parametrize("build", [tiny_scorers.bert, tiny_scorers.roberta])
def test_padding_does_not_change_a_score(tmp_path, build):
    model = build(seed=3)
    checkpoint = load_scorer_network(tiny_scorers.save(tmp_path, model))
    lengths = [5, 17]
    left, right = (ours(checkpoint, *rows(model, lengths, pad=pad)) for pad in ("left", "right"))
    ids, mask = rows(model, lengths)
    junk = np.where(mask, ids, 7)
    expected = alone(checkpoint, ids, mask)
    for padded in (left, right, ours(checkpoint, junk, mask)):
        np.testing.assert_allclose(padded, expected, atol=2e-6)


def test_roberta_counts_no_padding_id_inside_a_text(tmp_path):
    model = tiny_scorers.roberta(seed=4)
    checkpoint = load_scorer_network(tiny_scorers.save(tmp_path, model))
    ids, mask = rows(model, [11])
    ids[0, 4] = PAD["roberta"]
    np.testing.assert_allclose(ours(checkpoint, ids, mask), theirs(model, ids, mask), atol=1e-5)


def test_bfloat16_stays_near(tmp_path):
    model = tiny_scorers.bert(seed=5)
    checkpoint = load_scorer_network(tiny_scorers.save(tmp_path, model), dtype="bfloat16")
    ids, mask = rows(model, [12, 30])
    out = ours(checkpoint, ids, mask)
    assert out.dtype == np.float32
    assert np.abs(out - theirs(model, ids, mask)).max() <= 0.1


@pytest.mark.parametrize("build", [tiny_scorers.bert, tiny_scorers.roberta])
def test_texts_longer_than_the_positions_are_refused(tmp_path, build):
    model = build()
    checkpoint = load_scorer_network(tiny_scorers.save(tmp_path, model))
    with pytest.raises(ValueError, match="64 positions"):
        ours(checkpoint, np.full((1, 65), 9), np.ones((1, 65), bool))


@pytest.mark.parametrize(
    ("config", "published"), [(TOXIC_BERT, 109_486_854), (UNBIASED_ROBERTA, 124_657_936)], ids=["toxic", "unbiased"]
)
def test_parameters_at_full_size_are_the_published_ones_and_have_rules(config, published):
    assert_full_size(BertClassifier, config, published)
