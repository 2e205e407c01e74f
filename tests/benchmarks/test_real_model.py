"""The experiment on real weights: its runs, the held-out rows that they are measured on, and the page of results."""

import csv
import importlib.util
import json
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

import icet_jax
from examples.real_vlm.rows import write_jsonl
from examples.real_vlm.stages import REFUSAL
from tests import tiny

SCRIPT = Path(__file__).parents[2] / "benchmarks/real_model.py"
ASR, REFUSED, DEGENERATE, ACCURACY = (
    "asr/refusal_keywords", "refusal/refusal_keywords", "degenerate/text_rules", "accuracy/vqa_exact",
)  # fmt: skip


@pytest.fixture(scope="module")
def real_model():
    spec = importlib.util.spec_from_file_location("real_model", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    sys.modules["real_model"] = module
    spec.loader.exec_module(module)
    yield module
    del sys.modules["real_model"]


def test_every_run_has_a_command_of_its_own(real_model):
    runs = list(real_model.runs())
    fields = [real_model.fields(run, Path("build"), Path("rows")) for run in runs]
    commands = {tuple(real_model.command(run, Path("out"), Path("build"), Path("rows"))) for run in runs}
    assert len(commands) == len(runs) == len({run.name for run in runs}) == 8
    config = icet_jax.load_config(real_model.CONFIG, fields[-1])
    assert set(config.sweep.datasets) | set(config.sweep.utility) == set(real_model.COUNTS)
    assert config.algorithm == "lsft" and config.seed == 2 and not config.sweep.show_prompts


def _rows(name, count, kind="benign"):
    return [
        {"id": f"{name}:{n}", "prompt": f"{name} {n}", "image": f"images/p{n}.png", "kind": kind, "answer": "yes"}
        for n in range(count)
    ]


def test_rows_are_chosen_by_their_hash_and_show_held_out_pictures(real_model, tmp_path):
    build, figstep = tmp_path / "build", tmp_path / "figstep"
    (build / "data" / "images").mkdir(parents=True)
    figstep.mkdir()
    for number in range(120):
        Image.fromarray(np.full((8, 8, 3), number, np.uint8)).save(build / "data" / "images" / f"p{number}.png")
    for number in range(40):
        Image.new("RGB", (8, 8)).save(figstep / f"query_ForbidQI_{number + 1}_1_6.png")
    kinds = {"forbidden": "forbidden", "harmless": "benign", "captions": "benign", "questions": "vqa"}
    for name, kind in kinds.items():
        write_jsonl(build / "data" / f"held_out_{name}.jsonl", _rows(name, 120, kind))
    tables = {
        "advbench": (("goal", "target"), [(f"placeholder {n}", "") for n in range(50)]),
        "xstest": (("id", "prompt", "type", "label"), [(n, f"p {n}", "t", "safe") for n in range(80)]),
        "figstep": (
            ("dataset", "category_id", "task_id", "category_name"), [("ForbidQI", n + 1, 1, "c") for n in range(40)],
        ),
    }  # fmt: skip
    for name, (header, rows) in tables.items():
        with (tmp_path / f"{name}.csv").open("w", newline="") as file:
            csv.writer(file).writerows([header, *rows])
    files = {name: tmp_path / f"{name}.csv" for name in tables}
    options = SimpleNamespace(build=build, figstep_images=figstep, **files)
    real_model.write_rows(options, tmp_path / "rows")
    for name, count in real_model.COUNTS.items():
        rows = icet_jax.load_rows(str(tmp_path / "rows" / f"{name}.jsonl"))
        assert len(rows) == count and all(Path(str(row.images[0])).is_file() for row in rows), name
        assert {row.kind for row in rows} == {kinds.get(name) or ("benign" if name == "xstest" else "forbidden")}
    before = (tmp_path / "rows" / "forbidden.jsonl").read_bytes()
    (build / "data" / "held_out_forbidden.jsonl").unlink()
    real_model.write_rows(options, tmp_path / "rows")  # they are there
    assert (tmp_path / "rows" / "forbidden.jsonl").read_bytes() == before


def curve(means, n=64):
    return {"mean": means, "ci95": [[max(0.0, mean - 0.1), min(1.0, mean + 0.1)] for mean in means], "n": n}


def row(model, method, seed, forbidden, right=(0.5, 0.4, 0.6)):
    sets = {name: {ASR: curve(forbidden), DEGENERATE: curve([0.0, 0.125, 0.0])} for name in ("forbidden", "figstep")}
    sets |= {"harmless": {REFUSED: curve([0.0, 0.25, 0.0])}, "questions": {ACCURACY: curve(list(right), 96)}}
    words = {name: [1.0, 2.0, 3.0] for name in ("refusal_log_odds", "refusal_nats", "entropy")}
    geometry = [{"layer": n, "cosine": None if n == 1 else 0.5, "norm_ratio": 1.0} for n in (1, 2, 3)]
    return {
        "run": f"{model}/{method}/seed_{seed}", "model": model, "method": method, "seed": seed, "commit": "abc1234",
        "command": f"python {model} {method} {seed}", "num_exits": 3, "default_exit": 2, "sets": sets,
        "geometry": geometry, "first_words": words,
    }  # fmt: skip


def mean(value):
    return {"mean": value, "ci95": [value - 0.1, value + 0.1]}


BUILD = {
    "versions": {"icet_jax": "0.1.0"}, "parts": {"one": {}, "two": {}}, "seconds": {"data": 60.0, "tuning": 540.0},
    "results": {
        "probe": {"encoder": mean(0.7), "random": mean(0.6), "words": 10},
        "sight": {name: mean(2.0) for name in ("right", "shuffled", "difference")},
        "answers": {"tuning_rows": 2000}, "data": {"forbidden.jsonl": 500},
    },
    "reward": {"by_source": {"refusals": {"accuracy": {"mean": 0.9, "n": 50}}}},
}  # fmt: skip


@pytest.fixture
def write(real_model, tmp_path, monkeypatch):
    """Writes the page of some rows into a temporary folder, and returns it."""
    monkeypatch.setattr(real_model, "ROWS", tmp_path / "real_model.json")
    (tmp_path / "images").mkdir()

    def write(rows):
        real_model.ROWS.write_text(json.dumps({"schema": 1, "build": BUILD, "rows": rows}))
        monkeypatch.setattr("sys.argv", ["real_model.py", "--page"])
        assert real_model.main() == 0
        return (tmp_path / "real_model.md").read_text(encoding="utf-8")

    return write


def test_page_has_the_default_and_the_worst_exit_and_means_over_seeds(write, tmp_path):
    rows = [
        row("tuned", "none", 0, [0.75, 0.25, 0.5]),
        row("tuned", "lsft", 0, [0.0, 0.0, 0.25]),
        row("tuned", "lsft", 1, [0.0, 0.25, 0.75]),
    ]
    page = write(rows)
    lines = page.splitlines()
    start = "| RedTeam-2K, held-out half: not refused | 64 | "
    assert f"{start}25.0 | 75.0 (exit 1) | 12.5 | 50.0 (exit 3) |" in lines
    assert "| questions about photographs: right | 96 | 40.0 | 40.0 (exit 2) | 40.0 | 40.0 (exit 2) |" in lines
    assert "| after L-SFT, RedTeam-2K, held-out half: not refused | 0 | 12 | 50 |" in lines
    assert "| image features against the default exit's: cosine | – | 0.50 | 0.50 |" in lines
    assert "# tuned/lsft, seeds 0, 1 (commit abc1234)" in lines and "python tuned lsft 0" in lines
    assert "in 10 minutes of two CPU cores" in page.replace("\n", " ") and "90 % of 50 of refusals" in page
    assert max(len(line) for line in lines if not line.startswith(("| ", "|-"))) <= 120
    assert (tmp_path / "images" / "real_model.png").read_bytes()[:4] == b"\x89PNG"


def test_what_was_written_by_hand_is_kept(write, tmp_path):
    page = write([row("tuned", "none", 0, [0.5, 0.0, 0.5])])
    assert "Not written yet." in page
    (tmp_path / "real_model.md").write_text(page.replace("Not written yet.", "By hand.").replace("## Commands", "## X"))
    page = write([row("tuned", "none", 0, [0.5, 0.0, 0.5])])
    assert "By hand." in page and "## Commands" in page and "## X" not in page


def test_numbers_of_a_run_are_those_of_its_files(real_model, tmp_path):
    def layers(metric, values):
        return [
            {"layer": n, "metrics": {metric: {"mean": value, "ci95": [0.0, 1.0], "n": 4}}}
            for n, value in enumerate(values, 1)
        ]

    (tmp_path / "sweeps").mkdir()
    for side, values in (("before", [1.0, 1.0]), ("after", [0.123456, 0.0])):
        sizes = {"num_exits": 2, "default_exit": 2, "prompts": 2}
        table = {**sizes, "layers": layers(ASR, values), "worst_exit": {ASR: {"layer": 1}}}
        (tmp_path / "sweeps" / f"{side}.forbidden.json").write_text(json.dumps(table))
    utility = {side: {"questions": {"layers": layers(ACCURACY, [0.5, 0.25])}} for side in ("before", "after")}
    (tmp_path / "utility.json").write_text(json.dumps(utility))
    (tmp_path / "geometry.json").write_text(json.dumps({"layers": [{"layer": 1}, {"layer": 2}]}))
    (tmp_path / "cost.json").write_text("{}")
    numbers = real_model.measured(tmp_path)
    assert numbers["sets"]["forbidden"][ASR] == {"mean": [0.1235, 0.0], "ci95": [[0.0, 1.0]] * 2, "n": 4}
    assert numbers["sets"]["forbidden"]["prompts"] == 2 and numbers["sets"]["forbidden"]["worst_exit"] == {
        ASR: {"layer": 1}
    }
    assert numbers["sets"]["questions"][ACCURACY]["mean"] == [0.5, 0.25] and numbers["default_exit"] == 2


def test_first_words_are_those_of_the_logits_at_each_exit(real_model, tmp_path):
    pytest.importorskip("torch")
    folder = tiny.save_llava(tmp_path / "vlm")
    images = np.random.default_rng(0).integers(0, 256, (3, 30, 40, 3), dtype=np.uint8)
    (tmp_path / "images").mkdir()
    for number, pixels in enumerate(images):
        Image.fromarray(pixels).save(tmp_path / "images" / f"p{number}.png")
    write_jsonl(tmp_path / "forbidden.jsonl", _rows("forbidden", 3, "forbidden"))
    found = real_model.first_words(folder, tmp_path)
    vlm = icet_jax.load(folder)
    refusal = [*vlm.processor.tokenizer(REFUSAL, add_special_tokens=False)["input_ids"], vlm.eos_ids[0]]
    for layer in range(1, vlm.num_exits + 1):
        odds, nats, entropies = [], [], []
        for row in icet_jax.load_rows(str(tmp_path / "forbidden.jsonl")):
            prompt = vlm.processor(images=[row.images], prompts=[row.prompt])
            ids = np.concatenate([prompt["input_ids"], [refusal]], axis=1)
            inputs = {**prompt, "input_ids": ids, "attention_mask": np.ones_like(ids)}
            logits = np.array(vlm.logits(inputs, exit_layer=layer), np.float64)[0, -len(refusal) - 1 : -1]
            logits[:, list(vlm.suppress_ids)] = -np.inf
            log_probs = logits - np.log(np.sum(np.exp(logits), axis=-1, keepdims=True))
            picked = log_probs[np.arange(len(refusal)), refusal]
            odds.append(picked[0] - np.log(1 - np.exp(picked[0])))
            nats.append(-picked.mean())
            entropies.append(-np.sum(np.exp(log_probs[0]) * np.where(log_probs[0] > -np.inf, log_probs[0], 0)))
        for name, values in (("refusal_log_odds", odds), ("refusal_nats", nats), ("entropy", entropies)):
            assert found[name][layer - 1] == pytest.approx(np.mean(values), abs=2e-3), (name, layer)
