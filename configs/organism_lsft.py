"""The ablation a reviewer asks for: supervised refusals at sampled exits, on the organism and its data."""

from icet_jax import config as icet_config


def get_config(variant: str = "") -> icet_config.ConfigDict:
    """`:default_exit` fine-tunes at the default exit alone; `:per_batch` and `:per_example` as in L-PPO."""
    icet_config.choose_variant(variant, ("default_exit", "per_batch", "per_example"))
    config = icet_config.organism()
    config.algorithm = "lsft"
    if variant:
        config.lsft.exits = "fixed" if variant == "default_exit" else variant
    return config
