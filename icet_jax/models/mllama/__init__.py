"""Llama 3.2 Vision: a tiled vision tower, a projector and a decoder with cross-attention."""

from icet_jax.config.names import CAPTURES, EXIT_RULES
from icet_jax.models.base.family import Family
from icet_jax.models.mllama.config import mllama_at_exit, mllama_from_hf, mllama_to_hf
from icet_jax.models.mllama.images import image_parts, image_shape
from icet_jax.models.mllama.keys import mllama_table
from icet_jax.models.mllama.network import Mllama, encoder_work
from icet_jax.models.mllama.processor import MllamaProcessor
from icet_jax.models.mllama.reference import REFERENCE

FAMILY = Family(
    name="mllama",
    config_from_hf=mllama_from_hf,
    config_to_hf=mllama_to_hf,
    network=Mllama,
    table=mllama_table,
    image_shape=image_shape,
    image_parts=image_parts,
    processor=MllamaProcessor,
    reference=REFERENCE,
    config_at_exit=mllama_at_exit,
    encoder_work=encoder_work,
    exit_options={"exit_rule": EXIT_RULES, "capture": CAPTURES},
)
