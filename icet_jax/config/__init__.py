"""Every setting (`defaults`), what it may be (`checks`) and the names that a config may contain (`names`).

Nothing here imports jax, and `names` needs nothing at all: the package's own names are imported on first use.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
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
    from icet_jax.config.defaults import default, organism
    from icet_jax.config.names import KINDS, OPEN_FIELDS

_MODULES = {
    "ml_collections": ("ConfigDict",),
    "icet_jax.config.checks": (
        "TYPE_NAMES", "check", "check_exits", "check_names", "choose_variant", "flatten", "require", "scorer_fields",
        "unknown_field",
    ),
    "icet_jax.config.defaults": ("default", "organism"),
    "icet_jax.config.names": ("KINDS", "OPEN_FIELDS"),
}  # fmt: skip
_DEFINED_IN = {name: module for module, names in _MODULES.items() for name in names}

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


def __getattr__(name: str) -> Any:
    """Imports what is asked for (PEP 562)."""
    if name == "paper":
        return importlib.import_module("icet_jax.config.paper")
    if name in _DEFINED_IN:
        return getattr(importlib.import_module(_DEFINED_IN[name]), name)
    raise AttributeError(f"module 'icet_jax.config' has no attribute '{name}'")
