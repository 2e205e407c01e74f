"""Compares generation with the limits of the machine: decoding with its memory bandwidth, prefill with its arithmetic.

    python benchmarks/rollout.py --out runs/rollout                               # CPU: a LLaVA of about 60M, float32
    python benchmarks/rollout.py --out runs/rollout --preset llava-7b --batches 1,8,64   # GPU: LLaVA-1.5-7B's shapes

A decoding step of B rows takes at least the time to read the weights and the rows' keys and values once, at the
published bandwidth of the device's memory or, if none is published, the bandwidth measured here. A prefill takes at
least the time of its matrix products at the device's peak (published, or measured here). Rows have no padding, all
responses have the greatest length, and each time is the median of `--repeats` runs. Results go to OUT/rollout.json.
Needs jax, flax, optax and numpy.
"""

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import timing
from flax import nnx
from timing import PRESETS, Preset

from icet_jax.algorithms.utilisation import device_peak
from icet_jax.generation.decode import advance_all, begin, prefill
from icet_jax.generation.sampling import Sampling
from icet_jax.models.llava.network import Llava
from icet_jax.nn.protocols import count_parameters, one_image_per_row
from icet_jax.parallel import topology

STEPS = 32


class Network:
    """A LLaVA with random weights, and its compiled prefill and decoding."""

    def __init__(self, preset: Preset, prompt: int) -> None:
        self.preset, self.prompt = preset, prompt
        network = jax.jit(
            lambda: nnx.split(Llava(preset.config, rngs=nnx.Rngs(0), dtype=preset.dtype, param_dtype=preset.dtype))[1]
        )
        shapes = nnx.eval_shape(lambda: Llava(preset.config, rngs=nnx.Rngs(0), dtype=preset.dtype))
        self.graphdef, self.params = nnx.split(shapes)[0], network()
        self.sampling = Sampling(STEPS + 1, 0.0, eos_ids=(), suppress_ids=(preset.text.vocab_size - 1,))

        def start(params: Any, tokens: Any, visual: Any) -> Any:
            model, mask = nnx.merge(self.graphdef, params), jnp.ones(tokens.shape, bool)
            logits, cache = prefill(model, tokens, mask, visual)
            keys, limit = jax.random.split(jax.random.key(0), len(tokens)), jnp.full(len(tokens), STEPS + 1, jnp.int32)
            return begin(logits, cache.with_room(STEPS + 1), keys, limit, self.sampling)

        def go_on(params: Any, unstacked: Any, rows: Any) -> Any:
            return advance_all(nnx.merge(self.graphdef, params), rows, self.sampling, unstacked, STEPS)

        self._start, self._decode = jax.jit(start), jax.jit(go_on)
        self.unstacked = jax.jit(lambda params: nnx.merge(self.graphdef, params).unstack_layers())(self.params)

    def inputs(self, batch: int) -> tuple[Any, Any]:
        """Returns (random tokens [B, P] with an image each, image features) for a batch."""
        vision, draw = self.preset.vision, np.random.default_rng(0)
        tokens = draw.integers(3, self.preset.text.vocab_size - 1, (batch, self.prompt)).astype(np.int32)
        tokens[:, 1 : 1 + vision.num_patches] = self.preset.text.vocab_size - 1
        pixels = jnp.asarray(draw.normal(size=(batch, 3, vision.image_size, vision.image_size)), self.preset.dtype)

        @jax.jit
        def features(params: Any, pixels: Any) -> Any:
            model = nnx.merge(self.graphdef, params)
            return model.visual(model.encode(one_image_per_row(pixels)), jnp.int32(1))

        return jnp.asarray(tokens), features(self.params, pixels)

    def bytes_per_step(self, batch: int) -> int:
        """Returns the bytes that a decoding step reads: weights, and all rows' keys and values (half-way through)."""
        text, itemsize = self.preset.text, jnp.dtype(self.preset.dtype).itemsize
        decoder = count_parameters(self.params["language_model"]) - text.vocab_size * text.hidden_size  # no embedding
        columns = self.prompt + STEPS // 2
        cache = 2 * text.num_hidden_layers * batch * columns * text.num_key_value_heads * text.head_dim
        return (decoder + cache) * itemsize

    def prefill_flops(self, batch: int) -> int:
        """Returns the operations of the prefill of a batch."""
        model = nnx.merge(self.graphdef, self.params)
        return batch * model.operations(self.prompt, self.prompt, 1).prefill


def medians(run: Callable[[], Any], repeats: int) -> dict[str, float]:
    """Returns the median, least and most seconds of `repeats` runs, after one that is not timed."""
    jax.block_until_ready(run())
    seconds = []
    for _ in range(repeats):
        began = time.perf_counter()
        jax.block_until_ready(run())
        seconds.append(time.perf_counter() - began)
    return {"median": statistics.median(seconds), "least": min(seconds), "most": max(seconds)}


def measure(network: Network, batch: int, repeats: int, reading: float, flops: float) -> list[dict[str, Any]]:
    """Returns the results of prefill and decoding with one batch size.

    Args:
      network: the network.
      batch: number of rows.
      repeats: number of runs.
      reading: bytes per second that the device can read.
      flops: operations per second that the device can do.
    """
    tokens, visual = network.inputs(batch)
    rows = network._start(network.params, tokens, visual)
    results = []
    prefill_seconds = medians(lambda: network._start(network.params, tokens, visual), repeats)
    bound = network.prefill_flops(batch) / flops
    num_tokens = batch * network.prompt
    results.append(
        {"phase": "prefill", "batch": batch, "seconds": prefill_seconds, "bound": bound, "tokens": num_tokens}
    )
    decode_seconds = medians(lambda: network._decode(network.params, network.unstacked, rows), repeats)
    bound = STEPS * network.bytes_per_step(batch) / reading
    num_tokens = batch * STEPS
    results.append({"phase": "decode", "batch": batch, "seconds": decode_seconds, "bound": bound, "tokens": num_tokens})
    return results


def table(lines: list[dict[str, Any]], phase: str, what: str) -> None:
    """Prints the results of one phase; `what` names its limit."""
    print(f"\n{phase}, bound by {what}")
    print(f"{'batch':>6} {'seconds':>10} {'spread':>22} {'tokens/s':>12} {'bound, s':>10} {'reached':>9}")
    for line in (line for line in lines if line["phase"] == phase):
        seconds = line["seconds"]
        spread = f"({seconds['least']:.4f} to {seconds['most']:.4f})"
        speed = line["tokens"] / seconds["median"]
        share = line["bound"] / seconds["median"]
        times = f"{seconds['median']:>10.4f} {spread:>22}"
        print(f"{line['batch']:>6} {times} {speed:>12,.0f} {line['bound']:>10.4f} {share:>9.0%}")


def main() -> int:
    """Runs the benchmark and writes rollout.json."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder of rollout.json")
    parser.add_argument("--preset", choices=PRESETS, default="llava-60m")
    parser.add_argument("--batches", default="1,16,64", help="comma-separated")
    parser.add_argument("--text-tokens", type=int, default=64, help="of a prompt, beside its image's positions")
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    preset = PRESETS[options.preset]
    network = Network(preset, preset.vision.num_patches + options.text_tokens)
    devices = jax.devices()[:1]
    peak, chip = device_peak(devices, preset.dtype), topology.chip_of(devices[0].device_kind)
    published = chip is not None and chip.bandwidth is not None
    reading = chip.bandwidth if published else timing.reading_rate()
    print(f"{options.preset} ({count_parameters(network.params) / 1e6:.1f}M parameters, {preset.dtype}), {peak}")
    print(f"memory: {reading / 1e9:.0f} GB/s ({'published' if published else 'measured'}); prompts of {network.prompt}")
    lines = []
    for batch in map(int, options.batches.split(",")):
        lines += measure(network, batch, options.repeats, reading, peak.flops)
    table(lines, "prefill", "products at the peak (its share is MFU)")
    table(lines, "decode", f"reading weights, keys and values ({STEPS} steps)")
    options.out.mkdir(parents=True, exist_ok=True)
    facts = {"device": devices[0].device_kind, "peak": peak._asdict(), "bytes_per_second": reading, "lines": lines}
    (options.out / "rollout.json").write_text(json.dumps(facts, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
