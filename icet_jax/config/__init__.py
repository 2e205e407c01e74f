"""All settings (`defaults`), the checks of their values (`checks`), and the names that a config may contain (`names`).

Nothing here imports jax. The names in `__all__` are imported on first use, so that `import icet_jax.config.names` loads
no other module.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ml_collections import ConfigDict

    from icet_jax.config import paper
    from icet_jax.config.checks import (
        check,
        check_exits,
        check_names,
        choose_variant,
        did_you_mean,
        flatten,
        group_size,
        require,
        scorer_fields,
        trained_parts,
        unknown_field,
        warm_start_config,
    )
    from icet_jax.config.defaults import FIELDS, OPEN_FIELDS, default
    from icet_jax.config.embedded import organism
    from icet_jax.config.fields import TYPE_NAMES
    from icet_jax.config.names import KINDS

_MODULES = {
    "ml_collections": ("ConfigDict",),
    "icet_jax.config.checks": (
        "check", "check_exits", "check_names", "choose_variant", "did_you_mean", "flatten", "group_size", "require",
        "scorer_fields", "trained_parts", "unknown_field", "warm_start_config",
    ),
    "icet_jax.config.defaults": ("FIELDS", "OPEN_FIELDS", "default"),
    "icet_jax.config.embedded": ("organism",),
    "icet_jax.config.fields": ("TYPE_NAMES",),
    "icet_jax.config.names": ("KINDS",),
}  # fmt: skip
_DEFINED_IN = {name: module for module, names in _MODULES.items() for name in names}

__all__ = [
    "ConfigDict",
    "FIELDS",
    "KINDS",
    "OPEN_FIELDS",
    "TYPE_NAMES",
    "check",
    "check_exits",
    "check_names",
    "choose_variant",
    "default",
    "did_you_mean",
    "flatten",
    "group_size",
    "organism",
    "paper",
    "require",
    "scorer_fields",
    "trained_parts",
    "unknown_field",
    "warm_start_config",
]


def __getattr__(name: str) -> Any:
    """Returns a name of `__all__`, imported on first use (PEP 562)."""
    if name == "paper":
        return importlib.import_module("icet_jax.config.paper")
    if name in _DEFINED_IN:
        return getattr(importlib.import_module(_DEFINED_IN[name]), name)
    raise AttributeError(f"module 'icet_jax.config' has no attribute '{name}'")
