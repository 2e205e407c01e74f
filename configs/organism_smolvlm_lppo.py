"""The embedded model in SmolVLM's shape: SigLIP tower, pixel shuffle, exits up to the last block; the same L-PPO."""

from icet_jax import config as icet_config


def get_config() -> icet_config.ConfigDict:
    """`organism_lppo.py` on those weights."""
    config = icet_config.organism()
    config.model.checkpoint = "organism:smolvlm"
    return config
