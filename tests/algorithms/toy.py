"""A toy LLaVA, rollout inputs and settings for the tests of algorithms."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from icet_jax.algorithms import lppo
from icet_jax.algorithms.settings import from_config
from icet_jax.algorithms.state import init_state
from icet_jax.config import default
from icet_jax.generation import Sampling
from icet_jax.models.llava.network import Llava, LlavaConfig
from icet_jax.nn.clip import ClipConfig
from icet_jax.nn.llama import LlamaConfig, lora_shapes
from icet_jax.nn.protocols import Images, init_lora

IMAGE, PAD, EOS = 30, 31, 2
TEXT = LlamaConfig(
    vocab_size=32,
    hidden_size=16,
    intermediate_size=24,
    num_hidden_layers=2,
    num_attention_heads=2,
    num_key_value_heads=1,
    head_dim=8,
)
VISION = ClipConfig(
    hidden_size=12,
    intermediate_size=16,
    num_hidden_layers=4,
    num_attention_heads=2,
    image_size=4,
    patch_size=2,
)
ROWS, NEW_TOKENS = 8, 5
SAMPLING = Sampling(NEW_TOKENS, temperature=0.7, eos_ids=(EOS,), suppress_ids=(IMAGE, PAD), pad_id=PAD)
_DEFAULT = from_config(default(), SAMPLING)
SETTINGS = dataclasses.replace(
    _DEFAULT,
    optimizer=dataclasses.replace(_DEFAULT.optimizer, learning_rate=1e-2, max_grad_norm=1.0),
    lora_scale=2.0,
    epochs=2,
    minibatches=2,
    accumulation=2,
    log_prob_chunk=2,
    kl_adaptive=True,
    kl_horizon=100.0,
    normalise=True,
)


def settings(**changes):
    return dataclasses.replace(SETTINGS, **changes)


def llava(dtype=jnp.float32):
    return Llava(
        LlavaConfig(vision=VISION, text=TEXT, image_token_index=IMAGE),
        rngs=nnx.Rngs(0),
        dtype=dtype,
        param_dtype=dtype,
    )


@functools.cache
def model():
    """(graphdef, params) with weights large enough that exits and images matter."""
    graphdef, params = nnx.split(llava())
    return graphdef, jax.tree.map(lambda x: 1.5 * x, params)


def inputs(seed=0):
    """Left-padded prompts: rows with 0, 1 and 2 images, and one filler row at the end."""
    rng = np.random.default_rng(seed)
    per_row = [1, 0, 2, 1, 1, 0, 2, 0]
    prompts = [
        np.concatenate([rng.integers(3, 30, 2), np.full(4 * count, IMAGE), rng.integers(3, 30, 2 + row % 3)])
        for row, count in enumerate(per_row)
    ]
    width = max(len(prompt) for prompt in prompts)
    tokens = np.full((ROWS, width), PAD, np.int32)
    mask = np.zeros((ROWS, width), bool)
    for row, prompt in enumerate(prompts[:-1]):
        tokens[row, width - len(prompt) :] = prompt
        mask[row, width - len(prompt) :] = True
    rows = np.repeat(np.arange(ROWS), per_row)
    pixels = rng.normal(size=(len(rows) + 1, 3, 4, 4)).astype(np.float32)
    images = Images(
        pixels=jnp.asarray(pixels),
        rows=jnp.asarray(np.append(rows, ROWS), jnp.int32),
        num_rows=ROWS,
        per_row=2,
    )
    return images, tokens, mask


def state(params, config=SETTINGS, seed=0, value_head=True):
    lora = None
    if config.lora_scale is not None:
        targets = ("q_proj", "v_proj", "down_proj")
        lora = init_lora(
            lora_shapes(TEXT), rank=2, alpha=2 * config.lora_scale, targets=targets, key=jax.random.key(seed)
        )
    return init_state(
        params, lora, hidden_size=TEXT.hidden_size, optimizer=config.optimizer, kl_coef=0.02, value_head=value_head
    )


def token_score(rollout):
    """Share of each response's tokens with an id below 12: about a third for the untrained model."""
    hits = (np.asarray(rollout.tokens) < 12) & np.asarray(rollout.mask)
    return (hits.sum(1) / np.maximum(np.asarray(rollout.mask).sum(1), 1)).astype(np.float32)


@functools.cache
def phases(config):
    """The phases for the toy model, compiled once per settings and test run."""
    return lppo.build(model()[0], config)
