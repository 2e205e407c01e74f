"""What the benchmarks share: sizes of models, runs in alternation with an eye on other programs, a machine's rates."""

import dataclasses
import gc
import os
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from icet_jax.models.llava.network import LlavaConfig
from icet_jax.nn.clip import ClipConfig
from icet_jax.nn.llama import LlamaConfig

QUIET = 0.1  # share of all processors that other programs may use during a timed run
Rounds = list[dict[str, Any]]
"""Each round's seconds, processor seconds and others' share by side, and whether it was quiet."""


@dataclasses.dataclass(frozen=True)
class Preset:
    """Sizes of a LLaVA, whose last token stands for images, and its dtype."""

    vision: ClipConfig
    text: LlamaConfig
    dtype: str

    @property
    def config(self) -> LlavaConfig:
        """Of the network."""
        return LlavaConfig(vision=self.vision, text=self.text, image_token_index=self.text.vocab_size - 1)


PRESETS = {
    "tiny": Preset(
        ClipConfig(32, 64, 4, 2, image_size=28, patch_size=14), LlamaConfig(96, 32, 64, 2, 4, 2, 8), "float32"
    ),
    "llava-60m": Preset(
        ClipConfig(256, 1024, 24, 4, image_size=112, patch_size=14),
        LlamaConfig(8192, 512, 1376, 12, 8, 8, 64),
        "float32",
    ),
    "llava-7b": Preset(
        ClipConfig(1024, 4096, 24, 16, image_size=336, patch_size=14),
        LlamaConfig(32064, 4096, 11008, 32, 32, 32, 128),
        "bfloat16",
    ),
}


def rounds(
    sides: Mapping[str, Callable[[], Any]], count: int, warm: Sequence[Callable[[], Any]] | None = None
) -> Rounds:
    """`count` rounds in which each side runs once; rounds that others disturbed are repeated within bounds.

    Args:
      sides: what to time, by name; each returns when it is done.
      count: of rounds.
      warm: what to run first, untimed; all sides if None.
    """
    for run in sides.values() if warm is None else warm:
        run()
    found: Rounds = []
    for attempt in range(2 * count):
        order = list(sides) if attempt % 2 == 0 else list(sides)[::-1]
        results = {name: timed(sides[name]) for name in order}
        quiet = max(others for _, _, others in results.values()) <= QUIET
        kinds = ("seconds", "processor_seconds", "others")
        found.append({"quiet": quiet} | {kind: {n: r[i] for n, r in results.items()} for i, kind in enumerate(kinds)})
        line = ", ".join(f"{name} {results[name][0]:.2f} s" for name in sides)
        print(f"  {line}{'' if quiet else '  (disturbed)'}", flush=True)
        if sum(each["quiet"] for each in found) == count:
            break
    found.sort(key=lambda each: not each["quiet"])
    return found[:count]


def timed(run: Callable[[], Any]) -> tuple[float, float, float]:
    """(seconds, processor seconds, share of the processors that others used) of one run."""
    gc.collect()
    time.sleep(0.3)  # threads of another library stop spinning
    (all_before, own_before), began = _busy(), time.perf_counter()
    run()
    seconds, (all_after, own_after) = time.perf_counter() - began, _busy()
    others = (all_after - all_before) - (own_after - own_before)
    return seconds, own_after - own_before, max(others, 0.0) / seconds / (os.cpu_count() or 1)


def table(found: Rounds, floor: float, peer: str | None) -> dict[str, Any]:
    """Prints medians and spread of every side; returns them."""
    print(f"{'':34} {'seconds':>24} {'cpu s':>7} {'of floor':>9} {'x peer':>22}")
    sides = {}
    for name in found[0]["seconds"]:
        seconds = spread([each["seconds"][name] for each in found])
        cpu = spread([each["processor_seconds"][name] for each in found])
        row: dict[str, Any] = {"seconds": seconds, "processor_seconds": cpu, "of_floor": floor / seconds["median"]}
        ratio = ""
        if peer is not None:
            row["times_peer"] = spread([each["seconds"][peer] / each["seconds"][name] for each in found])
            ratio = "{median:.2f} ({least:.2f} to {most:.2f})".format(**row["times_peer"])
        times = "{median:.2f} ({least:.2f} to {most:.2f})".format(**seconds)
        print(f"{name:34} {times:>24} {cpu['median']:7.2f} {row['of_floor']:9.0%} {ratio:>22}")
        sides[name] = row
    disturbed = sum(not each["quiet"] for each in found)
    if disturbed:
        print(f"{disturbed} of {len(found)} rounds were disturbed by other programs")
    return sides


def spread(values: list[float]) -> dict[str, float]:
    """Median, least and most."""
    return {"median": statistics.median(values), "least": min(values), "most": max(values)}


def gemm_rates(preset: Any, rows: int, with_torch: bool) -> dict[str, float]:
    """Operations a second of the layers' largest product over so many rows, for each library; the best run."""
    text, dtype = preset.text, preset.dtype
    flops = 2 * rows * text.hidden_size * text.intermediate_size
    x, w = jnp.ones((rows, text.hidden_size), dtype), jnp.ones((text.hidden_size, text.intermediate_size), dtype)
    product = jax.jit(jnp.matmul)
    rates = {"jax": flops / best(lambda: product(x, w).block_until_ready())}
    if with_torch:
        import torch

        device = "cuda" if jax.default_backend() == "gpu" else "cpu"
        a = torch.ones(rows, text.hidden_size, dtype=getattr(torch, dtype), device=device)
        b = torch.ones(text.intermediate_size, text.hidden_size, dtype=a.dtype, device=device)

        def run() -> None:
            torch.nn.functional.linear(a, b)
            if device == "cuda":
                torch.cuda.synchronize()

        rates["torch"] = flops / best(run)
    return rates


def reading_rate() -> float:
    """Bytes a second at which an array larger than any cache is read."""
    size = 2**30 if jax.default_backend() == "gpu" else 2**27
    x = jnp.ones((64, size // 64), jnp.float32)
    total = jax.jit(lambda x: x.sum(axis=1))
    return x.nbytes / best(lambda: total(x).block_until_ready())


def best(run: Callable[[], Any], seconds: float = 2.0) -> float:
    """The least time of a run, tried for so many seconds."""
    run()
    least, until = float("inf"), time.perf_counter() + seconds
    while time.perf_counter() < until:
        began = time.perf_counter()
        run()
        least = min(least, time.perf_counter() - began)
    return least


def _busy() -> tuple[float, float]:
    """Seconds that all processors together have worked: for everyone, and for this process."""
    own = sum(os.times()[:2])
    try:
        fields = Path("/proc/stat").read_text().splitlines()[0].split()[1:]
    except OSError:
        return own, own  # not Linux: others are not seen
    ticks = [int(field) for field in fields]
    return (sum(ticks) - ticks[3] - ticks[4]) / os.sysconf("SC_CLK_TCK"), own
