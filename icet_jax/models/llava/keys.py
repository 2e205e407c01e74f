"""Key table of LLaVA-1.5 (HF `LlavaForConditionalGeneration`)."""

from collections.abc import Iterator

from icet_jax.checkpoints.tables import (
    LINEAR,
    LINEAR_KERNEL,
    Table,
    TableEntry,
    clip_entries,
    llama_entries,
    renaming,
    single,
)
from icet_jax.models.llava.network import LlavaConfig

normalise_llava = renaming(
    (r"(model\.)?(language_model\.)?lm_head\.", "language_model.lm_head."),
    (r"(model\.)?language_model\.(model\.)?", "language_model.model."),
    (r"(model\.)?vision_tower\.(vision_model\.)?", "vision_tower.vision_model."),
    (r"(model\.)?multi_modal_projector\.", "multi_modal_projector."),
    (r"(model\.)?image_newline$", "image_newline"),
)
"""Function that takes a tensor's key, as any transformers from 4.46 to 5.x writes it, and returns the key in this
table, or None for a tensor that is not a parameter."""


def llava_table(config: LlavaConfig) -> Table:
    """Returns the key table of LLaVA-1.5, 686 tensors at 7B (HF `LlavaForConditionalGeneration`)."""
    return Table(tuple(llava_entries(config)), normalise_llava)


def llava_entries(config: LlavaConfig) -> Iterator[TableEntry]:
    """Yields the entries (a key in a checkpoint and the parameter it belongs to) of tower, projector and decoder."""
    leaves = LINEAR if config.multimodal_projector_bias else LINEAR_KERNEL
    projector = tuple((f"multi_modal_projector.{name}", f"projector/{name}") for name in ("linear_1", "linear_2"))
    yield from clip_entries(config.vision, "vision_tower.vision_model", "vision_tower")
    yield from single(projector, leaves)
    yield from llama_entries(config.text, "language_model.model", "language_model", "language_model.lm_head.weight")
