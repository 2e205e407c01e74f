"""Key table of SmolVLM and Idefics3 (HF `SmolVLMForConditionalGeneration`), the same for all transformers versions."""

from icet_jax.checkpoints.tables import LINEAR_KERNEL, Table, llama_entries, renaming, siglip_entries, single
from icet_jax.models.smolvlm.network import SmolVLMConfig

DECODER_PATH = "model.text_model"
"""Path of the decoder in transformers' module, which begins the keys of its tensors."""


def smolvlm_table(config: SmolVLMConfig) -> Table:
    """Returns the key table, 489 tensors at 500M."""
    connector = single((("model.connector.modality_projection.proj", "projector"),), LINEAR_KERNEL)
    return Table(
        (
            *siglip_entries(config.vision, "model.vision_model", "vision_tower"),
            *connector,
            *llama_entries(config.text, DECODER_PATH, "language_model", "lm_head.weight"),
        ),
        renaming(),
    )
