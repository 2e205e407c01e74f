"""Processor of Qwen2.5-VL (HF `Qwen2_5_VLProcessor`)."""

import numpy as np
from PIL.Image import Image

from icet_jax.errors import UserError
from icet_jax.files import JsonObject
from icet_jax.media.images import ImageLike, image_size
from icet_jax.media.templates import QWEN_IMAGE_TOKEN, Template
from icet_jax.models.base.processor import SETTINGS_FILE, Inputs, Processor, image_name
from icet_jax.models.qwen2_5_vl.resize import most_patches, pixel_limits, smart_resize


class QwenProcessor(Processor):
    """Makes the inputs of Qwen2.5-VL: the patches of each image, whose size is a multiple of a group of patches.

    Pixels come from transformers' Pillow image processor, `Qwen2VLImageProcessorPil`.
    """

    placeholder = QWEN_IMAGE_TOKEN

    @classmethod
    def published_template(cls, values: JsonObject) -> Template:
        """Returns the published template; see `Processor`."""
        return qwen_template

    @classmethod
    def image_processors(cls) -> JsonObject:
        """Returns {name: HF's class}; see `Processor`."""
        from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

        # The two names are those of one class, the second one in files of transformers 4.49.
        return dict.fromkeys(("Qwen2VLImageProcessor", "Qwen2_5_VLImageProcessor"), Qwen2VLImageProcessorPil)

    def _check_image_processor(self) -> None:
        vision, settings = self.config.vision, self.image_processor
        expected = (vision.patch_size, vision.temporal_patch_size, vision.spatial_merge_size)
        if (settings.patch_size, settings.temporal_patch_size, settings.merge_size) != expected:
            raise UserError(
                f"{SETTINGS_FILE}: patch_size, temporal_patch_size and merge_size must be {expected}, the model's"
            )
        if not settings.do_resize:
            raise UserError(f"{SETTINGS_FILE}: do_resize must be true, as in the published models")
        limits = pixel_limits(settings.size)
        if limits is None:
            raise UserError(f"{SETTINGS_FILE}: min_pixels and max_pixels must be positive integers")
        if most_patches(vision, limits) > self.config.max_patches:
            raise UserError(
                f"{SETTINGS_FILE}: an image has up to {most_patches(vision, limits)} patches, but the model was loaded "
                f"for {self.config.max_patches}; load it from the directory with this file"
            )
        self.limits = limits

    def _image_tokens(self, image: ImageLike, name: str) -> int:
        name = image_name(image, name)
        factor = self.config.vision.spatial_merge_size * self.config.vision.patch_size
        high, wide = smart_resize(image_size(image, name), factor, *self.limits, name)
        return (high // factor) * (wide // factor)

    def _tokenize(self, texts: list[str], pad_to: int | None) -> Inputs:
        inputs = super()._tokenize(texts, pad_to)
        is_image = inputs["input_ids"] == self.config.image_token_index
        return inputs | {"mm_token_type_ids": is_image.astype(np.int64)}

    def _with_pixels(self, inputs: Inputs, rows: list[list[Image]]) -> Inputs:
        arrays = self.image_processor([image for row in rows for image in row], return_tensors="np")
        return inputs | {
            "pixel_values": np.asarray(arrays["pixel_values"], np.float32),
            "image_grid_thw": np.asarray(arrays["image_grid_thw"], np.int64),
        }


def qwen_template(prompt: str, num_images: int) -> str:
    """Formats a prompt for Qwen2.5-VL, with the published system prompt."""
    images = f"<|vision_start|>{QWEN_IMAGE_TOKEN}<|vision_end|>" * num_images
    return (
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
        f"<|im_start|>user\n{images}{prompt}<|im_end|>\n<|im_start|>assistant\n"
    )
