"""What the compiled update does not do: gradients of frozen weights, logits of whole responses, padding, host syncs."""

import dataclasses

import jax
import jax.extend
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from icet_jax.algorithms import lppo
from icet_jax.algorithms import phases as shared_phases
from icet_jax.algorithms.metrics import host_metrics
from icet_jax.models.llava.network import Llava, LlavaConfig
from tests.algorithms import toy

RUN_KEY = jax.random.key(0)
EXITS = np.array([1, 2, 3, 4, 1, 2, 3, 4], np.int32)


def prepared(settings=toy.SETTINGS, *, longest=None, cut=False):
    """(phases, parameters, state, batch, metrics) of a toy iteration up to its update.

    Responses end after `longest` tokens; with `cut` the phases are told so.
    """
    graphdef, params = toy.model()
    phases = lppo.build(graphdef, settings) if cut else toy.phases(settings)
    state = toy.state(params, settings)
    rollout = toy.phases(settings).rollout(params, state, *toy.inputs(), EXITS, RUN_KEY)
    if longest is not None:
        rollout = rollout._replace(mask=rollout.mask & (jnp.arange(toy.NEW_TOKENS) < longest))
    scores, learned = np.linspace(-1, 1, toy.ROWS).astype(np.float32), np.ones(toy.ROWS, bool)
    state, batch, metrics = phases.prepare(params, state, rollout, scores, learned, longest if cut else None)
    return phases, params, state, batch, metrics


def equations(jaxpr):
    """Every equation, those of inner jaxprs included."""
    for equation in jaxpr.eqns:
        yield equation
        for inner in jax.extend.core.jaxprs_in_params(equation.params):
            yield from equations(getattr(inner, "jaxpr", inner))


def products(settings):
    """Shapes of the results of all matrix products and scatters of an update, and all primitives' names."""
    phases, params, state, batch, _ = prepared(settings)
    found = list(equations(jax.make_jaxpr(phases.update)(params, state, batch, RUN_KEY).jaxpr))
    shapes = {
        variable.aval.shape
        for equation in found
        if equation.primitive.name in ("dot_general", "scatter-add")
        for variable in equation.outvars
    }
    return shapes, {equation.primitive.name for equation in found}


@pytest.mark.parametrize("lora_scale", [2.0, None], ids=["lora", "full"])
def test_frozen_weights_have_no_gradient_and_nothing_calls_the_host(lora_scale):
    """Under LoRA; full fine-tuning has those of the decoder, and shows that the test would see them."""
    shapes, primitives = products(toy.settings(lora_scale=lora_scale))
    width, ffn, vocabulary = toy.TEXT.hidden_size, toy.TEXT.intermediate_size, toy.TEXT.vocab_size
    decoder = {(width, ffn), (ffn, width), (vocabulary, width)}
    assert shapes & decoder == (set() if lora_scale is not None else decoder)
    vision = toy.VISION.hidden_size
    assert not shapes & {(vision, toy.VISION.intermediate_size), (vision, width), (width, width, vision)}
    assert not {name for name in primitives if "callback" in name or name in ("infeed", "outfeed")}


def test_the_state_before_an_update_is_donated():
    phases, params, state, batch, _ = prepared()
    after, _ = phases.update(params, state, batch, RUN_KEY)
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves((state.trainable, state.opt_state)))
    assert not any(leaf.is_deleted() for leaf in jax.tree.leaves((params, batch, after)))


@pytest.mark.parametrize("longest", [1, 2])
def test_columns_that_are_padding_in_every_row_are_left_out_and_change_nothing(monkeypatch, longest):
    monkeypatch.setattr(shared_phases, "_NARROWEST", 2)
    results = []
    for cut, columns in ((True, 2), (False, toy.NEW_TOKENS)):
        phases, params, state, batch, before = prepared(longest=longest, cut=cut)
        assert batch.mask.shape[1] == columns and batch.mask.any()
        state, after = phases.update(params, state, batch, RUN_KEY)
        results.append((jax.device_get(state.trainable), host_metrics(before, after)))
    (mine, my_row), (theirs, their_row) = results
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), mine, theirs)
    assert my_row == pytest.approx(their_row, rel=1e-4, abs=1e-6)


def test_a_narrower_program_is_worth_it():
    assert shared_phases.response_widths(768, 128) == [None, 64]
    assert shared_phases.response_widths(100, 128) == [None, 64, 32]
    assert shared_phases.response_widths(2928, 128) == [None]  # the prompt is most of it
    assert shared_phases.response_widths(48, 16) == [None]
    assert [shared_phases.response_columns(100, 128, longest) for longest in (0, 32, 33, 64, 65, 128)] == [
        32, 32, 64, 64, None, None
    ]  # fmt: skip


def test_every_program_of_a_run_is_lowered_before_it(monkeypatch):
    monkeypatch.setattr(shared_phases, "_NARROWEST", 2)
    graphdef, params = toy.model()
    lowered = lppo.build(graphdef, toy.SETTINGS).lowered(params, toy.state(params), *toy.inputs(), EXITS, RUN_KEY)
    names = [name for name, _ in lowered]
    assert names == ["update", "update of 2 columns", "rollout", "prepare", "prepare of 2 columns"]


def test_doubling_the_response_adds_no_memory_proportional_to_the_vocabulary():
    """Compiled: temporaries of updates whose logits would weigh most."""
    vocabulary, rows, chunk = 8192, 4, 4
    text = dataclasses.replace(toy.TEXT, vocab_size=vocabulary)

    def network():
        return Llava(
            LlavaConfig(vision=toy.VISION, text=text, image_token_index=toy.IMAGE), rngs=nnx.Rngs(0), remat="full"
        )

    def temporaries(length):
        sampling = dataclasses.replace(toy.SETTINGS.sampling, max_new_tokens=length)
        settings = toy.settings(sampling=sampling, log_prob_chunk=chunk, minibatches=1, accumulation=1)
        graphdef, params = nnx.split(nnx.eval_shape(network))
        state = jax.eval_shape(lambda params: toy.state(params, settings), params)
        per_token = jax.ShapeDtypeStruct((rows, length), jnp.float32)
        whole, mask = jax.ShapeDtypeStruct((rows, 8), jnp.int32), jax.ShapeDtypeStruct((rows, 8), bool)
        batch = lppo.TrainBatch(
            prompts=whole, prompt_mask=mask, visual=jax.ShapeDtypeStruct((rows, 4, text.hidden_size), jnp.float32),
            responses=jax.ShapeDtypeStruct((rows, length), jnp.int32),
            mask=jax.ShapeDtypeStruct((rows, length), bool),
            old_log_probs=per_token, old_values=per_token, advantages=per_token, returns=per_token,
        )  # fmt: skip
        update = lppo.build(graphdef, settings).update
        return update.lower(params, state, batch, RUN_KEY).compile().memory_analysis().temp_size_in_bytes

    once, twice = temporaries(16), temporaries(32)
    logits = 4 * rows * vocabulary  # bytes, of one position of each row
    assert once > logits * chunk  # they are seen
    assert twice - once < logits * 16 / 8  # the sixteen more positions take far less than theirs
