"""Qwen2.5-VL: a vision transformer for images of any size, a merger, and a Qwen2 decoder with multimodal positions."""

from icet_jax.models.base.family import Family
from icet_jax.models.llava.config import llava_at_exit
from icet_jax.models.qwen2_5_vl.config import qwen_from_hf, qwen_to_hf, with_patches
from icet_jax.models.qwen2_5_vl.images import image_parts, image_shape
from icet_jax.models.qwen2_5_vl.keys import DECODER_PATHS, qwen_table
from icet_jax.models.qwen2_5_vl.network import Qwen25VL, encoder_work
from icet_jax.models.qwen2_5_vl.processor import QwenProcessor
from icet_jax.models.qwen2_5_vl.reference import REFERENCE

FAMILY = Family(
    name="qwen2_5_vl",
    config_from_hf=qwen_from_hf,
    config_to_hf=qwen_to_hf,
    network=Qwen25VL,
    table=qwen_table,
    image_shape=image_shape,
    image_parts=image_parts,
    processor=QwenProcessor,
    reference=REFERENCE,
    config_at_exit=llava_at_exit,
    encoder_work=encoder_work,
    decoder_paths=DECODER_PATHS,
    with_files=with_patches,
)
