"""What a sweep will take: operations against those in the traced functions, counts against the sweep itself."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from icet_jax.evaluation.batching import prompt_batch
from icet_jax.evaluation.cost import Cost, Rates, estimate
from icet_jax.evaluation.queue import encode
from icet_jax.evaluation.sweep import sweep
from icet_jax.generation.decode import prefill
from icet_jax.models.llava.network import Llava, LlavaConfig
from icet_jax.models.llava_next.network import LlavaNext, LlavaNextConfig
from icet_jax.models.mllama.network import Mllama, MllamaConfig
from icet_jax.models.mllama.text import MllamaTextConfig
from icet_jax.models.mllama.vision import MllamaVisionConfig
from icet_jax.nn.clip import ClipConfig
from icet_jax.nn.llama import LlamaConfig
from icet_jax.runs.loading import load
from icet_jax.scorers.base import Scores
from icet_jax.scorers.keywords import RefusalKeywords
from tests import tiny, tiny_families, tiny_qwen, tiny_smolvlm
from tests.evaluation import bundle

RATES = Rates(prompts=1e9, steps=1e8)
CLIP = ClipConfig(1024, 4096, 24, 16, image_size=336, patch_size=14)
LLAMA = LlamaConfig(32064, 4096, 11008, 32, 32, 32, 128)


def save_qwen(directory, full=()):
    """A Qwen2.5-VL all of whose blocks are of one kind: the trace of a tower of both kinds has both in every block."""
    return tiny_qwen.save(directory, tiny_qwen.model(vision={"fullatt_block_indexes": list(full)}))


FAMILIES = {
    "LLaVA-1.5": tiny.save_llava,
    "LLaVA-NeXT": tiny_families.save_llava_next,
    "Llama 3.2 Vision": tiny_families.save_mllama,
    "SmolVLM": tiny_smolvlm.save,
    "Qwen2.5-VL": save_qwen,
    "Qwen2.5-VL without windows": functools.partial(save_qwen, full=range(4)),
}


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


def test_attempts_at_forbidden_rows_cost_prompts_answers_and_verdicts(vlm):
    once, thrice = run(vlm), run(vlm, attempts=3)
    assert (once.attempts, thrice.attempts, thrice.rows, thrice.answers) == (7, 13, 7, 26)
    assert thrice.judged == {"asr/refusal_keywords": 18, "ts/service": 26}
    assert thrice.tower_flops == once.tower_flops
    for name in ("prompt_flops", "answer_flops", "new_tokens"):
        assert getattr(thrice, name) * 7 == getattr(once, name) * 13


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


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("images", [0, 2])
def test_operations_are_those_of_the_traced_functions(tmp_path, family, images):
    vlm = load(FAMILIES[family](tmp_path))
    rows = [row for row in bundle.rows() if len(row.images) == images][:1]
    batch, model = prompt_batch(vlm, rows, 1, images), nnx.merge(vlm.graphdef, vlm.params)
    length = batch.tokens.shape[1]
    found = model.operations(length, length + 9, images)

    def counted(function, *arguments):
        return traced_flops(jax.make_jaxpr(function)(vlm.params, *arguments).jaxpr)

    def network(params):
        return nnx.merge(vlm.graphdef, params)

    visual = None
    if images:
        encoded = encode(vlm.graphdef, vlm.params, batch.images)
        assert counted(lambda params: network(params).encode(batch.images)) == images * found.encode
        traced = counted(lambda params, encoded: network(params).visual(encoded, jnp.int32(2)), encoded)
        assert traced == pytest.approx(images * found.visual, rel=0.02)
        visual = model.visual(encoded, jnp.int32(2))

    def first_logits(params, tokens, mask, visual):
        return prefill(network(params), tokens, mask, visual)

    assert counted(lambda *arguments: first_logits(*arguments)[0], batch.tokens, batch.mask, visual) == found.prefill

    def next_logits(params, cache, token):
        model = network(params)
        hidden, _ = model.step(token, jnp.ones(1, bool), cache, model.unstack_layers())
        return model.logits(hidden)

    _, cache = first_logits(vlm.params, batch.tokens, batch.mask, visual)
    assert counted(next_logits, cache.with_room(9), batch.tokens[:, 0]) == found.step


@pytest.mark.parametrize("family", ["LLaVA-NeXT", "Llama 3.2 Vision", "SmolVLM", "Qwen2.5-VL"])
def test_prompts_of_every_family_are_counted(tmp_path, family):
    vlm = load(FAMILIES[family](tmp_path))
    rows = [(list(row.images), row.prompt) for row in bundle.rows()]
    inputs = vlm.processor(images=[images for images, _ in rows], prompts=[prompt for _, prompt in rows])
    assert run(vlm, exits=[1]).prompt_tokens == inputs["attention_mask"].sum()


def test_operations_at_full_size():
    """A 7B LLaVA: 6.5e9 decoder weights, so about 1.3e10 operations a token; LLaVA-1.5: 3.7e11 an image.

    Llama 3.2 Vision: 4 x 1608 positions through 32 blocks of 20e6 weights, and 2.2e12 of attention.
    """
    llava = nnx.eval_shape(lambda: Llava(LlavaConfig(CLIP, LLAMA, 32000), rngs=nnx.Rngs(0)))
    found = llava.operations(640, 640, 1)
    assert llava.operations(1, 1, 1).step == pytest.approx(2 * 6.6e9, rel=0.02)
    assert found.prefill == pytest.approx(31 / 32 * 640 * 2 * 6.5e9 + 31 * 4 * 640**2 * 4096, rel=0.02)
    assert found.encode == pytest.approx(3.9e11, rel=0.1)
    assert found.visual == pytest.approx(2 * 576 * 21e6, rel=0.01)
    pinpoints = ((336, 672), (672, 336), (672, 672), (1008, 336), (336, 1008))
    config = LlavaNextConfig(CLIP, LLAMA, 32000, image_grid_pinpoints=pinpoints)
    tiled = nnx.eval_shape(lambda: LlavaNext(config, rngs=nnx.Rngs(0))).operations(640, 640, 1)
    assert (tiled.encode, tiled.visual, tiled.step) == (5 * found.encode, 5 * found.visual, found.step)
    ratios = tuple((high, wide) for high in range(1, 5) for wide in range(1, 5) if high * wide <= 4)
    vision = MllamaVisionConfig(1280, 5120, 32, 8, 16, 560, 14, (3, 7, 15, 23, 30), ratios)
    text = MllamaTextConfig(LlamaConfig(128256, 4096, 14336, 40, 32, 8, 128), (3, 8, 13, 18, 23, 28, 33, 38))
    network = nnx.eval_shape(lambda: Mllama(MllamaConfig(vision, text, 128256), rngs=nnx.Rngs(0)))
    found, alone = network.operations(64, 64, 1), network.operations(64, 64, 0)
    assert found.encode == pytest.approx(32 * (6432 * 2 * 19.7e6 + 4 * 6432**2 * 1280), rel=0.02)
    assert found.visual == pytest.approx(found.encode / 4 + 2 * 6404 * 7680 * 4096, rel=0.01)
    assert alone.step == pytest.approx(2 * (32 * 218e6 + 0.53e9), rel=0.02)
    assert found.step - alone.step == pytest.approx(8 * (2 * 210e6 + 4 * 6404 * 4096), rel=0.02)
    assert found.prefill - alone.prefill == pytest.approx(
        64 * (found.step - alone.step) + 8 * 2 * 6404 * 8.4e6, rel=0.02
    )
