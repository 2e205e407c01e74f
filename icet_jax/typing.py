"""Array annotations that carry shapes: `Float[Array, "B T D"]`.

jaxtyping is checked at run time in the tests and is optional everywhere else: where it is not installed the
annotations fall back to `Any`, so that `icet_jax.models` and `icet_jax.lppo` need only jax, flax, optax and numpy.
"""

from typing import TYPE_CHECKING, Any

from jax import Array

if TYPE_CHECKING:
    from jaxtyping import Bool, Float, Int, Key, PyTree, Shaped
else:
    try:
        from jaxtyping import Bool, Float, Int, Key, PyTree, Shaped
    except ImportError:

        class _Unchecked:
            """Stands in for a jaxtyping dtype: every subscript is `Any`."""

            def __class_getitem__(cls, item: Any) -> Any:
                return Any

        Bool = Float = Int = Key = Shaped = _Unchecked
        PyTree = Any

__all__ = ["Array", "Bool", "Float", "Int", "Key", "PyTree", "Shaped"]
