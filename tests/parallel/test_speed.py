"""Measured speeds, by a clock that is known."""

import jax.numpy as jnp
import pytest

from icet_jax.parallel import speed


def test_operations_of_both_products_over_the_fastest_run(monkeypatch):
    """A device that takes 10 us for a pair of products, and in every other run twice as long."""
    now, runs = [0.0], []

    def products(x, up, down, repeats):
        assert (x.shape, up.shape, down.shape) == ((3, 5), (5, 7), (7, 5))
        runs.append(repeats)
        now[0] += repeats * 1e-5 * (1 + len(runs) % 2)
        return jnp.zeros(())

    monkeypatch.setattr(speed, "_products", products)
    monkeypatch.setattr(speed.time, "perf_counter", lambda: now[0])
    assert speed.product_speed.__wrapped__(3, 5, 7, "float32") == pytest.approx(2 * 2 * 3 * 5 * 7 / 1e-5)
    assert runs[-1] * 2e-5 >= 0.05 and len(runs) < 10


def test_a_real_device_has_a_speed():
    assert speed.product_speed(8, 16, 32, "bfloat16") > 1e5
