"""What the stages of an organism's build share: rows of text as arrays, the next-token loss, and an optimizer loop."""

import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from icet_jax.algorithms.state import OptimizerSettings, make_optimizer
from icet_jax.nn.protocols import Visual
from icet_jax.organism import tokenizer
from icet_jax.typing import Array, Float, PyTree

TEXT_TOKENS = 12
"""Largest number of tokens of a prompt, without those of its picture."""
RESPONSE_TOKENS = 12
"""Largest number of tokens of a response, with its `</s>`."""
_LOG_EVERY = 50  # steps between log lines


class TextRows(NamedTuple):
    """Holds N rows of T tokens: prompts, padded on the left, then responses, padded on the right."""

    tokens: np.ndarray  # int32 [N, T]
    mask: np.ndarray  # bool [N, T], true for tokens that are not padding
    response: np.ndarray  # bool [N, T], true for tokens to learn: the response and its </s>

    def take(self, index: np.ndarray) -> "TextRows":
        """Returns the rows `index`."""
        return TextRows(*(column[index] for column in self))


def prompt_ids(prompt: str, picture: Sequence[int]) -> list[int]:
    """Returns the ids of a prompt in the chat template; `picture` are those of its picture, empty if it has none."""
    ids = tokenizer.vocabulary()
    return [ids[tokenizer.BOS], ids["user:"], *picture, *tokenizer.encode(prompt), ids["assistant:"]]


def pack(prompts: Sequence[str], answers: Sequence[str], picture: Sequence[int], width: int) -> TextRows:
    """Returns rows of prompts (with the ids `picture` in each, padded to `width` tokens) and their answers."""
    shape = (len(prompts), width + RESPONSE_TOKENS)
    tokens = np.full(shape, tokenizer.vocabulary()[tokenizer.PAD], dtype=np.int32)
    mask, response = np.zeros(shape, dtype=bool), np.zeros(shape, dtype=bool)
    for row, (prompt, answer) in enumerate(zip(prompts, answers, strict=True)):
        before = prompt_ids(prompt, picture)
        after = [*tokenizer.encode(answer), tokenizer.vocabulary()[tokenizer.EOS]]
        start, stop = width - len(before), width + len(after)
        tokens[row, start:stop] = before + after
        mask[row, start:stop] = True
        response[row, width:stop] = True
    return TextRows(tokens, mask, response)


def next_token_loss(model: Any, batch: TextRows, visual: Visual | None) -> tuple[Float[Array, ""], dict[str, Array]]:
    """Returns the mean cross-entropy of the response tokens in nats, and metrics; `visual` are the image features."""
    tokens, mask = jnp.asarray(batch.tokens), jnp.asarray(batch.mask)
    hidden = model.decode(tokens, model.positions(tokens, mask, visual), mask, visual)
    logits = model.logits(hidden[:, -RESPONSE_TOKENS - 1 : -1])
    targets, learn = batch.tokens[:, -RESPONSE_TOKENS:], batch.response[:, -RESPONSE_TOKENS:]
    nll = optax.softmax_cross_entropy_with_integer_labels(logits, targets)
    loss = jnp.sum(nll * learn) / jnp.sum(learn)
    right = jnp.all((jnp.argmax(logits, axis=-1) == targets) | ~learn, axis=1)
    return loss, {"loss": loss, "right": right.mean()}


def optimizer(learning_rate: float, steps: int) -> optax.GradientTransformation:
    """Returns AdamW with linear warm-up, cosine decay to 5 % of `learning_rate`, and gradients clipped at norm 1."""
    return make_optimizer(
        OptimizerSettings(
            learning_rate, schedule="cosine", warmup_steps=min(20, steps // 2), total_steps=steps, final_share=0.05,
            b1=0.9, b2=0.98, eps=1e-8, weight_decay=0.01, max_grad_norm=1.0,
        )
    )  # fmt: skip


def train(
    name: str,
    loss: Callable[..., tuple[Array, dict[str, Array]]],
    params: PyTree,
    batches: Iterator[tuple[Any, ...]],
    optimiser: optax.GradientTransformation,
    log: Callable[[str], None],
) -> PyTree:
    """Returns `params` after one optimizer step per batch on the loss `loss(params, *batch)`.

    `loss` returns (scalar, metrics). Every `_LOG_EVERY` steps, `log` gets a line with the metrics.
    """

    @jax.jit
    def step(params: PyTree, state: PyTree, *batch: PyTree) -> tuple[PyTree, PyTree, dict[str, Array]]:
        gradients, metrics = jax.grad(loss, has_aux=True)(params, *batch)
        updates, state = optimiser.update(gradients, state, params)
        return optax.apply_updates(params, updates), state, metrics

    state, start = jax.jit(optimiser.init)(params), time.perf_counter()
    for number, batch in enumerate(batches, start=1):
        params, state, metrics = step(params, state, *batch)
        if number % _LOG_EVERY == 0:
            values = " ".join(f"{key} {float(value):.3f}" for key, value in metrics.items())
            log(f"{name} step {number}: {values} ({time.perf_counter() - start:.0f} s)")
    return params
