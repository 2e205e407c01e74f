"""Rows through a network: few padded lengths, one compilation each, results in the rows' order whatever the batches."""

import jax
import numpy as np
import pytest

from icet_jax.data.padding import bucket, pad_rows
from icet_jax.scorers.rows import BatchedNetwork


@pytest.mark.parametrize(("length", "expected"), [(0, 32), (1, 32), (32, 32), (33, 64), (64, 64), (65, 100), (99, 100)])
def test_bucket(length, expected):
    assert bucket(length, 100) == expected


@pytest.mark.parametrize(("length", "expected"), [(0, 32), (33, 64), (129, 160), (161, 192), (250, 256), (257, 320)])
def test_finer_buckets(length, expected):
    assert bucket(length, 300, buckets_per_doubling=4) == min(expected, 300)


def test_padding_on_either_side():
    for side, where in (("right", slice(0, 2)), ("left", slice(2, 4))):
        tokens, mask = pad_rows([[7, 8], []], 4, 3, side)
        assert tokens[0, where].tolist() == [7, 8] and mask[0, where].all() and mask.sum() == 2 and tokens.sum() == 15


@pytest.mark.parametrize("side", ["left", "right"])
def test_results_keep_the_order_of_the_rows_and_each_length_compiles_once(side):
    traced = []

    def count(scale, tokens, mask):
        traced.append(tokens.shape)
        return {"sum": scale * (tokens * mask).sum(1), "last": tokens[:, -1]}

    network = BatchedNetwork(count, 2, longest=100, batch_size=4, padding_side=side)
    lengths = [3, 90, 0, 33, 40, 1, 100, 32, 64]
    rows = [list(range(1, length + 1)) for length in lengths]
    for _ in range(2):
        out = network(rows)
    np.testing.assert_array_equal(out["sum"], [length * (length + 1) for length in lengths])
    assert out["last"].tolist() == (lengths if side == "left" else [0] * 6 + [100] + [0] * 2)
    assert traced == [(4, 100), (4, 64), (4, 32)], "the longest four, the next four, the row without tokens"


def test_long_rows_come_in_smaller_batches():
    shapes = []

    def record(_, tokens, mask):
        shapes.append(tokens.shape)
        return mask.sum(1)

    network = BatchedNetwork(record, (), longest=5000, batch_size=6)
    lengths = [10, 1500, 4000, 5000, 3000, 20, 1100]
    assert network([[1] * length for length in lengths]).tolist() == lengths
    assert shapes == [(1, 5000), (1, 4096), (3, 2048), (6, 32)]
    assert [length for length, _ in network.lowered(64)] == ["32", "64"]
    assert shapes[4:] == [(6, 64)]


def test_no_rows_have_results_of_no_rows():
    network = BatchedNetwork(lambda _, tokens, mask: {"a": mask, "b": tokens.sum(1)}, (), longest=64, batch_size=2)
    out = network([])
    assert out["a"].shape == (0, 32) and out["a"].dtype == bool and out["b"].shape == (0,)
    assert isinstance(out["b"], np.ndarray) and not isinstance(out["b"], jax.Array)
