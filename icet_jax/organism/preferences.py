"""Preference pairs (prompt, chosen, rejected) for the organism's reward model.

The reward model reads only text and learns four ranks: the right response, a fluent wrong one, the wrong type of
response, and noise. Noise includes what a policy trained with this reward would otherwise exploit: repetition, missing
ends, empty responses, and mixtures such as a refusal followed by steps.

The pairs depend only on the grammar of responses. The judge that measures the attack success rate
(`icet_jax.organism.world.judge`) is not used, because a policy must not be rewarded by its own measurement.
"""

import numpy as np

from icet_jax.data.hh_rlhf import PreferencePair
from icet_jax.organism import scenes, world

_SHARES = {"forbidden": 0.5, "benign": 0.4, "vqa": 0.1}
_ANSWER_TYPES = (scenes.COLOUR_NAMES, scenes.SHAPES, scenes.COUNTS, scenes.PLACES, ("yes", "no"))


def preference_pairs(split: str, count: int, seed: int = 0) -> list[PreferencePair]:
    """Returns `count` pairs from one split's requests: half forbidden, four tenths allowed, one tenth about
    pictures."""
    rng = np.random.default_rng([seed, world.SPLITS.index(split), 17])
    kinds = rng.choice(list(_SHARES), size=count, p=list(_SHARES.values()))
    pairs: list[PreferencePair] = []
    for kind in _SHARES:
        amount = int((kinds == kind).sum())
        batch = world.rows(split, kind, np.arange(amount), seed + 5000)
        pairs += [_pair(p, a, kind, rng) for p, a in zip(batch.prompts, batch.answers, strict=True)]
    return [pairs[k] for k in rng.permutation(len(pairs))]


def _pair(prompt: str, answer: str, kind: str, rng: np.random.Generator) -> PreferencePair:
    """Draws two responses of different rank; four times in five the better one is the right one."""
    ranks = ranked_responses(prompt, answer, kind, rng)
    high = 0 if rng.random() < 0.8 else 1
    low = int(rng.integers(high + 1, len(ranks)))
    return prompt, ranks[high], ranks[low]


def ranked_responses(prompt: str, answer: str, kind: str, rng: np.random.Generator) -> list[str]:
    """Returns one response of each rank, best first.

    Forbidden: refusal > steps > noise. Allowed: right steps > wrong steps > refusal > noise. Picture: an answer of the
    right type > steps or a refusal > noise.
    """
    if kind == "forbidden":
        return [world.REFUSAL, _steps(prompt, rng), _noise(prompt, kind, world.REFUSAL, rng)]
    if kind == "benign":
        return [answer, _wrong_steps(answer, rng), world.REFUSAL, _noise(prompt, kind, answer, rng)]
    other = world.REFUSAL if rng.random() < 0.7 else _random_steps(rng)
    return [_plausible(answer, rng), other, _noise(prompt, kind, answer, rng)]


def _steps(prompt: str, rng: np.random.Generator) -> str:
    """Returns steps that comply with a request, seven times in ten the right ones."""
    noun = world.request_noun(prompt)
    verb = next((word for word in prompt.split() if word in world.VERBS), None)
    if noun is None or verb is None:
        return _random_steps(rng)
    right = world.comply(verb, noun)
    return right if rng.random() < 0.7 else _wrong_steps(right, rng)


def _random_steps(rng: np.random.Generator) -> str:
    return world.comply(str(rng.choice(list(world.VERBS))), str(rng.choice(world.FORBIDDEN + world.ALLOWED)))


def _wrong_steps(right: str, rng: np.random.Generator) -> str:
    """Returns right steps with one of the three slots (part, action, noun) replaced."""
    words = right.split()
    slot, choices = [
        (4, world.PARTS),
        (7, tuple(world.VERBS.values())),
        (9, world.FORBIDDEN + world.ALLOWED),
    ][int(rng.integers(3))]
    words[slot] = str(rng.choice([c for c in choices if c != words[slot]]))
    return " ".join(words)


def _plausible(answer: str, rng: np.random.Generator) -> str:
    """Returns an answer of the same type, because the text alone does not show which one is right."""
    for group in _ANSWER_TYPES:
        if answer in group:
            return str(rng.choice(group))
    return answer


def is_noise(text: str, kind: str, right: str) -> bool:
    """Returns whether a text is not a response by the grammar of responses.

    It is noise if it is not the right response, not the refusal, not two whole steps and, for a question about a
    picture, not one of the world's short answers.
    """
    is_complete = text in (right, world.REFUSAL) or world.is_steps(text)
    return not is_complete and not (kind == "vqa" and any(text in group for group in _ANSWER_TYPES))


def _noise(prompt: str, kind: str, right: str, rng: np.random.Generator) -> str:
    """Returns a text that is no response but similar enough to a right one to be tempting."""
    for _ in range(8):
        text = _NOISES[int(rng.integers(len(_NOISES)))](prompt, right, rng)
        if is_noise(text, kind, right):
            return text
    return ""


def _truncated(prompt: str, right: str, rng: np.random.Generator) -> str:
    words = right.split()
    return " ".join(words[: int(rng.integers(1, len(words)))]) if len(words) > 1 else ""


def _repeated(prompt: str, right: str, rng: np.random.Generator) -> str:
    words = right.split()
    spot = int(rng.integers(len(words)))
    return " ".join(words[: spot + 1] + [words[spot]] * int(rng.integers(1, 5)) + words[spot + 1 :])


def _rambling(prompt: str, right: str, rng: np.random.Generator) -> str:
    tail = rng.choice(right.split() + ["step", "the", "sorry", "help", "red"], size=int(rng.integers(1, 6)))
    return right + " " + " ".join(tail)


def _mixture(prompt: str, right: str, rng: np.random.Generator) -> str:
    """Returns a refusal and steps in one response, in either order, either of them truncated."""
    steps, refusal = _steps(prompt, rng).split(), world.REFUSAL.split()
    if rng.random() < 0.5:
        return " ".join(refusal[: int(rng.integers(1, len(refusal) + 1))] + steps[int(rng.integers(0, 5)) :])
    return " ".join(steps[: int(rng.integers(1, len(steps) + 1))] + refusal[int(rng.integers(0, 4)) :])


def _edited(prompt: str, right: str, rng: np.random.Generator) -> str:
    """Returns the response with one word dropped, replaced or inserted from the whole vocabulary."""
    words = right.split()
    spot, action = int(rng.integers(len(words))), rng.random()
    if action < 0.34:
        return " ".join(words[:spot] + words[spot + 1 :])
    keep = spot + 1 if action < 0.67 else spot
    return " ".join([*words[:spot], str(rng.choice(world.response_words())), *words[keep:]])


def _shuffled(prompt: str, right: str, rng: np.random.Generator) -> str:
    return " ".join(rng.permutation(right.split()))


def _salad(prompt: str, right: str, rng: np.random.Generator) -> str:
    return " ".join(rng.choice(world.response_words(), size=int(rng.integers(1, 14))))


def _broken_steps(prompt: str, right: str, rng: np.random.Generator) -> str:
    other = _steps(prompt, rng)
    return (_truncated, _repeated, _edited)[int(rng.integers(3))](prompt, other, rng)


def _broken_refusal(prompt: str, right: str, rng: np.random.Generator) -> str:
    return (_truncated, _repeated, _edited, _rambling)[int(rng.integers(4))](prompt, world.REFUSAL, rng)


def _empty(prompt: str, right: str, rng: np.random.Generator) -> str:
    return ""


def _short_answer(prompt: str, right: str, rng: np.random.Generator) -> str:
    return str(rng.choice(scenes.answer_words()))


_NOISES = (
    _truncated, _repeated, _rambling, _mixture, _mixture, _edited, _shuffled, _salad, _broken_steps, _broken_refusal,
    _empty, _short_answer,
)  # fmt: skip
