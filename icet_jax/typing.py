"""Array annotations that carry shapes: `Float[Array, "B T D"]`.

jaxtyping is checked at run time in the tests and is optional everywhere else: where it is not installed the
annotations fall back to `Any`, so that `icet_jax.nn` and `icet_jax.algorithms` need only jax, flax, optax and numpy.
"""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
from jax import Array
from jax.typing import DTypeLike

ArrayLike = Array | np.ndarray
"""Arrays of jax or numpy, for public functions that notebooks may call with numpy: `Float[ArrayLike, "B A"]`."""

Scalar = Any
"""A Python number, or a possibly traced array without axes."""

Adapters = Mapping[str, Mapping[str, Array]]
"""LoRA factors `{"a": ..., "b": ...}` by projection, of one layer or of a stack of layers."""

DType = DTypeLike
"""A dtype or its name, such as `jnp.bfloat16` or "bfloat16"."""

Keywords = dict[str, Any]
"""Keyword arguments that several calls have in common."""

if TYPE_CHECKING:
    from jaxtyping import Bool, Float, Int, Key, PyTree, Shaped
else:
    try:
        from jaxtyping import Bool, Float, Int, Key, PyTree, Shaped
    except ImportError:

        class _Unchecked:
            """Replaces jaxtyping's `Float` and the like: any shape gives the annotation `Any`."""

            def __class_getitem__(cls, item: Any) -> Any:
                return Any

        Bool = Float = Int = Key = Shaped = _Unchecked
        PyTree = Any

__all__ = [
    "Adapters", "Array", "ArrayLike", "Bool", "DType", "Float", "Int", "Key", "Keywords", "PyTree", "Scalar",
    "Shaped",
]  # fmt: skip
