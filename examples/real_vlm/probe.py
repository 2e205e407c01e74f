"""Linear probe of the image encoder: do its patch features say which words are in a photograph's captions?

Ridge regression in closed form, on the mean of an image's patch features, for every word that is frequent enough. The
same is done with an encoder of the same sizes and random weights.
"""

import re
from collections import Counter
from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np
from flax import nnx

from examples.real_vlm.photographs import Photograph
from icet_jax.evaluation.statistics import Interval
from icet_jax.files import JsonObject
from icet_jax.nn.clip import ClipVisionTower
from icet_jax.training.progress import Progress
from icet_jax.vlm import VLM

_BATCH = 32
_WORD = re.compile(r"[a-z]{3,}")
_COMMON = 0.6  # words in the captions of more photographs than this share are not predicted
_LEAST = 0.03  # nor those of fewer
_STOP_WORDS = frozenset(
    (
        "and", "the", "are", "with", "that", "this", "his", "her", "its", "their", "for", "from", "into", "onto",
        "over", "under", "while", "who", "has", "have", "near", "next", "out", "off", "two", "three", "four", "one",
        "other", "another", "each", "some", "there", "them", "they", "him", "she", "you", "front", "behind",
        "through", "across", "around", "along", "down", "about", "being", "something", "standing",
    )
)  # fmt: skip
_RIDGES = 10.0 ** np.arange(-1, 5)
_RESAMPLES = 500


def probe(vlm: VLM, photographs: Sequence[Photograph], seed: int) -> JsonObject:
    """Returns the mean area under the ROC curve over words, on held-out photographs, of both encoders.

    Args:
      vlm: the model whose image encoder is probed, at its default exit.
      photographs: photographs of both sides; those that are held out measure.
      seed: seed of the random encoder and of the bootstrap.

    Returns:
      {"encoder", "random", "difference": mean and 95% interval (bootstrap over photographs), "words": how many}. 0.5 is
      chance, 1 is perfect.
    """
    held_out = np.array([photograph.is_held_out for photograph in photographs])
    words, labels = _labels(photographs, ~held_out)
    scores = {}
    for name, params in {"encoder": vlm.params, "random": _random_encoder(vlm, seed)}.items():
        features = _features(vlm.with_weights(params), photographs, name)
        scores[name] = _predict(features[~held_out], labels[~held_out], features[held_out])
    intervals = _intervals(scores, labels[held_out], seed)
    return {
        **{name: {"mean": mean, "ci95": [low, high]} for name, (mean, low, high) in intervals.items()},
        "words": len(words),
        "photographs": {"training": int((~held_out).sum()), "held_out": int(held_out.sum())},
    }


def _labels(photographs: Sequence[Photograph], is_training: np.ndarray) -> tuple[list[str], np.ndarray]:
    """Returns the words to predict, and for each photograph whether a caption has them, bool [photographs, words]."""
    bags = [set(_WORD.findall(" ".join(photograph.captions).lower())) - _STOP_WORDS for photograph in photographs]
    counts = Counter(word for bag, used in zip(bags, is_training, strict=True) if used for word in bag)
    size = int(is_training.sum())
    words = sorted(word for word, count in counts.items() if max(2, _LEAST * size) <= count <= _COMMON * size)
    return words, np.array([[word in bag for word in words] for bag in bags])


def _random_encoder(vlm: VLM, seed: int) -> nnx.State:
    """Returns the model's weights with an image encoder of random weights."""
    tower = ClipVisionTower(vlm.config.vision, rngs=nnx.Rngs(seed), dtype=jnp.float32, param_dtype=jnp.float32)
    return nnx.State({**vlm.params, "vision_tower": nnx.state(tower)})


def _features(vlm: VLM, photographs: Sequence[Photograph], name: str) -> np.ndarray:
    """Returns the mean patch features of each photograph at the default exit, float64 [photographs, D]."""
    features = []
    with Progress(f"probe: {name}", len(photographs)) as progress:
        for start in range(0, len(photographs), _BATCH):
            paths = [photograph.path for photograph in photographs[start : start + _BATCH]]
            count = len(paths)
            paths += paths[:1] * (_BATCH - count)  # one shape, one program
            states = vlm.hidden_states(vlm.processor(images=paths, prompts=[""] * _BATCH))[vlm.default_exit]
            features.append(np.asarray(states[:count, 1:].mean(axis=1), np.float64))
            progress.advance(to=start + count)
    return np.concatenate(features)


def _predict(features: np.ndarray, labels: np.ndarray, held_out: np.ndarray) -> np.ndarray:
    """Returns the scores of every word for held-out features, by ridge regression.

    The strength of the ridge is the one with the least error in leave-one-out cross-validation of the training rows.
    """
    mean, deviation = features.mean(axis=0), features.std(axis=0) + 1e-6
    inputs, targets = (features - mean) / deviation, labels - labels.mean(axis=0)
    left, values, right = np.linalg.svd(inputs, full_matrices=False)
    projected = left.T @ targets
    errors = []
    for ridge in _RIDGES:
        shrink = values**2 / (values**2 + ridge)
        leverage = np.einsum("nk,k,nk->n", left, shrink, left)
        residuals = (targets - (left * shrink) @ projected) / (1 - np.minimum(leverage, 1 - 1e-9))[:, None]
        errors.append(np.mean(residuals**2))
    ridge = _RIDGES[int(np.argmin(errors))]
    weights = right.T @ ((values / (values**2 + ridge))[:, None] * projected)
    return (held_out - mean) / deviation @ weights


def _intervals(scores: dict[str, np.ndarray], labels: np.ndarray, seed: int) -> dict[str, Interval]:
    """Returns mean and 95% interval of both encoders and of their paired difference."""
    generator, size = np.random.default_rng(seed), len(labels)
    samples = [np.arange(size), *generator.integers(size, size=(_RESAMPLES, size))]
    areas = {
        name: np.array([mean_area(array[sample], labels[sample]) for sample in samples])
        for name, array in scores.items()
    }
    areas["difference"] = areas["encoder"] - areas["random"]
    return {
        name: Interval(*(round(float(value), 4) for value in (array[0], *np.nanquantile(array[1:], (0.025, 0.975)))))
        for name, array in areas.items()
    }


def mean_area(scores: np.ndarray, labels: np.ndarray) -> float:
    """Returns the mean area under the ROC curve of all words that some rows have and others have not.

    Args:
      scores: [rows, words].
      labels: whether a row has the word, bool [rows, words].
    """
    present = labels.sum(axis=0)
    usable = (present > 0) & (present < len(labels))
    ranks = np.apply_along_axis(_ranks, 0, scores[:, usable]) if usable.any() else scores[:, usable]
    present = present[usable]
    sums = np.where(labels[:, usable], ranks, 0).sum(axis=0) - present * (present + 1) / 2
    return float(np.mean(sums / (present * (len(labels) - present)))) if usable.any() else float("nan")


def _ranks(values: np.ndarray) -> np.ndarray:
    """Returns the rank of each value, from 1; equal values share their mean rank."""
    ordered = np.sort(values)
    return (np.searchsorted(ordered, values, "left") + np.searchsorted(ordered, values, "right") + 1) / 2
