"""Text and images to a model's inputs and back, over the files of a checkpoint directory, without torch.

The tokenizer is transformers' (`AutoTokenizer`), and so is the image processor (the Pillow one, whose pixels do not
depend on what else is installed). Arrays carry the names and shapes of HF's `LlavaProcessor`.
"""

import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np

from icet_jax.checkpoints.hf_config import llava_from_hf, read_hf_config
from icet_jax.data.images import ImageLike, StoredImage, open_image, require_resizable
from icet_jax.data.templates import IMAGE_TOKEN, llava_15
from icet_jax.data.tokenizer import load_tokenizer
from icet_jax.errors import UserError
from icet_jax.models.llava import LlavaConfig

RowImages: TypeAlias = ImageLike | Sequence[ImageLike] | None
Inputs: TypeAlias = dict[str, np.ndarray]


class Processor:
    """Applies the chat template, opens and normalises images, tokenises, pads; and turns responses into text.

    Attributes:
      tokenizer: transformers' tokenizer, padding on the left.
      image_processor: transformers' Pillow image processor.
      config: of the model the inputs are for.
    """

    def __init__(
        self,
        tokenizer: Any,
        image_processor: Any,
        config: LlavaConfig,
        template: Callable[[str, int], str] = llava_15,
    ) -> None:
        """Checks that tokenizer and image processor fit the model.

        Raises:
          UserError: the image placeholder has another id, or images are cropped to another size than the model's.
        """
        self.tokenizer = tokenizer
        self.image_processor = image_processor
        self.config = config
        self.template = template
        self.tokenizer.padding_side = "left"
        if tokenizer.pad_token is None:
            self.tokenizer.pad_token = tokenizer.eos_token
        image_id = tokenizer.convert_tokens_to_ids(IMAGE_TOKEN)
        if image_id != config.image_token_index:
            raise UserError(
                f"tokenizer: '{IMAGE_TOKEN}' has id {image_id}, but config.json has image_token_index "
                f"{config.image_token_index}; take both from the same checkpoint"
            )
        crop, size = image_processor.crop_size, config.vision.image_size
        if not image_processor.do_center_crop or (crop["height"], crop["width"]) != (size, size):
            raise UserError(
                f"preprocessor_config.json: images must be cropped to {size} x {size}, the model's image_size"
            )

    @classmethod
    def from_directory(cls, directory: str | Path) -> "Processor":
        """Reads the tokenizer, image-processor and config files of a checkpoint; the weights may be elsewhere.

        Raises:
          UserError: files are missing, unreadable, or do not fit the model's config.
        """
        directory = Path(directory)
        config = llava_from_hf(read_hf_config(directory), str(directory / "config.json"))
        tokenizer = load_tokenizer(directory)
        image_processor = _load_image_processor(directory / "preprocessor_config.json")
        return cls(tokenizer, image_processor, config)

    def __call__(self, images: Sequence[RowImages], prompts: Sequence[str], *, pad_to: int | None = None) -> Inputs:
        """The model's inputs for prompts and their images.

        Args:
          images: for each prompt None, an image, or a list of images (see `open_image`).
          prompts: raw prompts; the chat template and the image placeholders are put around them here.
          pad_to: length T of every row; the longest row's if None.

        Returns:
          input_ids and attention_mask int64 [B, T], padded on the left; pixel_values float32 [I, 3, S, S], all images
          in row order, absent where no row has one.

        Raises:
          UserError: names the row whose image cannot be opened, whose prompt is too long for `pad_to`, or whose prompt
            holds the image placeholder.
        """
        if len(images) != len(prompts):
            raise UserError(f"{len(prompts)} prompts but {len(images)} images; give one entry (or None) per prompt")
        rows = [_as_list(entry) for entry in images]
        texts = [self._text(i, prompt, len(row)) for i, (prompt, row) in enumerate(zip(prompts, rows, strict=True))]
        inputs = self._tokenize(texts, pad_to)
        opened = [self._open(image, f"row {i} image {j}") for i, row in enumerate(rows) for j, image in enumerate(row)]
        if opened:
            processed = self.image_processor(opened, return_tensors="np")
            inputs["pixel_values"] = np.asarray(processed["pixel_values"], dtype=np.float32)
        return inputs

    def decode(self, tokens: np.ndarray, mask: np.ndarray) -> list[str]:
        """Texts of responses Int[B, A] where mask Bool[B, A] is True; special tokens are left out."""
        rows = zip(np.asarray(tokens), np.asarray(mask, dtype=bool), strict=True)
        return [self.tokenizer.decode(row[keep].tolist(), skip_special_tokens=True) for row, keep in rows]

    def _text(self, row: int, prompt: str, num_images: int) -> str:
        if IMAGE_TOKEN in prompt:
            raise UserError(f"row {row}: the prompt holds '{IMAGE_TOKEN}', which is put there for you; remove it")
        text = self.template(prompt, num_images)
        return text.replace(IMAGE_TOKEN, IMAGE_TOKEN * self.config.image_tokens)

    def _tokenize(self, texts: list[str], pad_to: int | None) -> Inputs:
        encoded = [self.tokenizer(text)["input_ids"] for text in texts]
        lengths = [len(ids) for ids in encoded]
        length = max(lengths, default=0) if pad_to is None else pad_to
        for row, needed in enumerate(lengths):
            if needed > length:
                raise UserError(
                    f"row {row}: the prompt takes {needed} tokens, images included, but the bucket holds {length}"
                )
        input_ids = np.full((len(texts), length), self.tokenizer.pad_token_id, dtype=np.int64)
        attention_mask = np.zeros_like(input_ids)
        for row, ids in enumerate(encoded):
            input_ids[row, length - len(ids) :] = ids
            attention_mask[row, length - len(ids) :] = 1
        return {"input_ids": input_ids, "attention_mask": attention_mask}

    def _open(self, source: ImageLike, name: str) -> Any:
        if isinstance(source, (str, os.PathLike)):
            name = str(source)
        elif isinstance(source, StoredImage):
            name = source.name
        image = open_image(source, name)
        require_resizable(image, name)
        return image


def image_rows(input_ids: np.ndarray, num_images: int, config: LlavaConfig) -> np.ndarray:
    """The row of each image, int32 [I] ascending, from the placeholders in input_ids [B, T].

    Raises:
      UserError: a row's placeholders are no whole number of images, or the images are too few or too many.
    """
    counts, rest = np.divmod((input_ids == config.image_token_index).sum(axis=1), config.image_tokens)
    if rest.any():
        raise UserError(
            f"input_ids: row {int(rest.argmax())} holds no whole number of images (each {config.image_tokens} tokens)"
        )
    if counts.sum() != num_images:
        raise UserError(f"input_ids hold placeholders for {counts.sum()} images, pixel_values hold {num_images}")
    return np.repeat(np.arange(len(counts), dtype=np.int32), counts)


def _as_list(entry: RowImages) -> list[ImageLike]:
    if entry is None:
        return []
    if isinstance(entry, (list, tuple)):
        return list(entry)
    return [entry]  # type: ignore[list-item]


def _load_image_processor(path: Path) -> Any:
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
    from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil

    try:
        settings = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise UserError(f"{path}: no such file; copy it from the checkpoint's source") from error
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: not a JSON file ({error})") from error
    kinds = {
        "CLIPImageProcessor": CLIPImageProcessorPil,
        "CLIPFeatureExtractor": CLIPImageProcessorPil,
        "LlavaImageProcessor": LlavaImageProcessorPil,
    }
    named = settings.get("image_processor_type") or settings.get("feature_extractor_type") or "CLIPImageProcessor"
    kind = kinds.get(named.removesuffix("Pil").removesuffix("Fast"))
    if kind is None:
        raise UserError(f"{path}: image_processor_type '{named}' is unknown; known: {', '.join(kinds)}")
    return kind.from_dict(settings)
