"""L-PPO: exits, rewards, advantages and losses as functions of arrays, and the jitted phases that use them."""

from icet_jax.algorithms.advantages import gae, whiten
from icet_jax.algorithms.losses import policy_loss, value_loss
from icet_jax.algorithms.rewards import kl_penalty, token_rewards

__all__ = ["gae", "kl_penalty", "policy_loss", "token_rewards", "value_loss", "whiten"]
