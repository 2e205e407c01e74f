"""L-RLOO: several answers of one (prompt, image, exit) are compared with each other, without a critic.

The paper has no such algorithm.

One iteration, step by step; pi is the policy, pi_ref the model before training, P the projector, k the group size:

    1. batch        B / k prompts x with images                                                  `training.loop`
    2. exits        l ~ the schedule of `config.lrloo.exits`, one per prompt                     `rewarded`
    3. encode       e_1 .. e_N = E(image): the tower once per prompt, for all exits
    4. visual       P(e_l), once per prompt
    5. rollout      y_1 .. y_k ~ pi_old(. | P(e_l), x): one prefill per prompt, whose KV cache is repeated k times
    6. text         each response as words, and its reward r(x, y_i)
    7. log-probs    log pi_old(y_it | P(e_l), x, y_i<t), log pi_ref(y_it | same)                 `_prepare`
    8. rewards      rloo:  R_i = r_i - eta sum_t KL_it        grpo:  R_i = r_i
    9. advantages   rloo:  A_i = R_i - mean over j != i of R_j           (Ahmadian et al. 2024, "Back to Basics", eq. 8)
                    grpo:  A_i = (R_i - mean(R)) / (std(R) + 1e-4)       (Shao et al. 2024, "DeepSeekMath", section 4.1)
   10. update       K epochs of mini-batches:  K_it = pi(y_it | ...) / pi_old(y_it | ...)        `lrloo_loss`
                    L = E_it[max(-K_it A_i, -clip(K_it, 1 - eps, 1 + eps) A_i)]
                    grpo:  L += eta E_it[k3],  k3 = exp(-d) - 1 + d,  d = log pi(y_it | ...) - log pi_ref(y_it | ...)
   11. metrics      read while the next iteration runs                                           `rewarded`

E_it is the mean over all response tokens of a mini-batch: at K = 1 the gradient of rloo is that of REINFORCE over whole
responses, up to a constant. A response without a score is left out of its group, and a group with fewer than two scored
responses trains nothing. Rows of a kind without a reward have r = 0 and learn from the KL alone. Advantages are not
whitened. The rows of a group may go to different mini-batches. The guards, the anchor, the entropy bonus and everything
else that is not in `config.lrloo` are those of L-PPO (`config.lppo`).
"""

from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp

from icet_jax.algorithms import losses, rewards
from icet_jax.algorithms.advantages import group_advantages
from icet_jax.algorithms.metrics import group_metrics
from icet_jax.algorithms.phases import Rollout
from icet_jax.algorithms.rewarded import Phases, Rewarded, build_phases
from icet_jax.algorithms.rollouts import (
    RowRewards,
    add_options,
    clipped_loss,
    evaluate_rollout,
    kl_factors,
    report_rollout,
)
from icet_jax.algorithms.settings import Settings
from icet_jax.algorithms.state import Controls
from icet_jax.typing import Array, Float

if TYPE_CHECKING:
    from ml_collections import ConfigDict


class GroupBatch(NamedTuple):
    """Holds a rollout and everything else that the update needs and keeps constant; every leaf is row-aligned.

    Attributes:
      prompts, prompt_mask: [B, P], left-padded.
      visual: image features of each row's exit.
      responses: int32 [B, A].
      mask: bool [B, A], the response tokens that are learnt from.
      old_log_probs: float32 [B, A].
      advantages: float32 [B].
      ref_log_probs: float32 [B, A], the reference's log-probs; None for rloo.
      kl_coef: float32 [B], eta of the row's kind; None for rloo.
      anchor_hidden: [B, A, E], final hidden states of the reference at the default exit; None without an anchor.
    """

    prompts: Array
    prompt_mask: Array
    visual: Any
    responses: Array
    mask: Array
    old_log_probs: Array
    advantages: Array
    ref_log_probs: Array | None = None
    kl_coef: Array | None = None
    anchor_hidden: Array | None = None


def build(
    graphdef: Any, settings: Settings, group_size: int, advantage: str, mesh: jax.sharding.Mesh | None = None
) -> Phases:
    """Returns the phases for one model structure; see `rewarded.build_phases`.

    Args:
      graphdef: structure of the network.
      settings: settings that the phases are compiled for.
      group_size: `config.lrloo.group_size`; a rollout of P prompts has group_size * P rows.
      advantage: `config.lrloo.advantage`, "rloo" or "grpo".
      mesh: mesh of the arrays; None on one device.
    """

    def prepare(*arrays: Any, columns: int | None) -> Any:
        return _prepare(graphdef, settings, group_size, advantage, *arrays, columns=columns)

    def loss(*arrays: Any) -> tuple[Array, losses.Stats]:
        return lrloo_loss(graphdef, settings, *arrays)

    cache_key = ("lrloo", advantage)
    return build_phases(graphdef, settings, mesh, prepare, loss, cache_key=cache_key, group_size=group_size)


def _prepare(
    graphdef: Any, settings: Settings, group_size: int, advantage: str, params: Any, trainable: Any,
    controls: Controls, rollout: Rollout, rows: RowRewards, *, columns: int | None,
) -> tuple[GroupBatch, Controls, dict[str, Any]]:  # fmt: skip
    """Runs steps 7 to 9: log-probs, rewards, and each response's advantage over the others of its group.

    `columns` is the number of response columns that are used, see `phases.cut_columns`.

    Returns:
      (batch of the update, controls of the next rollout, metrics).
    """
    # 7. log pi_old and log pi_ref of every token, at the row's exit; r normalised, clipped, less the EOS penalty.
    evaluated = evaluate_rollout(graphdef, settings, params, trainable, controls, rollout, rows, columns)
    cut_rollout, mask = evaluated.rollout, evaluated.mask

    # 8 and 9. R_i and A_i; the KL is a part of the reward (rloo) or a term of the loss (grpo).
    reward, in_loss = evaluated.shaped, advantage == "grpo"
    if not in_loss:
        reward = jnp.sum(rewards.token_rewards(reward, evaluated.kl, mask, kl_coef=controls.kl_coef), axis=1)
    advantages, compared = group_advantages(reward, evaluated.scored, group_size=group_size, scaled=in_loss)
    batch = GroupBatch(
        prompts=cut_rollout.prompts,
        prompt_mask=cut_rollout.prompt_mask,
        visual=cut_rollout.visual,
        responses=cut_rollout.tokens,
        mask=mask & compared[:, None] & evaluated.stable,
        old_log_probs=evaluated.old.log_probs,
        advantages=advantages,
        ref_log_probs=evaluated.ref_log_probs if in_loss else None,
        kl_coef=controls.kl_coef * kl_factors(settings, rows.kinds) if in_loss else None,
        anchor_hidden=evaluated.anchor_hidden,
    )
    after, metrics = report_rollout(graphdef, settings, params, controls, evaluated, rows)
    return batch, after, metrics | group_metrics(evaluated.shaped, advantages, compared, group_size=group_size)


def lrloo_loss(
    graphdef: Any, settings: Settings, params: Any, trainable: dict[str, Any], rows: GroupBatch
) -> tuple[Float[Array, ""], dict[str, Array]]:
    """Returns the loss of step 10, a mean over tokens, with GRPO's KL term if `rows.kl_coef` is set; and statistics."""
    advantages = jnp.broadcast_to(rows.advantages[:, None], rows.mask.shape)
    new, loss, stats = clipped_loss(graphdef, settings, params, trainable, rows, advantages)
    if rows.kl_coef is not None and rows.ref_log_probs is not None:
        kl = rewards.kl_penalty(new.log_probs, rows.ref_log_probs, "k3")
        stats["kl"] = losses.masked_mean(rows.kl_coef[:, None] * kl, rows.mask)
        loss = loss + stats["kl"]
    return add_options(settings, loss, stats, new, rows.mask)


class Lrloo(Rewarded):
    """Runs L-RLOO on the host; `Rewarded` does steps 2 to 6 and 11."""

    @classmethod
    def phases(
        cls, config: "ConfigDict", graphdef: Any, settings: Settings, mesh: jax.sharding.Mesh | None
    ) -> Phases:  # fmt: skip
        """See `Rewarded`."""
        return build(graphdef, settings, config.lrloo.group_size, config.lrloo.advantage, mesh)


ALGORITHM = Lrloo
