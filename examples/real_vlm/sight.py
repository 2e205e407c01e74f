"""Measures whether a model sees: the loss of captions with their own photographs against other photographs."""

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from icet_jax.algorithms.forward import evaluate_responses
from icet_jax.algorithms.lsft import pad_targets
from icet_jax.algorithms.phases import encode_visual
from icet_jax.data.records import Example
from icet_jax.evaluation.batching import prompt_batch, prompt_tokens
from icet_jax.evaluation.statistics import Interval, mean_interval, paired_interval
from icet_jax.files import JsonObject
from icet_jax.training.progress import Progress
from icet_jax.vlm import VLM

_CHUNK = 16  # response positions whose logits exist at one time


def measure(vlm: VLM, rows: Sequence[Example], max_tokens: int, batch_size: int = 16) -> JsonObject:
    """Returns the mean loss per caption token at the default exit, in nats, with 95% intervals.

    Args:
      vlm: the model.
      rows: captions, one of each of at least two photographs.
      max_tokens: most tokens of a caption, with EOS.
      batch_size: rows computed at once.

    Returns:
      {"right": the loss with the caption's own photograph, "shuffled": with that of another caption, "difference":
      shuffled - right of the same captions, "n": number of captions}. A model that does not see has a difference of 0.
    """
    others = [*rows[1:], rows[0]]  # a caption never keeps its photograph
    shuffled = [replace(row, images=other.images) for row, other in zip(rows, others, strict=True)]
    width = max(map(len, prompt_tokens(vlm.processor, rows)))
    losses = {}
    with Progress("held-out captions", 2 * len(rows)) as progress:
        for name, sided_rows in {"right": rows, "shuffled": shuffled}.items():
            batches = []
            for start in range(0, len(rows), batch_size):
                batch = sided_rows[start : start + batch_size]
                batches.append(_losses(vlm, batch, batch_size, width, max_tokens))
                progress.advance(to=(name == "shuffled") * len(rows) + start + len(batch))
            losses[name] = np.concatenate(batches)
    clusters = [str(row.images[0]) for row in rows]
    difference = paired_interval(losses["right"], losses["shuffled"], clusters, share=False)
    intervals = {name: mean_interval(values, clusters, share=False) for name, values in losses.items()}
    return {
        **{name: as_json(interval) for name, interval in (intervals | {"difference": difference}).items()},
        "n": len(rows),
    }


def as_json(interval: Interval) -> JsonObject:
    """Returns a mean and its 95% interval as files and reports have them."""
    return {"mean": round(interval.mean, 4), "ci95": [round(interval.low, 4), round(interval.high, 4)]}


def _answer_ids(vlm: VLM, row: Example) -> list[int]:
    """Returns the token ids of a row's answer, without EOS."""
    return list(vlm.processor.tokenizer(row.answer or "", add_special_tokens=False)["input_ids"])


def _losses(vlm: VLM, rows: Sequence[Example], batch_size: int, width: int, max_tokens: int) -> np.ndarray:
    """Returns the mean negative log-likelihood per answer token of each row, float [n]."""
    batch = prompt_batch(vlm, rows, batch_size, 1, length=width)
    ids: list[list[int] | None] = [_answer_ids(vlm, row) for row in rows]
    ids += [None] * (batch_size - len(rows))
    targets, mask = pad_targets(ids, eos_id=vlm.eos_ids[0], length=max_tokens, pad_id=vlm.pad_id)
    losses = _token_losses(
        vlm.graphdef, vlm.suppress_ids, vlm.params, vlm.lora, batch.images, batch.tokens, batch.mask, targets, mask
    )
    return np.asarray(losses)[: len(rows)]


@partial(jax.jit, static_argnums=(0, 1))
def _token_losses(
    graphdef: Any, suppress_ids: tuple[int, ...], params: Any, lora: Any, images: Any, tokens: Any, mask: Any,
    targets: Any, target_mask: Any,
) -> jax.Array:  # fmt: skip
    """Returns the mean negative log-likelihood of each row's target, float32 [B]."""
    model = nnx.merge(graphdef, params)
    visual = encode_visual(model, images, jnp.full(tokens.shape[0], model.default_exit))
    scored = evaluate_responses(
        model, lora, None, tokens, mask, targets, target_mask, visual,
        temperature=1.0, suppress_ids=suppress_ids, chunk=_CHUNK,
    )  # fmt: skip
    count = jnp.maximum(target_mask.sum(axis=1), 1)
    return -jnp.where(target_mask, scored.log_probs, 0).sum(axis=1) / count
