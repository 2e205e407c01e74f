"""What the benchmarks share: sizes of models, timing of alternatives in turn, and speeds of the machine."""

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
"""One dict per round: `quiet`, whether other programs left the machine alone, and {side: value} of `seconds`,
`processor_seconds` and `others` (the share of all processors that other programs used)."""


@dataclasses.dataclass(frozen=True)
class Preset:
    """Sizes and dtype of a LLaVA. The last token of its vocabulary is the image placeholder."""

    vision: ClipConfig
    text: LlamaConfig
    dtype: str

    @property
    def config(self) -> LlavaConfig:
        """Config of the network."""
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
    """Times several alternatives in rounds, in each of which every side runs once.

    Up to `count` rounds that other programs disturbed are repeated.

    Args:
      sides: {name: function to time, which returns when its work is done}.
      count: number of rounds.
      warm: functions to run first without timing them; all sides if None.

    Returns:
      `count` rounds, quiet ones first.
    """
    for run in sides.values() if warm is None else warm:
        run()
    results: Rounds = []
    for attempt in range(2 * count):
        order = list(sides) if attempt % 2 == 0 else list(sides)[::-1]
        times = {name: timed(sides[name]) for name in order}
        quiet = max(others for _, _, others in times.values()) <= QUIET
        keys = ("seconds", "processor_seconds", "others")
        columns = {key: {name: values[i] for name, values in times.items()} for i, key in enumerate(keys)}
        results.append({"quiet": quiet} | columns)
        line = ", ".join(f"{name} {times[name][0]:.2f} s" for name in sides)
        print(f"  {line}{'' if quiet else '  (disturbed)'}", flush=True)
        if sum(result["quiet"] for result in results) == count:
            break
    results.sort(key=lambda result: not result["quiet"])
    return results[:count]


def timed(run: Callable[[], Any]) -> tuple[float, float, float]:
    """Runs a function and returns (seconds, processor seconds, share of all processors that other programs used)."""
    gc.collect()
    time.sleep(0.3)  # threads of another library stop spinning
    (all_before, own_before), began = _processor_seconds(), time.perf_counter()
    run()
    seconds, (all_after, own_after) = time.perf_counter() - began, _processor_seconds()
    others = (all_after - all_before) - (own_after - own_before)
    return seconds, own_after - own_before, max(others, 0.0) / seconds / (os.cpu_count() or 1)


def table(results: Rounds, floor: float, peer: str | None) -> dict[str, Any]:
    """Prints the median and range of every side, and returns them.

    Args:
      results: result of `rounds`.
      floor: least possible time in seconds, with which every side is compared.
      peer: side with which every other side is compared; None for no comparison.
    """
    print(f"{'':34} {'seconds':>24} {'cpu s':>7} {'of floor':>9} {'x peer':>22}")
    sides = {}
    for name in results[0]["seconds"]:
        seconds = spread([result["seconds"][name] for result in results])
        cpu = spread([result["processor_seconds"][name] for result in results])
        row: dict[str, Any] = {"seconds": seconds, "processor_seconds": cpu, "of_floor": floor / seconds["median"]}
        ratio = ""
        if peer is not None:
            row["times_peer"] = spread([result["seconds"][peer] / result["seconds"][name] for result in results])
            ratio = "{median:.2f} ({least:.2f} to {most:.2f})".format(**row["times_peer"])
        times = "{median:.2f} ({least:.2f} to {most:.2f})".format(**seconds)
        print(f"{name:34} {times:>24} {cpu['median']:7.2f} {row['of_floor']:9.0%} {ratio:>22}")
        sides[name] = row
    disturbed = sum(not result["quiet"] for result in results)
    if disturbed:
        print(f"{disturbed} of {len(results)} rounds were disturbed by other programs")
    return sides


def spread(values: list[float]) -> dict[str, float]:
    """Returns the median, least and most of some values."""
    return {"median": statistics.median(values), "least": min(values), "most": max(values)}


def gemm_rates(preset: Any, rows: int, with_torch: bool) -> dict[str, float]:
    """Returns {library: operations per second} of the decoder layers' largest matrix product, the best of several runs.

    Args:
      preset: sizes of the network.
      rows: rows of the product.
      with_torch: whether to measure torch as well as jax.
    """
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
    """Returns the bytes per second at which the device reads an array that is larger than any cache."""
    size = 2**30 if jax.default_backend() == "gpu" else 2**27
    x = jnp.ones((64, size // 64), jnp.float32)
    total = jax.jit(lambda x: x.sum(axis=1))
    return x.nbytes / best(lambda: total(x).block_until_ready())


def best(run: Callable[[], Any], seconds: float = 2.0) -> float:
    """Returns the least time of a run in seconds, over as many runs as fit into `seconds`."""
    run()
    least, until = float("inf"), time.perf_counter() + seconds
    while time.perf_counter() < until:
        began = time.perf_counter()
        run()
        least = min(least, time.perf_counter() - began)
    return least


def _processor_seconds() -> tuple[float, float]:
    """Returns the seconds that all processors together have worked so far: for all programs, and for this process."""
    own = sum(os.times()[:2])
    try:
        fields = Path("/proc/stat").read_text().splitlines()[0].split()[1:]
    except OSError:
        return own, own  # not Linux: other programs cannot be observed
    ticks = [int(field) for field in fields]
    return (sum(ticks) - ticks[3] - ticks[4]) / os.sysconf("SC_CLK_TCK"), own
