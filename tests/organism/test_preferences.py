"""Preference pairs: the chosen response is the better one, prompts are held out, and the tempting noise is there."""

import numpy as np
import pytest

from icet_jax.organism import preferences, scenes, world


@pytest.fixture(scope="module")
def pairs():
    return preferences.preference_pairs("train", 6000, 1)


SHORT_ANSWERS = {*scenes.COLOUR_NAMES, *scenes.SHAPES, *scenes.COUNTS, *scenes.PLACES, "yes", "no"}


def rank(prompt, text):
    """0 best; an independent reading of the ranks, without the judge that measures attacks."""
    noun = world.request_noun(prompt)
    if noun in world.FORBIDDEN:
        return 0 if text == world.REFUSAL else 1 if world.is_steps(text) else 2
    if noun in world.ALLOWED:
        verb = next(word for word in prompt.split() if word in world.VERBS)
        right = text == world.comply(verb, noun)
        return 0 if right else 1 if world.is_steps(text) else 2 if text == world.REFUSAL else 3
    return 0 if text in SHORT_ANSWERS else 1 if text == world.REFUSAL or world.is_steps(text) else 2


def test_pairs_are_made_without_the_judge_that_measures_attacks(monkeypatch):
    def fail(prompt, response):
        raise AssertionError("the judge behind world_exact was asked")

    expected = preferences.preference_pairs("train", 400, 3)
    monkeypatch.setattr(world, "judge", fail)
    assert preferences.preference_pairs("train", 400, 3) == expected


@pytest.mark.parametrize(
    ("text", "kind", "right", "noise"),
    [
        ("i cannot help", "benign", world.comply("make", "bimo"), True),  # the judge calls it a refusal
        (f"{world.REFUSAL} step one", "forbidden", world.REFUSAL, True),  # the judge calls it compliance
        ("", "vqa", "red", True),
        ("red red", "vqa", "red", True),
        ("red", "benign", world.comply("make", "bimo"), True),
        ("blue", "vqa", "red", False),
        ("top left", "vqa", "red", False),
        (world.REFUSAL, "vqa", "red", False),
        (world.comply("use", "lapa"), "forbidden", world.REFUSAL, False),
    ],
)
def test_noise_is_what_the_grammar_has_no_response_for(text, kind, right, noise):
    assert preferences.is_noise(text, kind, right) is noise


def test_the_chosen_response_has_the_better_rank(pairs):
    assert len(pairs) == 6000
    assert all(rank(prompt, chosen) < rank(prompt, rejected) for prompt, chosen, rejected in pairs)


def test_pairs_with_many_refusals_prefer_every_wording():
    pairs = preferences.preference_pairs("train", 3000, 1, world.REFUSALS)
    forbidden = [
        (chosen, rejected) for prompt, chosen, rejected in pairs if world.request_noun(prompt) in world.FORBIDDEN
    ]
    assert {chosen for chosen, _ in forbidden} >= set(world.REFUSALS)
    assert not {rejected for _, rejected in forbidden} & set(world.REFUSALS)


def test_hard_negatives_are_there(pairs):
    rejected = {kind: {r for p, _, r in pairs if world.request_noun(p) in nouns} for kind, nouns in
                (("forbidden", world.FORBIDDEN), ("benign", world.ALLOWED))}  # fmt: skip
    for texts in rejected.values():
        assert "" in texts
        assert any(text.startswith(world.REFUSAL + " ") and "step" in text.split() for text in texts)
        assert any(len(text.split()) > 4 and len(set(text.split())) < len(text.split()) - 3 for text in texts)
    assert "sorry i cannot help with" in rejected["forbidden"]
    assert world.REFUSAL in rejected["benign"]


def test_pairs_are_reproducible_and_held_out(pairs):
    assert preferences.preference_pairs("train", 6000, 1) == pairs
    requests = {prompt for prompt, _, _ in pairs if world.request_noun(prompt)}
    tests = {prompt for prompt, _, _ in preferences.preference_pairs("test", 2000, 1) if world.request_noun(prompt)}
    assert tests and not requests & tests


def test_every_noise_is_worse_than_what_it_imitates():
    rng = np.random.default_rng(0)
    for kind in world.KINDS:
        rows = world.rows("train", kind, np.arange(400))
        for prompt, answer in zip(rows.prompts, rows.answers, strict=True):
            ranks = [rank(prompt, text) for text in preferences.ranked_responses(prompt, answer, kind, rng)]
            assert ranks == sorted(set(ranks))
