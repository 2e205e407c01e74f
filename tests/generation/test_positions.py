"""Positions are the family's own: multimodal rotary embedding passes through rollout, scoring, cache and slots.

The family here is LLaVA whose image tokens have three positions, and whose text goes on after the largest of them. What
it says is compared with a float64 computation over whole sequences that follows transformers' `get_rope_index`.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from icet_jax.algorithms.forward import evaluate_responses
from icet_jax.generation import Sampling
from icet_jax.generation.engine import Engine, PromptGroup, Prompts, run_prefix
from icet_jax.models.llava.network import Llava
from icet_jax.nn.layers import positions_from_mask
from icet_jax.nn.protocols import Images
from tests.generation.test_decode import CONFIG, IMAGE, PAD, PATCHES, SUPPRESSED, padded, pixels, run

SECTIONS = (1, 1, 1)
GRIDS = np.array([[[2, 2]] * 2, [[2, 2]] * 2, [[1, 4]] * 2, [[4, 1]] * 2])  # (high, wide) of each image
COUNTS = [2, 1, 0, 1]
NEW = 8
SAMPLING = Sampling(NEW, 1.0, eos_ids=(), suppress_ids=SUPPRESSED, pad_id=PAD)


class GridLlava(Llava):
    """LLaVA with multimodal rotary positions; `Images.layout` [B, M, 2] are the grids of a row's images."""

    def visual(self, encoded, exits, rows=None):
        grids = encoded.images.layout if rows is None else encoded.images.layout[rows]
        return super().visual(encoded, exits, rows), grids

    def merge(self, tokens, visual):
        return super().merge(tokens, None if visual is None else visual[0])

    def decode(self, tokens, positions, mask, visual=None, lora=None):
        return self.language_model(self.merge(tokens, visual), positions, mask, lora)

    def prefill(self, tokens, mask, visual=None, prefix=None, lora=None):
        positions = self.positions(tokens, mask, visual)
        return self.language_model.prefill(self.merge(tokens, visual), positions, mask, prefix, lora)

    def positions(self, tokens, mask, visual=None):
        index = positions_from_mask(mask)
        if visual is None:
            return jnp.stack([index] * 3)
        grids, is_image = visual[1], (tokens == IMAGE) & mask
        number = jnp.cumsum(is_image, axis=1) - is_image
        image, place = number // PATCHES, jnp.where(is_image, number % PATCHES, 0)
        saved = jnp.pad(jnp.cumsum(PATCHES - grids.max(-1), axis=1), ((0, 0), (1, 0)))
        start = index - place - jnp.take_along_axis(saved, image, axis=1)
        width = jnp.take_along_axis(grids[..., 1], jnp.minimum(image, grids.shape[1] - 1), axis=1)
        return jnp.stack([start, start + place // width, start + place % width])


def positions_by_hand(tokens, grids):
    """[3, T] of one row without padding: text counts on; an image of h x w takes max(h, w) positions."""
    rows, current, images = [], 0, iter(grids)
    while len(rows) < len(tokens):
        if tokens[len(rows)] != IMAGE:
            rows.append((current, current, current))
            current += 1
            continue
        high, wide = next(images)
        rows += [(current, current + row, current + column) for row in range(high) for column in range(wide)]
        current += max(high, wide)
    return np.array(rows).T


def whole_sequence(params, tokens, features, positions):
    """Float64 log-probs [T, V] of one row: a Llama decoder without cache, each frequency with its own position."""
    text, layers = CONFIG.text, params["layers"]
    x = params["embed_tokens"][tokens]
    x[tokens == IMAGE] = features[: (tokens == IMAGE).sum()]
    half = text.head_dim // 2
    axes = [axis for axis, count in enumerate(SECTIONS) for _ in range(count)]
    angle = np.stack([positions[axes[j]] * text.rope_theta ** (-j / half) for j in range(half)], axis=-1)[:, None]

    def norm(x, scale):
        return x / np.sqrt((x**2).mean(-1, keepdims=True) + text.rms_norm_eps) * scale

    def heads(x, count):
        return x.reshape(len(x), count, -1)

    def turned(x):
        first, second = x[..., :half], x[..., half:]
        return np.concatenate([first * np.cos(angle) - second * np.sin(angle),
                               second * np.cos(angle) + first * np.sin(angle)], axis=-1)  # fmt: skip

    for layer in range(text.num_hidden_layers):
        kernel = {name: part["kernel"][layer] for name, part in layers.items() if "kernel" in part}
        y = norm(x, layers["input_layernorm"]["scale"][layer])
        q = turned(heads(y @ kernel["q_proj"], text.num_attention_heads))
        k = turned(heads(y @ kernel["k_proj"], text.num_key_value_heads))
        v = heads(y @ kernel["v_proj"], text.num_key_value_heads)
        k, v = (np.repeat(part, q.shape[1] // k.shape[1], axis=1) for part in (k, v))
        scores = np.einsum("qhd,khd->hqk", q, k) / np.sqrt(text.head_dim)
        weights = np.exp(np.where(np.tri(len(x), dtype=bool), scores, -np.inf))
        attended = np.einsum("hqk,khd->qhd", weights / weights.sum(-1, keepdims=True), v).reshape(len(x), -1)
        x = x + attended @ kernel["o_proj"]
        y = norm(x, layers["post_attention_layernorm"]["scale"][layer])
        gate = y @ kernel["gate_proj"]
        x = x + (gate / (1 + np.exp(-gate)) * (y @ kernel["up_proj"])) @ kernel["down_proj"]
    logits = norm(x, params["norm"]["scale"]) @ params["lm_head"]["kernel"]
    logits[:, list(SUPPRESSED)] = -np.inf
    return logits - np.log(np.exp(logits).sum(-1, keepdims=True))


class Case:
    """Four prompts with two, one, no and one image, the network, and the float64 answer to any sequence."""

    def __init__(self):
        text = dataclasses.replace(CONFIG.text, mrope_section=SECTIONS)
        model = GridLlava(dataclasses.replace(CONFIG, text=text), rngs=nnx.Rngs(0))
        self.graphdef, self.params = nnx.split(model)
        noise, image = np.random.default_rng(0), [IMAGE] * PATCHES
        words = [noise.integers(6, IMAGE, length) for length in (7, 4, 9, 5)]
        self.prompts = [
            np.concatenate([w[:1], image * n, w[1:]]).astype(int) for w, n in zip(words, COUNTS, strict=True)
        ]
        self.tokens, self.mask = padded(self.prompts)
        rows = np.repeat(np.arange(4), COUNTS)
        images = Images(pixels(4), jnp.asarray(rows), num_rows=4, per_row=2, layout=jnp.asarray(GRIDS))
        encode = jax.jit(lambda params, images: nnx.merge(self.graphdef, params).encode(images))
        self.encoded = encode(self.params, images)
        self.visual = jax.jit(lambda params, exits: nnx.merge(self.graphdef, params).visual(self.encoded, exits))(
            self.params, jnp.int32(2)
        )
        self.keys = jax.vmap(functools.partial(jax.random.fold_in, jax.random.key(7)))(jnp.arange(4))
        self.double = jax.tree.map(
            lambda leaf: np.asarray(leaf, np.float64), nnx.to_pure_dict(self.params)["language_model"]
        )

    def expected(self, row, response, positions=positions_by_hand):
        """Float64 log-probs [A] of `response` after the row's prompt."""
        tokens = np.concatenate([self.prompts[row], response])
        features = np.asarray(self.visual[0][row], np.float64)
        log_probs = whole_sequence(self.double, tokens, features, positions(tokens, GRIDS[row]))
        before = len(tokens) - len(response) - 1
        return log_probs[before + np.arange(len(response)), response]


@pytest.fixture(scope="module")
def case():
    return Case()


@pytest.fixture(scope="module")
def rollout(case):
    return run(case.graphdef, case.params, case.tokens, case.mask, case.visual, case.keys, SAMPLING)


def test_positions_are_those_of_the_rule(case):
    """Rows with images go on at a position below the number of their tokens."""
    model = nnx.merge(case.graphdef, case.params)
    found = np.asarray(model.positions(case.tokens, case.mask, case.visual))
    for row, tokens in enumerate(case.prompts):
        np.testing.assert_array_equal(found[:, row, -len(tokens) :], positions_by_hand(tokens, GRIDS[row]))
    assert found[:, :, -1].max(axis=0).tolist() == [10, 5, 8, 8]


def test_rollout_and_scoring_are_those_of_whole_sequences(case, rollout):
    score = jax.jit(
        lambda params, *rows: evaluate_responses(
            nnx.merge(case.graphdef, params), None, None, *rows, temperature=1.0, suppress_ids=SUPPRESSED, chunk=NEW
        )
    )
    scored = score(case.params, case.tokens, case.mask, rollout.tokens, rollout.mask, case.visual)
    for row in range(4):
        expected = case.expected(row, np.asarray(rollout.tokens[row]))
        np.testing.assert_allclose(rollout.log_probs[row], expected, atol=2e-5)
        np.testing.assert_allclose(scored.log_probs[row], expected, atol=2e-5)


def test_the_comparison_sees_positions(case, rollout):
    def counted(tokens, grids):
        return np.stack([np.arange(len(tokens))] * 3)

    for row, count in enumerate(COUNTS):
        response = np.asarray(rollout.tokens[row])
        gap = np.abs(case.expected(row, response, counted) - case.expected(row, response)).max()
        assert gap > 1e-2 if count else gap == 0


def prompt_group(case, rows, tokens, mask, encoded, prefix=None):
    rows = np.array(rows, np.int32)
    keys = np.asarray(jax.random.key_data(case.keys))[rows]
    limit, exits = np.full(len(rows), NEW, np.int32), np.full(len(rows), 2, np.int32)
    return PromptGroup(rows.tolist(), Prompts(tokens, mask, rows, exits, keys, limit), encoded, prefix)


def responses(case, groups):
    engine = Engine(case.graphdef, case.params, SAMPLING, slots=2, columns=32)
    return {item.tag: item for some in engine.run(iter(groups)) for item in some}


def test_slots_that_change_rows_keep_each_rows_position(case, rollout):
    """Two slots take four rows with different offsets one after another."""
    tokens, mask = np.asarray(case.tokens), np.asarray(case.mask)
    groups = [prompt_group(case, rows, tokens[rows], mask[rows], case.encoded) for rows in ([2, 0], [1, 3])]
    for row, item in responses(case, groups).items():
        np.testing.assert_array_equal(item.tokens, rollout.tokens[row])
        np.testing.assert_allclose(item.log_probs, rollout.log_probs[row], atol=1e-5)


def test_prompts_that_continue_a_prefix_go_on_at_its_position(case, rollout):
    rows, shared = [0, 3], [1 + 2 * PATCHES, 1 + PATCHES + 2]
    head = prompt_group(case, rows, *padded([case.prompts[row][:n] for row, n in zip(rows, shared, strict=True)]), None)
    prefix = run_prefix(case.graphdef, None, case.params, None, head.prompts, case.encoded)
    rest = padded([case.prompts[row][n:] for row, n in zip(rows, shared, strict=True)])
    for row, item in responses(case, [prompt_group(case, rows, *rest, None, prefix)]).items():
        np.testing.assert_array_equal(item.tokens, rollout.tokens[row])
        np.testing.assert_allclose(item.log_probs, rollout.log_probs[row], atol=1e-5)
