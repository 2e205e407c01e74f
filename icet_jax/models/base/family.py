"""The description of a family of vision-language models, through which the rest of the package uses it."""

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from icet_jax.checkpoints.tables import Table
from icet_jax.files import JsonObject
from icet_jax.models.base.encoder_work import EncoderWork
from icet_jax.models.base.image_batches import ImageParts
from icet_jax.models.base.processor import Processor
from icet_jax.models.base.reference import Reference


@dataclasses.dataclass(frozen=True)
class Family:
    """Describes one family of vision-language models, in which *config* means the network's config.

    Attributes:
      name: `model_type` in `config.json`.
      config_from_hf: function of (parsed `config.json`, its name in error messages, **options) that returns the config;
        the options are keys of `exit_options`.
      config_to_hf: function of (config, parsed `config.json` of the source or None, torch's name of the weights' dtype)
        that returns the `config.json` to write.
      network: class of the network; its first argument is the config.
      table: function of the config that returns the key table.
      image_shape: function of (config, largest number of an image's positions in the prompt) that returns the shape of
        one image in `Images.pixels`. Families whose images all have one shape ignore the number.
      image_parts: function of (config, outputs of the processor, input_ids [B, T]) that returns the `ImageParts`.
      processor: class of the family's processor.
      reference: how to run the family's models in transformers, for `--mode=verify`.
      config_at_exit: function of (config, exit, name of the argument in error messages) that returns the config of the
        model whose image encoder ends at that exit. Raises a `UserError` if there is no such exit, or if HF's files of
        the family cannot describe such a model.
      encoder_work: function of (config, exit, length of the prompt in positions) that returns the `EncoderWork` of one
        image if only that exit is used. Families whose images all have one shape ignore the length; in the others 0
        means the largest image.
      decoder_paths: paths of the decoder in transformers' model: the one that begins the keys in `table`, then those of
        other versions of transformers.
      with_files: function of (config, directory of the checkpoint) that returns the config with what other files than
        config.json determine, such as the number of tiles of an image.
      exit_options: {option: possible values, the default first} that choose between definitions of an exit; empty if
        the family has one definition.
    """

    name: str
    config_from_hf: Callable[..., Any]
    config_to_hf: Callable[[Any, JsonObject | None, str], JsonObject]
    network: Callable[..., Any]
    table: Callable[[Any], Table]
    image_shape: Callable[[Any, int], tuple[int, ...]]
    image_parts: Callable[[Any, Mapping[str, Any], Any], ImageParts]
    processor: type[Processor]
    reference: Reference
    config_at_exit: Callable[[Any, int, str], Any]
    encoder_work: Callable[[Any, int, int], EncoderWork]
    decoder_paths: tuple[str, ...] = ("language_model.model", "model.language_model")
    with_files: Callable[[Any, Path], Any] = lambda config, directory: config
    exit_options: Mapping[str, tuple[str, ...]] = dataclasses.field(default_factory=dict)
