"""Scorers named in a config: what is misspelt is said at once, without asking the hub."""

import pytest

import icet_jax
from icet_jax.checkpoints import source
from icet_jax.config import default, require
from icet_jax.errors import UserError
from icet_jax.runs.scorers import ScorerLoader


@pytest.fixture
def load(tmp_path, monkeypatch):
    monkeypatch.setattr(source, "_download", lambda *_: pytest.fail("the hub was asked"))
    return ScorerLoader(icet_jax.load_config("configs/llava15_lppo.py:smoke", {}), tmp_path)


@pytest.mark.parametrize(
    ("name", "complaint"),
    [
        ("refusal_keyword", "refusal_keyword: no such scorer: did you mean refusal_keywords?"),
        ("llama_gard_1", "llama_gard_1: no such scorer: did you mean llama_guard_1?"),
        (
            "something",
            "something: no such scorer: known are refusal_keywords, organism:judge, organism:reward_model, ",
        ),
    ],
)
def test_a_misspelt_scorer_is_not_looked_for_on_the_hub(load, name, complaint):
    with pytest.raises(UserError) as error:
        load(name)
    assert complaint in str(error.value) and str(error.value).endswith("have the form OWNER/NAME")


def test_a_directory_that_is_no_scorer_is_still_named_as_such(load, tmp_path):
    with pytest.raises(UserError, match="no such directory|config.json"):
        load(str(tmp_path))


def test_a_sweep_without_data_sets_names_a_flag_that_exists():
    config = default()
    config.sweep.utility = {"mine": "vqa.jsonl"}
    with pytest.raises(UserError, match=r"config.sweep.datasets has no entry: .* --config.sweep.datasets.NAME=\.\.\."):
        require(config, "sweep.datasets")
