"""Every setting (`defaults`) and what it may be (`checks`). Nothing here imports jax."""

from ml_collections import ConfigDict

from icet_jax.config import paper
from icet_jax.config.checks import (
    TYPE_NAMES,
    check,
    check_exits,
    check_names,
    choose_variant,
    flatten,
    require,
    scorer_fields,
    unknown_field,
)
from icet_jax.config.defaults import KINDS, OPEN_FIELDS, default, organism

__all__ = [
    "ConfigDict",
    "KINDS",
    "OPEN_FIELDS",
    "TYPE_NAMES",
    "check",
    "check_exits",
    "check_names",
    "choose_variant",
    "default",
    "flatten",
    "organism",
    "paper",
    "require",
    "scorer_fields",
    "unknown_field",
]
