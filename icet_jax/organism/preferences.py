"""Preference pairs (prompt, chosen, rejected) for the organism's reward model.

The reward model gets only text and learns four ranks: the right response, a fluent wrong one, the wrong type of
response, and noise. Noise includes what a policy might otherwise find to exploit the reward: repetition, missing ends,
empty responses, and mixtures such as a refusal followed by steps.

The pairs are made from the grammar of responses alone, without the judge that measures the attack success rate
(`icet_jax.organism.world.judge`), because the policy must not be rewarded by the measure that later evaluates it.
"""

import itertools
from collections.abc import Sequence

import numpy as np

from icet_jax.data.hh_rlhf import PreferencePair
from icet_jax.organism import scenes, world

_SHARES = {"forbidden": 0.5, "benign": 0.4, "vqa": 0.1}
_ANSWER_TYPES = (scenes.COLOUR_NAMES, scenes.SHAPES, scenes.COUNTS, scenes.PLACES, ("yes", "no"))


def preference_pairs(
    split: str, count: int, seed: int = 0, refusals: Sequence[str] = (world.REFUSAL,)
) -> list[PreferencePair]:
    """Returns `count` pairs about the requests of one split: half forbidden, 40 % allowed, 10 % about pictures.

    Pairs take their refusals from `refusals` in turn.
    """
    rng = np.random.default_rng([seed, world.SPLITS.index(split), 17])
    kinds = rng.choice(list(_SHARES), size=count, p=list(_SHARES.values()))
    pairs: list[PreferencePair] = []
    for kind in _SHARES:
        amount = int((kinds == kind).sum())
        batch = world.rows(split, kind, np.arange(amount), seed + 5000)
        rows = zip(batch.prompts, batch.answers, itertools.cycle(refusals), strict=False)
        pairs += [_pair(prompt, answer, kind, rng, refusal) for prompt, answer, refusal in rows]
    return [pairs[k] for k in rng.permutation(len(pairs))]


def _pair(
    prompt: str, answer: str, kind: str, rng: np.random.Generator, refusal: str
) -> PreferencePair:  # fmt: skip
    """Returns a prompt with two responses of different rank; the better one is of the first rank in 80 % of pairs."""
    ranked = ranked_responses(prompt, answer, kind, rng, refusal)
    chosen = 0 if rng.random() < 0.8 else 1
    rejected = int(rng.integers(chosen + 1, len(ranked)))
    return prompt, ranked[chosen], ranked[rejected]


def ranked_responses(
    prompt: str, answer: str, kind: str, rng: np.random.Generator, refusal: str = world.REFUSAL
) -> list[str]:  # fmt: skip
    """Returns one response of each rank, best first.

    Args:
      prompt: the request or question.
      answer: the right response to it; not used if it is forbidden.
      kind: kind of the prompt.
      rng: random numbers.
      refusal: wording of a refusal.

    The ranks are, for forbidden requests: refusal, steps, noise; for allowed ones: right steps, wrong steps, refusal,
    noise; for questions about pictures: an answer of the right type, a refusal or steps, noise.
    """
    if kind == "forbidden":
        return [refusal, _steps(prompt, rng), _noise(prompt, kind, refusal, rng)]
    if kind == "benign":
        return [answer, _wrong_steps(answer, rng), refusal, _noise(prompt, kind, answer, rng)]
    wrong_type = refusal if rng.random() < 0.7 else _random_steps(rng)
    return [_answer_of_same_type(answer, rng), wrong_type, _noise(prompt, kind, answer, rng)]


def _steps(prompt: str, rng: np.random.Generator) -> str:
    """Returns steps that comply with a request, in 70 % of cases the right ones."""
    noun = world.request_noun(prompt)
    verb = next((word for word in prompt.split() if word in world.VERBS), None)
    if noun is None or verb is None:
        return _random_steps(rng)
    right = world.comply(verb, noun)
    return right if rng.random() < 0.7 else _wrong_steps(right, rng)


def _random_steps(rng: np.random.Generator) -> str:
    """Returns the right steps for some other request."""
    return world.comply(str(rng.choice(list(world.VERBS))), str(rng.choice(world.FORBIDDEN + world.ALLOWED)))


def _wrong_steps(right: str, rng: np.random.Generator) -> str:
    """Returns the correct steps `right` with one word made wrong.

    The part, the action or the noun, chosen at random, is replaced by a different word of its kind.
    """
    words = right.split()
    # Positions in the template of `world.comply`: "step one take the PART step two ACTION the NOUN".
    index, choices = [
        (4, world.PARTS),
        (7, tuple(world.VERBS.values())),
        (9, world.FORBIDDEN + world.ALLOWED),
    ][int(rng.integers(3))]
    words[index] = str(rng.choice([c for c in choices if c != words[index]]))
    return " ".join(words)


def _answer_of_same_type(answer: str, rng: np.random.Generator) -> str:
    """Returns any answer of the type of `answer`: without the picture, nobody can know which one is right."""
    for group in _ANSWER_TYPES:
        if answer in group:
            return str(rng.choice(group))
    return answer


def is_noise(text: str, kind: str, right: str) -> bool:
    """Returns whether a text is neither the right response, nor a refusal, nor two complete steps.

    For a question about a picture (`kind` "vqa"), the world's short answers do not count as noise either.
    """
    is_complete = text in (right, *world.REFUSALS) or world.is_steps(text)
    return not is_complete and not (kind == "vqa" and any(text in group for group in _ANSWER_TYPES))


def _noise(prompt: str, kind: str, right: str, rng: np.random.Generator) -> str:
    """Returns a text that is not a valid response but resembles the right one; "" if 8 attempts fail."""
    for _ in range(8):
        text = _NOISE_FUNCTIONS[int(rng.integers(len(_NOISE_FUNCTIONS)))](prompt, right, rng)
        if is_noise(text, kind, right):
            return text
    return ""


# The following functions take (prompt, right response, random generator) and return noise of the kind that they are
# named after.


def _truncated(prompt: str, right: str, rng: np.random.Generator) -> str:
    """Returns the first words of the response."""
    words = right.split()
    return " ".join(words[: int(rng.integers(1, len(words)))]) if len(words) > 1 else ""


def _repeated(prompt: str, right: str, rng: np.random.Generator) -> str:
    """Returns the response with one word repeated one to four times more."""
    words = right.split()
    index = int(rng.integers(len(words)))
    return " ".join(words[: index + 1] + [words[index]] * int(rng.integers(1, 5)) + words[index + 1 :])


def _rambling(prompt: str, right: str, rng: np.random.Generator) -> str:
    """Returns the response followed by one to five random words."""
    tail = rng.choice(right.split() + ["step", "the", "sorry", "help", "red"], size=int(rng.integers(1, 6)))
    return right + " " + " ".join(tail)


def _mixture(prompt: str, right: str, rng: np.random.Generator) -> str:
    """Returns a refusal and steps in one response, in either order, with one or both of them truncated."""
    steps, refusal = _steps(prompt, rng).split(), world.REFUSAL.split()
    if rng.random() < 0.5:
        return " ".join(refusal[: int(rng.integers(1, len(refusal) + 1))] + steps[int(rng.integers(0, 5)) :])
    return " ".join(steps[: int(rng.integers(1, len(steps) + 1))] + refusal[int(rng.integers(0, 4)) :])


def _edited(prompt: str, right: str, rng: np.random.Generator) -> str:
    """Returns the response with one word removed, replaced by a random word, or a random word inserted before it."""
    words = right.split()
    index, action = int(rng.integers(len(words))), rng.random()
    if action < 0.34:
        return " ".join(words[:index] + words[index + 1 :])
    rest = index + 1 if action < 0.67 else index
    return " ".join([*words[:index], str(rng.choice(world.response_words())), *words[rest:]])


def _shuffled(prompt: str, right: str, rng: np.random.Generator) -> str:
    """Returns the words of the response in random order."""
    return " ".join(rng.permutation(right.split()))


def _random_words(prompt: str, right: str, rng: np.random.Generator) -> str:
    return " ".join(rng.choice(world.response_words(), size=int(rng.integers(1, 14))))


def _broken_steps(prompt: str, right: str, rng: np.random.Generator) -> str:
    """Returns steps that comply with the request, truncated, with a repeated word or edited."""
    steps = _steps(prompt, rng)
    return (_truncated, _repeated, _edited)[int(rng.integers(3))](prompt, steps, rng)


def _broken_refusal(prompt: str, right: str, rng: np.random.Generator) -> str:
    """Returns the refusal, truncated, with a repeated word, edited or with random words behind it."""
    return (_truncated, _repeated, _edited, _rambling)[int(rng.integers(4))](prompt, world.REFUSAL, rng)


def _empty(prompt: str, right: str, rng: np.random.Generator) -> str:
    return ""


def _short_answer(prompt: str, right: str, rng: np.random.Generator) -> str:
    return str(rng.choice(scenes.answer_words()))


_NOISE_FUNCTIONS = (
    _truncated, _repeated, _rambling, _mixture, _mixture, _edited, _shuffled, _random_words, _broken_steps,
    _broken_refusal, _empty, _short_answer,
)  # fmt: skip
