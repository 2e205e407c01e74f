"""Which answers are given again: spread over data sets, rows and exits, none twice, the same for the same seed."""

import pytest

from icet_jax.evaluation.recheck import sample_pairs
from icet_jax.runs.export_check import allowed


@pytest.mark.parametrize(
    "sizes", [{"a": (100, 24)}, {"a": (6, 4), "b": (50, 8)}, {"a": (2, 2), "b": (3, 1), "c": (9, 9)}]
)
def test_pairs_are_distinct_and_spread(sizes):
    pairs = sample_pairs(sizes, 32, seed=3)
    assert pairs == sample_pairs(sizes, 32, seed=3) and pairs != sample_pairs(sizes, 32, seed=4)
    assert sum(map(len, pairs.values())) == 32
    for name, (rows, exits) in sizes.items():
        chosen = pairs[name]
        assert len(set(chosen)) == len(chosen)
        assert all(row in range(rows) and place in range(exits) for row, place in chosen)
        assert len({place for _, place in chosen}) == min(exits, len(chosen))
        assert len({row for row, _ in chosen}) == min(rows, len(chosen))
    full = [name for name, (rows, exits) in sizes.items() if len(pairs[name]) == rows * exits]
    others = {len(pairs[name]) for name in sizes if name not in full}
    assert not others or max(others) - min(others) <= 1


def test_small_sets_are_taken_whole():
    pairs = sample_pairs({"a": (2, 2), "b": (1, 3)}, 32, seed=0)
    assert sorted(pairs["a"]) == [(0, 0), (0, 1), (1, 0), (1, 1)] and sorted(pairs["b"]) == [(0, 0), (0, 1), (0, 2)]


def test_only_rounding_is_forgiven():
    assert allowed(32, "float32", "cpu") == 1 and allowed(8, "float32", "cpu") == 0
    assert allowed(32, "bfloat16", "cpu") == allowed(32, "float32", "gpu") == 4
    assert all(allowed(count, "bfloat16", "gpu") < count for count in range(1, 33))
