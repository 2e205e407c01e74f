"""Processor of LLaVA-NeXT (HF `LlavaNextProcessor`)."""

import numpy as np
from PIL.Image import Image

from icet_jax.errors import UserError
from icet_jax.files import JsonObject
from icet_jax.media.images import ImageLike, image_size
from icet_jax.media.templates import Template, mistral_16, vicuna_16
from icet_jax.models.base.processor import SETTINGS_FILE, Inputs, edges, image_name, template_of_backbone
from icet_jax.models.llava.processor import LlavaProcessor
from icet_jax.models.llava_next.anyres import packing


class LlavaNextProcessor(LlavaProcessor):
    """Makes the inputs of LLaVA-NeXT: each image scaled down, and its tiles (HF `LlavaNextProcessor`)."""

    @classmethod
    def published_template(cls, values: JsonObject) -> Template:
        """Returns the template for Mistral or Vicuna, whichever the model has; see `Processor`."""
        return template_of_backbone(values, {"llama": vicuna_16, "mistral": mistral_16})

    @classmethod
    def image_processors(cls) -> JsonObject:
        """Returns {name: HF's class}; see `Processor`."""
        from transformers.models.llava_next.image_processing_pil_llava_next import LlavaNextImageProcessorPil

        return {"LlavaNextImageProcessor": LlavaNextImageProcessorPil}

    def _check_image_processor(self) -> None:
        super()._check_image_processor()
        pinpoints, expected = self.image_processor.image_grid_pinpoints, [*map(list, self.config.image_grid_pinpoints)]
        if pinpoints != expected:
            raise UserError(f"{SETTINGS_FILE}: image_grid_pinpoints {pinpoints} are not config.json's, {expected}")
        edge = self.config.vision.image_size
        if edges(self.image_processor.size) != (edge, edge):
            raise UserError(f"{SETTINGS_FILE}: size must be {edge}, the model's image_size")

    def _image_tokens(self, image: ImageLike, name: str) -> int:
        return len(packing(image_size(image, image_name(image, name)), self.config))

    def _with_pixels(self, inputs: Inputs, rows: list[list[Image]]) -> Inputs:
        arrays = self.image_processor([image for row in rows for image in row], return_tensors="np")
        sizes = np.asarray(arrays["image_sizes"], np.int64)
        return inputs | {"pixel_values": np.asarray(arrays["pixel_values"], np.float32), "image_sizes": sizes}
