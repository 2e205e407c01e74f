"""icet_jax: measures and repairs the image-encoder early-exit hole of vision-language models.

The package is lazy: `import icet_jax` loads nothing heavy, and `icet_jax.nn` or `icet_jax.algorithms` need only jax,
flax, optax and numpy. The names in `SURFACE` are the public Python API, for notebooks and scripts; the command line
uses the same functions.
"""

from typing import Any

__version__ = "0.2.0"

SURFACE = {
    "load": "runs.loading.load",
    "load_scorer": "runs.loading.load_scorer",
    "VLM": "vlm.VLM",
    "load_config": "runs.config_files.load",
    "load_rows": "runs.sources.load_rows",
    "sweep": "evaluation.sweep.sweep",
    "train": "commands.align.train",
    "verify": "commands.verify.verify",
}
"""{NAME of `icet_jax.NAME`: module in which it is defined}."""


def __getattr__(name: str) -> Any:
    """Resolves `SURFACE` and sub-packages on first use (PEP 562)."""
    import importlib

    if name in SURFACE:
        module, _, attribute = SURFACE[name].rpartition(".")
        return getattr(importlib.import_module(f"icet_jax.{module}"), attribute)
    if name in ("algorithms", "config", "evaluation", "generation", "models", "nn", "scorers"):
        return importlib.import_module(f"icet_jax.{name}")
    raise AttributeError(f"module 'icet_jax' has no attribute '{name}'")


def __dir__() -> list[str]:
    """Returns the names of this module including those of `SURFACE`, for completion."""
    return sorted({*globals(), *SURFACE})
