"""Operations, speeds and peaks: the public definitions, by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from icet_jax.algorithms.utilisation import Counter, IterationOperations, Peak, device_peak, speeds
from icet_jax.nn.protocols import Operations
from icet_jax.parallel.topology import CHIPS, chip_of
from tests.algorithms import toy

N, HEAD, DEPTH_WIDTH = 1000, 2 * 16 * 16, 7


class Model:
    """A decoder of N weights: 2 N a token, 4 * depth * width a pair of places."""

    hidden_size, vocab_size = 16, 16

    def operations(self, length, cached, per_row):
        layers = 2 * length * N + 4 * length * cached * DEPTH_WIDTH
        step = 2 * N + 4 * cached * DEPTH_WIDTH + HEAD
        return Operations(encode=100, visual=10, project=7, prefill=layers + HEAD, step=step, forward=layers)


def counter(**changes):
    return Counter(Model(), toy.settings(**changes))


@pytest.mark.parametrize(("lora_scale", "per_weight"), [(2.0, 4), (None, 6)], ids=["lora", "full"])
def test_an_update_needs_4n_per_token_under_lora_and_6n_in_full_and_attention_three_times(lora_scale, per_weight):
    done = counter(lora_scale=lora_scale).count(np.array([10, 12]), np.array([5, 0]), np.array([1, 1]), passes=2)
    length = 14  # the last token is not fed; the second row is a filler
    attention = 4 * length**2 * DEPTH_WIDTH
    head = 5 * HEAD
    update = per_weight * length * N + per_weight / 2 * head + 3 * attention
    assert done.update_flops == toy.SETTINGS.epochs * update
    assert done.flops["update"] == done.update_flops + 2 * (2 * length * N + head + attention)
    steps = sum(2 * N + 4 * cached * DEPTH_WIDTH + HEAD for cached in (12, 13, 13, 14))
    assert done.flops["rollout"] == 110 + 2 * 10 * N + 400 * DEPTH_WIDTH + HEAD + steps
    assert (done.rows, done.sampled, done.trained) == (1, 5, 2 * length)


def test_a_trained_projector_is_computed_and_differentiated_in_every_epoch_and_not_once():
    lengths = np.array([10]), np.array([5]), np.array([2])
    both = counter(trained=("policy", "projector")).count(*lengths, sampled=False)
    language = counter().count(*lengths, sampled=False)
    assert both.update_flops - language.update_flops == toy.SETTINGS.epochs * 3 * 2 * 7
    assert both.flops["update"] - language.flops["update"] == (toy.SETTINGS.epochs * 3 - 1) * 2 * 7


def test_responses_of_one_prompt_share_its_images_and_its_prefill():
    lengths = np.array([10, 10, 7, 7]), np.array([5, 3, 0, 0])
    shared = counter().count(*lengths, np.ones(4, int), group_size=2)
    alone = counter().count(*lengths, np.ones(4, int))
    prefill = 2 * 10 * N + 400 * DEPTH_WIDTH + HEAD
    assert alone.flops["rollout"] - shared.flops["rollout"] == 110 + prefill
    assert alone.update_flops == shared.update_flops and shared.rows == 2


def test_a_count_by_xla_agrees():
    """A compiled forward pass does what is counted, and a little more (norms, rotations, softmax)."""
    graphdef, params = toy.model()
    mask = jnp.ones((1, 40), bool)

    def run(tokens):
        model = nnx.merge(graphdef, params)
        return model.logits(model.decode(tokens, tokens, mask)[:, -1])

    forward = sum(Counter(nnx.merge(graphdef, params), toy.SETTINGS)._forward(40, 1, 0))
    compiled = jax.jit(run).lower(jnp.arange(40)[None]).compile()
    depth = toy.TEXT.num_hidden_layers  # XLA counts the body of a loop once
    assert forward < compiled.cost_analysis()["flops"] * depth < 1.6 * forward


def test_speeds_by_hand():
    peak = Peak("device", 1, 1000.0, "made up")
    done = IterationOperations(rows=4, sampled=20, trained=80, flops={"rollout": 100, "update": 900}, update_flops=800)
    row = speeds(done, {"rollout": 1.0, "score": 1.0, "update": 2.0}, 0.5, peak)
    assert row == {
        "perf/time_rollout": 1.0, "perf/time_score": 1.0, "perf/time_update": 2.0, "perf/samples_per_sec": 1.0,
        "perf/tokens_per_sec": 5.0, "perf/tokens_per_sec_rollout": 20.0, "perf/tokens_per_sec_update": 20.0,
        "perf/mfu": 0.15, "perf/mfu_rollout": 0.1, "perf/mfu_update": 0.25, "perf/tokens": 20.0, "perf/flops": 600.0,
    }  # fmt: skip


def test_the_step_that_stops_an_iteration_was_computed():
    row = {"train/updates": 1.0, "train/nonfinite": 0.0, "policy/early_stop": 1.0}
    assert counter().evaluated(row) == 2 / 4
    assert counter().evaluated({"train/updates": 4.0, "train/nonfinite": 0.0}) == 1


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        ("TPU v4", "v4"), ("TPU v5 lite", "v5e"), ("TPU v5", "v5p"), ("TPU v5p", "v5p"), ("TPU v6 lite", "v6e"),
        ("NVIDIA H100 80GB HBM3", "h100"), ("NVIDIA H200", "h200"), ("NVIDIA A100-SXM4-40GB", "a100"),
        ("NVIDIA H100 PCIe", None), ("TPU v4 lite", None), ("TPU v3", None), ("cpu", None), ("NVIDIA L4", None),
    ],
)  # fmt: skip
def test_jax_names_of_devices(kind, name):
    assert chip_of(kind) == (None if name is None else CHIPS[name])


def test_the_peak_of_a_known_chip_is_published_and_of_another_measured():
    found = device_peak(jax.devices()[:1], "float32")
    assert found.flops > 1e8 and "measured: float32" in found.source and found.devices == 1
    chip = type("Device", (), {"device_kind": "TPU v5 lite", "platform": "tpu"})()
    assert device_peak([chip], "bfloat16").flops == 197e12
    assert device_peak([chip] * 4, "bfloat16").flops == 4 * 197e12
