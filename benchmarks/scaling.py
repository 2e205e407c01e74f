"""Measures how cost grows with queued prompts, exits, response length and width, on a LLaVA with random weights.

    python benchmarks/scaling.py --out runs/scaling                       # CPU
    python benchmarks/scaling.py --out runs/scaling --only prompts,exits

prompts: time per token of 64 and of 1,024 sequences in 64 slots, measured in turn, `--pairs` times.
exits: calls of the image encoder, and their time, in sweeps of 1 to 24 exits over the same images.
length: temporary memory of the compiled update at A, 2 A and 4 A response tokens, and for comparison the size of the
logits of all positions and the whole vocabulary, which the update never stores at once.
width: time of a sweep at several widths of the decoder, and its operations.

Results go to OUT/scaling.json. Needs jax, flax, optax and numpy.
"""

import argparse
import dataclasses
import json
import resource
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from timing import PRESETS, spread

from icet_jax.generation.engine import Engine, PromptGroup, Prompts
from icet_jax.generation.sampling import Sampling
from icet_jax.models.llava.network import Llava, LlavaConfig
from icet_jax.nn.protocols import one_image_per_row

SLOTS, TOGETHER, TEXT, ANSWER = 64, 8, 16, 32


class Sweep:
    """Runs prompts with an image each at several exits; all responses have the same length."""

    def __init__(self, config: LlavaConfig, images: int) -> None:
        self.config, self.images = config, images
        self.graphdef, self.params = nnx.split(Llava(config, rngs=nnx.Rngs(0)))
        draw, size = np.random.default_rng(0), config.vision.image_size
        self.pixels = jnp.asarray(draw.normal(size=(TOGETHER, 3, size, size)), jnp.float32)
        self.width = config.vision.num_patches + TEXT
        self.tokens = draw.integers(3, config.image_token_index, (TOGETHER, self.width)).astype(np.int32)
        self.tokens[:, 1 : 1 + config.vision.num_patches] = config.image_token_index
        sampling = Sampling(ANSWER, 0.0, eos_ids=(), suppress_ids=(config.image_token_index,))
        self.engine = Engine(self.graphdef, self.params, sampling, slots=SLOTS, columns=self.width + ANSWER)
        self._encode = jax.jit(lambda params, images: nnx.merge(self.graphdef, params).encode(images))
        self.encoded, self.encoding = 0, 0.0

    def run(self, exits: int) -> tuple[float, int]:
        """Generates the responses of all images at the first `exits` exits and returns (seconds, generated tokens)."""
        self.encoded, self.encoding = 0, 0.0
        began = time.perf_counter()
        tokens = sum(len(item.tokens) for some in self.engine.run(self._work(exits)) for item in some)
        return time.perf_counter() - began, tokens

    def _encodings(self) -> list[tuple[int, Any]]:
        """Encodes all images and returns (number of the first image, encoded images) of each batch.

        This happens before the decoder starts, so that the time is that of the encoder alone.
        """
        encodings, began = [], time.perf_counter()
        for start in range(0, self.images, TOGETHER):
            encodings.append((start, self._encode(self.params, one_image_per_row(self.pixels))))
            self.encoded += 1
        jax.block_until_ready(encodings)
        self.encoding = time.perf_counter() - began
        return encodings

    def _work(self, exits: int) -> Iterator[PromptGroup]:
        """Yields the prompts for the engine."""
        for start, encoded in self._encodings():
            for layer in range(1, exits + 1):
                ones = np.ones(TOGETHER, np.int32)
                prompts = Prompts(
                    self.tokens, np.ones_like(self.tokens, bool), np.arange(TOGETHER, dtype=np.int32), layer * ones,
                    np.zeros((TOGETHER, 2), np.uint32), ANSWER * ones,
                )  # fmt: skip
                yield PromptGroup([(start + row, layer) for row in range(TOGETHER)], prompts, encoded)


def prompts(config: LlavaConfig, pairs: int) -> dict[str, Any]:
    """Measures the time per token of 64 and of 1,024 sequences."""
    few, many = Sweep(config, SLOTS), Sweep(config, 16 * SLOTS)
    for sweep in (few, many):
        sweep.run(1)
    times: dict[str, list[float]] = {"64": [], "1024": [], "ratio": []}
    for _ in range(pairs):
        per_token = {}
        for name, sweep, repeats in (("64", few, 16), ("1024", many, 1)):  # equally many tokens on both sides
            results = [sweep.run(1) for _ in range(repeats)]
            per_token[name] = sum(seconds for seconds, _ in results) / sum(tokens for _, tokens in results)
            times[name].append(per_token[name])
        times["ratio"].append(per_token["1024"] / per_token["64"])
        print(f"  {per_token['64'] * 1e3:.3f} and {per_token['1024'] * 1e3:.3f} ms per token", flush=True)
    result = {name: spread(values) for name, values in times.items()}
    print(
        "prompts: 1,024 sequences take {median:.3f} ({least:.3f} to {most:.3f}) of 64's time per token".format(
            **result["ratio"]
        )
    )
    return result


def exits(config: LlavaConfig, pairs: int) -> list[dict[str, Any]]:
    """Measures the image encoder's calls and time in sweeps of more and more exits."""
    sweep, lines = Sweep(config, 2 * TOGETHER), []
    counts = [count for count in (1, 2, 4, 8, 12, 24) if count <= config.vision.num_hidden_layers]
    sweep.run(1)
    for count in counts:
        runs = [(sweep.run(count), sweep.encoded, sweep.encoding) for _ in range(pairs)]
        lines.append({
            "exits": count,
            "seconds": spread([seconds for (seconds, _), _, _ in runs]),
            "encoder_calls": runs[0][1],
            "encoder_seconds": spread([seconds for _, _, seconds in runs]),
        })  # fmt: skip
    print(f"\nexits: {2 * TOGETHER} images\n{'exits':>6} {'seconds':>9} {'encoder calls':>14} {'encoder, s':>11}")
    for line in lines:
        calls, encoder = line["encoder_calls"], line["encoder_seconds"]["median"]
        print(f"{line['exits']:>6} {line['seconds']['median']:>9.2f} {calls:>14} {encoder:>11.3f}")
    return lines


def length(preset: str) -> list[dict[str, Any]]:
    """Measures the temporary memory of the update at several response lengths."""
    import update_vs_torch

    lines = []
    print(f"\nlength: chunk of {16} positions\n{'responses':>10} {'temporaries, MiB':>17} {'B x A x V, MiB':>15}")
    for responses in (32, 64, 128):
        wanted = dataclasses.replace(update_vs_torch.PRESETS[preset], responses=responses)
        job = update_vs_torch.Job(wanted, accumulation=1, epochs=1)
        ours = update_vs_torch.Ours(job, "full")
        logits = wanted.rows * responses * wanted.text.vocab_size * 4
        lines.append({"responses": responses, "temporary_bytes": ours.temporaries, "logits_bytes": logits})
        print(f"{responses:>10} {(ours.temporaries or 0) / 2**20:>17.1f} {logits / 2**20:>15.1f}", flush=True)
    return lines


def width(config: LlavaConfig, pairs: int) -> list[dict[str, Any]]:
    """Measures the time of a sweep at several widths of the decoder."""
    lines = []
    print(f"\nwidth\n{'width':>6} {'seconds':>9} {'GFLOP':>8} {'GFLOP/s':>9}")
    for factor in (1, 2, 3):
        text = dataclasses.replace(
            config.text, hidden_size=256 * factor, intermediate_size=688 * factor,
            num_attention_heads=4 * factor, num_key_value_heads=4 * factor,
        )  # fmt: skip
        sweep = Sweep(dataclasses.replace(config, text=text), SLOTS)
        sweep.run(1)
        seconds = spread([sweep.run(1)[0] for _ in range(pairs)])
        each = nnx.merge(sweep.graphdef, sweep.params).operations(sweep.width, sweep.width + ANSWER, 1)
        flops = SLOTS * (each.encode + each.visual + each.prefill + ANSWER * each.step)
        lines.append({"width": 256 * factor, "seconds": seconds, "flops": flops})
        print(
            f"{256 * factor:>6} {seconds['median']:>9.2f} {flops / 1e9:>8.0f} {flops / 1e9 / seconds['median']:>9.0f}"
        )
    return lines


def main() -> int:
    """Runs the requested measurements and writes scaling.json."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder of scaling.json")
    parser.add_argument("--preset", choices=("tiny", "llava-60m"), default="llava-60m")
    parser.add_argument("--only", default="prompts,exits,length,width", help="comma-separated")
    parser.add_argument("--pairs", type=int, default=5)
    options = parser.parse_args()
    config, wanted = PRESETS[options.preset].config, options.only.split(",")
    result: dict[str, Any] = {"device": jax.devices()[0].device_kind, "arguments": sys.argv[1:]}
    if "prompts" in wanted:
        result["prompts"] = prompts(config, options.pairs)
    if "exits" in wanted:
        result["exits"] = exits(config, options.pairs)
    if "length" in wanted:
        result["length"] = length(options.preset)
    if "width" in wanted:
        result["width"] = width(config, options.pairs)
    result["peak_resident_bytes"] = 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    statistics_of_device = jax.devices()[0].memory_stats() or {}
    result["peak_device_bytes"] = statistics_of_device.get("peak_bytes_in_use")
    print(f"\npeak memory of this process: {result['peak_resident_bytes'] / 2**30:.2f} GiB")
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "scaling.json").write_text(json.dumps(result, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
