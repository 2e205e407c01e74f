"""Runs the same inputs through transformers (torch, float32, CPU) and through our LLaVA-NeXT and Llama 3.2 Vision."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import torch
from flax import nnx

from icet_jax.checkpoints.hf_import import Checkpoint, load_vlm
from icet_jax.data.anyres import gather_rows, packing
from icet_jax.generation.decode import generate
from icet_jax.generation.sampling import Sampling
from icet_jax.models.family import Images
from icet_jax.models.layers import positions_from_mask
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
    hidden, _ = model.decode(batch.tokens, positions_from_mask(batch.mask), batch.mask, visual)
    return model.logits(hidden)


def our_logits(checkpoint, batch, layer=None, upto=None):
    layer = checkpoint.model.default_exit if layer is None else layer
    return np.asarray(logits_of(checkpoint.graphdef, checkpoint.params, batch, jnp.int32(layer), upto))


@functools.partial(jax.jit, static_argnames=("graphdef", "sampling"))
def _generate(graphdef, params, batch, exit_layer, sampling):
    model = nnx.merge(graphdef, params)
    visual = None if batch.images is None else model.visual(model.encode(batch.images), exit_layer)
    keys = jax.random.split(jax.random.key(0), batch.tokens.shape[0])
    return generate(model, batch.tokens, batch.mask, visual, keys, sampling).tokens


@functools.partial(jax.jit, static_argnames="graphdef")
def cached_and_uncached(graphdef, params, batch, exit_layer):
    """Hidden states of the batch and a token more: the batch into a cache, then that token; and all at once."""
    model = nnx.merge(graphdef, params)
    visual = model.visual(model.encode(batch.images), exit_layer)
    count, length = batch.tokens.shape
    extra = jnp.full((count, 1), 9, jnp.int32)
    tokens = jnp.concatenate([batch.tokens, extra], axis=1)
    mask = jnp.concatenate([batch.mask, jnp.ones_like(extra, bool)], axis=1)
    positions = positions_from_mask(mask)
    whole, _ = model.decode(tokens, positions, mask, visual)
    empty = model.init_cache(count, length + 3)
    first, cache = model.decode(tokens[:, :length], positions[:, :length], mask[:, :length], visual, empty)
    last, after = model.decode(tokens[:, length:], positions[:, length:], mask[:, length:], None, cache)
    return jnp.concatenate([first, last], axis=1), whole, mask, (cache, after)


def our_greedy(checkpoint, batch, layer, count, pad_id, suppress=()):
    """`count` greedy tokens of each row [B, count], none of which ends it."""
    sampling = Sampling(count, temperature=0.0, eos_ids=(), suppress_ids=suppress, pad_id=pad_id)
    return np.asarray(_generate(checkpoint.graphdef, checkpoint.params, batch, jnp.int32(layer), sampling))


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
