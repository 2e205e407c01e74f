"""icet_jax: measures and repairs the image-encoder early-exit hole of vision-language models.

The package is lazy: `import icet_jax` loads nothing heavy, and `icet_jax.models` or `icet_jax.lppo` need only jax,
flax, optax and numpy. `icet_jax.load` and `icet_jax.load_scorer` are the Python surface.
"""

from typing import Any

__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    """Resolves `icet_jax.load`, `icet_jax.load_scorer` and sub-packages on first use (PEP 562)."""
    import importlib

    if name in ("load", "load_scorer", "VLM"):
        return getattr(importlib.import_module("icet_jax.api"), name)
    if name in ("lppo", "models", "api", "config", "evaluation", "generation", "judges"):
        return importlib.import_module(f"icet_jax.{name}")
    raise AttributeError(f"module 'icet_jax' has no attribute '{name}'")
