"""Without a critic: four answers of each prompt and exit are compared with each other, on the organism and its data."""

from icet_jax import config as icet_config


def get_config(variant: str = "") -> icet_config.ConfigDict:
    """The default is the leave-one-out mean (RLOO); `:grpo` divides by the group's spread, with the KL in the loss."""
    icet_config.choose_variant(variant, ("grpo",))
    config = icet_config.organism()
    config.algorithm = "lrloo"
    config.lrloo.advantage = variant or "rloo"
    return config
