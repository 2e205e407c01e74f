"""The embedded model in LLaVA-NeXT's shape: any-resolution tiles, the same planted hole, repaired by the same L-PPO."""

from icet_jax import config as icet_config


def get_config() -> icet_config.ConfigDict:
    """`organism_lppo.py` on those weights."""
    config = icet_config.organism()
    config.model.checkpoint = "organism:next"
    return config
