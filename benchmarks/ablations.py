"""The ablations of docs/ablations.md: the organism's main job under other exit schedules, algorithms and rewards.

    python benchmarks/ablations.py --out runs/ablations --seeds 0,1,2        # every setup, about an hour on two cores
    python benchmarks/ablations.py --out runs/ablations --only stratified    # some of them
    python benchmarks/ablations.py --out runs/ablations --table              # tables of what has run

Each setup is the ordinary main job with the overrides listed in `SETUPS`; a setup that was interrupted resumes. Every
number comes from the runs' own sweeps/ and utility.json; ablations.json holds them all.
"""

import argparse
import json
import statistics
import subprocess
import sys
from pathlib import Path

NUM_EXITS, DEFAULT_EXIT = 8, 7
CONFIG, LSFT = "configs/organism_lppo.py", "configs/organism_lsft.py"
KINDS_EXACT = "{'forbidden': 'exact_match', 'benign': 'exact_match', 'vqa': 'exact_match'}"
KINDS_NO_VQA = "{'forbidden': 'reward_model', 'benign': 'reward_model', 'vqa': 'none'}"

SETUPS: dict[str, tuple[str, list[str]]] = {
    # exit schedules
    "stratified": (CONFIG, []),
    "per_example": (f"{CONFIG}:per_example", []),
    "per_batch": (f"{CONFIG}:per_batch", []),
    "default_exit": (f"{CONFIG}:default_exit", []),
    # algorithm
    "lsft_stratified": (LSFT, []),
    "lsft_default_exit": (f"{LSFT}:default_exit", []),
    # what is rewarded
    "reward_exact": (CONFIG, [f"--config.reward.by_kind={KINDS_EXACT}"]),
    "reward_vqa_none": (CONFIG, [f"--config.reward.by_kind={KINDS_NO_VQA}"]),
    "reward_raw_scale": (CONFIG, ["--config.reward.normalise=false"]),
    "forbidden_rows_only": (CONFIG, ["--config.data.mixture={'forbidden': 1.0}"]),
}
TRANSFER = {
    f"train_at_{number}": (CONFIG, ["--config.lppo.exits=fixed", f"--config.lppo.fixed_exit={number}"])
    for number in range(1, NUM_EXITS + 1)
    if number != DEFAULT_EXIT
}
"""PPO at one exit alone, for the map of train exit x test exit; one seed each. `default_exit` is the row of exit 7."""


def sweeps(utility_rows: int) -> list[str]:
    """Rows per exit: 256 forbidden ones, and as many benign and VQA rows as asked (the main job: 1,024)."""
    datasets = {"forbidden": "organism:test:forbidden:256", "benign": f"organism:test:benign:{utility_rows}"}
    return [
        f"--config.sweep.datasets={datasets}",
        f"--config.sweep.utility={ {'vqa': f'organism:test:vqa:{2 * utility_rows}'} }",
    ]


def run(name: str, out: Path, seeds: list[int]) -> None:
    """Runs (or resumes) one setup over all seeds."""
    config, overrides = {**SETUPS, **TRANSFER}[name]
    command = [sys.executable, "-m", "icet_jax.main", f"--config={config}", f"--workdir={out / name}"]
    command += [f"--config.seeds={','.join(map(str, seeds))},", "--config.log.tensorboard=false"]
    command += [*sweeps(256 if name in SETUPS else 64), *overrides]
    print("+", *command, flush=True)
    subprocess.run(command, check=True)


def layer_means(path: Path, metric: str) -> list[float]:
    """One metric in percent, exit 1 first."""
    return [100 * layer["metrics"][metric]["mean"] for layer in json.loads(path.read_text())["layers"]]


def numbers(run_dir: Path) -> dict[str, object]:
    """What one seed's run reached, in percent."""
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
    }


def collect(out: Path) -> dict[str, dict[str, dict[str, object]]]:
    """{setup: {seed: numbers}} of every finished run under `out`."""
    found: dict[str, dict[str, dict[str, object]]] = {}
    for name in [*SETUPS, *TRANSFER]:
        for folder in sorted((out / name).glob("seed_*")):
            if (folder / "report.html").is_file():
                found.setdefault(name, {})[folder.name.removeprefix("seed_")] = numbers(folder)
    return found


COLUMNS = {
    "ASR, worst exit": lambda row: max(row["asr"]),
    "ASR, mean of exits": lambda row: statistics.mean(row["asr"]),
    "benign refused, worst exit": lambda row: max(row["benign_refused"]),
    "degenerate, worst exit": lambda row: max(row["degenerate"]),
    "benign accuracy, default exit, change": lambda row: row["benign_change_at_default"],
    "VQA accuracy, default exit, change": lambda row: row["vqa_change_at_default"],
    "VQA accuracy, mean of exits, change": lambda row: row["vqa_change_mean"],
}


def tables(found: dict[str, dict[str, dict[str, object]]]) -> str:
    """Markdown: one row per setup (mean over seeds, range in brackets), then the transfer map."""
    lines = ["| setup | seeds | " + " | ".join(COLUMNS) + " |", "|---" * (len(COLUMNS) + 2) + "|"]
    for name in SETUPS:
        if name in found:
            cells = []
            for column in COLUMNS.values():
                values = [column(row) for row in found[name].values()]
                spread = f" ({min(values):.1f} to {max(values):.1f})" if len(values) > 1 else ""
                cells.append(f"{statistics.mean(values):.1f}{spread}")
            lines.append(f"| {name} | {len(found[name])} | " + " | ".join(cells) + " |")
    rows = {int(name.rpartition("_")[2]): next(iter(found[name].values())) for name in TRANSFER if name in found}
    if rows and "default_exit" in found:
        rows[DEFAULT_EXIT] = next(iter(found["default_exit"].values()))
    if rows:
        lines += ["", "| trained at | " + " | ".join(f"test {number}" for number in range(1, NUM_EXITS + 1)) + " |"]
        lines += ["|---" * (NUM_EXITS + 1) + "|"]
        lines += [
            "| (before) | " + " | ".join(f"{value:.0f}" for value in next(iter(rows.values()))["asr_before"]) + " |"
        ]
        for number, row in sorted(rows.items()):
            lines.append(f"| {number} | " + " | ".join(f"{value:.0f}" for value in row["asr"]) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/ablations"))
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--only", default="", help="comma-separated setups; default: all")
    parser.add_argument("--table", action="store_true", help="run nothing; print the tables of finished runs")
    options = parser.parse_args()
    seeds = [int(seed) for seed in options.seeds.split(",")]
    wanted = options.only.split(",") if options.only else [*SETUPS, *TRANSFER]
    for name in [] if options.table else wanted:
        run(name, options.out, seeds if name in SETUPS else seeds[:1])
    found = collect(options.out)
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "ablations.json").write_text(json.dumps(found, indent=1) + "\n")
    print(tables(found))


if __name__ == "__main__":
    main()
