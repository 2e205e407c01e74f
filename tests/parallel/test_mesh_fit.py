"""Heads and rows that do not divide over the mesh are refused, with sizes that would."""

from types import SimpleNamespace

import pytest

from icet_jax.errors import UserError
from icet_jax.parallel.mesh_fit import check_heads, slices
from icet_jax.runs.config_files import load


def model(heads, kv_heads, inside=False):
    text = SimpleNamespace(num_attention_heads=heads, num_key_value_heads=kv_heads)
    return SimpleNamespace(text=SimpleNamespace(llama=text) if inside else text)


@pytest.mark.parametrize("inside", [False, True])
def test_heads(inside):
    check_heads(8, model(32, 8, inside))
    with pytest.raises(UserError, match=r"mesh.tensor=16: .* 32 heads and 8 .* choose one of 1, 2, 4, 8$"):
        check_heads(16, model(32, 8, inside))
    with pytest.raises(UserError, match="choose one of 1, 3"):
        check_heads(2, model(6, 3, inside))


def config(**lppo):
    return load("configs/llava15_lppo.py", [(f"lppo.{name}", str(value)) for name, value in lppo.items()])


def test_rows_of_a_batch_that_do_not_divide():
    assert config().data.batch_size == 64
    with pytest.raises(UserError, match="batch_size=64 does not divide over the 24 devices .* choose 48 or 72"):
        slices(config(), 24)
    with pytest.raises(UserError, match="over the 128 devices .* choose 128, or more mesh.tensor"):
        slices(config(), 128)
    with pytest.raises(
        UserError, match="batch_size=64 in 2 mini-batches does not .* over the 64 devices .* choose 128,"
    ):
        slices(config(minibatches=2), 64)


def test_prompts_of_groups_that_do_not_divide():
    grouped = load("configs/llava15_lppo.py", [("algorithm", "lrloo"), ("lrloo.group_size", "4")])
    assert slices(grouped, 16) == 4
    with pytest.raises(UserError, match="batch_size=64 in groups of 4 responses does not .* 32 devices .* choose 128,"):
        slices(grouped, 32)


@pytest.mark.parametrize(
    ("asked", "shards", "count"), [(8, 1, 8), (8, 8, 8), (8, 16, 4), (16, 8, 8), (16, 64, 1), (1, 64, 1), (32, 32, 2)]
)
def test_a_slice_has_rows_for_every_device_and_no_more_than_one_device_would_have(asked, shards, count):
    assert slices(config(accumulation=asked), shards) == count
    assert 64 // count % shards == 0 and 64 // count // shards <= max(64 // asked, 1)
