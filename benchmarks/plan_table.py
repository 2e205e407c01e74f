"""The table of docs/scaling.md: `--mode=plan` for four models on TPU slices that need not be here.

    python benchmarks/plan_table.py               # what is missing in docs/scaling.json; stop and go on at any time
    python benchmarks/plan_table.py --render      # docs/scaling.md from docs/scaling.json, without compiling anything

Every cell is a process of its own, written down when it is done; a crash costs that cell alone. All plans come first,
then the largest batches. It takes minutes of one core for each, and the `tpu` extra; nothing runs on a TPU.
"""

import argparse
import dataclasses
import hashlib
import json
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

from pages import generated

ROOT = Path(__file__).resolve().parents[1]
RESULTS, PAGE = ROOT / "docs" / "scaling.json", ROOT / "docs" / "scaling.md"
TOPOLOGIES = ("v5e:4x4", "v5e:8x8", "v5e:16x16", "v5p:4x4x4")
ROWS_PER_CHIP = 4
# What decides a program: a cell that other code made is not wrong, but old (`--renew` makes it again).
_SOURCES = ("models", "nn", "parallel", "generation", "algorithms", "planning", "evaluation/queue.py",
            "checkpoints/published.py", "config/defaults.py", "config/paper.py")  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Model:
    """One of the table's models.

    Attributes:
      config: its experiment.
      adapters: of `mesh`, (fsdp, tensor) on v5e and on v5p, training adapters.
      full: the same for full fine-tuning.
      slice_rows: rows of a slice on each of the mesh's row shards.
      swept: rows of a sweep on each of them.
      remat: what training adapters on v5e recomputes, where it is not what the config has.
      topologies: the TPU slices of its lines.
      gpus: the GPUs of its lines in the tables of `gpu_table.py`.
    """

    config: str
    adapters: tuple[tuple[int, int], tuple[int, int]] = ((16, 1), (1, 1))
    full: tuple[tuple[int, int], tuple[int, int]] = ((16, 1), (8, 1))
    slice_rows: int = 1
    swept: int = 1
    remat: str = ""
    topologies: tuple[str, ...] = TOPOLOGIES
    gpus: tuple[str, ...] = ("h100:1", "h200:1", "h100:8", "h200:8")


_FEWER: dict[str, Any] = dict(topologies=(), gpus=("h200:1", "h200:8"))
MODELS = {
    "LLaVA-1.5-7B": Model("llava15_lppo.py", swept=2),
    "Llama-3.2-11B-Vision": Model("llama32v_lppo.py", full=((64, 1), (8, 1))),
    "LLaVA-NeXT-7B": Model("llava_next_lppo.py", remat="full"),
    "LLaVA-1.5-13B": Model("llava15_lppo.py:13b", full=((64, 1), (8, 1)), swept=2),
    "SmolVLM-500M": Model("smolvlm_lppo.py", **_FEWER),
    "SmolVLM-2.2B": Model("smolvlm_lppo.py:2b", **_FEWER),
    "Qwen2.5-VL-3B": Model("qwen25vl_lppo.py:3b", **_FEWER),
    "Qwen2.5-VL-7B": Model("qwen25vl_lppo.py", **_FEWER),
    "Qwen2.5-VL-32B": Model("qwen25vl_lppo.py:32b", **_FEWER),
}


@dataclasses.dataclass(frozen=True)
class Cell:
    """One line of the table."""

    model: str
    topology: str
    training: str

    @property
    def key(self) -> str:
        """Its name in the results."""
        return f"{self.model} {self.topology} {self.training}"

    @property
    def chips(self) -> int:
        """Of the topology."""
        count = 1
        for size in self.topology.partition(":")[2].split("x"):
            count *= int(size)
        return count

    def fields(self) -> dict[str, int | str]:
        """What differs from the config."""
        model = MODELS[self.model]
        layouts = model.adapters if self.training == "LoRA" else model.full
        fsdp, tensor = layouts[self.topology.startswith("v5p")]
        while fsdp * tensor > self.chips:
            fsdp //= 2
        shards = self.chips // tensor
        found: dict[str, int | str] = {
            "mesh.data": shards // fsdp, "mesh.fsdp": fsdp, "mesh.tensor": tensor,
            "data.batch_size": ROWS_PER_CHIP * self.chips,
            "lppo.accumulation": max(ROWS_PER_CHIP * tensor // model.slice_rows, 1),
            "sweep.batch_size": model.swept * shards,
        }  # fmt: skip
        if self.training == "full":
            return found | {"lora.rank": 0, "model.remat": "full"}
        return found | {"model.remat": model.remat} if model.remat and self.topology.startswith("v5e") else found


def cells() -> list[Cell]:
    """The table, the lines that are asked for most first."""
    order = [(model, training) for training in ("LoRA", "full") for model in MODELS]
    return [Cell(model, topology, training) for model, training in order for topology in MODELS[model].topologies]


def source_hash() -> str:
    """Of the code that a cell's programs follow from."""
    digest = hashlib.sha256()
    for pattern in _SOURCES:
        path = ROOT / "icet_jax" / pattern
        found = path.rglob("*.py") if path.is_dir() else path.parent.glob(path.name)
        for file in sorted(found):
            digest.update(file.relative_to(ROOT).as_posix().encode() + b"\0" + file.read_bytes() + b"\0")
    return digest.hexdigest()[:12]


def compute(cell: Cell, known: dict[str, Any] | None) -> dict[str, Any]:
    """A cell's plan; with `known`, that plan, its largest batch."""
    import jax

    from icet_jax.commands import plan
    from icet_jax.parallel import topology as topologies
    from icet_jax.planning import advice as plan_advice
    from icet_jax.planning import batch as plan_batch
    from icet_jax.runs.config_files import load

    jax.config.update("jax_platforms", "cpu")
    fields = cell.fields()
    config = load(str(ROOT / "configs" / MODELS[cell.model].config), [(name, str(fields[name])) for name in fields])
    topology = topologies.parse(cell.topology)
    if known is not None:
        planned = [SimpleNamespace(**line) for line in known["phases"]]
        found = plan_batch.largest(
            config, topology, "data.batch_size", planned, lambda *given: plan.plan(given[0], topology, given[1])[0]
        )
        return dataclasses.asdict(found)
    lines, abstract = plan.plan(config, topology)
    chip = topology.chip
    return {
        "fields": fields,
        "source": source_hash(),
        "jax": jax.__version__,
        "room": chip.memory,
        "phases": [
            dataclasses.asdict(line)
            | {"total": line.total, "fits": line.fits(chip), "bounds": line.bounds(chip, topology.count)}
            for line in lines
        ],
        "mend": plan_advice.fixes(
            config, abstract, [line.phase for line in lines if line.fits(chip) is False],
            lines[0].weights + lines[0].trained + lines[0].judges, chip.memory,
        ),
    }  # fmt: skip


def fill(only: str, renew: bool, largest: bool) -> None:
    """Makes what is missing, one process each."""
    for cell, part in _missing(only, renew, largest):
        began = time.monotonic()
        print(f"{cell.key}: {part}", flush=True)
        found = computed([__file__, "--cell", cell.key, "--part", part])
        if found is None:
            continue
        found |= {"seconds": round(time.monotonic() - began)}
        results = read()
        if part == "plan":
            results[cell.key] = found
        else:
            results[cell.key]["largest"] = found
        write(RESULTS, json.dumps(results, indent=1, sort_keys=True) + "\n")
        write(PAGE, render(results))
        print(f"  {found['seconds']} s", flush=True)


def computed(command: list[str]) -> dict[str, Any] | None:
    """What a script prints as JSON in its last line; None, after saying why, if it fails."""
    done = subprocess.run([sys.executable, *command], capture_output=True, text=True, check=False, cwd=ROOT)
    said = done.stdout.strip().splitlines()
    if done.returncode or not said:
        print(f"  failed ({done.returncode}): {(done.stderr.strip().splitlines() or ['nothing said'])[-1]}")
        return None
    return json.loads(said[-1])


def _missing(only: str, renew: bool, largest: bool) -> Iterator[tuple[Cell, str]]:
    for part in ("plan", "largest") if largest else ("plan",):
        for cell in cells():
            known = read().get(cell.key)
            old = known is None or known["fields"] != cell.fields() or (renew and known["source"] != source_hash())
            if only not in cell.key:
                continue
            if (part == "plan" and old) or (part == "largest" and known and "largest" not in known):
                yield cell, part


def read(path: Path | None = None) -> dict[str, Any]:
    """The results so far; without a path, those of this script."""
    path = path or RESULTS
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}


def write(path: Path, text: str) -> None:
    """All or nothing."""
    scratch = path.with_suffix(path.suffix + ".part")
    scratch.write_text(text, encoding="utf-8")
    scratch.replace(path)


_GIB = 2**30
_ITERATION = ("rollout", "prepare", "update")


def seconds(cell: dict[str, Any], phases: tuple[str, ...] = _ITERATION, *, overlapped: bool = True) -> float:
    """The time of phases at peak: of each the longest of its three bounds, or their sum where nothing overlaps."""
    combine = max if overlapped else sum
    return sum(combine(line["bounds"].values()) for line in cell["phases"] if line["phase"] in phases)


def efficiency(small: dict[str, Any], large: dict[str, Any], *, overlapped: bool = True) -> float:
    """Weak scaling: chip-seconds for a row on few chips over those on many."""
    cost = [
        seconds(cell, overlapped=overlapped) * _chips(cell["fields"]) / cell["fields"]["data.batch_size"]
        for cell in (small, large)
    ]
    return cost[0] / cost[1]


def _chips(fields: dict[str, Any]) -> int:
    return fields["mesh.data"] * fields["mesh.fsdp"] * fields["mesh.tensor"]


def render(results: dict[str, Any]) -> str:
    """docs/scaling.md."""
    text = (Path(__file__).parent / "plan_table.txt").read_text(encoding="utf-8")
    parts: dict[str, str] = {}
    for training in ("LoRA", "full"):
        chosen = [cell for cell in cells() if cell.training == training]
        known = [(cell, results[cell.key]) for cell in chosen if cell.key in results]
        parts[f"memory {training}"] = table(_MEMORY, [_memory(*pair) for pair in known])
        parts[f"time {training}"] = table(_TIME, [_time(cell, found, results) for cell, found in known])
        left = [cell.key for cell in chosen if cell.key not in results]
        parts[f"left {training}"] = "\n" + f"Not compiled yet: {'; '.join(left)}.\n" if left else ""
    fixes = [_wrapped(f"- {cell.key}: {'; '.join(results[cell.key]['mend'])}")
             for cell in cells() if results.get(cell.key, {}).get("mend")]  # fmt: skip
    searched = [f"- {cell.key}: {_largest(results[cell.key]['largest'])}"
                for cell in cells() if "largest" in results.get(cell.key, {})]  # fmt: skip
    parts["gpus"] = generated(PAGE.read_text(encoding="utf-8") if PAGE.exists() else "", GPUS_BEGIN, GPUS_END)
    parts["largest"] = "\n".join(searched) or "None yet."
    parts["fixes"] = "\n".join(fixes) or "Every cell fits."
    parts["versions"] = ", ".join(sorted({f"jax {found['jax']}" for found in results.values()})) or "none yet"
    for name, part in parts.items():
        text = text.replace("{" + name + "}", part)
    return text


GPUS_BEGIN, GPUS_END = "<!-- made by benchmarks/gpu_table.py -->", "<!-- end of what it makes -->"


def _wrapped(item: str) -> str:
    """A list item in lines of at most 118 characters."""
    return textwrap.fill(item, 118, subsequent_indent="  ", break_long_words=False, break_on_hyphens=False)


_MEMORY = ("model", "chips", "data x fsdp x tensor", "rows (slices)", "weights", "trained", "judges", "inputs + cache",
           "temporaries", "GiB of", "fits")  # fmt: skip
_TIME = ("model", "chips", "Tflop/chip", "moved GiB", "rollout", "prepare", "update", "s / iteration",
         "ms / row / chip", "weak scaling")  # fmt: skip


def table(head: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    return "\n".join("| " + " | ".join(row) + " |" for row in (head, ("---",) * len(head), *rows))


def _memory(cell: Cell, found: dict[str, Any]) -> tuple[str, ...]:
    fields, worst = found["fields"], max(found["phases"], key=lambda line: (bool(line["refused"]), line["total"]))
    taken = worst["inputs"] + worst["cache"]
    refused = bool(worst["refused"])
    broken = [line["phase"] for line in found["phases"] if line["fits"] is False]
    return (
        cell.model, cell.topology, _mesh(fields), f"{fields['data.batch_size']} ({fields['lppo.accumulation']})",
        *(f"{size / _GIB:.1f}" for size in (worst["weights"], worst["trained"], worst["judges"], taken)),
        "refused" if refused else f"{worst['temporaries'] / _GIB:.1f}",
        f"{'>' * refused}{worst['total'] / _GIB:.1f} of {found['room'] / _GIB:.1f}",
        f"no: {', '.join(broken)}" if broken else f"yes ({worst['phase']})",
    )  # fmt: skip


def _mesh(fields: dict[str, Any]) -> str:
    return " x ".join(str(fields[f"mesh.{axis}"]) for axis in ("data", "fsdp", "tensor"))


def _largest(found: dict[str, Any]) -> str:
    if found["rows"] is None:
        return f"none of {found['unit']} or more"
    return str(found["rows"]) if found["next"] is None else f"{found['rows']} (not {found['next']})"


def _time(cell: Cell, found: dict[str, Any], results: dict[str, Any]) -> tuple[str, ...]:
    lines = {line["phase"]: line for line in found["phases"]}
    chips, rows = cell.chips, found["fields"]["data.batch_size"]
    flops = sum(lines[phase]["work"]["flops"] for phase in _ITERATION) / chips
    moved = [lines[phase]["moved"] for phase in _ITERATION]
    fewer = (results.get(dataclasses.replace(cell, topology=name).key) for name in TOPOLOGIES if name.startswith("v5e"))
    base, scaled = next((one for one in fewer if one and _known(one)), None), "-"
    if base and cell.topology.startswith("v5e") and _known(found):
        shares = [f"{100 * efficiency(base, found, overlapped=way):.0f}" for way in (True, False)]
        scaled = f"{' / '.join(shares)} %"
    least = "" if _known(found) else ">"
    total = seconds(found)
    return (
        cell.model, cell.topology, f"{flops / 1e12:.0f}",
        f"{sum(size or 0 for size in moved) / _GIB:.0f}" if _known(found) else "-",
        *(_phase(lines[phase]) for phase in _ITERATION),
        f"{least}{total:.2g} - {seconds(found, overlapped=False):.2g}",
        f"{least}{1e3 * total * chips / rows:.0f}", scaled,
    )  # fmt: skip


def _known(found: dict[str, Any]) -> bool:
    return all(line["moved"] is not None for line in found["phases"] if line["phase"] in _ITERATION)


def _phase(line: dict[str, Any]) -> str:
    bounds = line["bounds"]
    name = max(bounds, key=bounds.get)
    return f"{bounds[name]:.2g} s, {name}"


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--render", action="store_true", help="write docs/scaling.md alone")
    parser.add_argument("--only", default="", help="cells whose name contains this, such as 'LLaVA-1.5-7B v5e'")
    parser.add_argument("--renew", action="store_true", help="make cells again that other source code made")
    parser.add_argument("--no-largest", action="store_true", help="plans alone, without the largest batches")
    parser.add_argument("--cell", help=argparse.SUPPRESS)
    parser.add_argument("--part", default="plan", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.render:
        write(PAGE, render(read()))
    elif options.cell:
        (cell,) = (cell for cell in cells() if cell.key == options.cell)
        print(json.dumps(compute(cell, read()[cell.key] if options.part == "largest" else None)))
    else:
        fill(options.only, options.renew, not options.no_largest)


if __name__ == "__main__":
    main()
