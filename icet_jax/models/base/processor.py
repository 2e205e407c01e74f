"""Converts text and images to a model's inputs and responses back to text, using a checkpoint's files, without torch.

The tokenizer is transformers' (`AutoTokenizer`). The image processor is transformers' Pillow version, whose pixels do
not depend on what else is installed. Arrays have the names and shapes of the family's HF processor.
"""

import os
from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
from PIL.Image import Image

from icet_jax.checkpoints.hf_config import read_hf_config
from icet_jax.errors import UserError
from icet_jax.files import JsonObject, parse_json, read_text
from icet_jax.media.images import ImageLike, StoredImage, open_image, require_resizable
from icet_jax.media.limits import beyond_tokens, max_tokens
from icet_jax.media.templates import IMAGE_TOKEN, NAMED_TEMPLATES, Template, own_template
from icet_jax.media.tokenizer import Tokenizer, load_tokenizer
from icet_jax.models import family_of, vlm_config
from icet_jax.models.base.image_batches import batch_images
from icet_jax.nn.protocols import Images

RowImages: TypeAlias = ImageLike | Sequence[ImageLike] | None
Inputs: TypeAlias = dict[str, np.ndarray]

SETTINGS_FILE = "preprocessor_config.json"


class Processor(ABC):
    """Applies the chat template, opens and normalises images, tokenises and pads; and converts responses to text.

    Attributes:
      tokenizer: transformers' tokenizer, padding on the left.
      image_processor: transformers' Pillow image processor.
      config: config of the model that the inputs are for.
      template: function of (prompt, number of images) that returns the text with one placeholder for each image.
      placeholder: text that stands for an image.
      on_vicuna: whether the family was published on Vicuna, whose conversation formats are in `NAMED_TEMPLATES`.
    """

    placeholder = IMAGE_TOKEN
    on_vicuna = False

    def __init__(self, tokenizer: Tokenizer, image_processor: Any, config: Any, template: Template) -> None:
        """Checks that tokenizer and image processor fit the model.

        Raises:
          UserError: the image placeholder has another id, or images would get another shape than the model needs.
        """
        self.tokenizer = tokenizer
        self.image_processor = image_processor
        self.config = config
        self.template = template
        self.tokenizer.padding_side = "left"
        if tokenizer.pad_token is None:
            self.tokenizer.pad_token = tokenizer.eos_token
        image_id = tokenizer.convert_tokens_to_ids(self.placeholder)
        if image_id != config.image_token_index:
            raise UserError(
                f"tokenizer: '{self.placeholder}' has id {image_id}, but config.json has image_token_index "
                f"{config.image_token_index}; take both from the same checkpoint"
            )
        self._check_image_processor()

    def __call__(self, images: Sequence[RowImages], prompts: Sequence[str], *, pad_to: int | None = None) -> Inputs:
        """Returns the model's inputs for prompts and their images.

        Args:
          images: for each prompt None, an image, or a list of images (see `open_image`).
          prompts: raw prompts, to which the chat template and the image placeholders are added.
          pad_to: length T of every row; the length of the longest row if None.

        Returns:
          input_ids and attention_mask int64 [B, T], padded on the left; where a row has images also
          LLaVA-1.5: pixel_values float32 [I, C, S, S], all images in row order;
          LLaVA-NeXT: pixel_values [I, tiles, C, S, S], the whole image first, and image_sizes int64 [I, 2] (height,
          width);
          Llama 3.2 Vision: pixel_values [B, M, tiles, C, S, S], aspect_ratio_ids int64 [B, M] (0 is no image),
          aspect_ratio_mask [B, M, tiles] and cross_attention_mask [B, T, M, tiles].

        Raises:
          UserError: the image of a row cannot be opened, its prompt is too long for `pad_to` or the tokenizer, or its
            prompt contains the image placeholder; the message names the row.
        """
        rows = self._open_rows(images, prompts)
        texts = [self._text(i, prompt, row) for i, (prompt, row) in enumerate(zip(prompts, rows, strict=True))]
        inputs = self._tokenize(texts, pad_to)
        return self._with_pixels(inputs, rows) if any(rows) else inputs

    def token_ids(self, images: Sequence[RowImages], prompts: Sequence[str]) -> list[list[int]]:
        """Returns the tokens of each row, image positions included, without decoding images.

        Raises:
          UserError: a prompt contains the image placeholder, or the size of an image is needed and cannot be read; the
            message names the row or the image.
        """
        rows = _as_rows(images, prompts)
        texts = [self._text(i, prompt, row) for i, (prompt, row) in enumerate(zip(prompts, rows, strict=True))]
        return self._ids(texts)

    def misfit(self, ids: Sequence[int] | np.ndarray) -> str | None:
        """Returns why a row of `token_ids` is longer than the tokenizer allows, or None if it is not."""
        count = int(np.count_nonzero(np.asarray(ids) != self.config.image_token_index))
        return beyond_tokens(count, max_tokens(self.tokenizer))

    def batch_images(self, inputs: Inputs, *, num_rows: int, per_row: int | None = None) -> Images | None:
        """Returns the images of a batch for the network, see `icet_jax.models.base.image_batches.batch_images`."""
        return batch_images(self.config, inputs, num_rows=num_rows, per_row=per_row)

    def decode(self, tokens: np.ndarray, mask: np.ndarray) -> list[str]:
        """Returns the texts of responses Int[B, A] at the positions where mask Bool[B, A] is True, without special
        tokens."""
        rows = zip(np.asarray(tokens), np.asarray(mask, dtype=bool), strict=True)
        return [self.tokenizer.decode(row[keep].tolist(), skip_special_tokens=True) for row, keep in rows]

    @classmethod
    @abstractmethod
    def published_template(cls, values: JsonObject) -> Template:
        """Returns the chat template that the family was published with on the backbone of this config.json."""

    @classmethod
    @abstractmethod
    def image_processors(cls) -> JsonObject:
        """Returns HF's classes by the name in checkpoint files; the first is used if a file names none."""

    @abstractmethod
    def _check_image_processor(self) -> None:
        """Raises a `UserError` if images would get another shape than the model needs."""

    @abstractmethod
    def _image_tokens(self, image: ImageLike, name: str) -> int:
        """Returns the number of positions that an image takes in the prompt; the image is read only if its size
        matters."""

    @abstractmethod
    def _with_pixels(self, inputs: Inputs, rows: list[list[Image]]) -> Inputs:
        """Returns `inputs` with the image processor's arrays for the images, of which there is at least one."""

    def _text(self, row: int, prompt: str, images: Sequence[ImageLike]) -> str:
        if self.placeholder in prompt:
            raise UserError(f"row {row}: the prompt holds '{self.placeholder}', which is put there for you; remove it")
        first, *rest = self.template(prompt, len(images)).split(self.placeholder)
        expanded = [
            self.placeholder * self._image_tokens(image, f"row {row} image {number}") + text
            for number, (image, text) in enumerate(zip(images, rest, strict=True))
        ]
        return "".join([first, *expanded])

    def _ids(self, texts: list[str]) -> list[list[int]]:
        """Returns token ids with exactly one BOS: the template's, or the tokenizer's if the template writes none."""
        bos = self.tokenizer.bos_token
        special = [bos is None or not text.startswith(bos) for text in texts]
        pairs = zip(texts, special, strict=True)
        # verbose=False: `misfit` reports texts that are too long, so the tokenizer need not warn.
        return [self.tokenizer(text, add_special_tokens=add, verbose=False)["input_ids"] for text, add in pairs]

    def _tokenize(self, texts: list[str], pad_to: int | None) -> Inputs:
        encoded = self._ids(texts)
        lengths = [len(ids) for ids in encoded]
        length = max(lengths, default=0) if pad_to is None else pad_to
        for row, needed in enumerate(lengths):
            problem = self.misfit(encoded[row])
            if problem is not None:
                raise UserError(f"row {row}: {problem}")
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

    def _open_rows(self, images: Sequence[RowImages], prompts: Sequence[str]) -> list[list[Image]]:
        rows = _as_rows(images, prompts)
        return [[_open(image, f"row {i} image {j}") for j, image in enumerate(row)] for i, row in enumerate(rows)]


def load_processor(directory: str | Path, config: Any = None, template: str | None = None) -> Processor:
    """Loads a processor from the tokenizer, image-processor and config files of a checkpoint; weights are not needed.

    Args:
      directory: directory of the checkpoint.
      config: config of the network; read from the directory's config.json if None.
      template: a name in `NAMED_TEMPLATES`; None means the checkpoint's own template, or else the published one of its
        family.

    Raises:
      UserError: files are missing, unreadable or do not fit the model's config; or the template belongs to another
        backbone.
    """
    directory = Path(directory)
    values = read_hf_config(directory)
    if config is None:
        config = vlm_config(values, str(directory / "config.json"))
    kind, tokenizer = family_of(config).processor, load_tokenizer(directory)
    image_processor = _load_image_processor(directory, kind.image_processors())
    if template is not None:
        chosen = _named_template(template, kind, values)
    else:
        chosen = own_template(directory, tokenizer, kind.placeholder) or kind.published_template(values)
    return kind(tokenizer, image_processor, config, chosen)


def _named_template(name: str, kind: type[Processor], values: JsonObject) -> Template:
    """Returns the template called `name` if it fits the model of this config.json.

    Raises:
      UserError: there is no such template, or the model's backbone was trained on another conversation format.
    """
    if name not in NAMED_TEMPLATES:
        raise UserError(f"config.data.template={name}: unknown; choose {' or '.join(NAMED_TEMPLATES)}")
    backbone = backbone_of(values)
    if not kind.on_vicuna or backbone != "llama":
        raise UserError(
            f"config.data.template={name}: is for LLaVA on Vicuna; this model is {values['model_type']} on {backbone}: "
            "leave the field unset"
        )
    return NAMED_TEMPLATES[name]


def backbone_of(values: JsonObject) -> str:
    """Returns `model_type` of the decoder of a config.json."""
    return (values.get("text_config") or {}).get("model_type", "llama")


def edges(size: Any) -> tuple[int | None, int | None]:
    """Returns height and width of one of HF's size settings; None for an edge that the setting leaves open."""
    shortest = getattr(size, "shortest_edge", None)
    return shortest or getattr(size, "height", None), shortest or getattr(size, "width", None)


def _as_list(entry: RowImages) -> list[ImageLike]:
    if entry is None:
        return []
    if isinstance(entry, (list, tuple)):
        return list(entry)
    return [entry]  # type: ignore[list-item]


def _as_rows(images: Sequence[RowImages], prompts: Sequence[str]) -> list[list[ImageLike]]:
    if len(images) != len(prompts):
        raise UserError(f"{len(prompts)} prompts but {len(images)} images; give one entry (or None) per prompt")
    return [_as_list(entry) for entry in images]


def image_name(source: ImageLike, name: str) -> str:
    """Returns the name of an image in error messages: its own name if it has one, else `name`."""
    if isinstance(source, (str, os.PathLike)):
        return str(source)
    return source.name if isinstance(source, StoredImage) else name


def _open(source: ImageLike, name: str) -> Image:
    name = image_name(source, name)
    image = open_image(source, name)
    require_resizable(image, name)
    return image


def _load_image_processor(directory: Path, kinds: JsonObject) -> Any:
    path, settings = _image_settings(directory)
    name = settings.get("image_processor_type") or settings.get("feature_extractor_type") or next(iter(kinds))
    kind = kinds.get(str(name).removesuffix("Pil").removesuffix("Fast"))
    if kind is None:
        raise UserError(f"{path}: image_processor_type '{name}' is unknown here; known: {', '.join(kinds)}")
    try:
        return kind.from_dict(settings)
    except (TypeError, ValueError, AttributeError) as error:
        raise UserError(f"{path}: {error}; copy it from the checkpoint's source") from error


def _image_settings(directory: Path) -> tuple[Path, JsonObject]:
    """Returns the image processor's settings, from processor_config.json (transformers 5) or from a file of their
    own."""
    whole = directory / "processor_config.json"
    if whole.is_file():
        settings = _read_json(whole).get("image_processor")
        if isinstance(settings, dict):
            return whole, settings
    path = directory / SETTINGS_FILE
    return path, _read_json(path)


def _read_json(path: Path) -> JsonObject:
    try:
        settings = parse_json(read_text(path))
        if not isinstance(settings, dict):
            raise ValueError("no mapping")
    except FileNotFoundError as error:
        raise UserError(f"{path}: no such file; copy it from the checkpoint's source") from error
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: not a JSON file ({error})") from error
    return settings
