"""The paper's groups of exits."""

import numpy as np
import pytest

from icet_jax.exit_groups import exit_groups


@pytest.mark.parametrize("num_exits", [1, 2, 3, 8, 13, 23, 24, 25, 32])
def test_groups_are_the_papers(num_exits):
    parts = [part.tolist() for part in np.array_split(np.arange(1, num_exits + 1), 3)]
    assert list(exit_groups(num_exits).values()) == [part for part in parts if part]
    assert list(exit_groups(num_exits)) == ["early", "middle", "late"][:num_exits]
