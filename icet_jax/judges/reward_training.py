"""Training a reward model on preference pairs: minimise -log sigmoid(r_chosen - r_rejected)."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from icet_jax.errors import UserError
from icet_jax.judges.reward_model import HH_TEMPLATE, PairTokenizer, RewardModel, bucket, pad_rows
from icet_jax.models.gpt2 import GPT2RewardModel
from icet_jax.typing import Array, Float

Pair = tuple[str, str, str]
"""(prompt, chosen response, rejected response)."""


@dataclass(frozen=True)
class RewardTraining:
    """Settings of `train_reward_model`.

    Attributes:
      steps: optimizer steps.
      batch_size: pairs per step.
      learning_rate: peak of AdamW's, after the warm-up; it then falls to 0 along a cosine.
      warmup_steps: optimizer steps from 0 to the peak.
      weight_decay: AdamW's.
      max_grad_norm: gradients are clipped to this global norm.
      seed: of the order of the pairs.
    """

    steps: int
    batch_size: int = 64
    learning_rate: float = 1e-3
    warmup_steps: int = 20
    weight_decay: float = 0.01
    max_grad_norm: float = 1.0
    seed: int = 0


class RewardReport(NamedTuple):
    """What training reached.

    Attributes:
      losses: mean loss of each step, in nats.
      held_out_accuracy: share of held-out pairs whose chosen response scores higher (a tie counts as wrong).
      held_out_margin: mean of r_chosen - r_rejected over the held-out pairs.
      held_out_pairs: how many there were.
    """

    losses: list[float]
    held_out_accuracy: float
    held_out_margin: float
    held_out_pairs: int


def preference_loss(chosen: Float[Array, "B"], rejected: Float[Array, "B"]) -> Float[Array, ""]:
    """Mean of -log sigmoid(r_w - r_l) over B pairs, in nats (Bradley-Terry)."""
    return -jnp.mean(jax.nn.log_sigmoid(chosen - rejected))


def train_reward_model(
    model: GPT2RewardModel,
    tokenizer: Any,
    pairs: Sequence[Pair],
    held_out: Sequence[Pair],
    settings: RewardTraining,
    *,
    template: str = HH_TEMPLATE,
    progress: Callable[[int, float], None] | None = None,
) -> tuple[GPT2RewardModel, RewardReport]:
    """Trains every weight of `model`, which is left as it was, and tests the result on pairs it has not seen.

    Args:
      model: starting point.
      tokenizer: transformers'.
      pairs: training pairs; drawn in a new seeded order each time all have been used.
      held_out: pairs of other prompts.
      settings: sizes and optimizer.
      template: see `PairTokenizer`.
      progress: called after each step with (step, loss).

    Returns:
      (trained model, report).

    Raises:
      UserError: no pairs, or a loss that is not finite (names the step).
    """
    if not pairs or not held_out:
        raise UserError(f"{len(pairs)} training and {len(held_out)} held-out preference pairs; both need at least one")
    rows = _tokenise(PairTokenizer(tokenizer, template=template, max_length=model.config.n_positions), pairs)
    length = bucket(max(len(ids) for pair in rows for ids in pair), model.config.n_positions)
    graphdef, params = nnx.split(model)
    optimizer = _optimizer(settings)

    @jax.jit
    def step(params: nnx.State, state: optax.OptState, tokens: Any, mask: Any) -> tuple[Any, Any, Array]:
        def loss_of(params: nnx.State) -> Array:
            return preference_loss(*jnp.split(nnx.merge(graphdef, params)(tokens, mask), 2))

        loss, gradients = jax.value_and_grad(loss_of)(params)
        updates, state = optimizer.update(gradients, state, params)
        return optax.apply_updates(params, updates), state, loss

    state = optimizer.init(params)
    losses = []
    for number, chosen in enumerate(_batches(len(rows), settings)):
        batch = [rows[index][0] for index in chosen] + [rows[index][1] for index in chosen]
        params, state, loss = step(params, state, *pad_rows(batch, length, len(batch)))
        losses.append(float(loss))
        if not np.isfinite(losses[-1]):
            raise UserError(f"reward model: the loss is {losses[-1]} at step {number}; lower the learning rate")
        if progress is not None:
            progress(number, losses[-1])
    trained = nnx.merge(graphdef, params)
    return trained, _test(trained, tokenizer, template, held_out, losses)


def _tokenise(encode: PairTokenizer, pairs: Sequence[Pair]) -> list[tuple[list[int], list[int]]]:
    prompts, chosen, rejected = zip(*pairs, strict=True)
    return list(zip(encode(prompts, chosen), encode(prompts, rejected), strict=True))


def _batches(count: int, settings: RewardTraining) -> list[np.ndarray]:
    """Row numbers [batch_size] of every step; each pass over the pairs has its own order."""
    needed = settings.steps * settings.batch_size
    passes = [np.random.default_rng([settings.seed, lap]).permutation(count) for lap in range(-(-needed // count))]
    return list(np.concatenate(passes)[:needed].reshape(settings.steps, settings.batch_size))


def _optimizer(settings: RewardTraining) -> optax.GradientTransformation:
    warmup = min(settings.warmup_steps, settings.steps - 1)
    schedule = optax.warmup_cosine_decay_schedule(0.0, settings.learning_rate, warmup, settings.steps)
    return optax.chain(
        optax.clip_by_global_norm(settings.max_grad_norm),
        optax.adamw(schedule, weight_decay=settings.weight_decay),
    )


def _test(
    model: GPT2RewardModel, tokenizer: Any, template: str, held_out: Sequence[Pair], losses: list[float]
) -> RewardReport:
    scorer = RewardModel(model, tokenizer, name="held_out", template=template)
    prompts, chosen, rejected = zip(*held_out, strict=True)
    margins = scorer.score_tokens(scorer.pairs(prompts, chosen)) - scorer.score_tokens(scorer.pairs(prompts, rejected))
    return RewardReport(losses, float(np.mean(margins > 0)), float(np.mean(margins)), len(held_out))
