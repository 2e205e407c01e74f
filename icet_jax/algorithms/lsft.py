"""L-SFT, the ablation: supervised targets (refusals for forbidden rows) at sampled exits, on L-PPO's state and budget.

    update = lsft.build(graphdef, settings)
    targets, target_mask = lsft.pad_targets(token_ids, eos_id=.., length=.., pad_id=..)      # one list of ids per row
    state, metrics = update(params, state, images, tokens, mask, exits, targets, target_mask, run_key)

The arguments are those of `learner.Phases.rollout`. `settings` is L-PPO's own: one call runs the same epochs x
mini-batches x accumulation on a batch as an iteration of L-PPO does, with the same optimizer; only the data of the loss
differ. The value head of the shared state keeps its zeros.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from flax import nnx

from icet_jax.algorithms.forward import score_responses, with_policy
from icet_jax.algorithms.learner import check_divides, encode_visual, run_epochs
from icet_jax.algorithms.losses import masked_mean
from icet_jax.algorithms.metrics import step_metrics
from icet_jax.algorithms.settings import Settings
from icet_jax.algorithms.state import TrainState
from icet_jax.errors import UserError
from icet_jax.parallel.programs import Program
from icet_jax.typing import Array, Float


class TargetBatch(NamedTuple):
    """Prompts and the responses to learn; every leaf is row-aligned."""

    prompts: Array
    prompt_mask: Array
    visual: Any
    responses: Array
    mask: Array


def pad_targets(
    token_ids: Sequence[Sequence[int] | None], *, eos_id: int, length: int, pad_id: int
) -> tuple[np.ndarray, np.ndarray]:
    """Target responses as arrays: each row's ids, then EOS, then padding.

    Args:
      token_ids: one list per row, without EOS; None is a row without a target, which trains nothing.
      eos_id: ends every target.
      length: A, the columns; the rollout's `max_new_tokens`.
      pad_id: fills the rest.

    Returns:
      (int32 [B, A], bool [B, A] prefix mask that includes EOS).

    Raises:
      UserError: a target and its EOS do not fit.
    """
    tokens = np.full((len(token_ids), length), pad_id, np.int32)
    mask = np.zeros((len(token_ids), length), bool)
    for row, ids in enumerate(token_ids):
        if ids is None:
            continue
        if len(ids) + 1 > length:
            raise UserError(
                f"target of row {row}: {len(ids)} tokens + EOS exceed config.lppo.max_new_tokens ({length}); raise it"
            )
        tokens[row, : len(ids) + 1] = [*ids, eos_id]
        mask[row, : len(ids) + 1] = True
    return tokens, mask


def build(graphdef: Any, settings: Settings, mesh: jax.sharding.Mesh | None = None) -> Program:
    """The one phase of L-SFT; see the module's docstring for its arguments and results. It donates the state.

    `mesh` is as in `learner.build`.
    """

    def learn(*arrays: Any) -> tuple[TrainState, dict[str, Any]]:
        return _update(graphdef, settings, mesh, *arrays)

    return Program(learn, about=(graphdef, settings, mesh), donate=1)


def lsft_loss(
    graphdef: Any, settings: Settings, params: Any, trainable: dict[str, Any], rows: TargetBatch
) -> tuple[Float[Array, ""], dict[str, Array]]:
    """Mean negative log-likelihood per target token, nats, at temperature 1."""
    policy, lora = with_policy(params, trainable, settings.lora_scale)
    scored = score_responses(
        nnx.merge(graphdef, policy),
        lora,
        None,
        rows.prompts,
        rows.prompt_mask,
        rows.responses,
        rows.mask,
        rows.visual,
        temperature=1.0,
        suppress_ids=settings.sampling.suppress_ids,
        chunk=settings.log_prob_chunk,
    )
    loss = -masked_mean(scored.log_probs, rows.mask)
    return loss, {"entropy": masked_mean(scored.entropy, rows.mask)}


def _update(
    graphdef: Any, settings: Settings, mesh: jax.sharding.Mesh | None, params: Any, state: TrainState, images: Any,
    tokens: Array, mask: Array, exits: Array, targets: Array, target_mask: Array, run_key: Array,
) -> tuple[TrainState, dict[str, Any]]:  # fmt: skip
    """Encode, pick the exits, then the same scan of updates as L-PPO's; advances the iteration."""
    check_divides(settings, tokens.shape[0])
    batch = TargetBatch(
        prompts=tokens,
        prompt_mask=mask,
        visual=encode_visual(nnx.merge(graphdef, params), images, exits),
        responses=targets,
        mask=target_mask & mask.any(axis=1, keepdims=True),
    )
    new_state, outcome = run_epochs(
        lambda trainable, rows: lsft_loss(graphdef, settings, params, trainable, rows),
        settings,
        mesh,
        state,
        batch,
        run_key,
    )
    metrics = {"policy/entropy_avg": outcome.stats["entropy"], "loss/policy_avg": outcome.stats["loss"]}
    return new_state, metrics | step_metrics(state, outcome, settings.optimizer)
