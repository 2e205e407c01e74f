"""Batches hold exact quotas, in an order that depends on (seed, index) alone."""

import threading
import time
from collections import Counter

import pytest

from icet_jax.data.batches import Batches, quotas
from icet_jax.data.records import Example
from icet_jax.errors import UserError
from icet_jax.parallel.distributed import Share


def rows(**counts):
    return [Example(f"{kind}{i}", "p", kind=kind, answer="x") for kind, count in counts.items() for i in range(count)]


def ids(batch):
    return [example.id for example in batch]


def test_quotas_round_by_largest_remainder():
    assert quotas({"forbidden": 0.5, "benign": 0.2, "vqa": 0.3}, 128) == {"forbidden": 64, "benign": 26, "vqa": 38}
    assert quotas({"forbidden": 2, "benign": 1, "vqa": 0}, 10) == {"forbidden": 7, "benign": 3}
    assert quotas({"forbidden": 1, "benign": 1, "vqa": 1}, 4) == {"forbidden": 2, "benign": 1, "vqa": 1}


@pytest.mark.parametrize(
    "mixture", [{}, {"vqa": 0}, {"vqa": -1, "benign": 2}, {"vqa": float("nan")}, {"vqa": 1, "benign": 99}]
)
def test_bad_mixtures(mixture):
    with pytest.raises(UserError, match=r"config\.data\.mixture"):
        quotas(mixture, 4)


def test_kind_without_rows():
    with pytest.raises(UserError, match="'vqa' rows"):
        Batches(rows(benign=3), mixture={"benign": 1, "vqa": 1}, batch_size=4, seed=0)


def test_every_batch_has_the_quota_and_every_epoch_every_row():
    batches = Batches(rows(forbidden=6, benign=4), mixture={"forbidden": 3, "benign": 2}, batch_size=5, seed=1)
    seen = Counter()
    for index in range(4):
        batch = batches.batch(index)
        assert Counter(example.kind for example in batch) == {"forbidden": 3, "benign": 2}
        seen.update(ids(batch))
    assert set(seen.values()) == {2}


def test_random_access_equals_iteration_and_resume_is_one_integer():
    def make(seed=3):
        return Batches(rows(forbidden=7, vqa=5), mixture={"forbidden": 1, "vqa": 1}, batch_size=4, seed=seed)

    def walk(start, seed=3):
        return list(make(seed).load(ids, start, 9))

    assert [ids(make().batch(index)) for index in reversed(range(9))] == walk(0)[::-1]
    assert walk(4) == walk(0)[4:]
    assert walk(0, seed=4) != walk(0)


def test_epochs_differ_and_other_kinds_do_not_matter():
    alone = Batches(rows(forbidden=8), mixture={"forbidden": 1}, batch_size=8, seed=0)
    epochs = [sorted(ids(alone.batch(i))) for i in range(2)]
    assert epochs[0] == epochs[1]
    mixed = Batches(rows(forbidden=8, benign=3), mixture={"forbidden": 2, "benign": 1}, batch_size=3, seed=0)
    order = [example.id for i in range(4) for example in mixed.batch(i) if example.kind == "forbidden"]
    assert sorted(order) == epochs[0]
    first = Batches(rows(forbidden=8), mixture={"forbidden": 1}, batch_size=1, seed=0)
    one_by_one = [first.batch(i)[0].id for i in range(24)]
    assert len({tuple(one_by_one[k : k + 8]) for k in (0, 8, 16)}) == 3
    assert [set(order[k : k + 2]) for k in (0, 2, 4, 6)] == [set(one_by_one[k : k + 2]) for k in (0, 2, 4, 6)]


@pytest.mark.parametrize("count", [1, 2, 4])
def test_every_number_of_processes_sees_the_same_batches(count):
    """Also when resuming half way, with another number of processes than before."""
    examples, setting = rows(forbidden=7, benign=5, vqa=3), {"forbidden": 2, "benign": 1, "vqa": 1}

    def make():
        return Batches(examples, mixture=setting, batch_size=8, seed=5)

    alone = [ids(make().batch(index)) for index in range(12)]
    for start in (0, 6):
        sides = [make() for _ in range(count)]
        for index, expected in enumerate(alone[start:], start=start):
            parts = [ids(side.batch(index)[Share(i, count).rows(8)]) for i, side in enumerate(sides)]
            assert [len(part) for part in parts] == [8 // count] * count
            assert sum(parts, []) == expected


def test_loaded_batches_are_the_batches_in_order_and_made_by_other_threads():
    batches = Batches(rows(forbidden=6), mixture={"forbidden": 1}, batch_size=4, seed=2)
    threads = []

    def make(batch):
        threads.append(threading.current_thread())
        time.sleep(0.002 * (len(threads) % 3))
        return ids(batch)

    assert list(batches.load(make, 3, 9)) == [ids(batches.batch(index)) for index in range(3, 9)]
    assert threading.main_thread() not in threads
    assert list(batches.load(make, 3, 3)) == []


def test_batches_are_made_while_earlier_ones_are_used():
    batches = Batches(rows(forbidden=4), mixture={"forbidden": 1}, batch_size=2, seed=2)
    made = threading.Semaphore(0)

    def make(batch):
        made.release()
        return batch

    loaded = batches.load(make, 0, 5)
    next(loaded)
    # The consumer asks for nothing more, and still the next batches are made.
    assert all(made.acquire(timeout=10) for _ in range(3))


def test_what_is_wrong_with_a_batch_is_said_at_that_batch():
    batches = Batches(rows(forbidden=6), mixture={"forbidden": 1}, batch_size=2, seed=2)
    broken = ids(batches.batch(1))

    def make(batch):
        if ids(batch) == broken:
            raise UserError("a.png: truncated")
        return ids(batch)

    loaded = batches.load(make, 0, 3)
    assert next(loaded) == ids(batches.batch(0))
    with pytest.raises(UserError, match="a.png: truncated"):
        next(loaded)
