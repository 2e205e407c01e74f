"""All exits x P prompts: the slot engine against the loop that a user of transformers writes today.

    python benchmarks/sweep_vs_transformers.py --out runs/sweep                    # CPU: a LLaVA of about 60M, float32
    python benchmarks/sweep_vs_transformers.py --out runs/sweep --preset llava-7b  # GPU: LLaVA-1.5-7B's shapes, bf16
    python benchmarks/sweep_vs_transformers.py --out runs/sweep --peer none --slots 32,64,128

Both get the same random weights, images and tokens, generate greedily, and stop each response at a length of its own
(uniform between 4 and 64 tokens), which stands for its EOS. The peer runs one batch of all prompts per exit with
`generate` (sdpa, its default cache), as `vision_feature_layer` asks. Runs alternate in this process, pair by pair,
after one of each that is not timed; a pair during which other programs used more than a tenth of the processors is
measured again, at most `--pairs` times more. In float32 the tokens must be equal, but for ties of the two likeliest.

The floor is what no program can avoid: the products of all prompts and tokens at the fastest rate that either library
reaches on one of them here, and each step's keys and values read once at the rate of reading memory. Results go to
OUT/sweep.json. Needs jax, flax, optax and numpy; torch, transformers and safetensors for the peer.
"""

import argparse
import dataclasses
import json
import os
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # torch needs memory of the same device

import jax
import jax.numpy as jnp
import numpy as np
import timing
from flax import nnx
from timing import PRESETS, Preset

from icet_jax.data.padding import prompt_bucket
from icet_jax.generation.engine import Engine, PromptGroup, Prompts
from icet_jax.generation.sampling import Sampling
from icet_jax.models.llava.network import Llava
from icet_jax.nn.protocols import count_parameters, one_image_per_row

TOGETHER = 8
SHORTEST, LONGEST = 4, 64
GAP = 1e-4  # of the two likeliest logits, below which either may be chosen

Answers = dict[tuple[int, int], np.ndarray]
"""Tokens by (prompt, exit)."""


@dataclasses.dataclass(frozen=True)
class Job:
    """What both sides do.

    Attributes:
      preset: sizes.
      tokens: of each prompt.
      pixels: one image each, float32 [P, C, H, W].
      exits: numbers.
      limits: length of each response.
    """

    preset: Preset
    tokens: list[np.ndarray]
    pixels: np.ndarray
    exits: list[int]
    limits: dict[tuple[int, int], int]

    @classmethod
    def make(cls, preset: Preset, prompts: int, exits: int) -> "Job":
        """A job of `prompts` prompts of 8 to 46 words around their image's positions, at the first `exits` exits."""
        draw = np.random.default_rng(0)
        placeholder, patches = preset.text.vocab_size - 1, preset.vision.num_patches
        words = [draw.integers(3, placeholder, count) for count in draw.integers(8, 47, prompts)]
        tokens = [np.concatenate([text[:4], [placeholder] * patches, text[4:]]).astype(np.int32) for text in words]
        size = preset.vision.image_size
        pixels = draw.normal(size=(prompts, 3, size, size)).astype(np.float32)
        chosen = list(range(1, exits + 1))
        pairs = [(row, layer) for row in range(prompts) for layer in chosen]
        limits = dict(zip(pairs, draw.integers(SHORTEST, LONGEST + 1, len(pairs)).tolist(), strict=True))
        return cls(preset, tokens, pixels, chosen, limits)

    def floor(self, flops_rate: float, byte_rate: float) -> dict[str, float]:
        """Seconds of the products, and of reading keys and values (and, for each step of 128 rows, the weights)."""
        model = nnx.eval_shape(lambda: Llava(self.preset.config, rngs=nnx.Rngs(0)))
        text, itemsize = self.preset.text, jnp.dtype(self.preset.dtype).itemsize
        flops = len(self.tokens) * model.operations(1, 1, 1).encode
        read = 0
        for (row, _), limit in self.limits.items():
            length = len(self.tokens[row])
            each = model.operations(length, length, 1)
            flops += each.visual + each.prefill + (limit - 1) * model.operations(length, length + limit // 2, 1).step
            columns = (limit - 1) * (length + limit // 2)
            read += columns * 2 * text.num_hidden_layers * text.num_key_value_heads * text.head_dim * itemsize
        return {"flops": flops, "kv_bytes": read, "seconds": flops / flops_rate + read / byte_rate}


class Ours:
    """The engine; every image is encoded once."""

    def __init__(self, job: Job, graphdef: nnx.GraphDef, params: nnx.State, slots: int) -> None:
        self.job, self.graphdef, self.params, self.name = job, graphdef, params, f"ours, {slots} slots"
        self.sampling = Sampling(LONGEST, 0.0, eos_ids=(), suppress_ids=(job.preset.text.vocab_size - 1,))
        columns = max(prompt_bucket(len(tokens)) for tokens in job.tokens) + LONGEST
        self.engine = Engine(graphdef, params, self.sampling, slots=slots, columns=columns)
        self._encode = jax.jit(lambda params, images: nnx.merge(graphdef, params).encode(images))

    def run(self) -> Answers:
        """Every prompt at every exit."""
        return {item.tag: item.tokens for some in self.engine.run(self._work()) for item in some}

    def _work(self) -> Iterator[PromptGroup]:
        job = self.job
        order = sorted(range(len(job.tokens)), key=lambda row: len(job.tokens[row]))
        for start in range(0, len(order), TOGETHER):
            rows = order[start : start + TOGETHER]
            filled = rows + [rows[0]] * (TOGETHER - len(rows))
            encoded = self._encode(self.params, one_image_per_row(jnp.asarray(job.pixels[filled])))
            pairs = [(row, layer) for row in rows for layer in job.exits]
            for first in range(0, len(pairs), TOGETHER):
                yield self._prompts(pairs[first : first + TOGETHER], rows, encoded)

    def _prompts(self, pairs: list[tuple[int, int]], rows: list[int], encoded: Any) -> PromptGroup:
        job, width = self.job, prompt_bucket(max(len(self.job.tokens[row]) for row, _ in pairs))
        tokens, mask = np.zeros((TOGETHER, width), np.int32), np.zeros((TOGETHER, width), bool)
        places, exits, limit = (np.zeros(TOGETHER, np.int32) for _ in range(3))
        for number, (row, layer) in enumerate(pairs):
            own = job.tokens[row]
            tokens[number, : len(own)], mask[number, : len(own)] = own, True
            places[number], exits[number], limit[number] = rows.index(row), layer, job.limits[row, layer]
        keys = np.zeros((TOGETHER, 2), np.uint32)
        tags = [*pairs, *[None] * (TOGETHER - len(pairs))]
        return PromptGroup(tags, Prompts(tokens, mask, places, exits, keys, limit), encoded)


class Transformers:
    """`generate`, one batch of all prompts per exit."""

    name = "transformers"

    def __init__(self, job: Job, model: Any) -> None:
        import torch

        self.job, self.model, self.torch = job, model, torch
        self.device = "cuda" if torch.cuda.is_available() and jax.default_backend() == "gpu" else "cpu"
        model.to(self.device).eval()
        width = max(map(len, job.tokens))
        tokens, mask = np.zeros((len(job.tokens), width), np.int64), np.zeros((len(job.tokens), width), np.int64)
        for row, own in enumerate(job.tokens):
            tokens[row, width - len(own) :], mask[row, width - len(own) :] = own, 1
        put = lambda array: torch.from_numpy(array).to(self.device)  # noqa: E731
        self.inputs = {
            "input_ids": put(tokens), "attention_mask": put(mask), "pixel_values": put(job.pixels).to(model.dtype),
        }  # fmt: skip
        self.width = width

    def run(self, scores: bool = False) -> Any:
        """Every prompt at every exit; with `scores` also the gaps between the two likeliest tokens."""
        from transformers import StoppingCriteriaList

        answers, gaps = {}, {}
        for layer in self.job.exits:
            limits = self.torch.tensor([self.job.limits[row, layer] for row in range(len(self.job.tokens))])
            limits = limits.to(self.device)

            def ended(tokens: Any, _: Any, limits: Any = limits) -> Any:
                return tokens.shape[1] - self.width >= limits

            self.model.config.vision_feature_layer = layer
            with self.torch.no_grad():
                out = self.model.generate(
                    **self.inputs, do_sample=False, max_new_tokens=LONGEST, eos_token_id=None, pad_token_id=0,
                    suppress_tokens=[self.job.preset.text.vocab_size - 1],
                    stopping_criteria=StoppingCriteriaList([ended]), output_logits=scores,
                    return_dict_in_generate=scores,
                )  # fmt: skip
            tokens = (out.sequences if scores else out)[:, self.width :].cpu().numpy()
            for row in range(len(self.job.tokens)):
                answers[row, layer] = tokens[row, : self.job.limits[row, layer]]
            if scores:
                top = self.torch.stack(out.logits, dim=1).topk(3, dim=-1).values.cpu().float().numpy()
                for row in range(len(self.job.tokens)):
                    gaps[row, layer] = top[row, :, 0] - top[row, :, 1]
        return (answers, gaps) if scores else answers


def models(preset: Preset) -> tuple[nnx.GraphDef, nnx.State, Any]:
    """The same random weights for both: transformers' model, written to disk and read by our importer."""
    import torch
    import transformers

    from icet_jax.models.loading import load_vlm

    vision, text = preset.vision, preset.text
    config = transformers.LlavaConfig(
        vision_config=transformers.CLIPVisionConfig(
            hidden_size=vision.hidden_size, intermediate_size=vision.intermediate_size,
            num_hidden_layers=vision.num_hidden_layers, num_attention_heads=vision.num_attention_heads,
            image_size=vision.image_size, patch_size=vision.patch_size, projection_dim=vision.hidden_size,
        ),
        text_config=transformers.LlamaConfig(
            vocab_size=text.vocab_size, hidden_size=text.hidden_size, intermediate_size=text.intermediate_size,
            num_hidden_layers=text.num_hidden_layers, num_attention_heads=text.num_attention_heads,
            num_key_value_heads=text.num_key_value_heads, max_position_embeddings=4096, rms_norm_eps=text.rms_norm_eps,
        ),
        image_token_index=text.vocab_size - 1, image_seq_length=vision.num_patches,
    )  # fmt: skip
    torch.manual_seed(0)
    previous = torch.get_default_dtype()
    torch.set_default_dtype(getattr(torch, preset.dtype))
    model = transformers.LlavaForConditionalGeneration(config)
    torch.set_default_dtype(previous)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.ndim > 1 and "embed" not in name:
                weight.normal_(0, weight.shape[-1] ** -0.5)  # activations of a natural size
    model.generation_config = transformers.GenerationConfig()
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        checkpoint = load_vlm(Path(folder), dtype=preset.dtype, param_dtype=preset.dtype)
    return checkpoint.graphdef, checkpoint.params, model


def compare(job: Job, ours: Answers, theirs: Answers, gaps: dict[tuple[int, int], np.ndarray]) -> dict[str, int]:
    """How many responses are equal, differ first where the two likeliest tokens tie, or differ."""
    found = {"equal": 0, "tied": 0, "different": 0}
    for pair in job.limits:
        wrong = np.flatnonzero(ours[pair] != theirs[pair])
        tie = len(wrong) and gaps[pair][wrong[0]] < GAP
        found["equal" if not len(wrong) else "tied" if tie else "different"] += 1
    return found


def main() -> int:
    """Runs what the arguments ask for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder of sweep.json")
    parser.add_argument("--preset", choices=PRESETS, default="llava-60m")
    parser.add_argument("--prompts", type=int, default=16)
    parser.add_argument("--exits", type=int, help="the first so many; all if left out")
    parser.add_argument("--slots", default="64", help="comma-separated")
    parser.add_argument("--peer", choices=("transformers", "none"), default="transformers")
    parser.add_argument("--pairs", type=int, default=5)
    options = parser.parse_args()
    preset = PRESETS[options.preset]
    job = Job.make(preset, options.prompts, options.exits or preset.vision.num_hidden_layers)
    device = jax.devices()[0].device_kind
    sides: list[Any] = []
    result: dict[str, Any] = {"device": device, "preset": options.preset, "arguments": sys.argv[1:]}
    if options.peer == "none":
        network = Llava(preset.config, rngs=nnx.Rngs(0), dtype=preset.dtype, param_dtype=preset.dtype)
        graphdef, params = nnx.split(network)
    else:
        graphdef, params, model = models(preset)
        sides.append(Transformers(job, model))
    sides += [Ours(job, graphdef, params, int(count)) for count in options.slots.split(",")]
    total = sum(job.limits.values())
    print(
        f"{options.preset} ({count_parameters(params) / 1e6:.1f}M parameters, {preset.dtype}) on {device}: "
        f"{len(job.exits)} exits x {len(job.tokens)} prompts of {min(map(len, job.tokens))} to "
        f"{max(map(len, job.tokens))} positions, {total:,} tokens",
        flush=True,
    )
    began = time.perf_counter()
    first = sides[-1].run()
    result["cold_seconds"] = time.perf_counter() - began
    print(f"first run of ours, compiling: {result['cold_seconds']:.1f} s", flush=True)
    if options.peer != "none":
        theirs, gaps = sides[0].run(scores=True)
        result["agreement"] = compare(job, first, theirs, gaps)
        print(f"responses: {result['agreement']}", flush=True)
    rounds = timing.rounds(
        {side.name: side.run for side in sides}, options.pairs, warm=[side.run for side in sides[:-1]]
    )
    rates = timing.gemm_rates(preset, TOGETHER * (preset.vision.num_patches + 32), options.peer != "none")
    reading = timing.reading_rate()
    floor = job.floor(max(rates.values()), reading)
    print(
        f"\nfloor: {floor['flops'] / 1e9:.0f} GFLOP at {max(rates.values()) / 1e9:.0f} GFLOP/s, "
        f"{floor['kv_bytes'] / 1e9:.0f} GB of keys and values at {reading / 1e9:.0f} GB/s = {floor['seconds']:.1f} s"
    )
    result |= {"rounds": rounds, "gemm_rates": rates, "reading_rate": reading, "floor": floor, "tokens": total}
    result["sides"] = timing.table(rounds, floor["seconds"], "transformers" if options.peer != "none" else None)
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "sweep.json").write_text(json.dumps(result, indent=1) + "\n")
    return int(preset.dtype == "float32" and result.get("agreement", {}).get("different", 0) > 0)


if __name__ == "__main__":
    sys.exit(main())
