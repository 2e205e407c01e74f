"""Images of every family in batches of fixed shapes; prompt buckets are the only thing that compiles anew."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from icet_jax.data.padding import prompt_bucket
from icet_jax.data.records import Example
from icet_jax.errors import UserError
from icet_jax.evaluation.batching import prompt_batch
from icet_jax.models import family_of
from icet_jax.models.base.image_batches import batch_images
from icet_jax.models.llava_next.anyres import gather_rows, packing
from icet_jax.models.llava_next.images import anyres_rows
from icet_jax.nn.layers import positions_from_mask
from icet_jax.parallel.distributed import Share
from tests import tiny_families
from tests.models import processor_families as families
from tests.vlms import vlm_without_weights

SIZES = [[(31, 57)], [], [(28, 28), (200, 90)], [(40, 300)]]
PROMPTS = ["what is this?", "no picture", "which one", ""]
SMALL = {"num_hidden_layers": 2}


@pytest.fixture(scope="module")
def processors(tmp_path_factory):
    text = {"llava": {}, "llava_next": {}, "mllama": {"cross_attention_layers": [1]}}
    return {
        name: families.processor(tmp_path_factory.mktemp(name), name, **SMALL, **text[name])
        for name in families.FAMILIES
    }


@pytest.fixture(scope="module")
def inputs(processors):
    images = [tiny_families.pictures(row, number) for number, row in enumerate(SIZES)]
    return {name: processor(images=images, prompts=PROMPTS) for name, processor in processors.items()}


def flat(name, inputs):
    """Every image's own pixels, in row order."""
    pixels = inputs["pixel_values"]
    return pixels[inputs["aspect_ratio_ids"] > 0] if name == "mllama" else pixels


@pytest.mark.parametrize("name", families.FAMILIES)
def test_images_have_places_in_their_rows_and_fillers_are_zeros(name, processors, inputs):
    batch = processors[name].batch_images(inputs[name], num_rows=6, per_row=3)
    own = flat(name, inputs[name])
    assert (batch.num_rows, batch.per_row) == (6, 3) and batch.pixels.dtype == np.float32
    assert batch.rows.dtype == np.int32 and batch.rows.tolist() == [0, 6, 6, 6, 6, 6, 2, 2, 6, 3, *[6] * 8]
    places, within = [0, 6, 7, 9], tuple(map(slice, own.shape[1:]))
    np.testing.assert_array_equal(batch.pixels[(places, *within)], own)
    rest = batch.pixels.copy()
    rest[(places, *within)] = 0
    assert len(rest) == 18 and not rest.any()
    expected = [[0, -1, -1], [-1, -1, -1], [6, 7, -1], [9, -1, -1], [-1, -1, -1], [-1, -1, -1]]
    assert np.asarray(batch.index()).tolist() == expected
    assert np.asarray(batch.index(jnp.array([3, 2, 2]))).tolist() == [expected[3], expected[2], expected[2]]


@pytest.mark.parametrize("name", families.FAMILIES)
def test_shares_of_a_batch_are_its_parts(name, processors):
    sizes = [[(30, 50), (20, 60)], [(57, 57), (28, 28)], [(60, 20), (56, 56)], [(40, 40), (30, 50)]]
    images = [tiny_families.pictures(row, number) for number, row in enumerate(sizes)]
    whole = processors[name](images=images, prompts=["a prompt", "b", "c", "d"])
    width = whole["input_ids"].shape[1]
    expected = processors[name].batch_images(whole, num_rows=4, per_row=2)
    parts = []
    for share in (Share(0, 2), Share(1, 2)):
        own = processors[name](images=images[share.rows(4)], prompts=["a prompt", "b", "c", "d"][share.rows(4)])
        short = width - own["input_ids"].shape[1]
        own["input_ids"] = np.pad(own["input_ids"], ((0, 0), (short, 0)))
        parts.append(batch_images(processors[name].config, own, num_rows=4, per_row=2, share=share))
    assert all((part.num_rows, part.per_row) == (4, 2) for part in parts)
    jax.tree.map(lambda all_rows, *own: np.testing.assert_array_equal(np.concatenate(own), all_rows), expected, *parts)
    with pytest.raises(ValueError, match="a share of a batch has 2 images"):
        first = processors[name](images=[row[:1] for row in images[:2]], prompts=["a", "b"])
        batch_images(processors[name].config, first, num_rows=4, per_row=2, share=Share(0, 2))


def test_every_image_of_next_has_the_tiles_of_the_largest(processors, inputs):
    processor, own = processors["llava_next"], inputs["llava_next"]
    batch = processor.batch_images(own, num_rows=5, per_row=2)
    assert own["pixel_values"].shape[1] == 5 and batch.pixels.shape == (10, 5, 3, 28, 28)
    sizes = [size for row in SIZES for size in row]
    length = own["input_ids"].shape[1]
    wanted = gather_rows(sizes, [0, 2, 2, 3], 5, length, 5, processor.config, [0, 4, 5, 6], 10)
    np.testing.assert_array_equal(batch.layout, wanted)
    assert batch.layout.shape == (5, length) and batch.layout.max() == 10 * 5 * 16
    placeholders = (own["input_ids"] == processor.config.image_token_index).sum(axis=1)
    assert (batch.layout >= 0).sum(axis=1).tolist() == [*placeholders, 0]
    small = tiny_families.pictures([(28, 56)])
    few = processor(images=[small], prompts=["x"])
    assert few["pixel_values"].shape[1] == 3
    assert processor.batch_images(few, num_rows=1, per_row=1).pixels.shape[1] == 5


def test_layout_of_mllama_is_the_ratio_of_each_image(processors, inputs):
    batch = processors["mllama"].batch_images(inputs["mllama"], num_rows=4, per_row=2)
    ids = inputs["mllama"]["aspect_ratio_ids"]
    assert batch.layout.dtype == np.int32
    assert batch.layout.tolist() == [ids[0, 0], 0, 0, 0, ids[2, 0], ids[2, 1], ids[3, 0], 0]
    assert batch.pixels.shape == (8, 4, 3, 28, 28)


@pytest.mark.parametrize("name", families.FAMILIES)
def test_without_a_number_there_are_no_fillers(name, processors, inputs):
    batch = processors[name].batch_images(inputs[name], num_rows=4)
    assert len(batch.pixels) == 4 and batch.per_row == 2 and batch.rows.tolist() == [0, 2, 2, 3]
    text = processors[name](images=[None], prompts=["x"])
    assert processors[name].batch_images(text, num_rows=1) is None
    assert processors[name].batch_images(text, num_rows=1, per_row=0) is None
    filler = processors[name].batch_images(text, num_rows=2, per_row=1)
    assert filler.rows.tolist() == [2, 2] and filler.pixels.shape[1:] == batch.pixels.shape[1:]
    assert not filler.pixels.any()


def without(name, key):
    def change(inputs):
        return {field: array for field, array in inputs[name].items() if field != key}

    return name, change


def altered(name, key, function):
    def change(inputs):
        return inputs[name] | {key: function(inputs[name][key].copy())}

    return name, change


def no_placeholder(ids):
    ids[2, ids[2] == 259] = 5
    return ids


def late_image(ratios):
    ratios[0] = ratios[0, ::-1]
    return ratios


@pytest.mark.parametrize(
    "case, complaint",
    [
        (without("llava", "pixel_values"), "placeholders for 4 images, pixel_values hold 0"),
        (without("llava_next", "pixel_values"), "the placeholders of row 0 are not those"),
        (without("llava_next", "image_sizes"), "'image_sizes' is missing; give what the processor returns"),
        (without("mllama", "pixel_values"), "row 0 holds 1 image placeholders, pixel_values hold 0"),
        (without("mllama", "aspect_ratio_ids"), "'aspect_ratio_ids' is missing"),
        (altered("llava", "pixel_values", lambda x: x[:, :, :14]), r"pixel_values have shape \(4, 3, 14, 28\)"),
        (altered("llava_next", "pixel_values", lambda x: x[:, 0]), r"pixel_values have shape \(4, 3, 28, 28\)"),
        (altered("llava_next", "pixel_values", lambda x: np.repeat(x, 2, 1)), r"shape \(4, 10, 3, 28, 28\)"),
        (altered("llava_next", "pixel_values", lambda x: x[:, :2]), "has . tiles, 2 given"),
        (altered("llava_next", "pixel_values", lambda x: x[:3]), "4 image_sizes, but pixel_values hold 3 images"),
        (altered("llava_next", "image_sizes", lambda x: x[::-1]), "the placeholders of row 0 are not those"),
        (
            altered("llava_next", "input_ids", no_placeholder),
            "the placeholders of row . are not|placeholders for . images",
        ),
        (altered("mllama", "pixel_values", lambda x: x[:, :, :2]), r"pixel_values have shape \(4, 2, 2, 3, 28, 28\)"),
        (altered("mllama", "aspect_ratio_ids", lambda x: x + 8), r"each 0\.\.8"),
        (altered("mllama", "aspect_ratio_ids", lambda x: x[:, :1]), "must be .rows, images. as pixel_values are"),
        (altered("mllama", "aspect_ratio_ids", late_image), "must stand before its padding images"),
        (altered("mllama", "aspect_ratio_ids", lambda x: x * 0 + [[1, 0]] * 4), "row 1 holds 0 image placeholders"),
    ],
)
def test_inputs_that_do_not_fit_are_one_clear_line(case, complaint, processors, inputs):
    name, change = case
    with pytest.raises(UserError, match=complaint) as caught:
        batch_images(processors[name].config, change(inputs), num_rows=4)
    assert "\n" not in str(caught.value)


def test_too_many_images_for_their_room(processors, inputs):
    for name, processor in processors.items():
        with pytest.raises(UserError, match="row 2 has 2 images, but there is room for 1"):
            processor.batch_images(inputs[name], num_rows=4, per_row=1)


def test_rows_of_images_follow_from_their_sizes(processors):
    config = processors["llava_next"].config
    sizes = [(31, 57), (200, 90), (28, 28)]
    ids = np.zeros((3, 400), int)
    for row, own in ((0, sizes[:1]), (2, sizes[1:])):
        ids[row, : sum(len(packing(size, config)) for size in own)] = config.image_token_index
    assert anyres_rows(ids, sizes, config).tolist() == [0, 2, 2]
    with pytest.raises(UserError, match="placeholders of row 2"):
        anyres_rows(ids, sizes[:2], config)
    with pytest.raises(UserError, match="placeholders for 3 images, pixel_values hold 4"):
        anyres_rows(ids, [*sizes, (5, 5)], config)


@pytest.mark.parametrize("name", ["llava_next", "mllama"])
def test_images_of_any_size_compile_once_for_each_prompt_bucket(name, processors):
    """Tiles, aspect ratios and numbers of image tokens all differ; the network's shapes do not."""
    processor, traced = processors[name], []
    make = functools.partial(family_of(processor.config).network, processor.config)
    graph, params = nnx.split(nnx.eval_shape(lambda: make(rngs=nnx.Rngs(0))))
    vlm = vlm_without_weights(processor, processor.config)

    @jax.jit
    def run(params, images, tokens, mask, exit_index):
        traced.append(tokens.shape)
        model = nnx.merge(graph, params)
        visual = model.visual(model.encode(images), exit_index)
        return model.decode(tokens, positions_from_mask(mask), mask, visual)

    noise = np.random.default_rng(0)
    images = tiny_families.pictures([tuple(map(int, noise.integers(8, 120, 2))) for _ in range(24)])
    lengths, seen = [], set()
    for start in range(0, 24, 2):
        examples = [Example(str(i), "p" * (i % 5), (images[i],)) for i in range(start, start + 2)]
        batch = prompt_batch(vlm, examples, 2, 1)
        run.trace(params, batch.images, batch.tokens, batch.mask, jnp.int32(1))
        lengths += np.asarray(batch.mask).sum(axis=1).tolist()
        seen |= set(np.asarray(batch.images.layout).tolist()) if name == "mllama" else set(lengths)
    buckets = {prompt_bucket(max(pair)) for pair in zip(lengths[::2], lengths[1::2], strict=True)}
    assert sorted(traced) == [(2, bucket) for bucket in sorted(buckets)]
    assert len(seen) >= 5 and len(traced) < len(seen)
