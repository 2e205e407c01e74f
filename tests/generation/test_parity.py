"""Greedy generations equal transformers' at several exits, on random LLaVAs loaded from disk."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from icet_jax.generation import Sampling, generate, suppress_ids
from icet_jax.models.llava.images import image_rows
from icet_jax.models.loading import load_vlm
from icet_jax.nn.protocols import Images
from tests import tiny

torch = pytest.importorskip("torch")
NEW, GAP = 64, 5e-5
IMAGES = [1, 0, 2, 1]


@partial(jax.jit, static_argnums=(0, 4))
def run(graph, params, inputs, exit_layer, sampling):
    model = nnx.merge(graph, params)
    tokens, mask, images = inputs
    visual = model.visual(model.encode(images), exit_layer)
    keys = jax.random.split(jax.random.key(0), tokens.shape[0])
    return generate(model, tokens, mask, visual, keys, sampling)


def hf_greedy(model, inputs, exit_layer, eos_ids, suppressed):
    """Tokens [B, A] and the top-2 gaps [B, A] of transformers' own loop."""
    model.config.vision_feature_layer = exit_layer
    out = model.generate(
        **{name: torch.from_numpy(x) for name, x in inputs.items()},
        do_sample=False,
        max_new_tokens=NEW,
        eos_token_id=list(eos_ids),
        pad_token_id=tiny.PAD,
        suppress_tokens=list(suppressed),
        output_scores=True,
        return_dict_in_generate=True,
    )
    top = torch.stack(out.scores, dim=1).topk(2, dim=-1).values
    return out.sequences[:, inputs["input_ids"].shape[1] :].numpy(), (top[..., 0] - top[..., 1]).numpy()


@pytest.mark.parametrize("shape", [{}, {"num_key_value_heads": 4, "head_dim": 10}], ids=["gqa", "mha, odd head"])
def test_greedy_tokens_equal_transformers(tmp_path, shape):
    model = tiny.llava(seed=3, **shape)
    checkpoint = load_vlm(tiny.save_llava(tmp_path, model, processor=False))
    inputs = tiny.batch(model.config, IMAGES)
    rows = jnp.asarray(image_rows(inputs["input_ids"], 4, checkpoint.config))
    images = Images(pixels=jnp.asarray(inputs["pixel_values"]), rows=rows, num_rows=4, per_row=2)
    arrays = (jnp.asarray(inputs["input_ids"]), jnp.asarray(inputs["attention_mask"], bool), images)
    eos_ids = (tiny.EOS, 70, 71)
    suppressed = suppress_ids(tiny.IMAGE, tiny.PAD, eos_ids)
    sampling = Sampling(NEW, temperature=0.0, eos_ids=eos_ids, suppress_ids=suppressed, pad_id=tiny.PAD)
    said = set()
    for exit_layer in (1, 3, 4):
        expected, gaps = hf_greedy(model, inputs, exit_layer, eos_ids, suppressed)
        out = run(checkpoint.graphdef, checkpoint.params, arrays, jnp.int32(exit_layer), sampling)
        got = np.asarray(out.tokens)[:, : expected.shape[1]]
        assert not np.asarray(out.mask)[:, expected.shape[1] :].any()
        for row in range(4):
            wrong = np.flatnonzero(got[row] != expected[row])
            assert not len(wrong) or gaps[row, wrong[0]] < GAP, f"exit {exit_layer}, row {row}, token {wrong[0]}"
        said.add(got.tobytes())
    assert run._cache_size() <= 2, "a new exit must not compile anything"
    assert len(said) == 3, "the exits must matter"
