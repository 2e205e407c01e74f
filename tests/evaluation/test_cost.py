"""What a sweep will take: operations against those in the traced functions, counts against the sweep itself."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from icet_jax.evaluation import cost
from icet_jax.evaluation.batching import prompt_batch
from icet_jax.evaluation.cost import Cost, Rates, estimate
from icet_jax.evaluation.sweep import encode, sweep
from icet_jax.generation.decode import prefill
from icet_jax.judges.base import Scores
from icet_jax.judges.keywords import RefusalKeywords
from icet_jax.models.clip import ClipConfig
from icet_jax.models.llama import LlamaConfig
from icet_jax.models.llava import LlavaConfig
from tests.evaluation import bundle

RATES = Rates(prompts=1e9, steps=1e8)
CLIP = ClipConfig(1024, 4096, 24, 16, image_size=336, patch_size=14)
LLAMA = LlamaConfig(32064, 4096, 11008, 32, 32, 32, 128)


class Remote(RefusalKeywords):
    name, metric, requests_per_second = "service", "ts", 2.0

    def __call__(self, prompts, responses):
        return {self.name: Scores(np.zeros(len(prompts), np.float32), [None] * len(prompts))}


@pytest.fixture(scope="module")
def vlm(tmp_path_factory):
    return bundle.tiny_vlm(tmp_path_factory.mktemp("vlm"))


def run(vlm, **changes):
    settings = dict(exits=[1, 3], sampling=vlm.sampling(6), batch_size=3, dtype="float32", rates=RATES)
    settings["scorers"] = [RefusalKeywords(), Remote()]
    return estimate(vlm, bundle.rows(), **(settings | changes))


def traced_flops(jaxpr):
    """Twice the multiply-adds of every product and convolution in a jaxpr, those of loops as often as they run."""
    total = 0
    for equation in jaxpr.eqns:
        name, values = equation.primitive.name, equation.params
        out = equation.outvars[0].aval
        if name == "dot_general":
            (contracted, _), _ = values["dimension_numbers"]
            total += 2 * out.size * math.prod(equation.invars[0].aval.shape[axis] for axis in contracted)
        elif name == "conv_general_dilated":
            kernel = equation.invars[1].aval.shape
            total += 2 * out.size * math.prod(kernel) // kernel[values["dimension_numbers"].rhs_spec[0]]
        for inner in jax.tree.leaves(list(values.values()), is_leaf=lambda leaf: hasattr(leaf, "eqns")):
            inner = getattr(inner, "jaxpr", inner)
            if hasattr(inner, "eqns"):
                total += values.get("length", 1) * traced_flops(inner)
    return total


def test_counts_are_the_sweeps_own(vlm):
    found, calls = run(vlm), {}

    class Counting(Remote):
        def __call__(self, prompts, responses):
            calls[self.name] = calls.get(self.name, 0) + len(prompts)
            return super().__call__(prompts, responses)

    sweep(vlm, bundle.rows(), exits=[1, 3], sampling=vlm.sampling(6), scorers=[Counting()], batch_size=3)
    assert (found.rows, found.answers, found.new_tokens) == (7, 14, 84)
    assert found.judged == {"asr/refusal_keywords": 6, "ts/service": calls["service"]}
    assert found.remote_seconds == {"ts/service": 7.0}
    rows = [(list(row.images), row.prompt) for row in bundle.rows()]
    inputs = vlm.processor(images=[images for images, _ in rows], prompts=[prompt for _, prompt in rows])
    assert found.prompt_tokens == inputs["attention_mask"].sum()
    assert run(vlm, exits="all").answers == 28


def test_time_is_between_short_and_long_answers(vlm):
    found = run(vlm)
    before = (found.tower_flops + found.prompt_flops) / RATES.prompts
    assert found.seconds[0] == pytest.approx(before + found.answer_flops / 8 / RATES.steps)
    assert found.seconds[1] == pytest.approx(3 * (before + found.answer_flops / RATES.steps))
    assert run(vlm, rates=None).seconds[0] > 0


def test_costs_add_up(vlm):
    one, other = run(vlm), run(vlm, scorers=[RefusalKeywords()], exits=[2])
    both = sum([one, other], Cost())
    assert both.answers == 21 and both.judged == {"asr/refusal_keywords": 9, "ts/service": 14}
    assert both.remote_seconds == one.remote_seconds
    assert both.seconds == pytest.approx([a + b for a, b in zip(one.seconds, other.seconds, strict=True)])


def test_operations_are_those_of_the_traced_functions(vlm):
    batch = prompt_batch(vlm, bundle.rows()[:1], 1, 1)
    traced = jax.make_jaxpr(encode, static_argnums=0)(vlm.graphdef, vlm.params, batch.images)
    assert cost.tower_flops(vlm.config.vision) == traced_flops(traced.jaxpr)

    def project(params, encoded):
        return nnx.merge(vlm.graphdef, params).visual(encoded, jnp.int32(2))

    encoded = encode(vlm.graphdef, vlm.params, batch.images)
    traced = jax.make_jaxpr(project)(vlm.params, encoded)
    assert cost.projector_flops(vlm.config) == pytest.approx(traced_flops(traced.jaxpr), rel=0.01)

    length = batch.tokens.shape[1]

    def first_logits(params, tokens, mask):
        return prefill(nnx.merge(vlm.graphdef, params), tokens, mask, None, 1)[0]

    traced = traced_flops(jax.make_jaxpr(first_logits)(vlm.params, batch.tokens, batch.mask).jaxpr)
    assert cost.prefill_flops(vlm.config.text, length, length + 1) == traced

    def next_logits(params, cache, token):
        model = nnx.merge(vlm.graphdef, params)
        hidden, _ = model.decode(token, jnp.full((1, 1), length), jnp.ones((1, 1), bool), None, cache)
        return model.logits(hidden[:, 0])

    cache = nnx.merge(vlm.graphdef, vlm.params).init_cache(1, length + 9)
    traced = traced_flops(jax.make_jaxpr(next_logits)(vlm.params, cache, batch.tokens[:, :1]).jaxpr)
    assert cost.step_flops(vlm.config.text, length + 9) == traced


def test_operations_at_full_size():
    """LLaVA-1.5-7B: 6.5e9 decoder weights, so about 1.3e10 operations a token, and 3.7e11 an image."""
    assert cost.step_flops(LLAMA, 1) == pytest.approx(2 * 6.6e9, rel=0.02)
    assert cost.prefill_flops(LLAMA, 640, 640) == pytest.approx(640 * 2 * 6.5e9 + 32 * 4 * 640**2 * 4096, rel=0.02)
    assert cost.tower_flops(CLIP) == pytest.approx(3.9e11, rel=0.1)
    assert cost.projector_flops(LlavaConfig(CLIP, LLAMA, 32000)) == pytest.approx(2 * 576 * 21e6, rel=0.01)
