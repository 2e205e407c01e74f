"""One PPO update against PyTorch: same model, adapters, batch and loss; and against the time of its matrix products.

    python benchmarks/update_vs_torch.py --out runs/update                         # CPU: a LLaVA of about 60M, float32
    python benchmarks/update_vs_torch.py --out runs/update --remat none,dots,full  # each policy's time and memory
    python benchmarks/update_vs_torch.py --out runs/update --preset llava-7b  # GPU: LLaVA-1.5-7B's shapes, bfloat16
    python benchmarks/update_vs_torch.py --out runs/update --preset llava-7b --peer none --accumulation 8 --rows 64

Weights are random. First both sides' losses and gradients are compared; then updates alternate in this process, pair by
pair, and the table shows medians and spread. A pair during which other programs used more than a tenth of the
processors is measured again, at most `--pairs` times more, and marked if it still was so. The floor is the time of the
update's matrix products at the fastest rate that either library reaches here on one of them. Results go to
OUT/update.json. Needs jax, flax, optax and numpy; torch for the peer.
"""

import argparse
import dataclasses
import functools
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # torch needs memory of the same device

import jax
import jax.numpy as jnp
import numpy as np
import timing
from flax import nnx

import icet_jax.config
from icet_jax.algorithms import lppo
from icet_jax.algorithms.settings import from_config
from icet_jax.algorithms.state import TrainState, init_state
from icet_jax.generation.sampling import Sampling
from icet_jax.models.llava.network import Llava, LlavaConfig
from icet_jax.nn.clip import ClipConfig
from icet_jax.nn.layers import REMAT_POLICIES
from icet_jax.nn.llama import LlamaConfig
from icet_jax.nn.protocols import count_parameters, init_lora
from icet_jax.parallel.sharding import flatten_with_names


@dataclasses.dataclass(frozen=True)
class Preset:
    """Sizes: the model, and the batch of one update (image positions are part of the prompt)."""

    vision: ClipConfig
    text: LlamaConfig
    dtype: str
    rows: int
    text_tokens: int
    responses: int
    rank: int = 8


PRESETS = {
    "tiny": Preset(
        ClipConfig(32, 64, 4, 2, image_size=28, patch_size=14),
        LlamaConfig(96, 32, 64, 2, 4, 2, 8),
        "float32", rows=4, text_tokens=6, responses=8, rank=2,
    ),
    "llava-60m": Preset(
        ClipConfig(256, 1024, 24, 4, image_size=112, patch_size=14),
        LlamaConfig(8192, 512, 1376, 12, 8, 8, 64),
        "float32", rows=16, text_tokens=6, responses=32,
    ),
    "llava-7b": Preset(
        ClipConfig(1024, 4096, 24, 16, image_size=336, patch_size=14),
        LlamaConfig(32064, 4096, 11008, 32, 32, 32, 128),
        "bfloat16", rows=8, text_tokens=64, responses=128,
    ),
}  # fmt: skip


class Job:
    """One update's model, state, batch and settings, on the jax side."""

    def __init__(self, preset: Preset, *, accumulation: int, epochs: int):
        self.preset = preset
        text, vision = preset.text, preset.vision
        self.image, self.pad = text.vocab_size - 1, text.vocab_size - 2
        self.config = LlavaConfig(vision=vision, text=text, image_token_index=self.image)
        sampling = Sampling(preset.responses, eos_ids=(2,), suppress_ids=(self.image, self.pad), pad_id=self.pad)
        default = from_config(icet_jax.config.default(), sampling)
        self.settings = dataclasses.replace(
            default,
            optimizer=dataclasses.replace(default.optimizer, learning_rate=1e-4, max_grad_norm=1.0),
            lora_scale=2.0,
            kl_adaptive=False,
            epochs=epochs,
            accumulation=accumulation,
        )

        @jax.jit
        def make() -> Any:
            return nnx.split(self.network("none"))[1]

        self.params = jax.block_until_ready(make())
        self.batch: lppo.TrainBatch = jax.device_put(self._batch())
        self.key = jax.random.key(0)

    def network(self, remat: str) -> Llava:
        """The model with fresh random weights."""
        dtype = jnp.dtype(self.preset.dtype)
        return Llava(self.config, rngs=nnx.Rngs(0), dtype=dtype, param_dtype=dtype, remat=remat)

    def graphdef(self, remat: str) -> Any:
        """The model's structure under a remat policy."""
        return nnx.split(nnx.eval_shape(functools.partial(self.network, remat)))[0]

    def state(self) -> TrainState:
        """A train state whose adapters and value head are not zero, so that every gradient is at work."""
        shapes, rank = self.config.lora_shapes(), self.preset.rank
        lora = init_lora(shapes, rank=rank, alpha=2.0 * rank, targets=("q_proj", "v_proj"), key=jax.random.key(1))
        state = init_state(
            self.params, lora, hidden_size=self.preset.text.hidden_size, optimizer=self.settings.optimizer, kl_coef=0.0
        )
        random = np.random.default_rng(1)
        moved = jax.tree.map(lambda x: x + 0.02 * random.standard_normal(x.shape).astype(np.float32), state.trainable)
        return state._replace(trainable=moved)

    def _batch(self) -> lppo.TrainBatch:
        """Prompts of unequal lengths, left-padded, an image in each; responses of half to full length."""
        preset, random = self.preset, np.random.default_rng(0)
        rows, new, images = preset.rows, preset.responses, self.config.image_tokens
        width = images + preset.text_tokens
        short = random.integers(0, preset.text_tokens // 2 + 1, rows)
        prompts = np.full((rows, width), self.pad, np.int32)
        for row, missing in enumerate(short):
            words = random.integers(3, self.pad, preset.text_tokens - missing)
            prompts[row, missing:] = np.concatenate([words[:1], np.full(images, self.image), words[1:]])
        lengths = random.integers(new // 2, new + 1, rows)

        def noise(scale: float, offset: float = 0.0) -> np.ndarray:
            return (offset + scale * random.standard_normal((rows, new))).astype(np.float32)

        visual = jnp.asarray(random.standard_normal((rows, images, preset.text.hidden_size)), preset.dtype)
        return lppo.TrainBatch(
            prompts=prompts,
            prompt_mask=np.arange(width) >= short[:, None],
            visual=0.1 * visual,
            responses=random.integers(3, self.pad, (rows, new)).astype(np.int32),
            mask=np.arange(new) < lengths[:, None],
            old_log_probs=noise(0.1, -np.log(preset.text.vocab_size)),
            old_values=noise(0.1),
            advantages=noise(1.0),
            returns=noise(1.0),
        )

    def flops(self) -> int:
        """Of the matrix products that an update cannot do without: no gradients of frozen weights, no recomputation.

        Forward and backward through the layers and through attention, the head forward and backward on response
        positions (not twice), the adapters forward and backward with their own gradients.
        """
        preset, text = self.preset, self.preset.text
        width = self.config.image_tokens + preset.text_tokens + preset.responses - 1
        shapes = self.config.lora_shapes()
        layers = 2 * width * sum(depth * size_in * size_out for depth, size_in, size_out in shapes.values())
        attention = 4 * width**2 * text.num_hidden_layers * text.num_attention_heads * text.head_dim
        head = 2 * preset.responses * text.hidden_size * text.vocab_size
        adapted = [shapes[name] for name in ("q_proj", "v_proj")]
        adapters = 2 * width * sum(depth * preset.rank * (size_in + size_out) for depth, size_in, size_out in adapted)
        return self.settings.epochs * preset.rows * (2 * layers + 3 * attention + 2 * head + 3 * adapters)


class Ours:
    """The compiled update of `icet_jax` under one remat policy."""

    def __init__(self, job: Job, remat: str):
        self.job, self.name = job, f"icet_jax, remat {remat}"
        self.graphdef, self.state = job.graphdef(remat), job.state()
        update = lppo.build(self.graphdef, job.settings).update
        began = time.perf_counter()
        self.compiled = update.lower(job.params, self.state, job.batch, job.key).compile()
        self.compile_seconds = time.perf_counter() - began
        memory = self.compiled.memory_analysis()
        self.temporaries = None if memory is None else memory.temp_size_in_bytes

    def update(self) -> dict[str, float]:
        """One update, until its numbers are here."""
        self.state, metrics = self.compiled(self.job.params, self.state, self.job.batch, self.job.key)
        row = {name: float(value) for name, value in jax.device_get(metrics).items()}
        return {
            "loss": row["loss/total_avg"], "policy": row["loss/policy_avg"], "value": row["loss/value_avg"],
            "entropy": row["policy/entropy_avg"], "grad_norm": row["train/grad_norm"],
        }  # fmt: skip

    def gradients(self) -> tuple[dict[str, float], dict[str, np.ndarray]]:
        """(loss and statistics, gradients by name) of the whole batch at the fresh state."""
        job = self.job

        @jax.jit
        def grad(params: Any, trainable: Any, batch: Any) -> Any:
            def loss(trainable: Any) -> Any:
                return lppo.lppo_loss(self.graphdef, job.settings, params, trainable, batch)

            return jax.value_and_grad(loss, has_aux=True)(trainable)

        (loss, stats), grads = jax.device_get(grad(job.params, job.state().trainable, job.batch))
        names = ("policy", "value", "entropy")
        return {"loss": float(loss)} | {name: float(stats[name]) for name in names}, flatten_with_names(grads)


class Torch:
    """The peer, with the same weights and batch."""

    def __init__(self, job: Job, checkpointing: bool):
        import torch
        from torch_update import Hyperparameters, TorchUpdate, to_torch

        self.job, self.torch = job, torch
        self.name = f"torch {torch.__version__}, eager" + (", layers checkpointed" if checkpointing else "")
        self.device = "cuda" if jax.default_backend() == "gpu" else "cpu"
        torch.set_num_threads(os.cpu_count() or 1)
        settings, optimizer = job.settings, job.settings.optimizer
        hyper = Hyperparameters(
            lora_scale=2.0, clip_range=settings.clip_range, value_coef=settings.value_coef,
            temperature=settings.sampling.temperature, suppress_ids=settings.sampling.suppress_ids,
            learning_rate=optimizer.learning_rate, max_grad_norm=optimizer.max_grad_norm,
        )  # fmt: skip
        weights = {
            name.removeprefix("language_model/"): array
            for name, array in flatten_with_names(job.params).items()
            if name.startswith("language_model/")
        }
        trainable = job.state().trainable
        self.model = TorchUpdate(
            job.preset.text, job.image, weights, trainable["policy"], trainable["value_head"], hyper, self.device,
            checkpointing,
        )  # fmt: skip
        self.batch = to_torch(job.batch, self.device)

    def update(self) -> dict[str, float]:
        """As many optimizer steps as one update of ours, until their numbers are here."""
        rows = [self.model.update(self.batch, self.job.settings.accumulation) for _ in range(self.job.settings.epochs)]
        return {name: float(np.mean([float(row[name]) for row in rows])) for name in rows[0]}

    def gradients(self) -> tuple[dict[str, float], dict[str, np.ndarray]]:
        """As `Ours.gradients`."""
        loss, stats = self.model.loss(self.batch)
        loss.backward()
        return {name: float(value) for name, value in stats.items()}, self.model.gradients()


def agreement(ours: Ours, peer: Torch) -> dict[str, float]:
    """Largest relative differences of the losses and of the gradients (over the largest entry of each)."""
    (mine, my_grads), (theirs, their_grads) = ours.gradients(), peer.gradients()
    if set(my_grads) != set(their_grads):
        raise SystemExit(f"gradients of other weights: {sorted(set(my_grads) ^ set(their_grads))}")
    found = {name: abs(mine[name] - theirs[name]) / max(abs(theirs[name]), 1e-3) for name in mine}
    distances = [np.abs(my_grads[name] - grad).max() / np.abs(grad).max() for name, grad in their_grads.items()]
    return found | {"gradients": float(max(distances))}


def report(
    job: Job, sides: list[Ours | Torch], rounds: list[dict[str, Any]], rates: dict[str, float]
) -> dict[str, Any]:
    """Prints the table; returns its numbers."""
    flops, rate = job.flops(), max(rates.values())
    floor = flops / rate
    peer = next((side.name for side in sides if isinstance(side, Torch)), None)
    print(f"\nfloor: {flops / 1e9:.0f} GFLOP at {rate / 1e9:.0f} GFLOP/s = {floor:.2f} s   ({rates})")
    print(f"{'':34} {'seconds':>24} {'cpu s':>7} {'of floor':>9} {'x peer':>22} {'temporaries':>12}")
    found = {}
    for side in sides:
        seconds = timing.spread([each["seconds"][side.name] for each in rounds])
        cpu = timing.spread([each["processor_seconds"][side.name] for each in rounds])
        row: dict[str, Any] = {"seconds": seconds, "processor_seconds": cpu, "of_floor": floor / seconds["median"]}
        ratio = ""
        if peer is not None:
            row["times_peer"] = timing.spread([each["seconds"][peer] / each["seconds"][side.name] for each in rounds])
            ratio = "{median:.2f} ({least:.2f} to {most:.2f})".format(**row["times_peer"])
        memory = ""
        if isinstance(side, Ours):
            row |= {"temporary_bytes": side.temporaries, "compile_seconds": side.compile_seconds}
            memory = "?" if side.temporaries is None else f"{side.temporaries / 2**20:.0f} MiB"
        found[side.name] = row
        times = "{median:.2f} ({least:.2f} to {most:.2f})".format(**seconds)
        print(f"{side.name:34} {times:>24} {cpu['median']:7.2f} {row['of_floor']:9.0%} {ratio:>22} {memory:>12}")
    return {"flops": flops, "gemm_rates": rates, "floor_seconds": floor, "sides": found}


def main() -> None:
    """Runs what the arguments ask for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder of update.json")
    parser.add_argument("--preset", choices=PRESETS, default="llava-60m")
    parser.add_argument("--remat", default="none", help=f"policies, comma-separated: {', '.join(REMAT_POLICIES)}")
    parser.add_argument("--peer", choices=("torch", "torch-checkpointed", "none"), default="torch")
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--rows", type=int, help="of the batch, instead of the preset's")
    parser.add_argument("--accumulation", type=int, default=1, help="slices of the batch, one after the other")
    parser.add_argument("--epochs", type=int, default=1)
    options = parser.parse_args()
    preset = PRESETS[options.preset]
    if options.rows is not None:
        preset = dataclasses.replace(preset, rows=options.rows)
    job = Job(preset, accumulation=options.accumulation, epochs=options.epochs)
    device = jax.devices()[0].device_kind
    print(f"{options.preset}: {count_parameters(job.params) / 1e6:.1f}M parameters, {preset}, {device}", flush=True)
    sides: list[Ours | Torch] = [Ours(job, name) for name in options.remat.split(",")]
    result: dict[str, Any] = {"device": device, "preset": options.preset, "arguments": sys.argv[1:]}
    if options.peer != "none":
        peer = Torch(job, options.peer == "torch-checkpointed")
        result["agreement"] = agreement(sides[0], peer)  # type: ignore[arg-type]
        print(
            "largest relative differences:", {name: f"{x:.1e}" for name, x in result["agreement"].items()}, flush=True
        )
        sides.append(peer)
    positions = preset.rows * (preset.vision.num_patches + preset.text_tokens + preset.responses - 1)
    rates = timing.gemm_rates(preset, positions, options.peer != "none")
    result["rounds"] = timing.rounds({side.name: side.update for side in sides}, options.pairs)
    result |= report(job, sides, result["rounds"], rates)
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "update.json").write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
