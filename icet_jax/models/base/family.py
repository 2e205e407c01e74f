"""What a family of vision-language models brings: the one description that the rest of the package goes by."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from icet_jax.checkpoints.tables import Table
from icet_jax.models.base.image_batches import ImageParts
from icet_jax.models.base.processor import Processor
from icet_jax.models.base.reference import Reference


@dataclasses.dataclass(frozen=True)
class Family:
    """One family; each folder of `icet_jax.models` has one as `FAMILY`.

    Attributes:
      name: `model_type` of its `config.json`.
      config_from_hf: (parsed `config.json`, its name in error lines, options) -> the network's config; the options are
        those of `exit_options`.
      config_to_hf: (config, parsed `config.json` of the source or None, torch dtype) -> `config.json`.
      network: class of the network, called with the config.
      table: config -> key table.
      image_shape: config -> shape of one image's pixels.
      image_parts: (config, inputs, input_ids [B, T]) -> pixels, row of each image, and their layout.
      processor: class of its processor.
      reference: transformers' side, for `--mode=verify`.
      exit_options: {option: its values, the default first}, where exits can be read in several ways.
    """

    name: str
    config_from_hf: Callable[..., Any]
    config_to_hf: Callable[[Any, dict[str, Any] | None, str], dict[str, Any]]
    network: Callable[..., Any]
    table: Callable[[Any], Table]
    image_shape: Callable[[Any], tuple[int, ...]]
    image_parts: Callable[[Any, Mapping[str, Any], Any], ImageParts]
    processor: type[Processor]
    reference: Reference
    exit_options: Mapping[str, tuple[str, ...]] = dataclasses.field(default_factory=dict)
