"""The ablation a reviewer asks for: supervised refusals at sampled exits, on the organism and its data."""

from icet_jax import config as icet_config


def get_config(variant: str = "") -> icet_config.ConfigDict:
    """`:default_exit` fine-tunes at the default exit alone; `:per_example` and `:stratified` as in L-PPO."""
    icet_config.choose_variant(variant, ("default_exit", "per_example", "stratified"))
    config = icet_config.organism()
    config.algorithm = "lsft"
    if variant:
        config.lsft.exits = "fixed" if variant == "default_exit" else variant
    return config
