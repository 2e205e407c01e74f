"""Processor of SmolVLM and Idefics3 (HF `SmolVLMProcessor`, `Idefics3Processor`)."""

import numpy as np
from PIL.Image import Image

from icet_jax.errors import UserError
from icet_jax.files import JsonObject
from icet_jax.media.images import ImageLike, image_size
from icet_jax.media.templates import Template
from icet_jax.models.base.processor import SETTINGS_FILE, Inputs, Processor, image_name
from icet_jax.models.smolvlm.tiles import longest_edge, tile_grid

_AROUND_IMAGE, _WHOLE_IMAGE = "<fake_token_around_image>", "<global-img>"


class SmolVLMProcessor(Processor):
    """Makes the inputs of SmolVLM: rows of square tiles of each image, then the whole image scaled down to a tile.

    Pixels come from transformers' Pillow image processors, `SmolVLMImageProcessorPil` and `Idefics3ImageProcessorPil`,
    which compute the same.
    """

    @classmethod
    def published_template(cls, values: JsonObject) -> Template:
        """Returns SmolVLM2's template; see `Processor`.

        Raises:
          UserError: the model is an Idefics3, whose checkpoints begin a prompt in different ways.
        """
        if values["model_type"] == "smolvlm":
            return smolvlm_template
        raise UserError(
            f"{values['model_type']}: the checkpoint has no chat template, and its models have different ones; put the "
            "one that the model was trained with into chat_template.json"
        )

    @classmethod
    def image_processors(cls) -> JsonObject:
        """Returns {name: HF's class}; see `Processor`."""
        from transformers.models.idefics3.image_processing_pil_idefics3 import Idefics3ImageProcessorPil
        from transformers.models.smolvlm.image_processing_pil_smolvlm import SmolVLMImageProcessorPil

        return {"SmolVLMImageProcessor": SmolVLMImageProcessorPil, "Idefics3ImageProcessor": Idefics3ImageProcessorPil}

    def _check_image_processor(self) -> None:
        tile, longest = longest_edge(self.image_processor.max_image_size), longest_edge(self.image_processor.size)
        size = self.config.vision.image_size
        if tile != size:
            raise UserError(f"{SETTINGS_FILE}: max_image_size.longest_edge must be {size}, the model's image_size")
        for name in ("do_resize", "do_pad"):
            if not getattr(self.image_processor, name):
                raise UserError(f"{SETTINGS_FILE}: {name} must be true, as in the published models")
        if longest is None:
            raise UserError(f"{SETTINGS_FILE}: size.longest_edge is missing; copy it from the checkpoint's source")
        rows, columns = self._grid((longest, longest))
        if rows * columns + 1 > self.config.max_tiles:
            raise UserError(
                f"{SETTINGS_FILE}: an image is cut into up to {rows * columns + 1} tiles, but the model was loaded for "
                f"{self.config.max_tiles}; load it from the directory with this file"
            )

    def _image_tokens(self, image: ImageLike, name: str) -> int:
        rows, columns = self._grid(image_size(image, image_name(image, name)))
        return (rows * columns + 1) * self.config.image_tokens

    def _image_text(self, image: ImageLike, name: str) -> str:
        rows, columns = self._grid(image_size(image, image_name(image, name)))
        return image_text(rows, columns, self.placeholder * self.config.image_tokens)

    def _grid(self, size: tuple[int, int]) -> tuple[int, int]:
        """Returns the number of (rows, columns) of tiles of an image; (0, 0) if it is one tile only."""
        if not self.image_processor.do_image_splitting:
            return 0, 0
        return tile_grid(size, longest_edge(self.image_processor.size) or 0, self.config.vision.image_size)

    def _with_pixels(self, inputs: Inputs, rows: list[list[Image]]) -> Inputs:
        arrays = self.image_processor(rows, return_tensors="np")
        return inputs | {
            "pixel_values": np.asarray(arrays["pixel_values"], np.float32),
            "pixel_attention_mask": np.asarray(arrays["pixel_attention_mask"], np.int64),
        }


def smolvlm_template(prompt: str, num_images: int) -> str:
    """Formats a prompt for SmolVLM2, with the token that begins a conversation."""
    images = Processor.placeholder * num_images
    return f"<|im_start|>User:{images or ' '}{prompt}<end_of_utterance>\nAssistant:"


def image_text(rows: int, columns: int, tile: str) -> str:
    """Returns the text that stands for an image in the prompt (HF `get_image_prompt_string`).

    Args:
      rows: number of rows of tiles; 0 if the image is one tile only.
      columns: number of columns of tiles.
      tile: the placeholders of one tile.
    """
    lines = [
        "".join(f"{_AROUND_IMAGE}<row_{row}_col_{column}>{tile}" for column in range(1, columns + 1)) + "\n"
        for row in range(1, rows + 1)
    ]
    before = "\n" if rows else ""
    return f"{''.join(lines)}{before}{_AROUND_IMAGE}{_WHOLE_IMAGE}{tile}{_AROUND_IMAGE}"
