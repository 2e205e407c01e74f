"""The comparison of docs/methods.md: every method that closes exits, on the organisms, with the same measurements.

    python benchmarks/methods.py --out runs/methods                      # the next missing cells of all tables
    python benchmarks/methods.py --out runs/methods --table first        # of one table
    python benchmarks/methods.py --out runs/methods --only lppo_anchor --seeds 0
    python benchmarks/methods.py --page                                  # docs/methods.md from docs/methods.json

A cell is one run: one method, one organism, one variant of the data, one seed. The script can be stopped at any time:
each finished run appends one row to docs/methods.json, and the same command goes on with the cells that are missing;
a run that was stopped resumes. Settings are chosen on the val split; the tables are of the test split.
"""

import argparse
import json
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).parent))

from ablations import copy_sweep_before, run_job

from icet_jax.config.names import ALGORITHMS
from icet_jax.errors import RESUMABLE
from icet_jax.files import write_text_atomic

ROOT = Path(__file__).parents[1]
ROWS = ROOT / "docs/methods.json"
PAGE = ROOT / "docs/methods.md"
ORGANISMS = {
    "llava": "configs/organism_lppo.py",
    "llava_next": "configs/organism_next_lppo.py",
    "mllama": "configs/organism_mllama_lppo.py",
}
SWEEP = {
    "sweep.datasets": {"forbidden": "organism:test:forbidden:256", "benign": "organism:test:benign:256"},
    "sweep.utility": {"vqa": "organism:test:vqa:512"},
    "log.tensorboard": False,
}
METHODS: dict[str, tuple[str, dict[str, Any]]] = {
    "lsft": ("L-SFT", {"algorithm": "lsft"}),
    "lppo_default_exit": ("PPO at the default exit", {"lppo.exits": "fixed"}),
    "lppo_per_batch": ("L-PPO, one exit per batch", {"lppo.exits": "per_batch"}),
    "lppo_per_example": ("L-PPO, one exit per row", {"lppo.exits": "per_example"}),
    "lppo": ("L-PPO, stratified exits", {}),
    "lppo_adaptive": ("L-PPO, adaptive exits", {"lppo.exits": "adaptive"}),
    "lppo_anchor": ("L-PPO with an anchor", {"lppo.anchor_coef": 0.5}),
    "ldistill_policy": ("L-Distill on the policy's answers", {"algorithm": "ldistill"}),
    "ldistill_default": (
        "L-Distill on the default exit's answers",
        {"algorithm": "ldistill", "ldistill.on": "default"},
    ),
    "lrloo": ("L-RLOO", {"algorithm": "lrloo"}),
    "lrloo_grpo": ("L-RLOO with GRPO's advantage", {"algorithm": "lrloo", "lrloo.advantage": "grpo"}),
    "ldpo": ("L-DPO", {"algorithm": "ldpo"}),
    "ldpo_plain": ("L-DPO without the SFT term", {"algorithm": "ldpo", "ldpo.sft_coef": 0.0}),
}
"""Name of a cell -> (name in the page, fields that differ from the organism's config)."""
VARIANTS: dict[str, dict[str, Any]] = {
    "mixed": {},
    "every_second_exit": {"lppo.train_exits": (1, 3, 5, 7)},
    "forbidden_rows": {"data.mixture": {"forbidden": 1.0}},
    "half_budget": {
        f"{algorithm}.iterations": 20 for algorithm in ALGORITHMS
    },
}  # fmt: skip
"""What a run trains on -> the fields that say so."""


class Cell(NamedTuple):
    """One run of a table."""

    table: str
    method: str
    organism: str
    variant: str
    seed: int


TRAINING_STAGES = ("harvest", "train")
"""Stages of cost.json that are part of a method's budget."""
BEST = ("lppo", "lppo_anchor", "ldistill_policy", "ldistill_default", "lsft")
"""The methods of the second and third table: the paper's L-PPO and the four best of the first."""


def cells() -> Iterator[Cell]:
    """Every cell of the three tables, in the order in which they are run: all methods with one seed first."""
    for seed in range(3):
        for method in METHODS:
            yield Cell("first", method, "llava", "mixed", seed)
    for seed in range(5):
        for organism in ORGANISMS:
            for method in BEST:
                yield Cell("second", method, organism, "mixed", seed)
    for seed in range(3):
        for variant in VARIANTS:
            for method in BEST if variant != "mixed" else ():
                yield Cell("third", method, "llava", variant, seed)


def run_of(cell: Cell) -> str:
    """Names the run of a cell; cells of different tables may share one."""
    return f"{cell.organism}/{cell.variant}/{cell.method}/seed_{cell.seed}"


def fields(cell: Cell) -> dict[str, Any]:
    """The fields of a cell's run that differ from its organism's config."""
    return {"seed": cell.seed, **SWEEP, **METHODS[cell.method][1], **VARIANTS[cell.variant]}


def command(cell: Cell, folder: Path | str) -> list[str]:
    """The command line of a cell's run."""
    options = [f"--config.{name}={value}" for name, value in fields(cell).items()]
    return ["-m", "icet_jax.main", f"--config={ORGANISMS[cell.organism]}", f"--workdir={folder}", *options]


def measured(folder: Path) -> dict[str, Any]:
    """What a finished run reached, shares in percent, and what it cost."""
    forbidden = json.loads((folder / "sweeps/after.forbidden.json").read_text())
    benign = json.loads((folder / "sweeps/after.benign.json").read_text())
    utility = json.loads((folder / "utility.json").read_text())
    default = forbidden["default_exit"] - 1
    worst = forbidden["worst_exit"]["asr/world_exact"]
    any_exit = forbidden["any_exit"]["asr_any/world_exact"]
    history = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    stages = json.loads((folder / "cost.json").read_text())["phases"]
    vqa = {when: curve(utility[when]["vqa"], "accuracy/vqa_exact") for when in ("before", "after")}
    return {
        "asr_worst": 100 * worst["mean"],
        "asr_worst_ci95": [100 * end for end in worst["ci95"]],
        "asr_any": 100 * any_exit["mean"],
        "asr_any_ci95": [100 * end for end in any_exit["ci95"]],
        "asr_mean": statistics.mean(curve(forbidden, "asr/world_exact")),
        "benign_refused": max(curve(benign, "refusal/refusal_keywords")),
        "degenerate": max(max(curve(table, "degenerate/text_rules")) for table in (forbidden, benign)),
        "vqa_change": vqa["after"][default] - vqa["before"][default],
        "vqa_change_mean": statistics.mean(vqa["after"]) - statistics.mean(vqa["before"]),
        "kl_default_benign": kl_at_the_default_exit(folder),
        "tokens": sum(row["perf/tokens"] for row in history) + harvested(stages),
        "flops": sum(row["perf/flops"] for row in history),
        "seconds": sum(stage["seconds"] for stage in stages if stage["name"] in TRAINING_STAGES),
    }


def harvested(stages: Sequence[Mapping[str, Any]]) -> int:
    """Tokens that were generated before training, to learn from."""
    return sum(stage.get("tokens", 0) for stage in stages if stage["name"] == "harvest")


def curve(table: Mapping[str, Any], metric: str) -> list[float]:
    """One metric of a sweep in percent, exit 1 first."""
    return [100 * layer["metrics"][metric]["mean"] for layer in table["layers"]]


def kl_at_the_default_exit(folder: Path, rows: int = 64) -> float:
    """Mean KL(model before training || trained model) at the default exit, nats per token.

    It is taken on the greedy answers that the model before training gives to benign requests of the test split.
    """
    import jax
    import jax.numpy as jnp
    from flax import nnx

    import icet_jax
    from icet_jax.algorithms.forward import Anchor, evaluate_responses, response_hidden
    from icet_jax.algorithms.phases import encode_visual
    from icet_jax.evaluation.batching import prompt_batch
    from icet_jax.generation.decode import generate
    from icet_jax.organism.world import examples

    config = json.loads((folder / "config.json").read_text())
    before = icet_jax.load(config["model"]["checkpoint"])
    after = icet_jax.load(folder / "hf")
    batch = prompt_batch(before, examples("test", "benign", rows), rows, 1)
    exits = jnp.full(rows, before.default_exit, jnp.int32)
    sampling = before.sampling(16, 0.0)

    @jax.jit
    def mean_kl(old: Any, new: Any) -> Any:
        model, trained = nnx.merge(before.graphdef, old), nnx.merge(before.graphdef, new)
        visual = encode_visual(model, batch.images, exits)
        keys = jax.random.split(jax.random.key(0), rows)
        answers = generate(model, batch.tokens, batch.mask, visual, keys, sampling)
        inputs = (batch.tokens, batch.mask, answers.tokens, answers.mask, visual)
        anchor = Anchor(model, response_hidden(model, None, *inputs))
        scored = evaluate_responses(
            trained, None, None, *inputs, temperature=1.0, suppress_ids=sampling.suppress_ids, chunk=16, anchor=anchor
        )
        return jnp.sum(scored.anchor_kl, where=answers.mask) / jnp.sum(answers.mask)

    return float(mean_kl(before.params, after.params))


def load_rows() -> list[dict[str, Any]]:
    """The rows of docs/methods.json; none where there is no such file."""
    return json.loads(ROWS.read_text(encoding="utf-8"))["rows"] if ROWS.is_file() else []


def append(cell: Cell, numbers: Mapping[str, Any]) -> None:
    """Adds the row of a finished run to docs/methods.json."""
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True)
    row = {
        "run": run_of(cell), "method": cell.method, "organism": cell.organism, "variant": cell.variant,
        "seed": cell.seed, "commit": commit.stdout.strip(),
        "command": "python " + " ".join(command(cell, f"runs/methods/{run_of(cell)}")), **numbers,
    }  # fmt: skip
    write_text_atomic(ROWS, json.dumps({"schema": 1, "rows": [*load_rows(), row]}, indent=1) + "\n")


def perform(cell: Cell, out: Path) -> int:
    """Runs or resumes the run of a cell and appends its row; returns the exit status of the run."""
    folder = out / run_of(cell)
    if not (folder / "report.html").is_file():
        copy_sweep_before(folder, out / cell.organism / cell.variant, ORGANISMS[cell.organism], fields(cell))
        line = [sys.executable, *command(cell, folder)]
        print("+", *line, flush=True)
        status = run_job(line)
        if status:
            return status
    append(cell, measured(folder))
    return 0


COLUMNS: dict[str, tuple[str, Callable[[float], str]]] = {
    "asr_worst": ("ASR, worst exit", "{:.1f}".format),
    "asr_any": ("ASR, any exit", "{:.1f}".format),
    "asr_mean": ("ASR, mean of exits", "{:.1f}".format),
    "benign_refused": ("benign refused, worst exit", "{:.1f}".format),
    "degenerate": ("degenerate, worst exit", "{:.1f}".format),
    "vqa_change": ("VQA, default exit, change", "{:+.1f}".format),
    "kl_default_benign": ("KL at the default exit, benign", "{:.3f}".format),
    "tokens": ("tokens, thousands", lambda value: f"{value / 1e3:.1f}"),
    "flops": ("FLOPs, 10^12", lambda value: f"{value / 1e12:.2f}"),
    "seconds": ("training, s", "{:.0f}".format),
}


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Markdown of some rows by method: mean over seeds, range in brackets."""
    lines = ["| method | seeds | " + " | ".join(title for title, _ in COLUMNS.values()) + " |"]
    lines += ["|---" * (len(COLUMNS) + 2) + "|"]
    for method, (title, _) in METHODS.items():
        own = [row for row in rows if row["method"] == method]
        if own:
            values = [spread([row[name] for row in own], form) for name, (_, form) in COLUMNS.items()]
            lines.append(f"| {title} | {len(own)} | " + " | ".join(values) + " |")
    return "\n".join(lines)


def spread(values: Sequence[float], form: Callable[[float], str]) -> str:
    """Mean of the values, and their range if there are several."""
    mean = form(statistics.mean(values))
    return mean if len(values) == 1 else f"{mean} ({form(min(values))} to {form(max(values))})"


def main() -> int:
    """Runs what is missing of what is asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/methods"))
    parser.add_argument("--table", choices=("first", "second", "third"))
    parser.add_argument("--only", default="", help="comma-separated methods; default: all")
    parser.add_argument("--seeds", default="", help="comma-separated; default: all of the table")
    parser.add_argument("--page", action="store_true", help="run nothing; print the tables")
    options = parser.parse_args()
    chosen = options.only.split(",") if options.only else list(METHODS)
    for name in chosen:
        if name not in METHODS:
            parser.error(f"--only: there is no method {name!r}; choose from {', '.join(METHODS)}")
    seeds = [int(seed) for seed in options.seeds.split(",")] if options.seeds else range(5)
    for cell in [] if options.page else cells():
        is_requested = options.table in (None, cell.table) and cell.method in chosen and cell.seed in seeds
        if is_requested and run_of(cell) not in {row["run"] for row in load_rows()}:
            status = perform(cell, options.out)
            if status:
                what = "stopped" if status == RESUMABLE else f"ended with status {status}"
                print(f"{run_of(cell)}: {what}; the same command goes on from there", file=sys.stderr)
                return status
    for name in ("first", "second", "third"):
        groups = {(cell.organism, cell.variant) for cell in cells() if cell.table == name}
        for organism, variant in sorted(groups):
            rows = [row for row in load_rows() if (row["organism"], row["variant"]) == (organism, variant)]
            if rows:
                print(f"\n{name} table, {organism}, {variant}\n\n{table(rows)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
