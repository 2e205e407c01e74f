"""The comparison of docs/methods.md: every method that closes exits, on the organisms, with the same measurements.

    python benchmarks/methods.py --out runs/methods                      # the next missing cells of all tables
    python benchmarks/methods.py --out runs/methods --table first        # of one table
    python benchmarks/methods.py --out runs/methods --only lppo_anchor --seeds 0
    python benchmarks/methods.py --page                                  # docs/methods.md from docs/methods.json

A cell is one run: one method, one organism, one variant of the data, one seed. Each finished run appends one row to
docs/methods.json and renews docs/methods.md. The script can be stopped at any time: the same command goes on with the
cells that are missing, and a run that was stopped resumes. Settings are chosen on the val split; the tables are
of the test split.

The third table has two harder organisms, which do not ship. Their cells are left out until they have been built:

    python -m icet_jax.organism.build --out runs/organisms/near_default --planted-exits 5,6
    python -m icet_jax.organism.build --out runs/organisms/many_refusals --refusals many
    python benchmarks/methods.py --out runs/methods --table third --organisms runs/organisms
"""

import argparse
import json
import shlex
import statistics
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).parent))

from ablations import copy_sweep_before, run_job
from methods_page import FIGURE, Group, figure, page, spots

from icet_jax.config.names import ALGORITHMS
from icet_jax.errors import RESUMABLE
from icet_jax.files import write_text_atomic
from icet_jax.report.loading import load_run
from icet_jax.report.method import TrainingCost, run_cost
from icet_jax.report.study import Study
from icet_jax.report.tradeoff import utility_lost

ROOT = Path(__file__).parents[1]
ROWS = ROOT / "docs/methods.json"
PAGE = ROOT / "docs/methods.md"
ORGANISMS = {
    "llava": "configs/organism_lppo.py",
    "llava_next": "configs/organism_next_lppo.py",
    "mllama": "configs/organism_mllama_lppo.py",
}
SWEEPS = {
    split: {
        "sweep.datasets": {"forbidden": f"organism:{split}:forbidden:256", "benign": f"organism:{split}:benign:256"},
        "sweep.utility": {"vqa": f"organism:{split}:vqa:512"},
        "log.tensorboard": False,
    }
    for split in ("val", "test")
}
METHODS: dict[str, tuple[str, dict[str, Any]]] = {
    "none": ("no training", {}),
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
    "lppo_warm": ("L-SFT, then L-PPO", {"warm_start": "lsft", "lsft.iterations": 10, "lppo.iterations": 30}),
    "ldpo": ("L-DPO", {"algorithm": "ldpo"}),
    "ldpo_plain": ("L-DPO without the SFT term", {"algorithm": "ldpo", "ldpo.sft_coef": 0.0}),
}
"""Name of a cell -> (name in the page, fields that differ from the organism's config)."""
SETTINGS: dict[str, tuple[str, dict[str, Any]]] = {
    "lppo_anchor_0.1": ("L-PPO with an anchor, coefficient 0.1", {"lppo.anchor_coef": 0.1}),
    "lppo_anchor_1": ("L-PPO with an anchor, coefficient 1", {"lppo.anchor_coef": 1.0}),
}
"""Settings that were tried on the val split beside those of `METHODS`."""
ALL = METHODS | SETTINGS
VARIANTS: dict[str, dict[str, Any]] = {
    "mixed": {},
    "every_second_exit": {"lppo.train_exits": (1, 3, 5, 7)},
    "forbidden_rows": {"data.mixture": {"forbidden": 1.0}},
    "unseen_nouns": {
        "data.train": "organism:train:forbidden:2048:seen + organism:train:benign:2048 + organism:train:vqa:2048",
        "sweep.datasets": SWEEPS["test"]["sweep.datasets"] | {"forbidden": "organism:test:forbidden:256:unseen"},
    },
    "half_budget": {
        f"{algorithm}.iterations": 20 for algorithm in ALGORITHMS
    },
}  # fmt: skip
"""What a run trains on -> the fields that say so."""
ABOUT_VARIANTS = {
    "mixed": "Mixed data: forbidden, benign and VQA rows, all exits.",
    "every_second_exit": "Trained at exits 1, 3, 5 and 7 alone, measured at all.",
    "forbidden_rows": "Trained on forbidden rows alone.",
    "unseen_nouns": "Forbidden rows of training name 16 of the 24 forbidden nouns, those of the sweep the other eight.",
    "half_budget": "Half the iterations.",
}


class Harder(NamedTuple):
    """Describes an organism that does not ship: a LLaVA on which methods differ more.

    Attributes:
      about: what makes it harder.
      options: options of `icet_jax.organism.build`.
      own_reward_model: whether runs take the reward model that was built with it.
    """

    about: str
    options: str
    own_reward_model: bool


HARDER = {
    "near_default": Harder("The hole is at exits 5 and 6, next to the default exit 7.", "--planted-exits 5,6", False),
    "many_refusals": Harder("The model refuses in eight wordings instead of one.", "--refusals many", True),
}
BUILT = Path("runs/organisms")
"""Folder of the built organisms in the commands of docs/methods.json."""


class Cell(NamedTuple):
    """One run of a table."""

    table: str
    method: str
    organism: str
    variant: str
    seed: int

    @property
    def split(self) -> str:
        """Split of the rows of the sweeps: settings are chosen on val."""
        return "val" if self.table == "settings" else "test"


CHOICE = ("lppo", "lppo_anchor", "lppo_warm", "ldistill_policy", "ldistill_default", "lsft")
"""The methods among which the recommended one is chosen, with the whole and with half the budget."""
BEST = ("lppo", "lppo_anchor", "ldistill_policy", "ldistill_default", "lsft")
"""The methods of the second and third table: the paper's L-PPO and the four best of the first."""


def cells() -> Iterator[Cell]:
    """Every cell of the tables, in the order in which they are run: all methods with one seed first."""
    for method in (*CHOICE, *SETTINGS):
        yield Cell("settings", method, "llava", "mixed", 0)
    for organism in ORGANISMS:
        for method in CHOICE:
            yield Cell("settings", method, organism, "half_budget", 0)
    for seed in range(3):
        for method in METHODS:
            if method != "none" or seed == 0:  # greedy answers before training are the same for every seed
                yield Cell("first", method, "llava", "mixed", seed)
    for seed in range(5):
        for organism in ORGANISMS:
            for method in BEST:
                yield Cell("second", method, organism, "mixed", seed)
    for seed in range(3):
        for variant in VARIANTS:
            for method in BEST if variant != "mixed" else ():
                yield Cell("third", method, "llava", variant, seed)
        for organism in HARDER:
            for method in BEST:
                yield Cell("third", method, organism, "mixed", seed)


def run_of(cell: Cell) -> str:
    """Names the run of a cell; cells of different tables may share one."""
    split = f"{cell.split}/" if cell.split == "val" else ""
    return f"{split}{cell.organism}/{cell.variant}/{cell.method}/seed_{cell.seed}"


def config_of(organism: str) -> str:
    """The config of an organism; those that do not ship have that of the LLaVA organism."""
    return ORGANISMS["llava" if organism in HARDER else organism]


def fields(cell: Cell, organisms: Path = BUILT) -> dict[str, Any]:
    """The fields of a cell's run that differ from its organism's config; `organisms` has the built organisms."""
    weights = {}
    if cell.organism in HARDER:
        weights["model.checkpoint"] = str(organisms / cell.organism / "vlm")
        if HARDER[cell.organism].own_reward_model:
            weights["reward.model"] = str(organisms / cell.organism / "reward_model")
    method, variant = ALL[cell.method][1], VARIANTS[cell.variant]
    # A method with iterations of its own, such as those of a warm start, has half of them in half the budget.
    halved = {name: method[name] // 2 for name in method if name.endswith(".iterations") and name in variant}
    return {"seed": cell.seed, **SWEEPS[cell.split], **weights, **method, **variant, **halved}


def command(cell: Cell, folder: Path | str, organisms: Path = BUILT) -> list[str]:
    """The command line of a cell's run."""
    options = [f"--config.{name}={value}" for name, value in fields(cell, organisms).items()]
    mode = ["--mode=sweep"] if cell.method == "none" else []
    start = ["-m", "icet_jax.main", *mode, f"--config={config_of(cell.organism)}"]
    return [*start, f"--workdir={folder}", *options]


def build_command(organism: str) -> str | None:
    """The command that builds an organism; None for those that ship."""
    options = HARDER[organism].options if organism in HARDER else None
    return options and f"python -m icet_jax.organism.build --out {BUILT / organism} {options}"


def measured(folder: Path) -> dict[str, Any]:
    """What a finished run reached, shares in percent, and what it cost; of a sweep alone what the model is like."""
    side = "after" if (folder / "sweeps/after.forbidden.json").is_file() else "before"
    forbidden = json.loads((folder / f"sweeps/{side}.forbidden.json").read_text())
    benign = json.loads((folder / f"sweeps/{side}.benign.json").read_text())
    utility = json.loads((folder / "utility.json").read_text())
    default = forbidden["default_exit"] - 1
    worst = forbidden["worst_exit"]["asr/world_exact"]
    any_exit = forbidden["any_exit"]["asr_any/world_exact"]
    vqa = {when: curve(utility[when]["vqa"], "accuracy/vqa_exact") for when in ("before", side)}
    cost, lost = TrainingCost(tokens=0.0, flops=0.0, seconds=0.0), None
    if side == "after":
        run = load_run(folder)
        cost, lost = run_cost(run), utility_lost(Study((run,)))
    return {
        "asr_worst": 100 * worst["mean"],
        "asr_worst_ci95": [100 * end for end in worst["ci95"]],
        "asr_any": 100 * any_exit["mean"],
        "asr_any_ci95": [100 * end for end in any_exit["ci95"]],
        "asr_mean": statistics.mean(curve(forbidden, "asr/world_exact")),
        "benign_refused": max(curve(benign, "refusal/refusal_keywords")),
        "degenerate": max(max(curve(table, "degenerate/text_rules")) for table in (forbidden, benign)),
        "vqa": vqa[side][default],
        "vqa_change": vqa[side][default] - vqa["before"][default],
        "vqa_change_mean": statistics.mean(vqa[side]) - statistics.mean(vqa["before"]),
        "utility_lost": 0.0 if lost is None else 100 * lost.value.mean,
        "kl_default_benign": kl_at_the_default_exit(folder) if side == "after" else 0.0,
        "tokens": cost.tokens,
        "flops": cost.flops,
        "seconds": cost.seconds,
    }


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
        "command": shlex.join(["python", *command(cell, f"runs/methods/{run_of(cell)}")]),
        **({"build": build_command(cell.organism)} if cell.organism in HARDER else {}), **numbers,
    }  # fmt: skip
    write_text_atomic(ROWS, json.dumps({"schema": 1, "rows": [*load_rows(), row]}, indent=1) + "\n")


def perform(cell: Cell, out: Path, organisms: Path) -> int:
    """Runs or resumes the run of a cell, appends its row and renews the page; returns the exit status of the run."""
    folder = out / run_of(cell)
    if not (folder / "report.html").is_file():
        copy_sweep_before(folder, folder.parents[1], config_of(cell.organism), fields(cell, organisms))
        line = [sys.executable, *command(cell, folder, organisms)]
        print("+", *line, flush=True)
        status = run_job(line)
        if status:
            return status
    append(cell, measured(folder))
    write_page()
    return 0


def groups(rows: list[dict[str, Any]]) -> list[Group]:
    """The tables of the page, each with the rows that it has so far."""
    made: list[Group] = []
    for name, heading in (
        ("first", "Every method, LLaVA organism"),
        ("second", "The four best and the paper's L-PPO, three organisms"),
        ("third", "Less to learn from, and harder organisms"),
        ("settings", "Choice of settings, val split"),
    ):
        of_table = [cell for cell in cells() if cell.table == name]
        for organism, variant in dict.fromkeys((cell.organism, cell.variant) for cell in of_table):
            own = [cell for cell in of_table if (cell.organism, cell.variant) == (organism, variant)]
            names = dict.fromkeys(cell.method for cell in own)
            methods = {method: sum(cell.method == method for cell in own) for method in names}
            measured_rows = [row for row in rows if row["run"] in {run_of(cell) for cell in own}]
            lppo = [row["tokens"] for row in rows if row["run"].startswith(f"{organism}/mixed/lppo/")]
            tokens = statistics.mean(lppo) if lppo else None
            made.append(Group(heading, about(name, organism, variant), methods, measured_rows, tokens))
            heading = ""
    return made


def about(table: str, organism: str, variant: str) -> str:
    """What the runs of one group have in common."""
    if organism in HARDER:
        return f"{HARDER[organism].about} Built by `{build_command(organism)}`."
    return f"{ABOUT_VARIANTS[variant]} Organism: `{organism}`." if table != "third" else ABOUT_VARIANTS[variant]


def titles_of_methods() -> dict[str, str]:
    """Returns {name of a method: its name on the page}."""
    return {name: title for name, (title, _) in ALL.items()}


def write_page() -> None:
    """Writes docs/methods.md and its figure."""
    titles = titles_of_methods()
    tables = groups(load_rows())
    if spots(tables[0], titles):
        write_text_atomic(PAGE.parent / FIGURE, figure(tables[0], titles))
    old = PAGE.read_text(encoding="utf-8") if PAGE.is_file() else ""
    write_text_atomic(PAGE, page(old, tables, titles))


def main() -> int:
    """Runs what is missing of what is asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/methods"))
    parser.add_argument("--table", choices=("settings", "first", "second", "third"))
    parser.add_argument("--only", default="", help="comma-separated methods; default: all")
    parser.add_argument("--seeds", default="", help="comma-separated; default: all of the table")
    parser.add_argument("--organisms", type=Path, default=BUILT, help="folder of the organisms that do not ship")
    parser.add_argument("--page", action="store_true", help="run nothing; write docs/methods.md and its figure")
    options = parser.parse_args()
    if options.page:
        write_page()
        return 0
    chosen = options.only.split(",") if options.only else list(ALL)
    for name in chosen:
        if name not in ALL:
            parser.error(f"--only: there is no method {name!r}; choose from {', '.join(ALL)}")
    seeds = [int(seed) for seed in options.seeds.split(",")] if options.seeds else range(5)
    missing: set[str] = set()
    for cell in cells():
        is_requested = options.table in (None, cell.table) and cell.method in chosen and cell.seed in seeds
        if not is_requested or run_of(cell) in {row["run"] for row in load_rows()}:
            continue
        if cell.organism in HARDER and not (options.organisms / cell.organism / "vlm").is_dir():
            missing.add(cell.organism)
            continue
        status = perform(cell, options.out, options.organisms)
        if status:
            what = "stopped" if status == RESUMABLE else f"ended with status {status}"
            print(f"{run_of(cell)}: {what}; the same command goes on from there", file=sys.stderr)
            return status
    for organism in sorted(missing):
        print(f"{organism}: left out, it is not in {options.organisms}: {build_command(organism)}", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
