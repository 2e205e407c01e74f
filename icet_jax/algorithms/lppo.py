"""L-PPO: Clip-PPO whose policy, reference and value are conditioned on the image encoder's exit l (the paper's method).

One iteration, step by step; pi is the policy, pi_ref the model before training, V the value head, P the projector:

     1. batch        prompts x with images, B rows                                                `training.loop`
     2. exits        l ~ the schedule of `config.lppo.exits`, one per row (paper: one layer)       `rewarded`
     3. encode       e_1 .. e_N = E(image): the tower once, for all exits                          `sample_responses`
     4. visual       P(e_l), through the same projector at every exit
     5. rollout      y ~ pi_old(. | P(e_l), x), at the rollout's temperature
     6. text         the response as words, and its reward r(x, y)                                 `rewarded`
     7. log-probs    log pi_old(y_t | P(e_l), x, y_<t), log pi_ref(y_t | same), V_t                `_prepare`
     8. rewards      R_t = -eta KL_t + [t is the last token] r(x, y)   (paper: R = r - eta KL(pi || pi_ref))
     9. advantages   A = GAE(R, V; gamma, lambda), whitened over the rollout (or per exit and kind: `lppo.baseline`)
    10. update       K epochs of mini-batches:  K_t = pi(y_t | ...) / pi_old(y_t | ...)           `lppo_loss`
                     L_policy = E[max(-K A, -clip(K, 1 - eps, 1 + eps) A)]
                     L_value  = E[(V - returns)^2]
                     L        = L_policy + c1 L_value
                     with `config.lppo.anchor_coef` c (not in the paper, off by default; step 7 runs pi_ref once more):
                     L       += c E[KL(pi_ref(. | P(e_default), x, y_<t) || pi(. | P(e_l), x, y_<t))]
    11. metrics      means under TRL's names, read while the next iteration runs                   `rewarded`

Tower and projector are frozen, and every rollout is sampled by the current policy. The one change from Clip-PPO is the
exit l: numerator and denominator of K_t, reference and value all get P(e_l) of the row's own exit. The phases can be
used alone:

    graphdef, params = nnx.split(model)                    # frozen: tower, projector and the reference policy
    settings = settings.from_config(config, vlm.sampling(max_new_tokens, temperature))
    state = state.init_state(params, lora, hidden_size=model.hidden_size, optimizer=settings.optimizer, kl_coef=...)
    run = lppo.build(graphdef, settings, mesh)             # lora: nn.protocols.init_lora(...), None = full fine-tuning
    run_key = jax.random.key(seed)

    while int(state.iteration) < iterations:
        exits = phases.draw_exits(settings, run_key, state.iteration, batch=B, num_exits=.., default_exit=..)
        rollout = run.rollout(params, state, images, tokens, mask, exits, run_key)
        scores, learned = ...                              # host: decode rollout.tokens by rollout.mask, score the text
        state, batch, metrics = run.prepare(params, state, rollout, scores, learned, longest)
        state, more = run.update(params, state, batch, run_key)        # donates `state`
        row = metrics.host_metrics(metrics, more); metrics.instability(row)
"""

from typing import TYPE_CHECKING, Any, NamedTuple

import jax
from flax import nnx

from icet_jax.algorithms import losses, rewards
from icet_jax.algorithms.advantages import gae, whiten, whiten_cells
from icet_jax.algorithms.metrics import value_metrics
from icet_jax.algorithms.phases import Rollout
from icet_jax.algorithms.rewarded import Phases, Rewarded, build_phases
from icet_jax.algorithms.rollouts import (
    RowRewards,
    add_options,
    clipped_loss,
    evaluate_rollout,
    report_rollout,
)
from icet_jax.algorithms.settings import Settings
from icet_jax.algorithms.state import Controls
from icet_jax.config.names import KINDS
from icet_jax.typing import Array, Float

if TYPE_CHECKING:
    from ml_collections import ConfigDict


class TrainBatch(NamedTuple):
    """Holds a rollout and everything else that the update needs and keeps constant; every leaf is row-aligned.

    Attributes:
      prompts, prompt_mask: [B, P], left-padded.
      visual: image features of each row's exit.
      responses: int32 [B, A].
      mask: bool [B, A], the response tokens that are learnt from.
      old_log_probs, old_values, advantages, returns: float32 [B, A].
      anchor_hidden: [B, A, E], final hidden states of the reference at the default exit; None without an anchor.
    """

    prompts: Array
    prompt_mask: Array
    visual: Any
    responses: Array
    mask: Array
    old_log_probs: Array
    old_values: Array
    advantages: Array
    returns: Array
    anchor_hidden: Any = None


def build(graphdef: Any, settings: Settings, mesh: jax.sharding.Mesh | None = None) -> Phases:
    """Returns the phases for one model structure and one `Settings`; see `rewarded.build_phases`."""

    def prepare(*arrays: Any, columns: int | None) -> Any:
        return _prepare(graphdef, settings, *arrays, columns=columns)

    def loss(*arrays: Any) -> tuple[Array, losses.Stats]:
        return lppo_loss(graphdef, settings, *arrays)

    return build_phases(graphdef, settings, mesh, prepare, loss, cache_key=("lppo",))


def _prepare(
    graphdef: Any, settings: Settings, params: Any, trainable: Any, controls: Controls, rollout: Rollout,
    rows: RowRewards, *, columns: int | None,
) -> tuple[TrainBatch, Controls, dict[str, Any]]:  # fmt: skip
    """Runs steps 7 to 9: log-probs and values, token rewards, and advantages.

    `columns` is the number of response columns that are used, see `phases.cut_columns`.

    Returns:
      (batch of the update, controls of the next rollout, metrics).
    """
    # 7. log pi_old, V and log pi_ref of every token, at the row's exit; r normalised, clipped, less the EOS penalty.
    evaluated = evaluate_rollout(graphdef, settings, params, trainable, controls, rollout, rows, columns)
    cut_rollout, old, mask = evaluated.rollout, evaluated.old, evaluated.mask

    # 8. R_t = -eta KL_t + [t is the last token] r(x, y).
    reward = rewards.token_rewards(evaluated.shaped, evaluated.kl, mask, kl_coef=controls.kl_coef)

    # 9. A = GAE(R, V; gamma, lambda); returns = A + V; then A is whitened over the rewarded rows.
    if settings.whiten_rewards:
        reward = whiten(reward, mask, shift_mean=False, rows=rows.rewarded)
    advantages, returns = gae(reward, old.values, mask, gamma=settings.gamma, lam=settings.lam)

    batch = TrainBatch(
        prompts=cut_rollout.prompts,
        prompt_mask=cut_rollout.prompt_mask,
        visual=cut_rollout.visual,
        responses=cut_rollout.tokens,
        mask=mask & evaluated.stable,
        old_log_probs=old.log_probs,
        old_values=old.values,
        advantages=_whitened(
            settings, advantages, mask, cut_rollout.exits, rows, nnx.merge(graphdef, params).num_exits
        ),
        returns=returns,
        anchor_hidden=evaluated.anchor_hidden,
    )
    after, metrics = report_rollout(graphdef, settings, params, controls, evaluated, rows)
    return batch, after, metrics | value_metrics(advantages, returns, mask)


def _whitened(
    settings: Settings, advantages: Array, mask: Array, exits: Array, rows: RowRewards, num_exits: int
) -> Array:  # fmt: skip
    """Returns the advantages whitened over all rewarded rows, or over those of each exit and kind (`lppo.baseline`)."""
    if not settings.whiten_advantages:
        return advantages
    if settings.baseline == "rollout":
        return whiten(advantages, mask, rows=rows.rewarded)
    return whiten_cells(
        advantages,
        mask,
        exits=exits,
        kinds=rows.kinds,
        num_exits=num_exits,
        num_kinds=len(KINDS),
        min_rows=settings.baseline_min_rows,
        min_std=settings.baseline_min_std,
        rows=rows.rewarded,
    )


def lppo_loss(
    graphdef: Any, settings: Settings, params: Any, trainable: dict[str, Any], rows: TrainBatch
) -> tuple[Float[Array, ""], dict[str, Array]]:
    """Returns L = L_policy + c1 * L_value - entropy_coef * entropy (paper), a token mean, and TRL's statistics."""
    new, policy_term, stats = clipped_loss(graphdef, settings, params, trainable, rows, rows.advantages)
    value_term, value_stats = losses.value_loss(
        new.values, rows.old_values, rows.returns, rows.mask, clip_range=settings.value_clip_range or None
    )
    stats |= {"value": value_term, "value_clipfrac": value_stats["clipfrac"]}
    return add_options(settings, policy_term + settings.value_coef * value_term, stats, new, rows.mask)


class Lppo(Rewarded):
    """Runs L-PPO on the host; `Rewarded` does steps 2 to 6 and 11."""

    value_head = True

    @classmethod
    def phases(
        cls, config: "ConfigDict", graphdef: Any, settings: Settings, mesh: jax.sharding.Mesh | None
    ) -> Phases:  # fmt: skip
        """See `Rewarded`."""
        return build(graphdef, settings, mesh)


ALGORITHM = Lppo
