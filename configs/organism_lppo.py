"""The embedded default: L-PPO repairs the small VLM that ships with the package, in minutes on a laptop.

What is planted in that model, and what it can and cannot show, is said in the report. Every setting is in
`icet_jax.config.organism` (and `default` below it); this file holds what the variants change.
"""

from icet_jax import config as icet_config


def get_config(variant: str = "") -> icet_config.ConfigDict:
    """`:default_exit` is PPO at the default exit alone; `:per_batch` and `:per_example` change how exits are drawn."""
    icet_config.choose_variant(variant, ("default_exit", "per_batch", "per_example"))
    config = icet_config.organism()
    if variant:
        config.lppo.exits = "fixed" if variant == "default_exit" else variant
    return config
