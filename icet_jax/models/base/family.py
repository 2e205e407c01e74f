"""The description of a family of vision-language models, through which the rest of the package uses it."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from icet_jax.checkpoints.tables import Table
from icet_jax.files import JsonObject
from icet_jax.models.base.image_batches import ImageParts
from icet_jax.models.base.processor import Processor
from icet_jax.models.base.reference import Reference


@dataclasses.dataclass(frozen=True)
class Family:
    """Describes one family; each folder of `icet_jax.models` has one as `FAMILY`.

    Attributes:
      name: `model_type` of the family's `config.json`.
      config_from_hf: function of (parsed `config.json`, its name in error messages, options) that returns the network's
        config; the options are those of `exit_options`.
      config_to_hf: function of (config, parsed `config.json` of the source or None, torch dtype) that returns the
        `config.json`.
      network: class of the network; its first argument is the config.
      table: function of the config that returns the key table.
      image_shape: function of the config that returns the shape of one image's pixels.
      image_parts: function of (config, inputs, input_ids [B, T]) that returns pixels, row of each image, and their
        layout.
      processor: class of its processor.
      reference: the family in transformers, for `--mode=verify`.
      exit_options: {option: its values, the default first}, for families whose exits can be read in several ways.
    """

    name: str
    config_from_hf: Callable[..., Any]
    config_to_hf: Callable[[Any, JsonObject | None, str], JsonObject]
    network: Callable[..., Any]
    table: Callable[[Any], Table]
    image_shape: Callable[[Any], tuple[int, ...]]
    image_parts: Callable[[Any, Mapping[str, Any], Any], ImageParts]
    processor: type[Processor]
    reference: Reference
    exit_options: Mapping[str, tuple[str, ...]] = dataclasses.field(default_factory=dict)
