"""Toxicity classifiers: transformers' probabilities of the response alone, a name for each head."""

import numpy as np
import pytest

from icet_jax.errors import UserError
from icet_jax.scorers.load import load_scorer
from icet_jax.scorers.toxicity import head_labels
from tests import tiny_scorers

torch = pytest.importorskip("torch")

RESPONSES = ["a kind answer", "", "no", "w" * 90, "punctuation, of all; kinds!"]
LABELS = {"bert": ("toxic", "obscene", "Identity Hate"), "roberta": ("toxicity", "insult")}


@pytest.fixture(scope="module", params=["bert", "roberta"])
def checkpoint(request, tmp_path_factory):
    """The directory and the torch model of one kind of classifier."""
    kind = request.param
    model = getattr(tiny_scorers, kind)(seed=2, labels=LABELS[kind])
    return tiny_scorers.save(tmp_path_factory.mktemp("scorers") / f"Toxic-{kind}", model), model, kind


def test_scores_are_those_of_transformers_one_text_at_a_time(checkpoint):
    from transformers import AutoTokenizer

    directory, model, kind = checkpoint
    tokenizer = AutoTokenizer.from_pretrained(directory)
    expected = []
    for text in RESPONSES:
        inputs = tokenizer(text, truncation=True, max_length=64, return_tensors="pt")
        with torch.no_grad():
            expected.append(torch.sigmoid(model(**inputs).logits[0]).numpy())
    scorer = load_scorer(directory, heads=LABELS[kind][1:], batch_size=3)
    scores = scorer(["any prompt"] * 5, RESPONSES)
    names = {"bert": [".obscene", ".identity_hate"], "roberta": [".insult"]}[kind]
    assert list(scores) == [f"toxic_{kind}", *(f"toxic_{kind}{name}" for name in names)]
    for column, one in enumerate(scores.values()):
        np.testing.assert_allclose(one.values, np.array(expected)[:, column], atol=1e-5)
        assert one.labels == [None] * 5 and one.values.dtype == np.float32
    assert scorer.metric == "ts" and np.ptp(scores[scorer.name].values) > 0.01


def test_prompts_and_neighbours_change_nothing(checkpoint):
    scorer = load_scorer(checkpoint[0], batch_size=2)
    assert scorer.reads_prompts is False
    together = scorer(["p"] * 5, RESPONSES)[scorer.name].values
    alone = [scorer(["another"], [text])[scorer.name].values[0] for text in RESPONSES]
    np.testing.assert_allclose(together, alone, atol=1e-6)
    assert scorer([], [])[scorer.name].values.shape == (0,)


def test_a_number_that_is_none_is_an_error(checkpoint, tmp_path):
    directory, model, kind = checkpoint
    state = {
        name: torch.full_like(x, torch.nan) if name.startswith("class") else x for name, x in model.state_dict().items()
    }
    scorer = load_scorer(tiny_scorers.save(tmp_path / kind, model, state=state))
    assert np.isnan(scorer(["p"], ["r"])[kind].values).all()


def test_heads_are_chosen_by_label(tmp_path):
    directory = tiny_scorers.save(tmp_path / "c", tiny_scorers.bert(labels=("calm", "rude", "Rude")))
    assert list(load_scorer(directory, heads=("rude", "calm"))(["p"], ["r"])) == ["c", "c.calm"]
    for heads, error in [
        ((), "none of its heads"),
        (("angry",), "no head 'angry'"),
        (("calm", "rude", "Rude"), "same name"),
    ]:
        with pytest.raises(UserError, match=error):
            load_scorer(directory, **({"heads": heads} if heads else {}))
    with pytest.raises(UserError, match="no template"):
        load_scorer(directory, template="{prompt}", heads=("rude",))


def test_labels_come_from_the_config():
    assert head_labels({"id2label": {"1": "b", "0": "a"}}) == ["a", "b"]
    assert head_labels({"num_labels": 3}) == ["LABEL_0", "LABEL_1", "LABEL_2"]
    with pytest.raises(UserError, match="from 0, not 1, 2"):
        head_labels({"id2label": {"1": "b", "2": "a"}})
    with pytest.raises(UserError, match="single_label_classification"):
        head_labels({"problem_type": "single_label_classification"})
