"""Measures how fast the default device multiplies matrices, for devices whose published peak speed does not apply."""

import functools
import math
import time

import jax
import jax.numpy as jnp

from icet_jax.typing import Array, Float, Int

_SECONDS, _RUNS = 0.05, 3


@functools.cache
def product_speed(rows: int, width: int, ffn: int, dtype: str) -> float:
    """Returns the operations per second of matrix products [rows, width] x [width, ffn] x [ffn, width].

    It is the best of three measurements, each of at least 50 ms.
    """
    x = jnp.ones((rows, width), dtype)
    up, down = jnp.full((width, ffn), 1 / width, dtype), jnp.full((ffn, width), 1 / ffn, dtype)

    def seconds_of(repeats: int) -> float:
        began = time.perf_counter()
        _products(x, up, down, repeats).block_until_ready()
        return time.perf_counter() - began

    seconds_of(1)  # compiles
    repeats, seconds = 1, seconds_of(1)
    while seconds < _SECONDS:
        # At most 64 times as many, because a very short time is measured inexactly.
        repeats *= max(2, min(64, math.ceil(_SECONDS / max(seconds, 1e-6))))
        seconds = seconds_of(repeats)
    fastest = min(seconds, *(seconds_of(repeats) for _ in range(_RUNS - 1)))
    return repeats * 4 * rows * width * ffn / fastest  # two products, of two operations for each pair of elements


@jax.jit
def _products(
    x: Float[Array, "B E"], up: Float[Array, "E F"], down: Float[Array, "F E"], repeats: int | Int[Array, ""]
) -> Float[Array, "B E"]:
    """Returns `x` after `repeats` repetitions of x = x @ up @ down, where each product must wait for the last one."""
    return jax.lax.fori_loop(0, repeats, lambda _, x: (x @ up) @ down, x)
