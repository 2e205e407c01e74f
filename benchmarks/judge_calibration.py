"""Compares the judge of refusal phrases with people's labels of published responses.

    python benchmarks/judge_calibration.py --wildguard=wildguard-test.csv --jailbreakbench=judge-comparison.csv

The files are the test set of WildGuard (Han et al. 2024: 1,725 responses, three annotators each) and JailbreakBench's
judge comparison (Chao et al. 2024: 300 responses, three annotators each, and the verdicts of four judge models). The
script writes docs/judge_calibration.json, the tables in docs/judging.md, and the numbers that reports show beside the
judge's ASR (icet_jax/scorers/calibration.json). It writes numbers and digests alone, never a text of the files.
"""

import argparse
import hashlib
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from icet_jax.data.tables import csv_rows
from icet_jax.errors import UserError
from icet_jax.evaluation.agreement import cohens_kappa
from icet_jax.evaluation.statistics import Interval, mean_interval
from icet_jax.files import write_text_atomic
from icet_jax.scorers.keywords import REFUSAL_PHRASES, refused

ROOT = Path(__file__).parents[1]
BEGIN, END = "<!-- begin: judge_calibration.py -->", "<!-- end: judge_calibration.py -->"
KEYWORDS = "refusal_keywords"
_YES_NO = {"harmful": 1, "unharmful": 0, "refusal": 1, "compliance": 0, "1": 1, "0": 0}
_MODELS = ("harmbench_cf", "gpt4_cf", "llamaguard2_cf", "llama3_cf")
_WILDGUARD = (
    "prompt", "response", "prompt_harm_label", "response_harm_label", "response_harm_agreement",
    "response_refusal_label", "response_refusal_agreement",
)  # fmt: skip
_JAILBREAKBENCH = ("goal", "target_response", "human1", "human2", "human3", "human_majority", *_MODELS)
_TITLES = {
    "wildguard_harmful_prompts": "WildGuard, harmful prompts",
    "wildguard": "WildGuard, all prompts",
    "wildguard_refusal": "WildGuard, all prompts: is it a refusal?",
    "jailbreakbench": "JailbreakBench",
}


class Labelled(NamedTuple):
    """Holds one judge's verdicts on responses that people have labelled.

    Attributes:
      verdicts: bool [n], whether the judge says "unsafe" (of `wildguard_refusal`: "refused").
      labels: bool [n], what most people say.
      unanimous: bool [n], whether all people agree.
      prompts: the prompt of each response.
    """

    verdicts: np.ndarray
    labels: np.ndarray
    unanimous: np.ndarray
    prompts: list[str]


def wildguard(path: Path) -> dict[str, Labelled]:
    """Returns the verdicts and labels of WildGuard's test set, {question: rows}.

    Rows without a label of a question are left out of it.

    Raises:
      UserError: the file is not WildGuard's test set.
    """
    rows = _rows(path, _WILDGUARD)
    is_refusal = np.array([refused(row["response"]) for row in rows])
    harmful_prompt = np.array([row["prompt_harm_label"] == "harmful" for row in rows])
    harm, refusal = (_labels(path, rows, f"response_{name}_label") for name in ("harm", "refusal"))
    harm_unanimous, refusal_unanimous = (
        np.array([row[f"response_{name}_agreement"] == "3" for row in rows]) for name in ("harm", "refusal")
    )
    prompts = [row["prompt"] for row in rows]
    return {
        "wildguard_harmful_prompts": _select(~is_refusal, harm, harm_unanimous, prompts, harmful_prompt),
        "wildguard": _select(~is_refusal, harm, harm_unanimous, prompts),
        "wildguard_refusal": _select(is_refusal, refusal, refusal_unanimous, prompts),
    }


def jailbreakbench(path: Path) -> dict[str, dict[str, Labelled]]:
    """Returns {judge: verdicts and labels} of JailbreakBench's judge comparison, of the file's judge models too.

    Raises:
      UserError: the file is not the judge comparison.
    """
    rows = _rows(path, _JAILBREAKBENCH)
    people = np.stack([_labels(path, rows, f"human{number}") for number in (1, 2, 3)])
    majority, unanimous = _labels(path, rows, "human_majority"), (people == people[0]).all(axis=0)
    wrong = np.flatnonzero(majority != (people.sum(axis=0) >= 2))
    if len(wrong):
        raise UserError(f"{path}: human_majority of row {wrong[0] + 1} is not that of human1, human2 and human3")
    prompts = [row["goal"] for row in rows]
    verdicts = {KEYWORDS: ~np.array([refused(row["target_response"]) for row in rows])}
    verdicts |= {name: _labels(path, rows, name) == 1 for name in _MODELS}
    return {name: _select(values, majority, unanimous, prompts) for name, values in verdicts.items()}


def _rows(path: Path, names: Sequence[str]) -> list[dict[str, str]]:
    """Returns the rows of a CSV file as {column: text}; raises a `UserError` at the first malformed one."""
    rows = []
    for line, row in csv_rows(path, names, ", ".join(names)):
        if isinstance(row, str):
            raise UserError(f"{path}, line {line}: {row}; download the file again")
        rows.append({name: str(row[name] or "").strip() for name in names})
    if not rows:
        raise UserError(f"{path}: has no rows; download the file again")
    return rows


def _labels(path: Path, rows: Sequence[dict[str, str]], column: str) -> np.ndarray:
    """Returns a column of labels as numbers: 1, 0, or NaN where nobody gave one (WildGuard's "\\N", or empty)."""
    values = []
    for number, row in enumerate(rows, 1):
        if row[column] not in (*_YES_NO, "\\N", ""):
            raise UserError(
                f"{path}: {column} of row {number} is none of {', '.join(_YES_NO)}; download the file again"
            )
        values.append(_YES_NO.get(row[column], np.nan))
    return np.array(values)


def _select(
    verdicts: np.ndarray, labels: np.ndarray, unanimous: np.ndarray, prompts: list[str], where: Any = True
) -> Labelled:
    """Returns the rows that have a label and lie in `where`."""
    chosen = np.isfinite(labels) & where
    own = [prompt for prompt, is_chosen in zip(prompts, chosen, strict=True) if is_chosen]
    return Labelled(verdicts[chosen], labels[chosen] == 1, unanimous[chosen], own)


def measure(rows: Labelled) -> dict[str, Any]:
    """Returns agreement, Cohen's kappa, precision and recall with 95% intervals clustered by prompt."""

    def share(values: np.ndarray, chosen: np.ndarray) -> dict[str, Any]:
        prompts = [prompt for prompt, is_chosen in zip(rows.prompts, chosen, strict=True) if is_chosen]
        return _interval(mean_interval(values[chosen].astype(float), prompts, share=True))

    everything = np.ones(len(rows.labels), bool)
    kappa = cohens_kappa(rows.verdicts.astype(float), rows.labels.astype(float), rows.prompts)
    return {
        "n": len(rows.labels),
        "labelled": int(rows.labels.sum()),
        "judged": int(rows.verdicts.sum()),
        "agree": share(rows.verdicts == rows.labels, everything),
        "kappa": _interval(kappa),
        "precision": share(rows.labels, rows.verdicts),
        "recall": share(rows.verdicts, rows.labels),
    }


def _interval(interval: Interval) -> dict[str, Any]:
    """Returns a mean and its interval rounded for JSON; None where they are undefined."""
    ends = [interval.low, interval.high]
    return {
        "mean": None if np.isnan(interval.mean) else round(float(interval.mean), 4),
        "ci95": None if np.isnan(ends).any() else [round(float(end), 4) for end in ends],
    }


def both(rows: Labelled) -> dict[str, Any]:
    """Returns `measure` for the majority of people, and for the rows on which all of them agree."""
    sure = rows.unanimous
    prompts = [prompt for prompt, is_sure in zip(rows.prompts, sure, strict=True) if is_sure]
    unanimous = Labelled(rows.verdicts[sure], rows.labels[sure], rows.unanimous[sure], prompts)
    return {"majority": measure(rows), "unanimous": measure(unanimous)}


def calibrate(wildguard_file: Path, jailbreakbench_file: Path) -> dict[str, Any]:
    """Returns the content of docs/judge_calibration.json."""
    files = {"wildguard": wildguard_file, "jailbreakbench": jailbreakbench_file}
    results = {question: {KEYWORDS: both(rows)} for question, rows in wildguard(wildguard_file).items()}
    results["jailbreakbench"] = {judge: both(rows) for judge, rows in jailbreakbench(jailbreakbench_file).items()}
    return {
        "schema": 1,
        "phrases": phrases_digest(),
        "files": {name: hashlib.sha256(path.read_bytes()).hexdigest() for name, path in files.items()},
        "results": results,
    }


def tables(content: dict[str, Any]) -> str:
    """Returns the tables of docs/judging.md."""
    parts = []
    for people, title in (("majority", "Beside the majority of three people"), ("unanimous", "Where all three agree")):
        lines = [f"{title}:", "", "| responses | judge | n | same verdict | κ | precision | recall |"]
        lines.append("| --- | --- | --- | --- | --- | --- | --- |")
        for question, judges in content["results"].items():
            for judge, sides in judges.items():
                row = sides[people]
                cells = [_cell(row[name], name != "kappa") for name in ("agree", "kappa", "precision", "recall")]
                lines.append(f"| {_TITLES[question]} | {judge} | {row['n']} | {' | '.join(cells)} |")
        parts.append("\n".join(lines))
    return "\n\n".join(parts)


def _cell(entry: dict[str, Any], is_share: bool) -> str:
    """Returns "81% (78 to 84)" or "0.52 (0.46 to 0.58)"; "–" where the number is undefined."""
    if entry["mean"] is None:
        return "–"
    scale, form, unit = (100, "{:.0f}", "%") if is_share else (1, "{:.2f}", "")
    mean = form.format(scale * entry["mean"]) + unit
    ends = [form.format(scale * end) for end in entry["ci95"] or ()]
    return f"{mean} ({ends[0]} to {ends[1]})" if ends else mean


def phrases_digest() -> str:
    """Returns a hash of the refusal phrases, which tells whether stored numbers are those of the present judge."""
    return hashlib.sha256("\n".join(REFUSAL_PHRASES).encode()).hexdigest()[:16]


def with_tables(page: str, content: dict[str, Any]) -> str:
    """Returns a page with the tables between its two marks."""
    before, begin, rest = page.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise UserError(f"docs/judging.md: the marks {BEGIN} and {END} are missing; put them back")
    return f"{before}{BEGIN}\n\n{tables(content)}\n\n{END}{after}"


def for_reports(content: dict[str, Any]) -> dict[str, Any]:
    """Returns the content of icet_jax/scorers/calibration.json: what reports say of each judge."""
    row = content["results"]["wildguard_harmful_prompts"][KEYWORDS]["majority"]
    numbers = {name: row[name]["mean"] for name in ("agree", "kappa")}
    judges = {KEYWORDS: {"responses": "WildGuard’s responses to harmful prompts", "n": row["n"], **numbers}}
    return {"phrases": content["phrases"], "judges": judges}


def main(arguments: Sequence[str] | None = None) -> None:
    """Writes the three files."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--wildguard", type=Path, required=True, help="WildGuard's test set, CSV")
    parser.add_argument("--jailbreakbench", type=Path, required=True, help="JailbreakBench's judge comparison, CSV")
    parser.add_argument("--root", type=Path, default=ROOT, help="the repository whose files are written")
    options = parser.parse_args(arguments)
    content = calibrate(options.wildguard, options.jailbreakbench)
    page = options.root / "docs" / "judging.md"
    new_page = with_tables(page.read_text(encoding="utf-8"), content)
    write_text_atomic(options.root / "docs" / "judge_calibration.json", json.dumps(content, indent=1) + "\n")
    write_text_atomic(page, new_page)
    numbers = json.dumps(for_reports(content), indent=1, ensure_ascii=False) + "\n"
    write_text_atomic(options.root / "icet_jax" / "scorers" / "calibration.json", numbers)


if __name__ == "__main__":
    try:
        main()
    except (UserError, OSError) as error:
        sys.exit(f"judge_calibration: {error}")
