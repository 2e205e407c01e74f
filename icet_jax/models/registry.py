"""The families of vision-language models: what a `config.json` says a model is, and how it is made and kept."""

import dataclasses
from collections.abc import Callable
from typing import Any

from icet_jax.checkpoints import hf_config, tables
from icet_jax.checkpoints.tables import Table
from icet_jax.errors import UserError
from icet_jax.models.llava.network import Llava, LlavaConfig
from icet_jax.models.llava_next.network import LlavaNext, LlavaNextConfig
from icet_jax.models.mllama import config as mllama_config
from icet_jax.models.mllama import keys as mllama_tables
from icet_jax.models.mllama.network import Mllama, MllamaConfig
from icet_jax.models.mllama.vision import EXIT_RULES

CAPTURES = mllama_config.CAPTURES


@dataclasses.dataclass(frozen=True)
class Family:
    """One family.

    Attributes:
      name: `model_type` of its `config.json`.
      config: class of its configs; each has `lora_shapes()`.
      from_hf: (parsed file, its name in error lines) -> config; where `has_rules`, also `exit_rule` and `capture`.
      to_hf: (config, parsed file of the source or None, torch dtype) -> `config.json`.
      network: class of the network, called with the config.
      table: config -> key table.
      has_rules: whether its exits can be read in several ways.
    """

    name: str
    config: type
    from_hf: Callable[..., Any]
    to_hf: Callable[[Any, dict[str, Any] | None, str], dict[str, Any]]
    network: Callable[..., Any]
    table: Callable[[Any], Table]
    has_rules: bool = False


_FAMILIES = (
    Family("llava", LlavaConfig, hf_config.llava_from_hf, hf_config.llava_to_hf, Llava, tables.llava_table),
    Family(
        "llava_next", LlavaNextConfig, hf_config.llava_next_from_hf, hf_config.llava_next_to_hf, LlavaNext,
        tables.llava_next_table,
    ),
    Family(
        "mllama", MllamaConfig, mllama_config.mllama_from_hf, mllama_config.mllama_to_hf, Mllama,
        mllama_tables.mllama_table, has_rules=True,
    ),
)  # fmt: skip
FAMILIES = {family.name: family for family in _FAMILIES}
_BY_CONFIG = {family.config: family for family in _FAMILIES}


def family(values: dict[str, Any], where: str = "config.json") -> Family:
    """The family of a parsed `config.json`.

    Args:
      values: the file.
      where: its name in error lines.

    Raises:
      UserError: it is not a vision-language model that is supported here.
    """
    found = str(values.get("model_type"))
    if found not in FAMILIES:
        known = ", ".join(f"{name} ({hf_config.SUPPORTED[name]})" for name in FAMILIES)
        what = f" is a {hf_config.SUPPORTED[found]}" if found in hf_config.SUPPORTED else " is not supported"
        raise UserError(f"{where}: model_type '{found}'{what}; a vision-language model is needed here: {known}")
    return FAMILIES[found]


def family_of(config: Any) -> Family:
    """The family of a network's config."""
    return _BY_CONFIG[type(config)]


def vlm_config(
    values: dict[str, Any], where: str = "config.json", *, exit_rule: str | None = None, capture: str | None = None
) -> Any:
    """The network's config.

    Args:
      values: the parsed `config.json`.
      where: its name in error lines.
      exit_rule: what exit l feeds the projector, in families that can be read in several ways
        (`icet_jax.models.mllama.vision.EXIT_RULES`); None is the family's own way.
      capture: which states the indices of Llama 3.2 Vision's intermediates mean, one of `CAPTURES`; None is "input".

    Raises:
      UserError: not a supported model, or a value under which the network would differ from this one; a rule or a
        capture of another family.
    """
    found = family(values, where)
    for name, given, known in (("exit_rule", exit_rule, EXIT_RULES), ("capture", capture, CAPTURES)):
        if given is not None and given not in known:
            raise UserError(f"{name}={given!r}: give one of {', '.join(known)}")
    if found.has_rules:
        return found.from_hf(values, where, exit_rule=exit_rule or EXIT_RULES[0], capture=capture or CAPTURES[0])
    if exit_rule is not None or capture == CAPTURES[1]:
        given = f"exit_rule {exit_rule}" if exit_rule is not None else f"capture {capture}"
        raise UserError(f"{where}: {hf_config.SUPPORTED[found.name]} has one kind of exit; leave out the {given}")
    return found.from_hf(values, where)
