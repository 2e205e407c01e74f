"""How long `align` takes to reach its first L-PPO step: a first start against one that finds its programs compiled.

    python benchmarks/start_up.py --out runs/start_up                        # the organism and a LLaVA of about 60M
    python benchmarks/start_up.py --out runs/start_up --models organism --pairs 3

Every start is a process of its own that goes on in a run directory whose sweeps before training are done. Of a pair,
the first has an empty folder of compiled programs and the second the one that the first has filled. The clock runs from
before the process exists to the call of the first step; both end there. Files of either are in the page cache. A pair
during which other programs used more than a tenth of the processors is measured again, at most `--pairs` times more,
and marked if it still was so. Results go to OUT/start_up.json.
"""

import argparse
import functools
import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

QUIET = 0.1  # share of all processors that other programs may use during a timed pair
ROOT = Path(__file__).resolve().parent.parent
MODELS = ("organism", "llava-60m")
STAGES = {
    "imports": "Python and imports",
    "rows": "rows of the data sets",
    "weights": "weights of the model",
    "reward": "reward model: weights, tokenizer",
    "processor": "tokenizer, images, first batch",
    "state": "adapters and optimizer",
    "programs": "programs of the step: traced, compiled or read",
    "step": "to the call of the first step",
}


def flags(name: str, folder: Path) -> list[str]:
    """The command line of a model's run, without its directory."""
    shared = {
        "log.tensorboard": "false",
        "sweep.datasets": "{'forbidden': 'organism:test:forbidden'}",
        "sweep.utility": "{}",
        "sweep.limit": "2",
        "sweep.exits": "1,",
        "sweep.scorers": "refusal_keywords",
    }
    if name == "organism":
        return ["--config=configs/organism_lppo.py", *_settings(shared)]
    own = {
        "model.checkpoint": str(folder / name),
        "data.train": "toy:mixed",
        "data.mixture": "{'forbidden': 0.5, 'vqa': 0.5}",
        "data.batch_size": "16",
        "data.max_prompt_tokens": "128",
        "lora.rank": "8",
        "lora.targets": "q_proj,v_proj",
        "lppo.max_new_tokens": "32",
        "reward.model": "toy:reward_model",
        "sweep.datasets": "{'forbidden': 'toy:forbidden'}",
        "sweep.max_new_tokens": "4",
        "export.form": "full",
    }
    return ["--config=configs/llava15_lppo.py:smoke", *_settings(shared | own)]


def _settings(values: dict[str, str]) -> list[str]:
    return [f"--config.{field}={value}" for field, value in values.items()]


def make_llava(folder: Path) -> None:
    """A checkpoint of about 60M parameters with random weights: CLIP 24 x 256, 64 image positions, Llama 12 x 512."""
    from flax import nnx

    from icet_jax import miniatures as toy
    from icet_jax.models.llava.network import Llava, LlavaConfig
    from icet_jax.models.saving import save_vlm
    from icet_jax.nn.clip import ClipConfig
    from icet_jax.nn.llama import LlamaConfig

    small = toy.checkpoint("llava15", folder.parent)
    image = json.loads((small / "config.json").read_text())["image_token_index"]
    vision = ClipConfig(256, 1024, 24, 4, image_size=112, patch_size=14)
    config = LlavaConfig(vision=vision, text=LlamaConfig(8192, 512, 1376, 12, 8, 8, 64), image_token_index=image)
    save_vlm(folder, config, nnx.split(Llava(config, rngs=nnx.Rngs(0)))[1])
    for file in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        shutil.copy(small / file, folder)
    pixels = json.loads((small / "preprocessor_config.json").read_text())
    pixels |= {"size": {"shortest_edge": 112}, "crop_size": {"height": 112, "width": 112}}
    (folder / "preprocessor_config.json").write_text(json.dumps(pixels))


def child(report: Path, began: float, arguments: list[str]) -> None:
    """One start, as the command line does it; writes when each stage was over, in seconds since `began`."""
    import jax

    from icet_jax import main
    from icet_jax.algorithms import lppo
    from icet_jax.commands import align
    from icet_jax.runs import common
    from icet_jax.training import loop as training

    ends: dict[str, float] = {}
    events: dict[str, float] = {}

    def count(name: str, seconds: float, **_: Any) -> None:
        events[name] = events.get(name, 0.0) + seconds

    def watch(owner: Any, name: str, before: str | None, after: str | None = None) -> None:
        function: Callable[..., Any] = getattr(owner, name)

        @functools.wraps(function)
        def watched(*arguments: Any, **options: Any) -> Any:
            if before is not None:
                ends.setdefault(before, time.time() - began)
            result = function(*arguments, **options)
            if after is not None:
                ends[after] = time.time() - began
            return result

        setattr(owner, name, watched)

    def step(*_: Any) -> None:
        ends["step"] = time.time() - began
        report.write_text(json.dumps({"ends": ends, "events": events, "cpu": time.process_time()}))
        raise KeyboardInterrupt

    jax.monitoring.register_event_duration_secs_listener(count)
    watch(common, "load_inputs", "imports")
    watch(common, "load_model", "rows", "weights")
    watch(align, "_reward", None, "reward")
    watch(training.Trainer, "__init__", None, "processor")
    watch(training, "compile_programs", "state", "programs")
    lppo.Lppo.begin = step  # type: ignore[method-assign,assignment]
    sys.argv = [sys.argv[0], *arguments]
    main.console()


def start(folder: Path, name: str, programs: Path) -> dict[str, Any]:
    """One timed start on a fresh copy of the prepared run directory."""
    workdir, report = folder / "workdir", folder / "start.json"
    shutil.rmtree(workdir, ignore_errors=True)
    if (folder / f"{name}-run").exists():
        shutil.copytree(folder / f"{name}-run", workdir)
    report.unlink(missing_ok=True)
    arguments = [*flags(name, folder), f"--workdir={workdir}", f"--config.compilation_cache={programs}"]
    environment = {key: value for key, value in os.environ.items() if "CACHE" not in key}
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    began, others = time.time(), _others()
    command = [sys.executable, __file__, "--child", str(report), repr(began), *arguments]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    if not report.exists():
        sys.exit(f"the start failed:\n{done.stderr[-2000:]}")
    wall = time.time() - began
    return json.loads(report.read_text()) | {"others": (_others() - others) / wall / (os.cpu_count() or 1)}


def _others() -> float:
    """Processor seconds that all programs but this one's children have used; 0 where the system does not tell."""
    if not Path("/proc/stat").exists():
        return 0.0
    fields = [int(field) for field in Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:9]]
    busy = (sum(fields) - fields[3] - fields[4]) / os.sysconf("SC_CLK_TCK")
    times = os.times()
    return busy - times.user - times.system - times.children_user - times.children_system


def prepare(folder: Path, name: str) -> None:
    """Leaves a run directory whose sweeps before training are done, and the checkpoint that it needs."""
    if name != "organism" and not (folder / name / "config.json").exists():
        make_llava(folder / name)
    target = folder / f"{name}-run"
    shutil.rmtree(target, ignore_errors=True)
    start(folder, name, folder / "programs")
    workdir = folder / "workdir"
    shutil.rmtree(workdir / "checkpoints", ignore_errors=True)
    (workdir / "metrics.jsonl").unlink(missing_ok=True)
    workdir.rename(target)


def pair(folder: Path, name: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """A cold start and a warm one."""
    shutil.rmtree(folder / "programs", ignore_errors=True)
    cold = start(folder, name, folder / "programs")
    return cold, start(folder, name, folder / "programs")


def stages(run: dict[str, Any]) -> dict[str, float]:
    """Seconds of each stage of a start."""
    ends = [0.0, *(run["ends"][stage] for stage in STAGES)]
    return {stage: after - before for stage, before, after in zip(STAGES, ends, ends[1:], strict=False)}


def measure(folder: Path, name: str, pairs: int) -> dict[str, Any]:
    """All pairs of a model, as start_up.json holds them."""
    prepare(folder, name)
    kept: list[Any] = []
    for attempt in range(2 * pairs):
        cold, warm = pair(folder, name)
        loaded = max(cold["others"], warm["others"]) > QUIET
        if loaded and 2 * pairs - attempt > pairs - len(kept):
            print(f"{name}: other programs used the processors; measured again", file=sys.stderr)
            continue
        kept.append({"cold": cold, "warm": warm, "loaded": loaded})
        seconds = [run["ends"]["step"] for run in (cold, warm)]
        print(f"{name}: cold {seconds[0]:.2f} s, warm {seconds[1]:.2f} s", file=sys.stderr)
        if len(kept) == pairs:
            break
    totals = {kind: [one[kind]["ends"]["step"] for one in kept] for kind in ("cold", "warm")}
    ratios = [warm / cold for cold, warm in zip(totals["cold"], totals["warm"], strict=True)]
    medians = {
        kind: {stage: statistics.median(stages(one[kind])[stage] for one in kept) for stage in STAGES}
        for kind in ("cold", "warm")
    }
    cpu = {kind: [one[kind]["cpu"] for one in kept] for kind in ("cold", "warm")}
    return {"seconds": totals, "cpu_seconds": cpu, "warm_over_cold": ratios, "stages": medians, "pairs": kept}


def table(results: dict[str, Any]) -> str:
    """Markdown."""
    lines = ["| model | cold, s | warm, s | warm / cold | cold, processor s | warm, processor s |", "|---" * 6 + "|"]
    for name, result in results.items():
        numbers = [result["seconds"]["cold"], result["seconds"]["warm"]]
        cells = [f"{statistics.median(n):.2f} ({min(n):.2f}-{max(n):.2f})" for n in numbers]
        ratios = result["warm_over_cold"]
        loaded = sum(one["loaded"] for one in result["pairs"])
        note = f", {loaded} of {len(ratios)} pairs on a busy machine" if loaded else ""
        cells.append(f"{statistics.median(ratios):.0%} ({min(ratios):.0%}-{max(ratios):.0%}){note}")
        cells += [f"{statistics.median(result['cpu_seconds'][kind]):.2f}" for kind in ("cold", "warm")]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    for name, result in results.items():
        lines += ["", f"| {name}: where the time goes | cold, s | warm, s |", "|---|---|---|"]
        cold, warm = (result["stages"][kind] for kind in ("cold", "warm"))
        lines += [f"| {words} | {cold[stage]:.2f} | {warm[stage]:.2f} |" for stage, words in STAGES.items()]
    return "\n".join(lines)


def main() -> None:
    """Measures, prints the tables and writes the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder for checkpoints, runs and start_up.json")
    parser.add_argument("--models", nargs="+", choices=MODELS, default=MODELS)
    parser.add_argument("--pairs", type=int, default=5)
    options = parser.parse_args()
    folder = options.out.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    sys.path.insert(0, str(ROOT))
    results = {name: measure(folder, name, options.pairs) for name in options.models}
    (folder / "start_up.json").write_text(json.dumps(results, indent=1) + "\n")
    print(table(results))


if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        child(Path(sys.argv[2]), float(sys.argv[3]), sys.argv[4:])
    else:
        main()
