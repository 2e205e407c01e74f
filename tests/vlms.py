"""Models for tests that need no network."""

from typing import Any

from icet_jax.vlm import VLM


def vlm_without_weights(processor: Any, config: Any) -> VLM:
    """A model that can do no more than turn rows into arrays."""
    vlm = object.__new__(VLM)
    vlm.__dict__.update(processor=processor, config=config, mesh=None)
    return vlm
