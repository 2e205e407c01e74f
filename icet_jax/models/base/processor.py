"""Converts prompts and images to the arrays that a model takes, and generated tokens back to text, without torch.

The tokenizer is transformers' (`AutoTokenizer`). The image processor is transformers' Pillow version, whose pixels do
not depend on which other packages are installed. Arrays have the names and shapes of the family's HF processor.
"""

import os
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
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
from icet_jax.media.tokenizer import PlainText, Tokenizer, load_tokenizer
from icet_jax.models import checkpoint_config, family_of
from icet_jax.models.base.image_batches import batch_images
from icet_jax.nn.protocols import Images

RowImages: TypeAlias = ImageLike | Sequence[ImageLike] | None
"""The images of one prompt: an image, a list of images, or None."""

Inputs: TypeAlias = dict[str, np.ndarray]
"""{name: array} that a processor returns, see `Processor.__call__`."""

SETTINGS_FILE = "preprocessor_config.json"


class Processor(ABC):
    """Turns prompts and images into the model's input arrays, and responses into text.

    For the inputs it applies the chat template, opens and normalises images, tokenises and pads.

    Attributes:
      tokenizer: transformers' tokenizer, padding on the left.
      image_processor: transformers' Pillow image processor.
      config: config of the network that the inputs are for.
      template: function of (prompt, number of images) that returns the text with one placeholder for each image.
      plain: keeps prompts free of special tokens.
      placeholder: text that stands for an image.
      on_vicuna: whether checkpoints of the family use Vicuna, whose chat templates are in `NAMED_TEMPLATES`.
    """

    placeholder = IMAGE_TOKEN
    on_vicuna = False

    def __init__(self, tokenizer: Tokenizer, image_processor: Any, config: Any, template: Template) -> None:
        """Checks that tokenizer and image processor fit the model.

        Raises:
          UserError: the tokenizer's id of the image placeholder is not the model's, or images would get another shape
            than the model needs.
        """
        self.tokenizer = tokenizer
        self.plain = PlainText(tokenizer)
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
          images: for each prompt an image, a list of images (see `open_image`), or None.
          prompts: raw prompts, to which the chat template and the image placeholders are added. What spells a special
            token stays text, see `PlainText`.
          pad_to: length T of every row; the length of the longest row if None.

        Returns:
          input_ids and attention_mask int64 [B, T], padded on the left. If there are images, also
          LLaVA-1.5: pixel_values float32 [I, C, S, S], all images in row order;
          LLaVA-NeXT: pixel_values [I, tiles, C, S, S], where the first tile is the scaled-down image, and image_sizes
          int64 [I, 2] (height, width);
          Llama 3.2 Vision: pixel_values [B, M, tiles, C, S, S], aspect_ratio_ids int64 [B, M] (0 is no image),
          aspect_ratio_mask [B, M, tiles] and cross_attention_mask [B, T, M, tiles];
          SmolVLM: pixel_values [B, N, C, S, S], the tiles of all images of a row and then zeros, and
          pixel_attention_mask int64 [B, N, S, S], 0 where there is no tile;
          Qwen2.5-VL: pixel_values [patches, C * frames * S * S], the patches of all images in row order, and
          image_grid_thw int64 [I, 3] (frames, rows and columns of patches). Even without images it has
          mm_token_type_ids int64 [B, T], 1 at the positions of images.

        Raises:
          UserError: an image cannot be opened; or a prompt is longer than `pad_to` or than the tokenizer allows, or
            contains the image placeholder. The message names the row.
        """
        rows = self._open_rows(images, prompts)
        texts = [self._expand(i, prompt, row) for i, (prompt, row) in enumerate(zip(prompts, rows, strict=True))]
        inputs = self._tokenize(texts, pad_to)
        return self._with_pixels(inputs, rows) if any(rows) else inputs

    def token_ids(self, images: Sequence[RowImages], prompts: Sequence[str]) -> list[list[int]]:
        """Returns the tokens of each row, image positions included, without decoding images; see `__call__`.

        Raises:
          UserError: a prompt contains the image placeholder; or the number of an image's positions depends on its size,
            and the size cannot be read. The message names the row or the image.
        """
        rows = _as_rows(images, prompts)
        texts = [self._expand(i, prompt, row) for i, (prompt, row) in enumerate(zip(prompts, rows, strict=True))]
        return self._ids(texts)

    def misfit(self, ids: Sequence[int] | np.ndarray) -> str | None:
        """Returns a message if a row of `token_ids` is longer than the tokenizer allows, otherwise None."""
        count = int(np.count_nonzero(np.asarray(ids) != self.config.image_token_index))
        return beyond_tokens(count, max_tokens(self.tokenizer))

    def batch_images(self, inputs: Inputs, *, num_rows: int, per_row: int | None = None) -> Images | None:
        """Returns the images of a batch for the network, see `icet_jax.models.base.image_batches.batch_images`."""
        return batch_images(self.config, inputs, num_rows=num_rows, per_row=per_row)

    def decode(self, tokens: np.ndarray, mask: np.ndarray) -> list[str]:
        """Returns the texts of B responses, without special tokens.

        Args:
          tokens: token ids [B, A].
          mask: True at the tokens of the responses [B, A].
        """
        rows = zip(np.asarray(tokens), np.asarray(mask, dtype=bool), strict=True)
        return [self.tokenizer.decode(row[keep].tolist(), skip_special_tokens=True) for row, keep in rows]

    @classmethod
    @abstractmethod
    def published_template(cls, values: JsonObject) -> Template:
        """Returns the chat template with which the family was published; `values` is the config.json."""

    @classmethod
    @abstractmethod
    def image_processors(cls) -> JsonObject:
        """Returns {name in checkpoint files: HF's class}; the first one is used if a file names none."""

    @abstractmethod
    def _check_image_processor(self) -> None:
        """Raises a `UserError` if images would get another shape than the model needs."""

    @abstractmethod
    def _image_tokens(self, image: ImageLike, name: str) -> int:
        """Returns the number of positions of an image in the prompt; `name` names the image in error messages."""

    def _image_text(self, image: ImageLike, name: str) -> str:
        """Returns the text that stands for an image in the prompt, with a placeholder for each of its positions."""
        return self.placeholder * self._image_tokens(image, name)

    @abstractmethod
    def _with_pixels(self, inputs: Inputs, rows: list[list[Image]]) -> Inputs:
        """Returns `inputs` together with the image processor's arrays for the images of all rows, at least one."""

    def _expand(self, row: int, prompt: str, images: Sequence[ImageLike]) -> str:
        """Returns the prompt in its chat template, with one placeholder for each position of its images.

        `row` is the index of the prompt, for error messages.
        """
        if self.placeholder in prompt:
            raise UserError(f"row {row}: the prompt holds '{self.placeholder}', which is put there for you; remove it")
        first, *rest = self.template(self.plain(prompt), len(images)).split(self.placeholder)
        expanded = [
            self._image_text(image, f"row {row} image {number}") + text
            for number, (image, text) in enumerate(zip(images, rest, strict=True))
        ]
        return "".join([first, *expanded])

    def _ids(self, texts: list[str]) -> list[list[int]]:
        """Returns the token ids of each text; the tokenizer adds a BOS only if the template has not added one."""
        bos = self.tokenizer.bos_token
        needs_bos = [bos is None or not text.startswith(bos) for text in texts]
        pairs = zip(texts, needs_bos, strict=True)
        # verbose=False: `misfit` reports texts that are too long, so the tokenizer need not warn.
        return [self.tokenizer(text, add_special_tokens=add, verbose=False)["input_ids"] for text, add in pairs]

    def _tokenize(self, texts: list[str], pad_to: int | None) -> Inputs:
        """Returns input_ids and attention_mask of the texts, padded on the left; see `__call__`."""
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
        """Returns the opened images of each prompt; see `__call__`."""
        rows = _as_rows(images, prompts)
        return [[_open(image, f"row {i} image {j}") for j, image in enumerate(row)] for i, row in enumerate(rows)]


def load_processor(directory: str | Path, config: Any = None, template: str | None = None) -> Processor:
    """Loads the processor of a checkpoint from its tokenizer, image-processor and config files, without weights.

    Args:
      directory: directory of the checkpoint.
      config: config of the network; read from the directory's config.json if None.
      template: a name in `NAMED_TEMPLATES`; None means the checkpoint's own template, or the published one of its
        family if the checkpoint has none.

    Raises:
      UserError: files are missing, unreadable or do not fit the model's config; or the template belongs to another
        language model.
    """
    directory = Path(directory)
    values = read_hf_config(directory)
    if config is None:
        config = checkpoint_config(directory, values)
    processor_class, tokenizer = family_of(config).processor, load_tokenizer(directory)
    image_processor = _load_image_processor(directory, processor_class.image_processors())
    if template is not None:
        prompt_template = _named_template(template, processor_class, values)
    else:
        checkpoint_template = own_template(directory, tokenizer, processor_class.placeholder)
        prompt_template = checkpoint_template or processor_class.published_template(values)
    return processor_class(tokenizer, image_processor, config, prompt_template)


def _named_template(name: str, processor_class: type[Processor], values: JsonObject) -> Template:
    """Returns the template in `NAMED_TEMPLATES` with this name, for the model of a config.json.

    Raises:
      UserError: there is no such template, or the model is not a LLaVA on Vicuna.
    """
    if name not in NAMED_TEMPLATES:
        raise UserError(f"config.data.template={name}: unknown; choose {' or '.join(NAMED_TEMPLATES)}")
    backbone = backbone_of(values)
    if not processor_class.on_vicuna or backbone != "llama":
        raise UserError(
            f"config.data.template={name}: is for LLaVA on Vicuna; this model is {values['model_type']} on {backbone}: "
            "leave the field unset"
        )
    return NAMED_TEMPLATES[name]


def backbone_of(values: JsonObject) -> str:
    """Returns the `model_type` of the decoder that a config.json names, "llama" if it names none."""
    return (values.get("text_config") or {}).get("model_type", "llama")


def template_of_backbone(values: JsonObject, templates: Mapping[str, Template]) -> Template:
    """Returns the published template for the backbone of a config.json; `templates` is {backbone: template}.

    Raises:
      UserError: the family was not published on this backbone.
    """
    backbone = backbone_of(values)
    if backbone not in templates:
        raise UserError(
            f"{values['model_type']} on {backbone}: the checkpoint has no chat template, and none was published for "
            "this backbone; put the one that the model was trained with into chat_template.json"
        )
    return templates[backbone]


def edges(size: Any) -> tuple[int | None, int | None]:
    """Returns (height, width) from an HF image processor's `size` or `crop_size`, with None where it sets none."""
    shortest = getattr(size, "shortest_edge", None)
    return shortest or getattr(size, "height", None), shortest or getattr(size, "width", None)


def _as_list(entry: RowImages) -> list[ImageLike]:
    """Returns the images of one prompt as a list."""
    if entry is None:
        return []
    if isinstance(entry, (list, tuple)):
        return list(entry)
    return [entry]  # type: ignore[list-item]


def _as_rows(images: Sequence[RowImages], prompts: Sequence[str]) -> list[list[ImageLike]]:
    """Returns the images of each prompt; raises a UserError if there are not as many entries as prompts."""
    if len(images) != len(prompts):
        raise UserError(f"{len(prompts)} prompts but {len(images)} images; give one entry (or None) per prompt")
    return [_as_list(entry) for entry in images]


def image_name(source: ImageLike, name: str) -> str:
    """Returns the name of an image in error messages: its path or stored name, otherwise `name`."""
    if isinstance(source, (str, os.PathLike)):
        return str(source)
    return source.name if isinstance(source, StoredImage) else name


def _open(source: ImageLike, name: str) -> Image:
    """Opens an image that can be resized; `name` is used in error messages if the image has no name."""
    name = image_name(source, name)
    image = open_image(source, name)
    require_resizable(image, name)
    return image


def _load_image_processor(directory: Path, classes: JsonObject) -> Any:
    """Returns transformers' image processor of a checkpoint; `classes` is the result of `Processor.image_processors`.

    Raises:
      UserError: the file of settings is missing or broken, or names a class that is not in `classes`.
    """
    path, settings = _image_settings(directory)
    name = settings.get("image_processor_type") or settings.get("feature_extractor_type") or next(iter(classes))
    image_processor = classes.get(str(name).removesuffix("Pil").removesuffix("Fast"))
    if image_processor is None:
        raise UserError(f"{path}: image_processor_type '{name}' is unknown here; known: {', '.join(classes)}")
    try:
        return image_processor.from_dict(settings)
    except (TypeError, ValueError, AttributeError) as error:
        raise UserError(f"{path}: {error}; copy it from the checkpoint's source") from error


def _image_settings(directory: Path) -> tuple[Path, JsonObject]:
    """Returns (file, the image processor's settings in this file).

    The file is processor_config.json, as transformers 5 writes it, or else the preprocessor_config.json of earlier
    versions, which contains nothing but these settings.
    """
    combined_file = directory / "processor_config.json"
    if combined_file.is_file():
        settings = _read_json(combined_file).get("image_processor")
        if isinstance(settings, dict):
            return combined_file, settings
    path = directory / SETTINGS_FILE
    return path, _read_json(path)


def image_settings(directory: Path) -> JsonObject | None:
    """Returns the settings of a checkpoint's image processor; None if the directory has no readable file of them.

    A model is loaded without such a file, too. `load_processor` says what is wrong with it.
    """
    try:
        return _image_settings(directory)[1]
    except UserError:
        return None


def _read_json(path: Path) -> JsonObject:
    """Returns the object in a JSON file; raises a UserError if the file cannot be read or contains something else."""
    try:
        settings = parse_json(read_text(path))
        if not isinstance(settings, dict):
            raise ValueError("no mapping")
    except FileNotFoundError as error:
        raise UserError(f"{path}: no such file; copy it from the checkpoint's source") from error
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: not a JSON file ({error})") from error
    return settings
