"""Runs the same inputs through transformers (torch, float32, CPU) and through our LLaVA."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import torch
from flax import nnx

from icet_jax.checkpoints.hf_import import Checkpoint
from icet_jax.models.loading import load_vlm
from icet_jax.nn.layers import positions_from_mask
from icet_jax.nn.protocols import Images
from tests import tiny

GAP = 5e-5
"""Two best logits nearer than this may change places."""


def load(tmp_path, model, **options) -> Checkpoint:
    return load_vlm(tiny.save_llava(tmp_path, model, processor=False), **options)


def hf_logits(model, inputs, layer=-2):
    """transformers' logits [B, T, V]; as an index, 0 must be given as a list (it crashes otherwise)."""
    tensors = {name: torch.from_numpy(x) for name, x in inputs.items()}
    with torch.no_grad():
        return model(**tensors, vision_feature_layer=[0] if layer == 0 else layer).logits.numpy()


def images_of(inputs, model_config):
    """`Images` of HF inputs, or None."""
    if "pixel_values" not in inputs:
        return None
    counts = (inputs["input_ids"] == model_config.image_token_index).sum(1) // model_config.image_tokens
    return Images(
        pixels=jnp.asarray(inputs["pixel_values"]),
        rows=jnp.asarray(np.repeat(np.arange(len(counts)), counts)),
        num_rows=len(counts),
        per_row=int(max(counts)),
    )


@functools.partial(jax.jit, static_argnums=(0, 6))
def _logits(graphdef, params, tokens, mask, images, exit_layer, upto):
    model = nnx.merge(graphdef, params)
    visual = None if images is None else model.visual(model.encode(images, upto), exit_layer)
    hidden = model.decode(tokens, positions_from_mask(mask), mask, visual)
    return model.logits(hidden)


def our_logits(checkpoint, inputs, layer=None, upto=None, params=None):
    """Our logits [B, T, V] at exit `layer` (the default one if None)."""
    exit_layer = checkpoint.model.default_exit if layer is None else layer
    out = _logits(
        checkpoint.graphdef,
        checkpoint.params if params is None else params,
        jnp.asarray(inputs["input_ids"], jnp.int32),
        jnp.asarray(inputs["attention_mask"], bool),
        images_of(inputs, checkpoint.config),
        jnp.int32(exit_layer),
        upto,
    )
    return np.asarray(out)


def assert_logits_agree(ours, theirs, inputs, tolerance=1e-5):
    """Compares at real tokens only; returns the largest difference."""
    real = inputs["attention_mask"] == 1
    ours, theirs = ours[real], theirs[real]
    difference = np.abs(ours - theirs).max()
    assert difference <= tolerance * max(1.0, theirs.std()), f"logits differ by {difference}"
    best = np.sort(theirs, axis=-1)
    clear = best[:, -1] - best[:, -2] > GAP
    assert (ours.argmax(-1) == theirs.argmax(-1))[clear].all()
    return difference
