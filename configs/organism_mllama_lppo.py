"""The embedded model in Llama 3.2 Vision's shape: tiled tower, cross-attention, exits by rule E1; the same L-PPO."""

from icet_jax import config as icet_config


def get_config() -> icet_config.ConfigDict:
    """`organism_lppo.py` on those weights."""
    config = icet_config.organism()
    config.model.checkpoint = "organism:mllama"
    return config
