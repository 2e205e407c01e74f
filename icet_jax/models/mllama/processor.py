"""Processor of Llama 3.2 Vision (HF `MllamaProcessor`)."""

import numpy as np
from PIL.Image import Image

from icet_jax.errors import UserError
from icet_jax.files import JsonObject
from icet_jax.media.images import ImageLike
from icet_jax.media.templates import MLLAMA_IMAGE_TOKEN, Template, llama_32
from icet_jax.models.base.processor import SETTINGS_FILE, Inputs, Processor, edges


class MllamaProcessor(Processor):
    """Makes the inputs of Llama 3.2 Vision: up to four tiles of each image (HF `MllamaProcessor`)."""

    placeholder = MLLAMA_IMAGE_TOKEN

    @classmethod
    def published_template(cls, values: JsonObject) -> Template:
        """Returns Llama 3.2 Vision's template; see `Processor`."""
        return llama_32

    @classmethod
    def image_processors(cls) -> JsonObject:
        """Returns {name: HF's class}; see `Processor`."""
        from transformers.models.mllama.image_processing_pil_mllama import MllamaImageProcessorPil

        return {"MllamaImageProcessor": MllamaImageProcessorPil}

    def _check_image_processor(self) -> None:
        from transformers.models.mllama.image_processing_pil_mllama import get_all_supported_aspect_ratios

        vision, edge = self.config.vision, self.config.vision.image_size
        if edges(self.image_processor.size) != (edge, edge):
            raise UserError(f"{SETTINGS_FILE}: tiles must be {edge} x {edge} pixels, the model's image_size")
        tiles = self.image_processor.max_image_tiles
        if tiles != vision.max_num_tiles:
            raise UserError(f"{SETTINGS_FILE}: max_image_tiles is {tiles}, but config.json's is {vision.max_num_tiles}")
        if tuple(get_all_supported_aspect_ratios(tiles)) != vision.supported_aspect_ratios:
            raise UserError(
                f"config.json: supported_aspect_ratios must be all those of at most {tiles} tiles, in order"
            )

    def _image_tokens(self, image: ImageLike, name: str) -> int:
        return 1

    def _with_pixels(self, inputs: Inputs, rows: list[list[Image]]) -> Inputs:
        outputs = self.image_processor(rows, return_tensors="np")
        arrays = {"pixel_values": np.asarray(outputs["pixel_values"], np.float32)}
        arrays |= {name: np.asarray(outputs[name], np.int64) for name in ("aspect_ratio_ids", "aspect_ratio_mask")}
        mask = cross_attention_mask(inputs["input_ids"], self.config.image_token_index, arrays["aspect_ratio_mask"])
        mask *= (arrays["aspect_ratio_ids"] > 0)[:, None, :, None]
        return inputs | arrays | {"cross_attention_mask": mask}


def cross_attention_mask(input_ids: np.ndarray, image_token: int, tiles: np.ndarray) -> np.ndarray:
    """Returns which tiles each token attends to, int64 [B, T, M, tiles] (HF `get_cross_attention_token_mask`).

    A token attends to the last image before it. If other image placeholders directly precede that image's placeholder,
    the token attends to their images too.

    Args:
      input_ids: token ids [B, T].
      image_token: id of the image placeholder.
      tiles: 1 for each tile that an image has, else 0, int64 [B, M, tiles].
    """
    batch, length = input_ids.shape
    mask = np.zeros((batch, length, *tiles.shape[1:]), np.int64)
    for row, ids in enumerate(input_ids):
        end = after = length
        for image, start in reversed(list(enumerate(np.flatnonzero(ids == image_token)))):
            end = end if start + 1 == after else after
            mask[row, start:end, image] = tiles[row, image]
            after = start
    return mask
