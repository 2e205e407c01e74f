"""L-DPO on the organism: the default exit's refusals preferred to what other exits say, on the organism's data."""

from icet_jax import config as icet_config


def get_config(variant: str = "") -> icet_config.ConfigDict:
    """There are no variants."""
    icet_config.choose_variant(variant, ())
    config = icet_config.organism()
    config.algorithm = "ldpo"
    return config
