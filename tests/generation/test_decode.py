"""Properties of generation on a random LLaVA: nothing but prompt, images and key decides what a row says."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from icet_jax.generation import Sampling, generate, suppress_ids, token_log_probs
from icet_jax.models.llava.network import Llava, LlavaConfig
from icet_jax.nn.clip import ClipConfig
from icet_jax.nn.layers import positions_from_mask
from icet_jax.nn.llama import LlamaConfig
from icet_jax.nn.protocols import Images, init_lora

IMAGE, PAD, VOCAB, PATCHES = 40, 41, 43, 4
CONFIG = LlavaConfig(
    vision=ClipConfig(16, 24, 3, 2, image_size=8, patch_size=4),
    text=LlamaConfig(VOCAB, 24, 36, 2, 4, 2, 6),
    image_token_index=IMAGE,
)
SUPPRESSED = suppress_ids(IMAGE, PAD, (2,))
SAMPLED = Sampling(max_new_tokens=12, temperature=1.0, eos_ids=(2, 5), suppress_ids=SUPPRESSED, pad_id=PAD)


@pytest.fixture(scope="module")
def model():
    return Llava(CONFIG, rngs=nnx.Rngs(0))


def prompts(images, lengths, seed=0):
    """One prompt per row, its image placeholders after the first token."""
    generator = np.random.default_rng(seed)
    rows = [generator.integers(6, IMAGE, length) for length in lengths]
    return [np.concatenate([r[:1], np.full(n * PATCHES, IMAGE), r[1:]]) for r, n in zip(rows, images, strict=True)]


def padded(rows, side="left", length=None):
    length = length or max(map(len, rows))
    tokens, mask = np.full((len(rows), length), PAD, np.int32), np.zeros((len(rows), length), bool)
    for i, row in enumerate(rows):
        where = slice(length - len(row), length) if side == "left" else slice(0, len(row))
        tokens[i, where], mask[i, where] = row, True
    return jnp.asarray(tokens), jnp.asarray(mask)


def pixels(count, seed=1):
    return jnp.asarray(np.random.default_rng(seed).normal(size=(count, 3, 8, 8)), jnp.float32)


@partial(jax.jit, static_argnums=0)
def encoded_features(graph, params, images):
    model = nnx.merge(graph, params)
    return model.visual(model.encode(images), jnp.int32(2))


def features(model, images, pixels):
    if not sum(images):
        return None
    rows = np.repeat(np.arange(len(images)), images)
    return encoded_features(
        *nnx.split(model), Images(pixels=pixels, rows=jnp.asarray(rows), num_rows=len(images), per_row=max(images))
    )


@partial(jax.jit, static_argnums=(0, 6))
def run(graph, params, tokens, mask, visual, keys, sampling, lora=None):
    return generate(nnx.merge(graph, params), tokens, mask, visual, keys, sampling, lora)


@partial(jax.jit, static_argnums=(0, 6))
def teacher_forced(graph, params, prompts, prompt_mask, visual, out, sampling, lora):
    model, length = nnx.merge(graph, params), sampling.max_new_tokens
    tokens = jnp.concatenate([prompts, out.tokens], axis=1)
    mask = jnp.concatenate([prompt_mask, out.mask], axis=1)
    hidden = model.decode(tokens, positions_from_mask(mask), mask, visual, lora)
    return token_log_probs(
        model,
        hidden[:, -length - 1 : -1],
        out.tokens,
        temperature=sampling.temperature,
        suppress_ids=sampling.suppress_ids,
        chunk=5,
    )[0]


def respond(model, rows, images, image_pixels, keys, sampling=SAMPLED, side="left", length=None, lora=None):
    tokens, mask = padded(rows, side, length)
    graph, params = nnx.split(model)
    return run(graph, params, tokens, mask, features(model, images, image_pixels), keys, sampling, lora)


def random_lora():
    """Adapters on every projection that change what the model says."""
    targets = tuple(CONFIG.lora_shapes())
    lora = init_lora(CONFIG.lora_shapes(), rank=3, alpha=6.0, targets=targets, key=jax.random.key(3))
    noise = np.random.default_rng(3)
    fill = lambda leaf: jnp.asarray(0.1 * noise.normal(size=leaf.shape), leaf.dtype)  # noqa: E731
    return lora.replace(weights=jax.tree.map(fill, lora.weights))


IMAGES, LENGTHS = [1, 0, 2, 1], [5, 9, 3, 7]
KEYS = jax.vmap(partial(jax.random.fold_in, jax.random.key(7)))(jnp.arange(4))


@pytest.fixture(scope="module")
def batch(model):
    return respond(model, prompts(IMAGES, LENGTHS), IMAGES, pixels(4), KEYS)


def test_the_mask_is_a_prefix_that_ends_with_the_eos(batch):
    tokens, mask = np.asarray(batch.tokens), np.asarray(batch.mask)
    ended = 0
    for row in range(4):
        length = mask[row].sum()
        assert mask[row, :length].all() and length >= 1
        assert not np.isin(tokens[row, : length - 1], SAMPLED.eos_ids).any()
        if length < SAMPLED.max_new_tokens:
            ended += 1
            assert tokens[row, length - 1] in SAMPLED.eos_ids
        assert (tokens[row, length:] == PAD).all() and (np.asarray(batch.log_probs)[row, length:] == 0).all()
    assert ended, "the test needs a row that ends early"


@pytest.mark.parametrize(
    "sampling, lora",
    [(SAMPLED, None), (SAMPLED, random_lora()), (Sampling(12, 0.6, 6, 0.9, (2, 5), SUPPRESSED, PAD), None)],
    ids=["plain", "adapters", "truncated"],
)
def test_sampled_log_probs_equal_teacher_forcing(model, batch, sampling, lora):
    rows = prompts(IMAGES, LENGTHS)
    out = respond(model, rows, IMAGES, pixels(4), KEYS, sampling, lora=lora)
    visual = features(model, IMAGES, pixels(4))
    log_probs = teacher_forced(*nnx.split(model), *padded(rows), visual, out, sampling, lora)
    np.testing.assert_allclose(np.where(out.mask, log_probs, 0), out.log_probs, atol=1e-5)
    assert lora is None or (out.tokens != batch.tokens).any(), "the adapters must matter"


@pytest.mark.parametrize("row", range(3))
def test_a_row_alone_says_what_it_says_in_a_batch(model, batch, row):
    first = sum(IMAGES[:row])
    rows, images = prompts(IMAGES, LENGTHS)[row : row + 1], IMAGES[row : row + 1]
    alone = respond(model, rows, images, pixels(4)[first : first + images[0]], KEYS[row : row + 1])
    np.testing.assert_array_equal(alone.tokens[0], batch.tokens[row])
    np.testing.assert_allclose(alone.log_probs[0], batch.log_probs[row], atol=1e-5)


@pytest.mark.parametrize("side, length", [("right", None), ("left", 40)])
def test_padding_does_not_matter(model, batch, side, length):
    out = respond(model, prompts(IMAGES, LENGTHS), IMAGES, pixels(4), KEYS, side=side, length=length)
    np.testing.assert_array_equal(out.tokens, batch.tokens)
    np.testing.assert_array_equal(out.mask, batch.mask)
    np.testing.assert_allclose(out.log_probs, batch.log_probs, atol=1e-5)


def test_slot_and_neighbours_do_not_matter(model, batch):
    order = [2, 3, 0, 1]
    rows, images = prompts(IMAGES, LENGTHS), [IMAGES[i] for i in order]
    shuffled = pixels(4)[jnp.asarray([1, 2, 3, 0])]
    out = respond(model, [rows[i] for i in order], images, shuffled, KEYS[jnp.asarray(order)])
    np.testing.assert_array_equal(out.tokens, batch.tokens[jnp.asarray(order)])
    np.testing.assert_allclose(out.log_probs, batch.log_probs[jnp.asarray(order)], atol=1e-5)


def test_filler_rows_are_empty_and_stop_nothing(model, batch):
    tokens, mask = padded(prompts(IMAGES, LENGTHS))
    tokens = jnp.concatenate([tokens, jnp.full_like(tokens[:1], PAD)])
    mask = jnp.concatenate([mask, jnp.zeros_like(mask[:1])])
    graph, params = nnx.split(model)
    keys = jnp.concatenate([KEYS, KEYS[:1]])
    out = run(graph, params, tokens, mask, features(model, [*IMAGES, 0], pixels(4)), keys, SAMPLED)
    assert not out.mask[4].any() and (out.tokens[4] == PAD).all() and (out.log_probs[4] == 0).all()
    np.testing.assert_array_equal(out.tokens[:4], batch.tokens)


def test_placeholder_and_pad_are_never_sampled(model):
    rows = prompts([0] * 64, [4] * 64)
    keys = jax.random.split(jax.random.key(0), 64)
    flat = Sampling(max_new_tokens=40, temperature=50.0, eos_ids=(), suppress_ids=SUPPRESSED, pad_id=PAD)
    tokens = np.asarray(respond(model, rows, [0] * 64, None, keys, flat).tokens)
    assert not np.isin(tokens, SUPPRESSED).any()
    assert len(np.unique(tokens)) == VOCAB - len(SUPPRESSED)


def test_a_pad_that_ends_responses_may_be_sampled(model):
    keys = jax.random.split(jax.random.key(0), 64)
    settings = Sampling(40, 50.0, eos_ids=(PAD,), suppress_ids=suppress_ids(IMAGE, PAD, (PAD,)), pad_id=PAD)
    out = respond(model, prompts([0] * 64, [4] * 64), [0] * 64, None, keys, settings)
    lengths = np.asarray(out.mask.sum(1))
    assert (np.asarray(out.tokens)[np.arange(64), lengths - 1] == PAD)[lengths < 40].all() and (lengths < 40).any()


def test_the_loop_stops_when_every_row_is_done():
    """Any token ends a response here, so of a budget of a thousand tokens one is spent."""
    settings = Sampling(max_new_tokens=1000, temperature=0.0, eos_ids=tuple(range(VOCAB)), pad_id=PAD)
    steps = []

    class Counting(Llava):
        def prefill(self, tokens, *args):
            jax.debug.callback(lambda: steps.append(tokens.shape))
            return super().prefill(tokens, *args)

        def step(self, tokens, *args):
            jax.debug.callback(lambda: steps.append(tokens.shape))
            return super().step(tokens, *args)

    tokens, mask = padded(prompts([0, 0], [3, 4]))
    out = run(*nnx.split(Counting(CONFIG, rngs=nnx.Rngs(0))), tokens, mask, None, KEYS[:2], settings)
    jax.effects_barrier()
    assert out.mask.sum(1).tolist() == [1, 1] and steps == [(2, 4)]
