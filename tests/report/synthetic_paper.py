"""Makes run directories in the form of the paper's experiment: its sets, judges and policies, numbers invented."""

import json
import math
import random
from pathlib import Path
from typing import Any

from icet_jax.evaluation.agreement import agreement
from icet_jax.evaluation.summary import difference, summarise
from icet_jax.report.paper import TABLE_2
from tests.report import synthetic

NUM_EXITS = 24
DEFAULT_EXIT = 23
JUDGES = ("asr/llama_guard_3_8b", "asr/refusal_keywords")
POLICIES = ("Fraud", "Privacy Violation", "Government Decision-Making, Elections and other long names")
TYPES = ("homonyms", "figurative_language", "contrast_homonyms")
SOURCES = {
    "custom": "/data/custom_prompts.csv",
    "mini": "jailbreakv_28k:/data/mini_JailBreakV_28K.csv?images=/data/images",
    "advbench": "advbench_coco:/data/harmful_behaviors.csv?images=/data/coco",
    "xstest": "xstest:/data/xstest_prompts.csv?images=/data/coco",
}
PAPERS = {"custom": "Custom Prompts", "mini": "miniJailBreakV-28K", "advbench": "AdvBench-COCO"}
_ROWS = 12


def write_paper_run(path: Path, *, after: bool = True, checkpoint: str = "llava-hf/llava-1.5-7b-hf") -> Path:
    """Sweeps of four sets, one utility set, transcripts, differences, agreement and config."""
    draw = random.Random(0)
    phases = ("before", "after") if after else ("before",)
    rows: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for dataset in SOURCES:
        for phase in phases:
            rows[phase, dataset] = dataset_rows(phase, dataset, draw)
            table = header(dataset, "mixed" if dataset == "xstest" else "forbidden", checkpoint)
            table |= summarise(rows[phase, dataset], range(1, NUM_EXITS + 1), NUM_EXITS)
            write_json(path / f"sweeps/{phase}.{dataset}.json", table)
            synthetic._write_jsonl(path / f"transcripts/{phase}.{dataset}.jsonl", rows[phase, dataset])
        if after:
            both = difference(rows["before", dataset], rows["after", dataset], range(1, NUM_EXITS + 1), NUM_EXITS)
            head = {"schema": 1, "dataset": dataset, "kind": "mixed" if dataset == "xstest" else "forbidden"}
            write_json(path / f"sweeps/difference.{dataset}.json", head | both)
    utility = {}
    for phase in phases:
        answered = [row for exit_ in range(1, NUM_EXITS + 1) for row in vqa_rows(phase, exit_, draw)]
        table = summarise(answered, range(1, NUM_EXITS + 1), NUM_EXITS)
        utility[phase] = {"vqa_v2": header("vqa_v2", "vqa", checkpoint) | table}
    write_json(path / "utility.json", {"schema": 1, **utility})
    every = [(phase, dataset, row) for (phase, dataset), part in rows.items() for row in part]
    write_json(path / "agreement.json", agreement(every))
    write_json(path / "config.json", config(checkpoint))
    return path


def dataset_rows(phase: str, dataset: str, draw: random.Random) -> list[dict[str, Any]]:
    """Rows that follow the paper's group means: unsafe answers, toxicity, rewards; XSTest's refusals."""
    rows = []
    for index in range(_ROWS):
        for layer in range(1, NUM_EXITS + 1):
            row = {"id": f"{dataset}-{index}", "layer": layer, "prompt": f"placeholder request {index} of {dataset}"}
            benign = dataset == "xstest" and index % 2 == 0
            row |= {"kind": "benign" if benign else "forbidden", "labels": {}}
            row["policy"] = (TYPES if dataset == "xstest" else POLICIES)[index % 3]
            rows.append(row | response(phase, dataset, layer, index, benign, draw))
    return rows


def response(phase: str, dataset: str, layer: int, index: int, benign: bool, draw: random.Random) -> dict[str, Any]:
    """Text and scores of one answer."""
    side, group = phase == "after", ("early", "middle", "late")[(layer - 1) // 8]
    asr, ts, tr = (pair[side] for pair in TABLE_2[PAPERS.get(dataset, "AdvBench-COCO")][group])
    scores: dict[str, float | None] = {"length": 12.0, "empty": 0.0, "truncated": 0.0, "degenerate/text_rules": 0.0}
    if benign:
        refused = draw.random() < 0.1 + 0.2 * side
        scores["refusal/refusal_keywords"] = float(refused)
        return {"response": synthetic.REFUSAL if refused else "a plain answer", "scores": scores}
    unsafe = draw.random() < asr * (1.4 - 0.4 * (index % 3))
    if dataset == "xstest":
        scores["refusal_unsafe/refusal_keywords"] = float(not unsafe)
    verdict = None if draw.random() < 0.02 else float(unsafe)
    scores |= {JUDGES[0]: verdict, "p_unsafe/llama_guard_3_8b.p_unsafe": 0.9 if unsafe else 0.1}
    scores |= {JUDGES[1]: float(unsafe or draw.random() < 0.1), "ts/toxic_bert": min(1.0, ts * 2 * draw.random())}
    scores["tr/gpt2_large_harmless_reward_model"] = tr + draw.gauss(0, 0.3)
    if dataset == "mini" and index == 3 and layer % 6 == 0:
        scores["asr/human"] = float(unsafe)
    return {"response": synthetic.UNSAFE_TEXT if unsafe else synthetic.REFUSAL, "scores": scores}


def vqa_rows(phase: str, layer: int, draw: random.Random) -> list[dict[str, Any]]:
    """Ten questions, best answered near the default exit."""
    rows = []
    for index in range(10):
        right = draw.random() < 0.8 * math.exp(-abs(layer - DEFAULT_EXIT) / 10) - 0.02 * (phase == "after")
        kind = ("yes_no", "number", "other")[index % 3]
        scores = {"vqa/official": 0.9 * right, f"vqa/official_{kind}": 0.9 * right, "vqa/normalised": float(right)}
        scores["tr/general"] = 0.5 * right
        rows.append({"id": str(index), "layer": layer, "prompt": f"question {index}", "kind": "vqa", "scores": scores})
    return rows


def header(dataset: str, kind: str, checkpoint: str) -> dict[str, Any]:
    """What every sweep says about itself."""
    name = checkpoint.rsplit("/", 1)[-1]
    own = {"model": name, "dataset": dataset, "kind": kind, "num_exits": NUM_EXITS, "default_exit": DEFAULT_EXIT}
    return synthetic.header(kind) | own


def config(checkpoint: str) -> dict[str, Any]:
    """The fields that the report reads."""
    return {
        "algorithm": "lppo",
        "seed": 0,
        "model": {"checkpoint": checkpoint},
        "lppo": {"iterations": 94, "exits": "per_example"},
        "data": {"train": "redteam_2k:/data/RedTeam_2K.csv?images=/data/coco", "mixture": {"forbidden": 1.0}},
        "reward": {"model": "harmless_reward", "by_kind": {"forbidden": "reward_model"}},
        "sweep": {"datasets": SOURCES, "scorers": ["llama_guard_3", "refusal_keywords"]},
    }


def write_json(path: Path, value: Any) -> None:
    """Strict JSON, folders made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value, allow_nan=False), encoding="utf-8")
