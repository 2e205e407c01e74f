"""The families of vision-language models, one folder each; `family` and `family_of` look a family up.

A family's folder contains the modules `network`, `config`, `keys`, `processor` and `reference`. The folder's `FAMILY`
describes the family to the rest of the package. An entry in `icet_jax.config.names` registers the family.
"""

import importlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

from icet_jax.config.names import CAPTURES, FAMILIES
from icet_jax.errors import UserError
from icet_jax.files import JsonObject

if TYPE_CHECKING:
    from icet_jax.models.base.family import Family
    from icet_jax.nn.protocols import NetworkConfig

_IGNORED_VALUES = {"capture": CAPTURES[0]}
"""{exit option: default}. `config.model` has these options for all families, so a family without an option accepts its
default and ignores it."""


def family(model_type: object, where: str = "config.json") -> "Family":
    """Returns the family of a `config.json`'s `model_type`.

    Args:
      model_type: value in the file.
      where: name of the file in error messages.

    Raises:
      UserError: the model type is not a supported vision-language model.
    """
    if model_type not in FAMILIES:
        from icet_jax.checkpoints.hf_config import SUPPORTED

        choices = ", ".join(f"{name} ({entry.title})" for name, entry in FAMILIES.items())
        reason = f" is a {SUPPORTED[model_type]}" if model_type in SUPPORTED else " is not supported"
        raise UserError(
            f"{where}: model_type '{model_type}'{reason}; a vision-language model is needed here: {choices}"
        )
    return importlib.import_module(FAMILIES[model_type].module).FAMILY


def family_of(config: "NetworkConfig") -> "Family":
    """Returns the family that a network's config belongs to."""
    return family(config.model_type)


def checkpoint_config(directory: Path, values: JsonObject, **options: str | None) -> Any:
    """Returns the network's config for a checkpoint directory.

    Args:
      directory: directory of the checkpoint.
      values: its parsed `config.json`.
      options: see `vlm_config`.

    Raises:
      UserError: see `vlm_config`.
    """
    config = vlm_config(values, str(directory / "config.json"), **options)
    return family_of(config).with_files(config, directory)


def vlm_config(values: JsonObject, where: str = "config.json", **options: str | None) -> Any:
    """Returns the network's config for a checkpoint's `config.json`, whose `model_type` determines the family.

    Args:
      values: the parsed `config.json`.
      where: name of the file in error messages.
      options: {name in `Family.exit_options`: value}, which choose the definition of an exit; None chooses the default.

    Raises:
      UserError: the model or a value in the file is not supported; or the family has no such option or value.
    """
    model_family = family(values.get("model_type"), where)
    settings = {}
    for name, value in options.items():
        choices = model_family.exit_options.get(name, ())
        if value is None or (not choices and value == _IGNORED_VALUES.get(name)):
            continue
        if not choices:
            title = FAMILIES[model_family.name].title
            raise UserError(f"{where}: {title} has one kind of exit; leave out the {name} {value}")
        if value not in choices:
            raise UserError(f"{name}={value!r}: give one of {', '.join(choices)}")
        settings[name] = value
    return model_family.config_from_hf(values, where, **settings)
