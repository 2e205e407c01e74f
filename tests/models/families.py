"""Runs the same inputs through transformers (torch, float32, CPU) and through our LLaVA-NeXT and Llama 3.2 Vision."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import torch
from flax import nnx

from icet_jax.checkpoints.hf_import import Checkpoint
from icet_jax.generation.decode import generate
from icet_jax.generation.sampling import Sampling
from icet_jax.models.llava_next.anyres import gather_rows, packing
from icet_jax.models.loading import load_vlm
from icet_jax.nn.layers import positions_from_mask
from icet_jax.nn.protocols import Images
from tests import tiny_families
from tests.models.parity import GAP


class Batch(NamedTuple):
    """Our inputs of one batch."""

    tokens: Any
    mask: Any
    images: Images | None


def load_mllama(directory, model, **options) -> Checkpoint:
    return load_vlm(tiny_families.save_mllama(directory, model, processor=False), **options)


def load_next(directory, model, **options) -> Checkpoint:
    return load_vlm(tiny_families.save_llava_next(directory, model, processor=False), **options)


def mllama_batch(rows, pad="left") -> Batch:
    """One padded batch of rows that transformers made one by one."""
    length = max(row["input_ids"].shape[1] for row in rows)
    tokens, mask = np.full((len(rows), length), tiny_families.MLLAMA_PAD, np.int32), np.zeros((len(rows), length), bool)
    for number, row in enumerate(rows):
        ids = row["input_ids"][0]
        where = slice(length - len(ids), length) if pad == "left" else slice(0, len(ids))
        tokens[number, where], mask[number, where] = ids, True
    seen = [(number, row) for number, row in enumerate(rows) if "pixel_values" in row]
    if not seen:
        return Batch(jnp.asarray(tokens), jnp.asarray(mask), None)
    counts = [row["pixel_values"].shape[1] for _, row in seen]
    images = Images(
        pixels=jnp.asarray(np.concatenate([row["pixel_values"][0] for _, row in seen])),
        rows=jnp.asarray(np.repeat([number for number, _ in seen], counts), jnp.int32),
        num_rows=len(rows),
        per_row=max(counts),
        layout=jnp.asarray(np.concatenate([row["aspect_ratio_ids"][0] for _, row in seen]), jnp.int32),
    )
    return Batch(jnp.asarray(tokens), jnp.asarray(mask), images)


def next_batch(inputs, config) -> Batch:
    """Of what transformers' processor returned; an image's row is the one whose placeholders it fills."""
    tokens, mask = jnp.asarray(inputs["input_ids"], jnp.int32), jnp.asarray(inputs["attention_mask"], bool)
    if "pixel_values" not in inputs:
        return Batch(tokens, mask, None)
    sizes = [tuple(map(int, size)) for size in inputs["image_sizes"]]
    places = (inputs["input_ids"] == config.image_token_index).sum(1)
    ends = np.cumsum([len(packing(size, config)) for size in sizes])
    assert ends[-1] == places.sum()
    rows = np.searchsorted(np.cumsum(places), ends).tolist()
    pixels = inputs["pixel_values"]
    images = Images(
        pixels=jnp.asarray(pixels),
        rows=jnp.asarray(rows, jnp.int32),
        num_rows=len(tokens),
        per_row=int(np.bincount(rows).max()),
        layout=jnp.asarray(gather_rows(sizes, rows, len(tokens), int(places.max()), pixels.shape[1], config)),
    )
    return Batch(tokens, mask, images)


@functools.partial(jax.jit, static_argnames=("graphdef", "upto"))
def logits_of(graphdef, params, batch, exit_layer, upto=None):
    """float32 [B, T, V] at a traced exit; `_cache_size` counts what was compiled."""
    model = nnx.merge(graphdef, params)
    visual = None if batch.images is None else model.visual(model.encode(batch.images, upto), exit_layer)
    hidden = model.decode(batch.tokens, positions_from_mask(batch.mask), batch.mask, visual)
    return model.logits(hidden)


def our_logits(checkpoint, batch, layer=None, upto=None):
    layer = checkpoint.model.default_exit if layer is None else layer
    return np.asarray(logits_of(checkpoint.graphdef, checkpoint.params, batch, jnp.int32(layer), upto))


@functools.partial(jax.jit, static_argnames=("graphdef", "sampling", "copies"))
def _generate(graphdef, params, batch, exit_layer, sampling, copies):
    model = nnx.merge(graphdef, params)
    visual = None if batch.images is None else model.visual(model.encode(batch.images), exit_layer)
    keys = jax.random.split(jax.random.key(0), copies * batch.tokens.shape[0])
    return generate(model, batch.tokens, batch.mask, visual, keys, sampling).tokens


@functools.partial(jax.jit, static_argnames=("graphdef", "suffix"))
def cached_and_uncached(graphdef, params, batch, exit_layer, suffix=0):
    """States of each row's last token and of a token more, [B, 2, E]: with a cache, and all at once; and the caches.

    The last `suffix` tokens of every row are run after the others are in the cache.
    """
    model = nnx.merge(graphdef, params)
    visual = model.visual(model.encode(batch.images), exit_layer)
    count = batch.tokens.shape[0]
    extra = jnp.full((count, 1), 9, jnp.int32)
    tokens = jnp.concatenate([batch.tokens, extra], axis=1)
    mask = jnp.concatenate([batch.mask, jnp.ones_like(extra, bool)], axis=1)
    whole = model.decode(tokens, positions_from_mask(mask), mask, visual)
    length = batch.mask.sum(axis=1)
    last = batch.mask.shape[1] - 1 - jnp.argmax(jnp.flip(batch.mask, axis=1), axis=1)
    expected = jnp.concatenate([jnp.take_along_axis(whole, last[:, None, None], axis=1), whole[:, -1:]], axis=1)

    columns = jnp.arange(batch.tokens.shape[1])
    right = jnp.take_along_axis(batch.tokens, (jnp.argmax(batch.mask, axis=1)[:, None] + columns) % len(columns), 1)
    first, cache = model.prefill(right, columns < (length - suffix)[:, None], visual)
    if suffix:
        rest = jnp.take_along_axis(right, (length - suffix)[:, None] + jnp.arange(suffix), axis=1)
        padded = jnp.pad(rest, ((0, 0), (0, 2)))
        first, cache = model.prefill(padded, jnp.arange(suffix + 2) < jnp.full((count, 1), suffix), None, cache)
    cache = cache.with_room(3)
    second, after = model.step(extra[:, 0], jnp.ones(count, bool), cache, model.unstack_layers())
    return jnp.stack([first, second], axis=1), expected, (cache, after)


def assert_rows_are_picked(checkpoint, batch):
    """`visual` of some rows, each at an exit of its own, is what `visual` of the whole batch has for them."""

    @functools.partial(jax.jit, static_argnums=0)
    def visual(graphdef, params, images, exits, rows=None):
        model = nnx.merge(graphdef, params)
        return model.visual(model.encode(images), exits, rows)

    inputs = checkpoint.graphdef, checkpoint.params, batch.images
    rows, exits = np.array([3, 0, 3, 1, 4, 0, 2]), np.array([1, 3, 2, 4, 1, 2, 3])
    picked = visual(*inputs, jnp.asarray(exits), jnp.asarray(rows))
    for place, (row, layer) in enumerate(zip(rows, exits, strict=True)):
        whole = visual(*inputs, jnp.int32(layer))
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a[place], b[row], atol=1e-6), picked, whole)  # noqa: B023


def our_greedy(checkpoint, batch, layer, count, pad_id, suppress=(), copies=1):
    """`count` greedy tokens of each row [copies * B, count], none of which ends it; the copies share a prefill."""
    sampling = Sampling(count, temperature=0.0, eos_ids=(), suppress_ids=suppress, pad_id=pad_id)
    return np.asarray(_generate(checkpoint.graphdef, checkpoint.params, batch, jnp.int32(layer), sampling, copies))


def hf_greedy(model, inputs, count, pad_id, suppress=()):
    """The same in transformers."""
    from transformers import GenerationConfig

    model.generation_config = GenerationConfig(
        do_sample=False, max_new_tokens=count, pad_token_id=pad_id, suppress_tokens=list(suppress) or None
    )
    with torch.no_grad():
        out = model.generate(**tensors(inputs))
    return out[:, inputs["input_ids"].shape[1] :].numpy()


def tensors(inputs):
    return {name: torch.from_numpy(np.ascontiguousarray(array)) for name, array in inputs.items()}


def hf_logits(model, inputs, **options):
    with torch.no_grad():
        return model(**tensors(inputs), **options).logits.numpy()


def hf_row_logits(model, rows):
    """Of each row alone, [T, V]."""
    return [hf_logits(model, row)[0] for row in rows]


def assert_agree(ours, theirs, tolerance=1e-5):
    """Logits at real tokens [n, V]; returns the largest difference."""
    assert ours.shape == theirs.shape
    difference = np.abs(ours - theirs).max()
    assert difference <= tolerance * max(1.0, theirs.std()), f"logits differ by {difference}"
    best = np.sort(theirs, axis=-1)
    clear = best[:, -1] - best[:, -2] > GAP
    assert (ours.argmax(-1) == theirs.argmax(-1))[clear].all()
    return difference


def assert_rows_agree(ours, batch, theirs, tolerance=1e-5):
    """Our batch's logits [B, T, V] against those of each row alone."""
    real = np.asarray(batch.mask)
    return max(assert_agree(ours[i][real[i]], row, tolerance) for i, row in enumerate(theirs))
