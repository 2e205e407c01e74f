"""The families of vision-language models, one folder each: `family` and `family_of` find the one that is meant.

A family is a folder with `network`, `config`, `keys`, `processor` and `reference`, whose `FAMILY` says everything about
it, and one line in `icet_jax.config.names`.
"""

import importlib
from typing import TYPE_CHECKING, Any

from icet_jax.config.names import CAPTURES, FAMILIES
from icet_jax.errors import UserError

if TYPE_CHECKING:
    from icet_jax.models.base.family import Family

_DEFAULTS = {"capture": CAPTURES[0]}
"""Options that every config sets, whatever the family."""


def family(model_type: Any, where: str = "config.json") -> "Family":
    """The family of a `config.json`'s `model_type`.

    Args:
      model_type: as the file has it.
      where: the file's name in error lines.

    Raises:
      UserError: it is not a vision-language model that is supported here.
    """
    if model_type not in FAMILIES:
        from icet_jax.checkpoints.hf_config import SUPPORTED

        known = ", ".join(f"{name} ({entry.title})" for name, entry in FAMILIES.items())
        what = f" is a {SUPPORTED[model_type]}" if model_type in SUPPORTED else " is not supported"
        raise UserError(f"{where}: model_type '{model_type}'{what}; a vision-language model is needed here: {known}")
    return importlib.import_module(FAMILIES[model_type].module).FAMILY


def family_of(config: Any) -> "Family":
    """The family of a network's config, which names it (`model_type`)."""
    return family(config.model_type)


def vlm_config(values: dict[str, Any], where: str = "config.json", **options: str | None) -> Any:
    """The network's config.

    Args:
      values: the parsed `config.json`.
      where: its name in error lines.
      options: how exits are read, in families that know several ways (`Family.exit_options`); None is the default.

    Raises:
      UserError: not a supported model, or a value under which the network would differ from this one; an option that
        the family does not have, or a value that the option does not have.
    """
    found = family(values.get("model_type"), where)
    chosen = {}
    for name, value in options.items():
        known = found.exit_options.get(name, ())
        if value is None or (not known and value == _DEFAULTS.get(name)):
            continue
        if not known:
            title = FAMILIES[found.name].title
            raise UserError(f"{where}: {title} has one kind of exit; leave out the {name} {value}")
        if value not in known:
            raise UserError(f"{name}={value!r}: give one of {', '.join(known)}")
        chosen[name] = value
    return found.config_from_hf(values, where, **chosen)
