"""The largest batch that fits: what is compiled on the way, and what is said of it."""

import pytest

from icet_jax.errors import UserError
from icet_jax.parallel import gpu_targets
from icet_jax.parallel.topology import parse
from icet_jax.planning import batch as plan_batch
from icet_jax.runs.config_files import load


def searched(sizes, first=64, unit=16, memory=1e5):
    tried = []

    def measure(rows):
        tried.append(rows)
        return sizes(rows)

    return plan_batch.search(measure, field="data.batch_size", unit=unit, first=first, memory=memory), tried


def test_the_line_through_two_sizes_leads_to_the_largest():
    found, tried = searched(lambda rows: {"rollout": 10_000 + 300 * rows, "update": 50_000 + 100 * rows})
    assert tried == [64, 128, 288, 352] and (found.rows, found.next, found.bound) == (288, 352, "rollout")
    assert "288 rows fit (compiled); 352 do not, bound by rollout; multiples of 16, 4 sizes" in str(found)


def test_a_first_size_that_does_not_fit_is_made_smaller():
    found, tried = searched(lambda rows: {"rollout": 1000 * rows, "update": None if rows > 48 else 20_000}, first=128)
    assert found.rows == 48 and found.next == 64 and found.bound == "update" and len(tried) <= 5


def test_not_even_the_smallest_fits():
    found, tried = searched(lambda rows: {"update": None}, first=30)
    assert found.rows is None and tried == [32, 16] and "not even 16 rows fit (update" in str(found)


def test_programs_that_take_what_is_there_are_not_believed_to_be_full():
    # Both sizes fill the chip, as programs do that gather ahead where there is room; four times as many rows still fit.
    found, tried = searched(lambda rows: {"rollout": 99_900 if rows <= 256 else None})
    assert found.rows == 256 and found.next == 384 and len(tried) <= 5


def test_rows_spread_over_chips_and_slices():
    config = load("configs/llava15_lppo.py", [("mesh.fsdp", "4"), ("lppo.accumulation", "2")])
    assert plan_batch.unit_of(config, 16, "data.batch_size") == 32
    assert plan_batch.unit_of(config, 16, "sweep.batch_size") == 16


def test_the_programs_planned_already_are_not_compiled_again():
    config = load("configs/llava15_lppo.py", [("mesh.fsdp", "16"), ("lppo.accumulation", "1")])
    asked = []

    class Line:
        def __init__(self, phase, total):
            self.phase, self.total, self.temporaries = phase, total, 1

    def plan(changed, part):
        asked.append((changed.data.batch_size, part))
        return [Line("update", changed.data.batch_size * 2**27)]

    planned = [Line("sweep: fill", 2**60), Line("update", 64 * 2**27)]
    found = plan_batch.largest(config, parse("v5e:4x4"), "data.batch_size", planned, plan)
    assert found.rows == 112 and asked[0] == (128, "training") and 64 not in {rows for rows, _ in asked}
    assert config.data.batch_size == 64


def test_only_where_there_is_a_compiler(monkeypatch):
    monkeypatch.setattr(gpu_targets, "PACKAGES", ("nobody.nothing",))
    with pytest.raises(UserError, match="--largest-batch: what fits h100 chips is not known"):
        plan_batch.check(parse("h100:8"))
