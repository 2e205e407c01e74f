"""Llama 3.2 Vision agrees with transformers: logits, hidden states, exits, padding, generation, low scale.

transformers cannot batch rows without images with rows that have some, so each row is its own reference there.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

torch = pytest.importorskip("torch")

from icet_jax.models.mllama import vision as mllama_vision  # noqa: E402
from icet_jax.models.mllama.network import Mllama  # noqa: E402
from icet_jax.nn import fused  # noqa: E402
from tests import tiny_families  # noqa: E402
from tests.models import families  # noqa: E402

SIZES = [[(30, 50)], [], [(20, 200), (57, 57)], [(5, 400)], [(200, 30), (28, 28), (90, 40)]]
"""One image, none, two next to each other, a sliver, three apart; every aspect ratio of up to four tiles."""

CASES = {
    "irregular cross layers": {"num_hidden_layers": 5, "cross_attention_layers": [0, 4], "num_key_value_heads": 4},
    "other vision": {
        "vision": {
            "hidden_size": 40, "attention_heads": 5, "intermediate_size": 61, "num_hidden_layers": 5,
            "num_global_layers": 1, "image_size": 42, "patch_size": 14, "intermediate_layers_indices": [1, 3],
            "max_num_tiles": 2, "supported_aspect_ratios": [[1, 1], [1, 2], [2, 1]],
        },
        "hidden_size": 30, "num_attention_heads": 3, "num_key_value_heads": 1, "intermediate_size": 41,
        "num_hidden_layers": 3, "cross_attention_layers": [1],
    },
    "deeper": {
        "vision": {
            "hidden_size": 64, "attention_heads": 4, "intermediate_size": 128, "num_hidden_layers": 12,
            "num_global_layers": 4, "intermediate_layers_indices": [2, 5, 8, 10],
        },
        "hidden_size": 128, "intermediate_size": 256, "num_attention_heads": 8, "num_key_value_heads": 4,
        "num_hidden_layers": 15, "cross_attention_layers": [3, 8, 13],
    },
}  # fmt: skip


def as_trained(seed, **options):
    return tiny_families.mllama_as_trained(tiny_families.mllama(seed, **options))


@pytest.fixture(scope="module")
def usual(tmp_path_factory):
    """(transformers' model as trained, ours, rows)."""
    model = as_trained(2)
    rows = tiny_families.mllama_rows(model.config, SIZES)
    return model, families.load_mllama(tmp_path_factory.mktemp("mllama"), model), rows


def test_logits_agree(usual):
    """4 heads over 2 of keys and values, two super-blocks of five layers."""
    model, checkpoint, rows = usual
    theirs = families.hf_row_logits(model, rows)
    for pad in ("left", "right"):
        batch = families.mllama_batch(rows, pad)
        families.assert_rows_agree(families.our_logits(checkpoint, batch), batch, theirs)


@pytest.mark.parametrize("case", CASES)
def test_logits_of_other_sizes_agree(tmp_path, case):
    model = as_trained(2, **CASES[case])
    checkpoint = families.load_mllama(tmp_path, model)
    rows = tiny_families.mllama_rows(model.config, SIZES)
    ids = np.concatenate([row["aspect_ratio_ids"][0] for row in rows if "pixel_values" in row])
    assert len(set(ids)) >= 3, "the rows must differ in aspect ratio"
    theirs = families.hf_row_logits(model, rows)
    for pad in ("left", "right"):
        batch = families.mllama_batch(rows, pad)
        tolerance = 2e-5 if case == "deeper" else 1e-5
        families.assert_rows_agree(families.our_logits(checkpoint, batch), batch, theirs, tolerance)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_a_batch_agrees_with_transformers_own(usual, attention):
    """Rows with equally many images, which transformers does batch, and whose fillers then are ours too."""
    model, checkpoint, _ = usual
    sizes = [[(30, 50), (28, 28)], [(20, 200), (57, 57)]]
    rows = tiny_families.mllama_rows(model.config, sizes)
    batch = families.mllama_batch(rows, "right")
    length = batch.tokens.shape[1]
    padded = [
        {
            **row,
            "input_ids": np.asarray(batch.tokens[i : i + 1], np.int64),
            "attention_mask": np.asarray(batch.mask[i : i + 1], np.int64),
            "cross_attention_mask": np.pad(
                row["cross_attention_mask"], ((0, 0), (0, length - row["input_ids"].shape[1]), (0, 0), (0, 0))
            ),
        }
        for i, row in enumerate(rows)
    ]
    inputs = {name: np.concatenate([row[name] for row in padded]) for name in padded[0]}
    model.set_attn_implementation(attention)
    theirs = families.hf_logits(model, inputs)
    model.set_attn_implementation("sdpa")
    real = np.asarray(batch.mask)
    families.assert_agree(families.our_logits(checkpoint, batch)[real], theirs[real])


def test_logits_agree_without_any_image(usual):
    model, checkpoint, _ = usual
    rows = tiny_families.mllama_rows(model.config, [[], []])
    batch = families.mllama_batch(rows)
    families.assert_rows_agree(families.our_logits(checkpoint, batch), batch, families.hf_row_logits(model, rows))


def low_scale():
    model = as_trained(3, scale=1e-2)
    rows = tiny_families.mllama_rows(model.config, SIZES)
    return model, [{k: x * np.float32(1e-2) if k == "pixel_values" else x for k, x in row.items()} for row in rows]


def test_logits_agree_at_low_scale(tmp_path):
    """Embeddings of 1e-2, where a wrong norm epsilon is not lost among larger numbers."""
    model, rows = low_scale()
    checkpoint = families.load_mllama(tmp_path, model)
    batch, theirs = families.mllama_batch(rows), families.hf_row_logits(model, rows)
    families.assert_rows_agree(families.our_logits(checkpoint, batch), batch, theirs)
    assert np.concatenate(theirs).std() > 0.1


@pytest.mark.parametrize("norm", ["MllamaTextRMSNorm", "layernorm_pre"])
def test_low_scale_sees_a_wrong_epsilon(norm):
    model, rows = low_scale()
    before = families.hf_row_logits(model, rows)
    for name, module in model.named_modules():
        if type(module).__name__ == norm:
            module.variance_epsilon = 1e-6
        elif name.endswith(norm):
            module.eps = 1e-6
    after = families.hf_row_logits(model, rows)
    assert max(np.abs(x - y).max() for x, y in zip(before, after, strict=True)) > 1e-3


class Identity(torch.nn.Module):
    """A block that is skipped."""

    def forward(self, hidden_states, **_):
        return hidden_states


class At:
    """transformers' model at an exit under each rule, made by changing its modules for a while."""

    def __init__(self, model, rule, layer):
        self.tower, self.rule, self.layer = model.model.vision_model, rule, layer

    def __enter__(self):
        self.saved = list(self.tower.transformer.layers)
        if self.rule == "E1":
            for index in range(self.layer, len(self.saved)):
                self.tower.transformer.layers[index] = Identity()
            return
        self.hooks = [self.tower.transformer.register_forward_hook(self._final_state)]
        if self.rule == "E5":
            keep = lambda module, args, output: args[0]  # noqa: E731
            self.hooks.append(self.tower.layernorm_post.register_forward_hook(keep))
            self.hooks.append(self.tower.post_tile_positional_embedding.register_forward_hook(keep))
            self.hooks.append(self.tower.global_transformer.register_forward_hook(self._unchanged))

    def _final_state(self, module, args, output):
        output.last_hidden_state = output.hidden_states[self.layer - 1]
        return output

    def _unchanged(self, module, args, output):
        output.last_hidden_state = args[0]
        return output

    def __exit__(self, *_):
        for index, layer in enumerate(self.saved):
            self.tower.transformer.layers[index] = layer
        for hook in getattr(self, "hooks", []):
            hook.remove()


@pytest.mark.parametrize("rule", ["E1", "E2", "E5"])
def test_every_exit_agrees_and_is_compiled_once(tmp_path, rule):
    model = as_trained(4)
    checkpoint = families.load_mllama(tmp_path, model, exit_rule=rule)
    rows = tiny_families.mllama_rows(model.config, SIZES)
    batch, plain = families.mllama_batch(rows), families.hf_row_logits(model, rows)
    compiled, outputs = families.logits_of._cache_size(), []
    for layer in range(1, checkpoint.model.num_exits + 1):
        ours = families.our_logits(checkpoint, batch, layer)
        with At(model, rule, layer):
            theirs = families.hf_row_logits(model, rows)
        families.assert_rows_agree(ours, batch, theirs)
        outputs.append(ours[np.asarray(batch.mask)])
    assert families.logits_of._cache_size() <= compiled + 1
    for first, second in zip(outputs, outputs[1:], strict=False):
        assert np.abs(first - second).max() > 0.02, "the exits must matter"
    is_default = [np.abs(output - np.concatenate(plain)).max() < 1e-4 for output in outputs]
    assert is_default == [False] * (len(outputs) - 1) + [rule != "E5"]
    assert rule in checkpoint.model.exit_definition


@pytest.mark.parametrize("capture", ["input", "output"])
def test_captured_intermediates(tmp_path, capture):
    """ "output" is what transformers does today, "input" what the model was trained with."""
    model = tiny_families.mllama(5)
    checkpoint = families.load_mllama(tmp_path, model, capture=capture)
    rows = tiny_families.mllama_rows(model.config, SIZES)
    batch = families.mllama_batch(rows)
    ours = families.our_logits(checkpoint, batch)
    other = families.hf_row_logits(model, rows)
    if capture == "output":
        families.assert_rows_agree(ours, batch, other)
        return
    assert np.abs(ours[np.asarray(batch.mask)] - np.concatenate(other)).max() > 0.05
    families.assert_rows_agree(ours, batch, families.hf_row_logits(tiny_families.mllama_as_trained(model), rows))


def test_every_hidden_state_agrees(usual):
    """Of the local blocks, padding tokens and absent tiles included, and what the projector gets."""
    model, checkpoint, rows = usual
    batch = families.mllama_batch(rows)
    found = []
    hook = model.model.vision_model.transformer.register_forward_hook(
        lambda module, args, output: found.append(torch.stack([args[0], *output.hidden_states]))
    )
    theirs = []
    for row in rows:
        if "pixel_values" in row:
            images = {name: torch.from_numpy(row[name]) for name in row if "pixel" in name or "aspect" in name}
            with torch.no_grad():
                theirs.append(model.model.vision_model(**images).last_hidden_state[0])
    hook.remove()
    states = torch.cat(found, dim=1).numpy()
    ours = np.asarray(checkpoint.model.hidden_states(batch.images))
    assert ours.shape == states.shape == (7, 7, 4 * 24, 24)
    assert np.abs(ours - states).max() <= 1e-5 * max(1.0, states.std())
    projected = torch.cat(theirs).numpy()
    count = jnp.full(len(projected), checkpoint.model.default_exit)
    features = checkpoint.model.vision_tower.features(jnp.asarray(ours), count, batch.images.layout)
    assert np.abs(np.asarray(features) - projected.reshape(features.shape)).max() <= 1e-5 * max(1.0, projected.std())


@pytest.mark.parametrize("layer", [2, 6])
def test_greedy_tokens_are_the_same(usual, layer):
    model, checkpoint, rows = usual
    with At(model, "E1", layer):
        theirs = [families.hf_greedy(model, row, 64, tiny_families.MLLAMA_PAD)[0] for row in rows]
    for pad in ("left", "right"):
        ours = families.our_greedy(checkpoint, families.mllama_batch(rows, pad), layer, 64, tiny_families.MLLAMA_PAD)
        np.testing.assert_array_equal(ours, np.stack(theirs))


def test_joined_projections_say_the_same(usual, monkeypatch):
    """As on GPUs; 12 tokens, which no other test asks for, so that the program is traced here."""
    model, checkpoint, rows = usual
    with At(model, "E1", 6):
        theirs = [families.hf_greedy(model, row, 12, tiny_families.MLLAMA_PAD)[0] for row in rows]
    joined = []
    monkeypatch.setattr(fused, "platform_of", lambda device: joined.append(device) or "gpu")
    ours = families.our_greedy(checkpoint, families.mllama_batch(rows), 6, 12, tiny_families.MLLAMA_PAD)
    assert joined
    np.testing.assert_array_equal(ours, np.stack(theirs))


def test_one_prefill_serves_several_responses(usual):
    """The cache of the images is repeated with that of the text."""
    _, checkpoint, rows = usual
    once, thrice = (
        families.our_greedy(checkpoint, families.mllama_batch(rows), 4, 8, tiny_families.MLLAMA_PAD, copies=copies)
        for copies in (1, 3)
    )
    np.testing.assert_array_equal(thrice, np.repeat(once, 3, axis=0))


@pytest.mark.parametrize(("pad", "suffix"), [("left", 0), ("right", 0), ("right", 2)])
def test_cached_equals_uncached(usual, pad, suffix):
    """The images' keys and values are made once, with the prompt or what it begins with."""
    _, checkpoint, rows = usual
    batch = families.mllama_batch(rows, pad)
    found, expected, caches = families.cached_and_uncached(
        checkpoint.graphdef, checkpoint.params, batch, jnp.int32(4), suffix
    )
    np.testing.assert_allclose(found, expected, atol=1e-5)
    before, after = caches
    assert [leaf.shape for leaf in before.k] == [(len(rows), 2, 3 * 4 * 17, 8)] * 2
    jax.tree.map(np.testing.assert_array_equal, before.k, after.k)


@pytest.mark.parametrize("rule", ["E1", "E2", "E5"])
def test_rows_are_picked_in_any_order(tmp_path, usual, rule):
    model, _, rows = usual
    families.assert_rows_are_picked(families.load_mllama(tmp_path, model, exit_rule=rule), families.mllama_batch(rows))


def test_each_row_may_have_its_own_exit(usual):
    _, checkpoint, rows = usual
    batch = families.mllama_batch(rows)
    exits = np.array([1, 2, 6, 4, 3])
    ours = np.asarray(families.logits_of(checkpoint.graphdef, checkpoint.params, batch, jnp.asarray(exits)))
    for row, layer in enumerate(exits):
        alone = families.our_logits(checkpoint, batch, layer)[row]
        np.testing.assert_allclose(ours[row], alone, atol=1e-5)


@pytest.mark.parametrize(("rule", "computed"), [("E1", 3), ("E2", 5)])
def test_upto_computes_what_the_exit_needs(usual, rule, computed):
    """Without a truncated encoder the last captured intermediate (what enters block 5 here) is needed too."""
    _, checkpoint, rows = usual
    network = Mllama(
        dataclasses.replace(
            checkpoint.config,
            exit_rule=rule,
            vision=dataclasses.replace(checkpoint.config.vision, intermediate_layers_indices=(1, 2, 5)),
        ),
        rngs=nnx.Rngs(0),
    )
    images, (graphdef, params) = families.mllama_batch(rows[:1]).images, nnx.split(network)

    @functools.partial(jax.jit, static_argnums=1)
    def visual(params, upto):
        model = nnx.merge(graphdef, params)
        encoded = model.encode(images, upto)
        return encoded.states, model.visual(encoded, jnp.int32(3)).states

    (states, part), (_, whole) = visual(params, 3), visual(params, None)
    assert states.shape[0] == computed + 1
    np.testing.assert_allclose(part, whole, atol=1e-6)


def test_filler_images_change_nothing(usual):
    """Slots beyond the images, whose row is one past the last, as data sets' batches have them."""
    _, checkpoint, rows = usual
    batch = families.mllama_batch(rows)
    images = batch.images
    more = images.replace(
        pixels=jnp.concatenate([images.pixels, jnp.zeros_like(images.pixels[:3])]),
        rows=jnp.concatenate([images.rows, jnp.full(3, len(rows), jnp.int32)]),
        layout=jnp.concatenate([images.layout, jnp.zeros(3, jnp.int32)]),
        per_row=4,
    )
    ours, real = families.our_logits(checkpoint, batch), np.asarray(batch.mask)
    filled = families.our_logits(checkpoint, batch._replace(images=more))
    assert np.abs(ours - filled)[real].max() <= 1e-5


def test_bfloat16_stays_near_float32(usual, tmp_path):
    model, _, rows = usual
    half = families.load_mllama(tmp_path, model, dtype="bfloat16")
    batch, theirs = families.mllama_batch(rows), np.concatenate(families.hf_row_logits(model, rows))
    ours = families.our_logits(half, batch)[np.asarray(batch.mask)]
    assert np.abs(ours - theirs).max() <= 0.15
    assert (ours.argmax(-1) == theirs.argmax(-1)).mean() >= 0.9


def test_chunks_of_images_change_nothing_but_memory(usual, monkeypatch):
    _, checkpoint, rows = usual
    images = families.mllama_batch(rows * 2).images

    def visual(params, images):
        model = nnx.merge(checkpoint.graphdef, params)
        return model.visual(model.encode(images), jnp.int32(5))

    def compiled():
        return jax.jit(lambda *args: visual(*args)).lower(checkpoint.params, images).compile()

    whole = compiled()
    monkeypatch.setattr(mllama_vision, "_SCORE_BYTES", 1)
    chunked = compiled()
    found, expected = (program(checkpoint.params, images) for program in (chunked, whole))
    np.testing.assert_allclose(found.states, expected.states, atol=1e-5)
    np.testing.assert_array_equal(found.tiles, expected.tiles)
    used = [program.memory_analysis().temp_size_in_bytes for program in (chunked, whole)]
    scores = 3 * (4 * 24) ** 2 * 4  # of one image
    assert used[1] - used[0] > 8 * scores, used


@pytest.mark.parametrize(("count", "size"), [(7, 3), (8, 2), (5, 1), (4, 9)])
def test_in_chunks_is_the_function_itself(count, size):
    x, y = np.random.default_rng(0).normal(size=(2, count, 5)).astype(np.float32)
    sizes = []

    def function(x, y):
        sizes.append(x.shape[0])
        return jnp.tanh(x) * y

    found = mllama_vision.in_chunks(function, size, jnp.asarray(x), jnp.asarray(y))
    np.testing.assert_allclose(found, np.tanh(x) * y, atol=1e-6)
    assert max(sizes) <= size * jax.device_count()
