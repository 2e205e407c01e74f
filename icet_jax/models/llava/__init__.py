"""LLaVA-1.5: a CLIP tower, a two-layer projector and a LLaMA decoder."""

from icet_jax.models.base.family import Family
from icet_jax.models.llava.config import llava_at_exit, llava_from_hf, llava_to_hf
from icet_jax.models.llava.images import image_parts, image_shape
from icet_jax.models.llava.keys import llava_table
from icet_jax.models.llava.network import Llava, encoder_work
from icet_jax.models.llava.processor import LlavaProcessor
from icet_jax.models.llava.reference import REFERENCE

FAMILY = Family(
    name="llava",
    config_from_hf=llava_from_hf,
    config_to_hf=llava_to_hf,
    network=Llava,
    table=llava_table,
    image_shape=image_shape,
    image_parts=image_parts,
    processor=LlavaProcessor,
    reference=REFERENCE,
    config_at_exit=llava_at_exit,
    encoder_work=encoder_work,
)
