"""Key table of LLaVA-1.5 (HF `LlavaForConditionalGeneration`)."""

import re
from collections.abc import Iterator

from icet_jax.checkpoints.tables import LINEAR, Slot, Table, clip_slots, llama_slots, single
from icet_jax.models.llava.network import LlavaConfig

_IGNORED = re.compile(r".*(\.position_ids|rotary_emb\.inv_freq)")
_PREFIXES = tuple(
    (re.compile(pattern), old)
    for pattern, old in (
        (r"(model\.)?(language_model\.)?lm_head\.", "language_model.lm_head."),
        (r"(model\.)?language_model\.(model\.)?", "language_model.model."),
        (r"(model\.)?vision_tower\.(vision_model\.)?", "vision_tower.vision_model."),
        (r"(model\.)?multi_modal_projector\.", "multi_modal_projector."),
        (r"(model\.)?image_newline$", "image_newline"),
    )
)


def normalise_llava(key: str) -> str | None:
    """Returns the old name of a key in any of the layouts that transformers 4.46 to 5.x write; None for buffers."""
    if _IGNORED.fullmatch(key):
        return None
    for pattern, old in _PREFIXES:
        match = pattern.match(key)
        if match:
            return old + key[match.end() :]
    return key


def llava_table(config: LlavaConfig) -> Table:
    """Returns the key table of LLaVA-1.5, 686 tensors at 7B (HF `LlavaForConditionalGeneration`)."""
    return Table(tuple(llava_slots(config)), normalise_llava)


def llava_slots(config: LlavaConfig) -> Iterator[Slot]:
    """Yields the slots of the tower, the projector and the decoder."""
    leaves = LINEAR if config.multimodal_projector_bias else LINEAR[:1]
    projector = tuple((f"multi_modal_projector.{name}", f"projector/{name}") for name in ("linear_1", "linear_2"))
    yield from clip_slots(config.vision, "vision_tower.vision_model", "vision_tower")
    yield from single(projector, leaves)
    yield from llama_slots(config.text, "language_model.model", "language_model", "language_model.lm_head.weight")
