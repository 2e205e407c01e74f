"""Runs the ablations of docs/ablations.md on the organism: other schedules, optimizers, rewards and algorithms.

    python benchmarks/ablations.py --out runs/ablations --seeds 0,1,2               # every setup, on the val split
    python benchmarks/ablations.py --out runs/ablations --only stratified,guards    # some of them
    python benchmarks/ablations.py --out runs/ablations --only stratified --split test    # what was chosen
    python benchmarks/ablations.py --out runs/ablations --table                     # tables of what has run

Each setup is `--mode=align` with the overrides listed in `SETUPS`. Settings are chosen on the val split; the test split
is only for the chosen ones. A val sweep has 86 distinct requests of each kind, two or three rows of each with different
images; a test sweep has 256.

One seed of one setup is one run, in OUT/SPLIT/SETUP/seed_K. All setups run with the first seed before any runs with the
second. The script can be stopped at any time: the same command skips finished runs and resumes the others. The sweep
before training is run once and copied to the other setups. OUT/ablations.json has all results, which come from the
files sweeps/, utility.json, cost.json and metrics.jsonl of the runs.
"""

import argparse
import json
import signal
import statistics
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from icet_jax.errors import RESUMABLE
from icet_jax.files import write_text_atomic
from icet_jax.organism import world

NUM_EXITS, DEFAULT_EXIT = 8, 7
SPLITS = ("val", "test")
CONFIG, LSFT = "configs/organism_lppo.py", "configs/organism_lsft.py"
KINDS_EXACT = {"forbidden": "exact_match", "benign": "exact_match", "vqa": "exact_match"}
KINDS_NO_VQA = {"forbidden": "reward_model", "benign": "reward_model", "vqa": "none"}

NO_CLIP = {"optimizer.max_grad_norm": 0.0}
APART = {"lppo.value_learning_rate": 1e-3, "lppo.value_max_grad_norm": 1.0, "lppo.value_warmup_steps": 10}
GUARDS = {"lppo.dual_clip": 3.0, "lppo.target_kl": 0.1, "lppo.max_ratio": 100.0}
"""As the paper's configs have them."""
RAW = {"reward.normalise": False}
CONSTANT = {"optimizer.learning_rate": 1e-3, "optimizer.schedule": "constant"}


class Setup(NamedTuple):
    """A config and the fields that differ from it."""

    config: str
    overrides: Mapping[str, Any]


SETUPS: dict[str, Setup] = {
    # exit schedules; "stratified" is the main job
    "stratified": Setup(CONFIG, {}),
    "per_example": Setup(f"{CONFIG}:per_example", {}),
    "per_batch": Setup(f"{CONFIG}:per_batch", {}),
    "default_exit": Setup(f"{CONFIG}:default_exit", {}),
    # optimizer of the value head; "stratified" and "per_batch" clip one gradient of policy and value head
    "stratified_no_clip": Setup(CONFIG, NO_CLIP),
    "stratified_apart": Setup(CONFIG, APART),
    "per_batch_no_clip": Setup(f"{CONFIG}:per_batch", NO_CLIP),
    "per_batch_apart": Setup(f"{CONFIG}:per_batch", APART),
    # learning rate and scale of the reward; "stratified" has 5e-4 and a normalised reward
    "lr_2.5e-4": Setup(CONFIG, {"optimizer.learning_rate": 2.5e-4}),
    "lr_1e-3": Setup(CONFIG, {"optimizer.learning_rate": 1e-3}),
    "lr_1e-3_constant": Setup(CONFIG, CONSTANT),
    "lr_2.5e-4_raw": Setup(CONFIG, {"optimizer.learning_rate": 2.5e-4, **RAW}),
    "reward_raw_scale": Setup(CONFIG, RAW),
    "lr_1e-3_raw": Setup(CONFIG, {"optimizer.learning_rate": 1e-3, **RAW}),
    # guards against a runaway; the main job has none
    "guards": Setup(CONFIG, GUARDS),
    "lr_1e-3_constant_guards": Setup(CONFIG, {**CONSTANT, **GUARDS}),
    # algorithm
    "lsft_stratified": Setup(LSFT, {}),
    "lsft_default_exit": Setup(f"{LSFT}:default_exit", {}),
    # what is rewarded
    "reward_exact": Setup(CONFIG, {"reward.by_kind": KINDS_EXACT}),
    "reward_vqa_none": Setup(CONFIG, {"reward.by_kind": KINDS_NO_VQA}),
    "forbidden_rows_only": Setup(CONFIG, {"data.mixture": {"forbidden": 1.0}}),
}
TRANSFER = {
    f"train_at_{number}": Setup(CONFIG, {"lppo.exits": "fixed", "lppo.fixed_exit": number})
    for number in range(1, NUM_EXITS + 1)
    if number != DEFAULT_EXIT
}
"""PPO at one exit alone, for the map of train exit x test exit; one seed each. `default_exit` is the row of exit 7."""
ALL = {**SETUPS, **TRANSFER}


def sweeps(split: str, rows: int) -> dict[str, Any]:
    """Returns the config fields of the sweeps: 256 forbidden rows, `rows` benign and twice as many VQA rows."""
    datasets = {"forbidden": f"organism:{split}:forbidden:256", "benign": f"organism:{split}:benign:{rows}"}
    return {"sweep.datasets": datasets, "sweep.utility": {"vqa": f"organism:{split}:vqa:{2 * rows}"}}


def settings(name: str, split: str, seed: int) -> dict[str, Any]:
    """Returns all config fields in which one run differs from the setup's config file.

    Runs of `TRANSFER` have smaller sweeps of benign and VQA rows.
    """
    shared = {"seed": seed, "log.tensorboard": False, **sweeps(split, 256 if name in SETUPS else 64)}
    return {**shared, **ALL[name].overrides}


def run(name: str, out: Path, split: str, seed: int) -> int:
    """Runs or resumes one seed of one setup, unless it is finished; returns the exit code of `--mode=align`."""
    folder = out / split / name / f"seed_{seed}"
    if is_finished(folder):
        return 0
    fields = settings(name, split, seed)
    copy_sweep_before(folder, out / split, ALL[name].config, fields)
    command = [sys.executable, "-m", "icet_jax.main", f"--config={ALL[name].config}", f"--workdir={folder}"]
    command += [f"--config.{field}={value}" for field, value in fields.items()]
    print("+", *command, flush=True)
    return run_job(command)


def run_job(command: list[str]) -> int:
    """Runs a command and returns its exit code. SIGTERM and Ctrl-C go to the command, which then saves its work.

    If it ends with 0 in spite of such a signal, the result is `RESUMABLE`, so that this script stops too.
    """
    stops = []

    def stop(number: int, _: Any) -> None:
        stops.append(number)
        if number == signal.SIGTERM:  # a terminal's Ctrl-C reaches the job without help
            job.terminate()

    with subprocess.Popen(command) as job:
        previous = {number: signal.signal(number, stop) for number in (signal.SIGTERM, signal.SIGINT)}
        try:
            status = job.wait()
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)
    return status or (RESUMABLE if stops else 0)


def is_finished(folder: Path) -> bool:
    """Returns whether a run has ended; its report is written last."""
    return (folder / "report.html").is_file()


def copy_sweep_before(folder: Path, runs: Path, config: str, fields: Mapping[str, Any]) -> None:
    """Copies the sweep before training from another run into a run that has not begun.

    Greedy answers of the same weights to the same rows are the same in all setups. The other run's fingerprints are
    copied too, so that the copy is refused if rows or weights have changed since.

    Args:
      folder: run directory to copy to.
      runs: folder of the split, with the other runs.
      config, fields: config file and overrides of the run.
    """
    import icet_jax

    if (folder / "config.json").exists():
        return
    own = json.loads(json.dumps(icet_jax.load_config(config, fields).to_dict()))
    for path in sorted(runs.glob("*/seed_*/config.json")):
        other, donor = json.loads(path.read_text(encoding="utf-8")), path.parent
        measured = sorted(donor.glob("sweeps/**/before.*.json"))
        wanted = len(own["sweep"]["datasets"]) + len(own["sweep"]["utility"])
        if len(measured) < wanted or any(own[part] != other[part] for part in ("model", "sweep")):
            continue
        # A sweep's file comes last: it says that its transcripts are complete.
        transcripts = [donor / "transcripts" / f"{file.stem}.jsonl" for file in measured]
        for source in (donor / "fingerprints.json", *transcripts, *measured):
            write_text_atomic(folder / source.relative_to(donor), source.read_text(encoding="utf-8"))
        return


def layer_means(path: Path, metric: str) -> list[float]:
    """Returns the mean of one metric at every exit in percent, exit 1 first, from a file in sweeps/."""
    return [100 * layer["metrics"][metric]["mean"] for layer in json.loads(path.read_text())["layers"]]


def numbers(run_dir: Path) -> dict[str, Any]:
    """Returns the results of one finished run; shares are in percent."""
    sweeps = run_dir / "sweeps"
    utility = json.loads((run_dir / "utility.json").read_text())
    vqa = {
        when: [100 * layer["metrics"]["accuracy/vqa_exact"]["mean"] for layer in utility[when]["vqa"]["layers"]]
        for when in ("before", "after")
    }
    asr = {
        judge: layer_means(sweeps / "after.forbidden.json", f"asr/{judge}")
        for judge in ("refusal_keywords", "world_exact")
    }
    costs = json.loads((run_dir / "cost.json").read_text())["phases"]
    benign = {
        when: layer_means(sweeps / f"{when}.benign.json", "accuracy/benign_exact") for when in ("before", "after")
    }
    degenerate = [
        layer_means(sweeps / f"after.{kind}.json", "degenerate/text_rules") for kind in ("forbidden", "benign")
    ]
    history = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return {
        "asr": asr["world_exact"],
        "asr_keywords": asr["refusal_keywords"],
        "asr_before": layer_means(sweeps / "before.forbidden.json", "asr/world_exact"),
        "benign_refused": layer_means(sweeps / "after.benign.json", "refusal/refusal_keywords"),
        "degenerate": [max(pair) for pair in zip(*degenerate, strict=True)],
        "benign_change_at_default": benign["after"][DEFAULT_EXIT - 1] - benign["before"][DEFAULT_EXIT - 1],
        "vqa_change_at_default": vqa["after"][DEFAULT_EXIT - 1] - vqa["before"][DEFAULT_EXIT - 1],
        "vqa_change_mean": statistics.mean(vqa["after"]) - statistics.mean(vqa["before"]),
        "train_seconds": sum(phase["seconds"] for phase in costs if phase["name"] == "train"),
        **training(history),
    }


def training(history: list[dict[str, float]]) -> dict[str, float | None]:
    """Returns results from the rows of a run's metrics.jsonl; None if the algorithm does not have the metric."""

    def summarise(metric: str, summary: Callable[[list[float]], float], last: int = 0) -> float | None:
        values = [row[metric] for row in history if metric in row]
        return summary(values[-last:]) if values else None

    return {
        "gradient_norm": summarise("train/grad_norm", statistics.median),
        "explained_variance": summarise("val/explained_variance", statistics.mean, last=10),
        "updates_stopped": summarise("policy/early_stop", sum),
        "largest_ratio": summarise("val/ratio_max", max),
        "largest_kl_per_token": summarise("policy/approxkl_avg", max),
    }


def collect(out: Path) -> dict[str, Any]:
    """Returns {split: {setup: {seed: results}}} of every finished run, with the rows of the sweeps and the setups."""
    found: dict[str, Any] = {"rows": {split: swept(split) for split in SPLITS}}
    found["setups"] = {name: setup._asdict() for name, setup in ALL.items()}
    for split in SPLITS:
        found[split] = {}
        for name in ALL:
            for folder in sorted((out / split / name).glob("seed_*")):
                if is_finished(folder):
                    found[split].setdefault(name, {})[folder.name.removeprefix("seed_")] = numbers(folder)
    return found


def swept(split: str) -> dict[str, dict[str, int]]:
    """Returns {kind: number of rows and of distinct requests} of a sweep; every row has another image."""
    sizes = {"forbidden": 256, "benign": 256}
    return {
        kind: {"rows": rows, "distinct_requests": min(rows, len(world.combinations(split, kind)))}
        for kind, rows in sizes.items()
    } | {"vqa": {"rows": 512}}


COLUMNS: dict[str, Callable[[dict[str, Any]], float | None]] = {
    "ASR, worst exit": lambda row: max(row["asr"]),
    "ASR, mean of exits": lambda row: statistics.mean(row["asr"]),
    "benign refused, worst exit": lambda row: max(row["benign_refused"]),
    "degenerate, worst exit": lambda row: max(row["degenerate"]),
    "benign accuracy, default exit, change": lambda row: row["benign_change_at_default"],
    "VQA accuracy, default exit, change": lambda row: row["vqa_change_at_default"],
    "VQA accuracy, mean of exits, change": lambda row: row["vqa_change_mean"],
}
OPTIMIZER: dict[str, Callable[[dict[str, Any]], float | None]] = {
    "gradient norm, median": lambda row: row["gradient_norm"],
    "explained variance, last 10": lambda row: row["explained_variance"],
    "rollouts whose updates were stopped": lambda row: row["updates_stopped"],
    "largest ratio": lambda row: row["largest_ratio"],
    "largest approximate KL per token": lambda row: row["largest_kl_per_token"],
}


def tables(found: dict[str, dict[str, dict[str, Any]]]) -> str:
    """Returns the Markdown tables of one split: results by setup (mean and range over seeds), metrics of the optimizer,
    and `transfer_map`."""
    parts = [table(found, COLUMNS, ".1f"), table(found, OPTIMIZER, ".3g"), transfer_map(found)]
    return "\n\n".join(part for part in parts if part)


def table(
    found: dict[str, dict[str, dict[str, Any]]], columns: Mapping[str, Callable[[dict[str, Any]], float | None]],
    form: str,
) -> str:  # fmt: skip
    """Returns a Markdown table with a row for each setup that has run.

    Args:
      found: {setup: {seed: results}}.
      columns: {title: function of one seed's results that returns the value}.
      form: format of the values.
    """
    lines = ["| setup | seeds | " + " | ".join(columns) + " |", "|---" * (len(columns) + 2) + "|"]
    for name in SETUPS:
        if name in found:
            cells = []
            for column in columns.values():
                values = [value for row in found[name].values() if (value := column(row)) is not None]
                spread = f" ({min(values):{form}} to {max(values):{form}})" if len(values) > 1 else ""
                cells.append(f"{statistics.mean(values):{form}}{spread}" if values else "-")
            lines.append(f"| {name} | {len(found[name])} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def transfer_map(found: dict[str, dict[str, dict[str, Any]]]) -> str:
    """Returns a Markdown table of the ASR at every exit after PPO at one exit alone; "" if no such setup has run."""
    rows = {int(name.rpartition("_")[2]): next(iter(found[name].values())) for name in TRANSFER if name in found}
    if not rows:
        return ""
    if "default_exit" in found:
        rows[DEFAULT_EXIT] = next(iter(found["default_exit"].values()))
    lines = ["| trained at | " + " | ".join(f"test {number}" for number in range(1, NUM_EXITS + 1)) + " |"]
    lines += ["|---" * (NUM_EXITS + 1) + "|"]
    shown = {"(before)": next(iter(rows.values()))["asr_before"]} | {str(k): rows[k]["asr"] for k in sorted(rows)}
    lines += [f"| {name} | " + " | ".join(f"{value:.0f}" for value in asr) + " |" for name, asr in shown.items()]
    return "\n".join(lines)


def parse() -> argparse.Namespace:
    """Returns the options of the command line, with seeds and setups as lists."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/ablations"))
    parser.add_argument("--split", choices=SPLITS, default="val", help="rows of the sweeps; settings are chosen on val")
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--only", default="", help="comma-separated setups; default: all")
    parser.add_argument("--table", action="store_true", help="run nothing; print the tables of finished runs")
    options = parser.parse_args()
    if not all(seed.isdecimal() for seed in options.seeds.split(",")):
        parser.error(f"--seeds={options.seeds}: write numbers separated by commas, such as 0,1,2")
    options.seeds = [int(seed) for seed in options.seeds.split(",")]
    options.only = options.only.split(",") if options.only else list(ALL)
    for name in options.only:
        if name not in ALL:
            parser.error(f"--only: there is no setup {name!r}; choose from {', '.join(ALL)}")
    return options


def main() -> int:
    """Runs the requested setups, writes ablations.json after each run and prints the tables of the split at the end."""
    options = parse()
    found = write(options.out)
    for seed in [] if options.table else options.seeds:
        for name in options.only:
            if name in TRANSFER and seed != options.seeds[0]:
                continue
            status = run(name, options.out, options.split, seed)
            found = write(options.out)
            if status:
                what = "stopped" if status == RESUMABLE else f"the main job ended with status {status}"
                print(f"{name}, seed {seed}: {what}; the same command goes on from there", file=sys.stderr)
                return status
    print(tables(found[options.split]))
    return 0


def write(out: Path) -> dict[str, Any]:
    """Writes OUT/ablations.json and returns its content."""
    found = collect(out)
    write_text_atomic(out / "ablations.json", json.dumps(found, indent=1) + "\n")
    return found


if __name__ == "__main__":
    sys.exit(main())
