"""Processor of LLaVA-1.5 (HF `LlavaProcessor`)."""

import numpy as np
from PIL.Image import Image

from icet_jax.errors import UserError
from icet_jax.files import JsonObject
from icet_jax.media.images import ImageLike
from icet_jax.media.templates import Template, llava_15
from icet_jax.models.base.processor import SETTINGS_FILE, Inputs, Processor, edges, template_of_backbone


class LlavaProcessor(Processor):
    """Makes the inputs of LLaVA-1.5, whose images are resized and cropped to a square (HF `LlavaProcessor`)."""

    on_vicuna = True

    @classmethod
    def published_template(cls, values: JsonObject) -> Template:
        """Returns LLaVA-1.5's template; see `Processor`."""
        return template_of_backbone(values, {"llama": llava_15, "mistral": llava_15})

    @classmethod
    def image_processors(cls) -> JsonObject:
        """Returns {name: HF's class}; see `Processor`."""
        from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
        from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil

        return {
            "CLIPImageProcessor": CLIPImageProcessorPil,
            "CLIPFeatureExtractor": CLIPImageProcessorPil,
            "LlavaImageProcessor": LlavaImageProcessorPil,
        }

    def _check_image_processor(self) -> None:
        size = self.config.vision.image_size
        if not self.image_processor.do_center_crop or edges(self.image_processor.crop_size) != (size, size):
            raise UserError(f"{SETTINGS_FILE}: images must be cropped to {size} x {size}, the model's image_size")

    def _image_tokens(self, image: ImageLike, name: str) -> int:
        return self.config.image_tokens

    def _with_pixels(self, inputs: Inputs, rows: list[list[Image]]) -> Inputs:
        arrays = self.image_processor([image for row in rows for image in row], return_tensors="np")
        return inputs | {"pixel_values": np.asarray(arrays["pixel_values"], np.float32)}
