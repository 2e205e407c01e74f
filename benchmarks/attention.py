"""Compares the attention kernel that `icet_jax.nn.attention` chooses on this device with XLA's: parity, time, memory.

    python benchmarks/attention.py --out runs/attention                # LLaVA-1.5, Llama 3 (GQA) and CLIP, bfloat16
    python benchmarks/attention.py --out runs/attention --rows 4 --pairs 9

For each shape, outputs and gradients of both sides are compared with XLA's in float32 on the same inputs, as a share of
the largest value: the kernel may be twice as far off as XLA in bfloat16. Then both sides are timed in turn; the table
has medians and ranges. If no kernel is chosen (CPUs), one small shape is run and the exit code is 0. Results go to
OUT/attention.json. Needs jax and numpy, and flax for the package.
"""

import argparse
import dataclasses
import functools
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

from icet_jax.nn import attention


@dataclasses.dataclass(frozen=True)
class Case:
    """One shape of attention; if `padded`, rows have padding on both sides."""

    name: str
    length: int
    heads: int
    kv_heads: int
    size: int
    causal: bool
    padded: bool


CASES = (
    Case("LLaVA-1.5-7B, update", 895, 32, 32, 128, True, True),
    Case("LLaVA-1.5-7B, prompt", 640, 32, 32, 128, True, True),
    Case("Llama 3 8B (GQA)", 1024, 32, 8, 128, True, True),
    Case("Llama 3 8B, long", 4096, 32, 8, 128, True, True),
    Case("CLIP ViT-L/14-336", 577, 16, 16, 64, False, False),
)
SMALL = Case("no kernel here", 128, 4, 2, 64, True, True)


def inputs(case: Case, rows: int) -> tuple[list[Any], Any]:
    """Returns random inputs: (float32 [q, k, v, weights of the outputs in the loss], True at tokens that are no
    padding, or None without padding)."""
    keys = jax.random.split(jax.random.key(0), 4)
    heads = (case.heads, case.kv_heads, case.kv_heads, case.heads)
    arrays = [
        jax.random.normal(key, (rows, case.length, count, case.size)) for key, count in zip(keys, heads, strict=True)
    ]
    if not case.padded:
        return arrays, None
    columns, row = np.arange(case.length), np.arange(rows)[:, None]
    first, behind = (row * 37) % (case.length // 4), (row * 53) % (case.length // 8)
    return arrays, jnp.asarray((columns >= first) & (columns < case.length - behind))


def program(attend: Callable[..., Any], case: Case, real: Any, gradients: bool) -> Callable[..., Any]:
    """Returns a jitted function of (q, k, v, weights): the outputs, or with `gradients` those of their weighted sum.

    Outputs at padding are zero.
    """

    def out(q: Any, k: Any, v: Any) -> Any:
        y = attend(q, k, v, real=real, causal=case.causal).reshape(q.shape).astype(jnp.float32)
        return y if real is None else jnp.where(real[:, :, None, None], y, 0)

    def loss(q: Any, k: Any, v: Any, weights: Any) -> Any:
        return jnp.sum(out(q, k, v) * weights)

    return jax.jit(jax.grad(loss, (0, 1, 2)) if gradients else lambda q, k, v, weights: out(q, k, v))


def distance(result: Any, reference: Any) -> float:
    """Returns the largest difference as a share of the largest value, over all arrays; nan if one is not finite."""
    shares = [
        float(jnp.max(jnp.abs(a.astype(jnp.float32) - b)) / jnp.max(jnp.abs(b)))
        for a, b in zip(jax.tree.leaves(result), jax.tree.leaves(reference), strict=True)
    ]
    return max(shares) if np.isfinite(shares).all() else float("nan")


def seconds(run: Callable[..., Any], arrays: list[Any], repeats: int) -> float:
    """Returns the seconds of one call, as the mean over `repeats` consecutive calls."""
    start = time.perf_counter()
    for _ in range(repeats):
        result = run(*arrays)
    jax.block_until_ready(result)
    return (time.perf_counter() - start) / repeats


def measure(case: Case, rows: int, dtype: Any, pairs: int) -> list[dict[str, Any]]:
    """Returns the results for one shape: a dict for the outputs and one for the gradients."""
    arrays, real = inputs(case, rows)
    half = [x.astype(dtype) for x in arrays[:3]] + [arrays[3]]
    exact = [x.astype(jnp.float32) for x in half]
    kernel = attention.kernel_for(half[0], half[1], case.causal, None)
    sides = {"door": attention.attention, "xla": attention.xla_attention}
    lines = []
    for gradients in (False, True):
        reference = program(attention.xla_attention, case, real, gradients)(*exact)
        runs = {name: program(attend, case, real, gradients).lower(*half).compile() for name, attend in sides.items()}
        line: dict[str, Any] = dataclasses.asdict(case) | {"rows": rows, "dtype": jnp.dtype(dtype).name}
        line |= {
            "part": "gradients" if gradients else "outputs",
            "kernel": "xla" if kernel is None else kernel.__name__,
        }
        for name, run in runs.items():
            line[f"{name}_distance"] = distance(run(*half), reference)
            line[f"{name}_temporary_bytes"] = run.memory_analysis().temp_size_in_bytes
        once = max(seconds(run, half, 1) for run in runs.values())
        repeats = max(1, min(100, int(0.1 / once)))
        times = [{name: seconds(run, half, repeats) for name, run in runs.items()} for _ in range(pairs)]
        for name in sides:
            line[f"{name}_seconds"] = [pair[name] for pair in times]
        line["ratios"] = [pair["xla"] / pair["door"] for pair in times]
        lines.append(line)
    return lines


def table(lines: list[dict[str, Any]]) -> str:
    """Returns the results as a table of text."""
    head = ("shape", "part", "kernel", "ms", "XLA ms", "times faster", "MiB", "XLA MiB", "off", "XLA off")
    rows: list[tuple[str, ...]] = [head]
    for line in lines:
        low, high = min(line["ratios"]), max(line["ratios"])
        rows.append(
            (
                f"{line['name']} [{line['rows']}, {line['length']}]", line["part"], line["kernel"],
                *(f"{1e3 * statistics.median(line[f'{side}_seconds']):.3f}" for side in ("door", "xla")),
                f"{statistics.median(line['ratios']):.2f} ({low:.2f}-{high:.2f})",
                *(f"{line[f'{side}_temporary_bytes'] / 2**20:.0f}" for side in ("door", "xla")),
                *(f"{line[f'{side}_distance']:.1e}" for side in ("door", "xla")),
            )
        )  # fmt: skip
    widths = [max(len(row[column]) for row in rows) for column in range(len(head))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
    )


def main() -> int:
    """Runs the comparison; returns 1 if a kernel is too far off."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=Path, required=True, help="folder for attention.json")
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float16", "float32"))
    options = parser.parse_args()
    dtype, device = jnp.dtype(options.dtype), jax.devices()[0]
    abstract = functools.partial(jax.ShapeDtypeStruct, dtype=dtype)
    with_kernel = [
        case for case in CASES
        if attention.kernel_for(abstract((8, case.length, case.heads, case.size)),
                                abstract((8, case.length, case.kv_heads, case.size)), case.causal, None)
    ]  # fmt: skip
    lines = [line for case in with_kernel or [SMALL] for line in measure(case, options.rows, dtype, options.pairs)]
    print(f"{device.device_kind}, jax {jax.__version__}")
    print(table(lines))
    options.out.mkdir(parents=True, exist_ok=True)
    result = {"device": device.device_kind, "jax": jax.__version__, "lines": lines}
    (options.out / "attention.json").write_text(json.dumps(result, indent=1) + "\n")
    # A kernel may be twice as far from float32 as XLA in bfloat16 is.
    wrong = [line for line in lines if not line["door_distance"] <= max(2 * line["xla_distance"], 1e-5)]
    for line in wrong:
        print(
            f"{line['name']}, {line['part']}: {line['kernel']} is off by {line['door_distance']:.1e}", file=sys.stderr
        )
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main())
