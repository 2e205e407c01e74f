"""The un-planted control: the same small VLM, safety-tuned at the default exit without the replay at early exits.

What the main job finds in `organism_lppo.py` and does not find here was built in.
"""

from icet_jax import config as icet_config


def get_config() -> icet_config.ConfigDict:
    """`organism_lppo.py` on the control's weights."""
    config = icet_config.organism()
    config.model.checkpoint = "organism:control"
    return config
