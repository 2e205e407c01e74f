"""The order of a sweep's rows."""

import numpy as np

from icet_jax.data.padding import prompt_bucket
from icet_jax.data.records import Example
from icet_jax.evaluation.schedule import ImageGroup, length_groups

IMAGE = 9


def prompts(*lengths):
    return [np.arange(length, dtype=np.int32) % 7 for length in lengths]


def test_buckets_waste_an_eighth_or_sixteen_positions():
    for length in range(1, 3000):
        assert length <= prompt_bucket(length) <= max(length * 9 / 8 + 1, length + 15)
    assert [prompt_bucket(n) for n in (1, 16, 17, 620, 640)] == [16, 16, 32, 640, 640]
    assert len({prompt_bucket(length) for length in range(577, 3000)}) < 22


def test_rows_of_similar_length_stand_together_and_every_row_stands_once():
    lengths = [640 + 3 * n for n in range(20)] + [1300, 90, 700, 95]
    examples = [Example(str(n), "x") for n in range(len(lengths))]
    found = length_groups(examples, prompts(*lengths), IMAGE)
    rows = [[row for unit in stretch.image_groups for row in unit.rows] for stretch in found]
    assert sorted(sum(rows, [])) == list(range(len(lengths)))
    assert [stretch.length for stretch in found] == [704, 1408]
    assert rows[0][:2] == [21, 23] and rows[1] == [20], "two short rows join, one long row would widen all others"
    assert length_groups(examples, prompts(*lengths), IMAGE) == found


def test_rows_about_the_same_images_are_one_unit_if_they_differ_only_after_them():
    examples = [Example(str(n), "x", images) for n, images in enumerate([("a",), ("b",), ("a",), ("a",), ("b",), ()])]
    before, image = [1, 2], [IMAGE] * 3
    tokens = [before + image + rest for rest in ([4, 5], [4], [4, 6, 7], [5])] + [[2] + image + [4], [1, 2]]
    (stretch,) = length_groups(examples, [np.array(ids, np.int32) for ids in tokens], IMAGE)
    assert set(stretch.image_groups) == {ImageGroup((0, 2, 3), 5), ImageGroup((1,)), ImageGroup((4,)), ImageGroup((5,))}


def test_something_is_left_to_run_where_prompts_are_equal():
    examples = [Example(str(n), "x", ("a",)) for n in range(2)]
    (stretch,) = length_groups(examples, [np.array([1, IMAGE, 3], np.int32)] * 2, IMAGE)
    assert stretch.image_groups == (ImageGroup((0, 1), 2),)
