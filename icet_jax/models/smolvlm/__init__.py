"""SmolVLM, SmolVLM2 and Idefics3: a SigLIP tower, a pixel shuffle with one projection, and a Llama decoder."""

from icet_jax.models.base.family import Family
from icet_jax.models.llava.config import llava_at_exit
from icet_jax.models.smolvlm.config import smolvlm_from_hf, smolvlm_to_hf, with_tiles
from icet_jax.models.smolvlm.images import image_parts, image_shape
from icet_jax.models.smolvlm.keys import DECODER_PATH, smolvlm_table
from icet_jax.models.smolvlm.network import SmolVLM, encoder_work
from icet_jax.models.smolvlm.processor import SmolVLMProcessor
from icet_jax.models.smolvlm.reference import REFERENCE

FAMILY = Family(
    name="smolvlm",
    config_from_hf=smolvlm_from_hf,
    config_to_hf=smolvlm_to_hf,
    network=SmolVLM,
    table=smolvlm_table,
    image_shape=image_shape,
    image_parts=image_parts,
    processor=SmolVLMProcessor,
    reference=REFERENCE,
    config_at_exit=llava_at_exit,
    encoder_work=encoder_work,
    decoder_paths=(DECODER_PATH,),
    with_files=with_tiles,
)
