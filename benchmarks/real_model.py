"""The experiment of docs/real_model.md: a model of real weights, measured at every exit, repaired, and measured again.

    python benchmarks/real_model.py --build runs/real_vlm --out runs/real_model --advbench harmful_behaviors.csv \\
        --xstest xstest_prompts.csv --figstep safebench.csv --figstep-images SafeBench
    python benchmarks/real_model.py ... --only tuned/lsft --seeds 0,1     # some of the runs
    python benchmarks/real_model.py --page                                # docs/real_model.md from docs/real_model.json

BUILD is the working directory of examples/real_vlm/build.py, and of reward.py there. Each finished run appends one row
to docs/real_model.json and renews docs/real_model.md. The script can be stopped at any time: the same command goes on
with the runs that are missing, and a run that was stopped resumes. The files of prompts are read where they lie; copies
of the chosen rows and photographs are written to OUT/rows and nowhere else. docs/real_model.json has numbers alone.
"""

import argparse
import json
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parents[1]))

from ablations import copy_sweep_before, run_job
from real_model_page import FIGURE, figure, page

from examples.real_vlm.photographs import hash_order
from examples.real_vlm.rows import write_jsonl
from examples.real_vlm.stages import REFUSAL
from icet_jax.errors import RESUMABLE
from icet_jax.files import write_bytes_atomic, write_text_atomic

ROOT = Path(__file__).parents[1]
ROWS = ROOT / "docs/real_model.json"
CONFIG = "configs/real_vlm_lppo.py"
COUNTS = {"forbidden": 48, "advbench": 24, "figstep": 24, "xstest": 32, "harmless": 24, "captions": 24, "questions": 48}
"""{data set of the sweeps: number of its rows}."""
UTILITY = "questions"
_FIRST_WORDS = 16  # rows of `first_words`
METHODS: dict[str, dict[str, Any]] = {
    "none": {},
    "lppo": {},
    "lsft": {"algorithm": "lsft", "lppo.max_new_tokens": 64},  # the longest answer of the build's rows
}
"""{method: fields that differ from the config's}."""
MODELS = {"base": "projected", "tuned": "vlm"}
"""{model: its folder in BUILD}: the base model has seen captions alone, and its decoder is as it was published."""
SEEDS = (0, 1, 2)


class Run(NamedTuple):
    """One sweep, or one training between two sweeps."""

    model: str
    method: str
    seed: int

    @property
    def name(self) -> str:
        """Name in docs/real_model.json, and folder in OUT."""
        return f"{self.model}/{self.method}/seed_{self.seed}"


def runs() -> Iterator[Run]:
    """Yields every run, in the order in which they are made: each method with one seed first."""
    for model in MODELS:
        yield Run(model, "none", 0)
    for seed in SEEDS:
        for method in METHODS:
            if method != "none":
                yield Run("tuned", method, seed)


def fields(run: Run, build: Path, rows: Path) -> dict[str, Any]:
    """Returns the fields of a run that differ from its config.

    Args:
      run: the run.
      build: working directory of the build.
      rows: folder of the rows of the sweeps, see `write_rows`.
    """
    datasets = {name: str(rows / f"{name}.jsonl") for name in COUNTS}
    return {
        "seed": run.seed,
        "model.checkpoint": str(build / MODELS[run.model]),
        "data.root": str(build / "data"),
        "reward.model": str(build / "reward_model"),
        "sweep.utility": {UTILITY: datasets.pop(UTILITY)},
        "sweep.datasets": datasets,
        "sweep.limit": max(COUNTS.values()),
        **METHODS[run.method],
    }


def command(run: Run, folder: Path, build: Path, rows: Path) -> list[str]:
    """Returns the command line of a run."""
    mode = ["--mode=sweep"] if run.method == "none" else []
    options = [f"--config.{name}={value}" for name, value in fields(run, build, rows).items()]
    return ["-m", "icet_jax.main", *mode, f"--config={CONFIG}", f"--workdir={folder}", *options]


def write_rows(options: argparse.Namespace, folder: Path) -> None:
    """Writes the rows of the sweeps, and the pictures that they show, unless they are there.

    A hash of a row's prompt and id chooses the rows. All photographs are held out from the build's training.
    """
    import icet_jax

    done = folder / "complete"
    if done.is_file():
        return
    shutil.rmtree(folder, ignore_errors=True)
    images, data = folder / "images", options.build / "data"
    images.mkdir(parents=True)
    held_out = {name: icet_jax.load_rows(str(data / f"held_out_{name}.jsonl")) for name in _HELD_OUT}
    for row in held_out["captions"]:
        shutil.copyfile(str(row.images[0]), images / Path(str(row.images[0])).name)
    sources = {
        "advbench": f"advbench_coco:{options.advbench}?images={images}",
        "xstest": f"xstest:{options.xstest}?images={images}",
        "figstep": f"figstep:{options.figstep}?images={options.figstep_images}",
    }
    sets = held_out | {name: icet_jax.load_rows(source) for name, source in sources.items()}
    for name, count in COUNTS.items():
        chosen = sorted(sets[name], key=lambda row: hash_order(f"{row.id}\n{row.prompt}"))[:count]
        for row in chosen:
            target = images / Path(str(row.images[0])).name
            if not target.is_file():
                shutil.copyfile(str(row.images[0]), target)
        write_jsonl(folder / f"{name}.jsonl", [_row(replace(row, images=_names(row.images))) for row in chosen])
    done.touch()


_HELD_OUT = ("forbidden", "harmless", "captions", "questions")


def _names(images: Sequence[Any]) -> tuple[str, ...]:
    """Returns the paths of pictures in the folder of the rows."""
    return tuple(f"images/{Path(str(image)).name}" for image in images)


def _row(row: Any) -> dict[str, Any]:
    """Returns a row of a .jsonl file."""
    values = {"id": row.id, "prompt": row.prompt, "image": row.images[0], "kind": row.kind}
    known = {"answer": row.answer, "policy": row.category}
    return values | {name: value for name, value in known.items() if value is not None}


def measured(folder: Path) -> dict[str, Any]:
    """Returns what a finished run measured: curves over the exits, as shares with their 95% intervals."""
    side = "after" if (folder / "sweeps/after.forbidden.json").is_file() else "before"
    sets = {}
    for path in sorted((folder / "sweeps").glob(f"{side}.*.json")):
        table = json.loads(path.read_text())
        exits = {"num_exits": table["num_exits"], "default_exit": table["default_exit"]}
        sets[path.name.split(".")[1]] = {"prompts": table["prompts"], **_curves(table["layers"]), **_ends(table)}
    utility = json.loads((folder / "utility.json").read_text())
    sets[UTILITY] = _curves(utility[side][UTILITY]["layers"])
    geometry = json.loads((folder / "geometry.json").read_text())["layers"]
    cost = json.loads((folder / "cost.json").read_text())
    return {**exits, "sets": sets, "geometry": geometry, "cost": cost}


def _curves(layers: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Returns {metric: {"mean": [exit 1, ...], "ci95": [...], "n": rows per exit}}."""
    names = dict.fromkeys(name for layer in layers for name in layer["metrics"])
    return {
        name: {
            "mean": [_rounded(layer["metrics"][name]["mean"]) for layer in layers],
            "ci95": [_rounded(layer["metrics"][name]["ci95"]) for layer in layers],
            "n": layers[0]["metrics"][name]["n"],
        }
        for name in names
    }


def _ends(table: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the attack success at the worst exit and at any exit, where the data set has one."""
    return {name: table[name] for name in ("worst_exit", "any_exit") if name in table}


def _rounded(value: Any) -> Any:
    """Returns a number, or a list of numbers, to four digits."""
    return [_rounded(item) for item in value] if isinstance(value, list) else value and round(value, 4)


def first_words(checkpoint: Path, rows: Path) -> dict[str, Any]:
    """Returns what moves with the exit before a word is said, as means over 16 forbidden rows, exit 1 first.

    `refusal_log_odds` are those of the first token of the taught refusal, `refusal_nats` the negative log-likelihood
    per token of the whole refusal, `entropy` that of the first token of an answer, in nats.
    """
    import jax
    import jax.numpy as jnp
    import numpy as np
    from flax import nnx

    import icet_jax
    from icet_jax.algorithms.forward import evaluate_responses
    from icet_jax.algorithms.lsft import pad_targets
    from icet_jax.evaluation.batching import prompt_batch
    from icet_jax.evaluation.queue import encode

    vlm = icet_jax.load(checkpoint)
    examples = icet_jax.load_rows(str(rows / "forbidden.jsonl"))[:_FIRST_WORDS]
    batch = prompt_batch(vlm, examples, len(examples), 1)
    refusal = list(vlm.processor.tokenizer(REFUSAL, add_special_tokens=False)["input_ids"])
    targets, mask = pad_targets(
        [refusal] * len(examples), eos_id=vlm.eos_ids[0], length=len(refusal) + 1, pad_id=vlm.pad_id
    )

    encoded = encode(vlm.graphdef, vlm.params, batch.images)

    @jax.jit
    def scored(params: Any, encoded: Any, layer: Any) -> Any:
        model = nnx.merge(vlm.graphdef, params)
        visual = model.visual(encoded, jnp.full(len(examples), layer))
        inputs = (batch.tokens, batch.mask, jnp.asarray(targets), jnp.asarray(mask), visual)
        options = {"temperature": 1.0, "suppress_ids": vlm.suppress_ids, "chunk": 4}
        return evaluate_responses(model, None, None, *inputs, **options)

    found: dict[str, list[float]] = {"refusal_log_odds": [], "refusal_nats": [], "entropy": []}
    for layer in range(1, vlm.num_exits + 1):
        values = jax.device_get(scored(vlm.params, encoded, jnp.int32(layer)))
        first = values.log_probs[:, 0].astype(np.float64)
        found["refusal_log_odds"].append(float(np.mean(first - np.log(-np.expm1(first)))))
        nats = -np.where(mask, values.log_probs, 0).sum(axis=1) / np.asarray(mask).sum(axis=1)
        found["refusal_nats"].append(float(np.mean(nats)))
        found["entropy"].append(float(np.mean(values.entropy[:, 0])))
    return {name: [round(value, 4) for value in curve] for name, curve in found.items()}


def load_rows() -> list[dict[str, Any]]:
    """Returns the rows of docs/real_model.json; none where there is no such file."""
    return json.loads(ROWS.read_text(encoding="utf-8"))["rows"] if ROWS.is_file() else []


def append(run: Run, build: Path, numbers: Mapping[str, Any]) -> None:
    """Adds the row of a finished run to docs/real_model.json, with the facts of the build."""
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True)
    line = command(run, Path("runs/real_model") / run.name, Path("runs/real_vlm"), Path("runs/real_model/rows"))
    row = {
        "run": run.name, "model": run.model, "method": run.method, "seed": run.seed,
        "commit": commit.stdout.strip(), "command": shlex.join(["python", *line]), **numbers,
    }  # fmt: skip
    content = {"schema": 1, "build": _build_facts(build), "rows": [*load_rows(), row]}
    write_text_atomic(ROWS, json.dumps(content, indent=1) + "\n")


def _build_facts(build: Path) -> dict[str, Any]:
    """Returns the content of build.json, and of reward.json where there is a reward model, without paths."""
    facts = dict(json.loads((build / "build.json").read_text()))
    path = build / "reward/run/reward.json"
    if path.is_file():
        reward = json.loads(path.read_text())
        by_source = {Path(source).stem: result for source, result in reward["by_source"].items()}
        facts["reward"] = {"steps": reward["steps"], "accuracy": reward["accuracy"], "by_source": by_source}
    return facts


def perform(run: Run, options: argparse.Namespace) -> int:
    """Makes or resumes a run, appends its row and renews the page; returns its exit status."""
    folder, rows = options.out / run.name, options.out / "rows"
    if not (folder / "report.html").is_file():
        if run.method != "none":
            copy_sweep_before(folder, options.out / run.model, CONFIG, fields(run, options.build, rows))
        line = [sys.executable, *command(run, folder, options.build, rows)]
        print("+", *line, flush=True)
        status = run_job(line)
        if status:
            return status
    checkpoint = options.build / MODELS[run.model] if run.method == "none" else folder / "hf"
    append(run, options.build, measured(folder) | {"first_words": first_words(checkpoint, rows)})
    write_page()
    return 0


def write_page() -> None:
    """Writes docs/real_model.md and its figure from docs/real_model.json."""
    from icet_jax.report.charts.png import png

    path, content = ROWS.with_suffix(".md"), json.loads(ROWS.read_text(encoding="utf-8"))
    write_bytes_atomic(path.parent / FIGURE, png(figure(content["rows"])))
    write_text_atomic(path, page(path.read_text(encoding="utf-8") if path.is_file() else "", content))


def options_of() -> argparse.Namespace:
    """Returns the options of the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--build", type=Path, default=Path("runs/real_vlm"))
    parser.add_argument("--out", type=Path, default=Path("runs/real_model"))
    parser.add_argument("--advbench", type=Path, help="AdvBench's harmful_behaviors.csv")
    parser.add_argument("--xstest", type=Path, help="XSTest's xstest_prompts.csv")
    parser.add_argument("--figstep", type=Path, help="FigStep's safebench.csv")
    parser.add_argument("--figstep-images", type=Path, help="folder of FigStep's pictures")
    parser.add_argument("--only", default="", help="comma-separated MODEL/METHOD; default: all")
    parser.add_argument("--seeds", default="", help="comma-separated; default: all")
    parser.add_argument("--page", action="store_true", help="run nothing; write docs/real_model.md and its figure")
    options = parser.parse_args()
    missing = [name for name in ("advbench", "xstest", "figstep", "figstep_images") if getattr(options, name) is None]
    if missing and not options.page and not (options.out / "rows/complete").is_file():
        parser.error(f"--{missing[0].replace('_', '-')} is missing")
    return options


def main() -> int:
    """Makes the runs that are missing."""
    options = options_of()
    if options.page:
        write_page()
        return 0
    write_rows(options, options.out / "rows")
    only = options.only.split(",") if options.only else None
    seeds = [int(seed) for seed in options.seeds.split(",")] if options.seeds else SEEDS
    for run in runs():
        is_asked = run.seed in seeds and (only is None or f"{run.model}/{run.method}" in only)
        if is_asked and run.name not in {row["run"] for row in load_rows()}:
            status = perform(run, options)
            if status:
                what = "stopped" if status == RESUMABLE else f"ended with status {status}"
                print(f"{run.name}: {what}; the same command goes on from there", file=sys.stderr)
                return status
    return 0


if __name__ == "__main__":
    sys.exit(main())
