"""LLaVA-NeXT: LLaVA-1.5 on tiles, for images of any resolution."""

from icet_jax.models.base.family import Family
from icet_jax.models.llava.config import llava_at_exit
from icet_jax.models.llava.network import encoder_work
from icet_jax.models.llava_next.config import llava_next_from_hf, llava_next_to_hf
from icet_jax.models.llava_next.images import image_parts, image_shape
from icet_jax.models.llava_next.keys import llava_next_table
from icet_jax.models.llava_next.network import LlavaNext
from icet_jax.models.llava_next.processor import LlavaNextProcessor
from icet_jax.models.llava_next.reference import REFERENCE

FAMILY = Family(
    name="llava_next",
    config_from_hf=llava_next_from_hf,
    config_to_hf=llava_next_to_hf,
    network=LlavaNext,
    table=llava_next_table,
    image_shape=image_shape,
    image_parts=image_parts,
    processor=LlavaNextProcessor,
    reference=REFERENCE,
    config_at_exit=llava_at_exit,
    encoder_work=encoder_work,
)
