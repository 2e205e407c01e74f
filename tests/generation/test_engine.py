"""The slot engine: every prompt gets the response that it gets alone, bit for bit, whatever surrounds it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from icet_jax.generation import Sampling, engine
from icet_jax.generation.engine import Engine, PromptGroup, Prompts, run_prefix
from icet_jax.nn.protocols import one_image_per_row
from icet_jax.parallel.compilations import CompilationCounter
from tests.generation.test_decode import CONFIG, PATCHES, SUPPRESSED, Llava, padded, pixels, prompts, random_lora, run

LENGTHS = [5, 9, 3, 7, 6, 11]
GREEDY = Sampling(max_new_tokens=20, temperature=0.0, eos_ids=(2, 5, 9, 11), suppress_ids=SUPPRESSED, pad_id=41)
DRAWN = Sampling(max_new_tokens=20, temperature=1.0, eos_ids=(2, 5), suppress_ids=SUPPRESSED, pad_id=41)
TOGETHER, WIDTH = 2, 16


@pytest.fixture(scope="module")
def network():
    graphdef, params = nnx.split(Llava(CONFIG, rngs=nnx.Rngs(0)))
    encoded = jax.jit(lambda params: nnx.merge(graphdef, params).encode(one_image_per_row(pixels(6))))(params)
    return graphdef, params, encoded


def requests(exits=(1, 2, 3)):
    """(row, exit) of six prompts with an image each."""
    return [(row, layer) for row in range(len(LENGTHS)) for layer in exits]


def key(row):
    return jax.random.fold_in(jax.random.key(7), row)


def key_data(rows):
    return np.asarray(jax.random.key_data(jax.vmap(key)(rows)))


def work(chosen, encoded, limits=None, width=WIDTH, together=TOGETHER):
    """PromptGroup in groups of `together`, the last filled up."""
    tokens, mask = map(np.asarray, padded(prompts([1] * len(LENGTHS), LENGTHS), "left", width))
    for start in range(0, len(chosen), together):
        part = chosen[start : start + together]
        rows = np.array([row for row, _ in part] + [0] * (together - len(part)), np.int32)
        real = np.arange(together) < len(part)
        limit = [20 if limits is None else limits[pair] for pair in part] + [0] * (together - len(part))
        exits = np.array([layer for _, layer in part] + [1] * (together - len(part)), np.int32)
        keys = key_data(rows)
        tags = part + [None] * (together - len(part))
        yield PromptGroup(
            tags, Prompts(tokens[rows], mask[rows] & real[:, None], rows, exits, keys, np.int32(limit)), encoded
        )


def answers(network, chosen, sampling=GREEDY, slots=4, lora=None, limits=None, **changes):
    graphdef, params, encoded = network
    machine = Engine(graphdef, params, sampling, slots=slots, columns=WIDTH + 20, lora=lora)
    found = [item for some in machine.run(work(chosen, encoded, limits, **changes)) for item in some]
    assert len(found) == len(chosen) == len({item.tag for item in found})
    return {item.tag: item for item in found}


def assert_same(found, expected):
    for tag, item in found.items():
        np.testing.assert_array_equal(item.tokens, expected[tag].tokens)
        np.testing.assert_array_equal(item.log_probs, expected[tag].log_probs)


@pytest.mark.parametrize("sampling", [GREEDY, DRAWN], ids=["greedy", "drawn"])
@pytest.mark.parametrize("lora", [None, random_lora()], ids=["plain", "adapters"])
def test_responses_are_those_of_a_batch_run_to_its_end(network, sampling, lora):
    graphdef, params, encoded = network
    found = answers(network, requests(), sampling, lora=lora)
    tokens, mask = padded(prompts([1] * len(LENGTHS), LENGTHS))
    keys = jax.vmap(key)(jnp.arange(len(LENGTHS)))
    lengths = set()
    for layer in (1, 2, 3):
        visual = nnx.merge(graphdef, params).visual(encoded, jnp.int32(layer))
        batch = run(graphdef, params, tokens, mask, visual, keys, sampling, lora)
        for row in range(len(LENGTHS)):
            item, count = found[row, layer], int(batch.mask[row].sum())
            np.testing.assert_array_equal(item.tokens, batch.tokens[row, :count])
            np.testing.assert_allclose(item.log_probs, batch.log_probs[row, :count], atol=1e-5)
            lengths.add(count)
    assert len(lengths) > (1 if sampling is GREEDY else 4), "the test needs responses of many lengths"


@pytest.mark.parametrize("sampling", [GREEDY, DRAWN], ids=["greedy", "drawn"])
def test_slot_neighbours_and_order_do_not_change_a_bit(network, sampling):
    expected = answers(network, requests(), sampling)
    backwards = list(reversed(requests()))
    assert_same(answers(network, backwards, sampling), expected)
    shuffled = [requests()[index] for index in np.random.default_rng(0).permutation(len(requests()))]
    assert_same(answers(network, shuffled, sampling), expected)
    assert_same(answers(network, requests()[3:4], sampling), expected)


def test_a_row_stops_at_its_own_limit(network):
    limits = {pair: 1 + index % 20 for index, pair in enumerate(requests())}
    endless = Sampling(20, 0.0, eos_ids=(), suppress_ids=SUPPRESSED)
    whole, cut = answers(network, requests(), endless), answers(network, requests(), endless, limits=limits)
    for pair, limit in limits.items():
        assert len(whole[pair].tokens) == 20
        np.testing.assert_array_equal(cut[pair].tokens, whole[pair].tokens[:limit])


class Stepping(Llava):
    """A model that says, while it runs, that it decodes one more token of every slot."""

    steps = []

    def step(self, *arguments):
        jax.debug.callback(lambda: self.steps.append(1))
        return super().step(*arguments)


def test_slots_are_refilled_before_the_longest_response_ends(network):
    """With limits 20 and 1 in turn a batch of four would wait 19 steps for each; slots need less in all."""
    graphdef, params, encoded = network
    model = nnx.merge(graphdef, params)
    model.__class__ = Stepping
    limits = {pair: 20 if index % 4 == 0 else 1 for index, pair in enumerate(requests())}
    endless = Sampling(20, 0.0, eos_ids=(), suppress_ids=SUPPRESSED)
    Stepping.steps.clear()
    ended = answers((nnx.split(model)[0], params, encoded), requests(), endless, limits=limits)
    jax.effects_barrier()
    order = [requests().index(tag) for tag in ended]
    assert order.index(5) < order.index(0), "a short one of the second four ends before the long one of the first"
    batches = -(-len(requests()) // 4)
    assert 20 < len(Stepping.steps) < 0.85 * batches * 19


@pytest.mark.parametrize(("slots", "before"), [(18, 2), (4, 1)], ids=["nothing waits", "prompts wait"])
def test_the_next_call_starts_before_the_status_is_read_where_no_prompt_waits(network, monkeypatch, slots, before):
    events = []

    class Numpy:
        def __getattr__(self, name):
            return getattr(np, name)

        def asarray(self, array):
            events.append("read")
            return np.asarray(array)

    def decode(*arguments):
        events.append("call")
        return compiled(*arguments)

    compiled = engine.decode
    monkeypatch.setattr(engine, "np", Numpy())
    monkeypatch.setattr(engine, "decode", decode)
    answers(network, requests(), slots=slots)
    assert events.index("read") == before
    calls = [index for index, event in enumerate(events) if event == "call"]
    reads = len(events) - len(calls)
    assert reads == 4 * (len(calls) - 1)  # the last call finds nothing to do, and is not read


def test_exits_and_order_compile_nothing(network):
    answers(network, requests())
    counts = []
    for chosen in (requests(), requests((3,)), list(reversed(requests((2, 1))))):
        with CompilationCounter() as counter:
            answers(network, chosen)
        counts.append(counter.count)
    assert counts[1:] == counts[:1] * 2, "each queue compiles its empty slots, and nothing else"


def test_what_prompts_share_is_run_once(network):
    """Three prompts about one image: the image's part from `run_prefix`, then each prompt's own words."""
    graphdef, params, encoded = network
    generator = np.random.default_rng(3)
    start = np.concatenate([[7], np.full(PATCHES, 40), [8, 9]])
    whole = [np.concatenate([start, generator.integers(6, 40, count)]) for count in (4, 1, 6)]
    exits = np.array([1, 3], np.int32)
    rows, keys, limit = np.array([2, 2], np.int32), key_data(np.arange(2)), np.full(2, 20, np.int32)

    def prompt(tokens, width):
        padding = np.pad(tokens, (width - len(tokens), 0))
        return np.stack([padding] * 2), np.stack([np.arange(width) >= width - len(tokens)] * 2)

    plain, shared = [], []
    prefix = run_prefix(graphdef, None, params, None, Prompts(*prompt(start, 9), rows, exits, keys, limit), encoded)
    for number, tokens in enumerate(whole):
        tags = [(number, 1), (number, 3)]
        plain.append(PromptGroup(tags, Prompts(*prompt(tokens, WIDTH), rows, exits, keys, limit), encoded))
        own = prompt(tokens[len(start) :], 8)
        shared.append(PromptGroup(tags, Prompts(*own, rows, exits, keys, limit), None, prefix))
    found = []
    for queue in (plain, shared):
        machine = Engine(graphdef, params, GREEDY, slots=4, columns=WIDTH + 20)
        found.append({item.tag: item for some in machine.run(iter(queue)) for item in some})
    assert len(found[1]) == 6
    for tag, item in found[1].items():
        np.testing.assert_array_equal(item.tokens, found[0][tag].tokens)
        np.testing.assert_allclose(item.log_probs, found[0][tag].log_probs, atol=1e-5)
