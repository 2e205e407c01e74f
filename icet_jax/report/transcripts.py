"""What the page shows of the responses: a few prompts, every exit, nothing that a judge called unsafe."""

import base64
from pathlib import Path
from typing import Any

from icet_jax.report.loading import PHASES, read_jsonl
from icet_jax.report.pictures import picture_path, shown
from icet_jax.report.study import KINDS, Study, as_value, dataset_name
from icet_jax.report.text import visible

MAX_TEXT = 2_000  # characters of one response or prompt
MAX_LABEL = 24  # characters of a scorer's own words
MAX_PICTURE = 300_000  # bytes
_ODD = ("degenerate", "empty", "truncated")
_PNG = b"\x89PNG\r\n\x1a\n"


def collect(study: Study, *, reveal_unsafe: bool) -> list[dict[str, Any]]:
    """The page's transcripts, ready to be written as JSON, from the study's first run.

    Prompts are taken at even distances through each data set, the same ones before and after.

    Returns:
      One dict per prompt: `dataset`, `id`, `prompt`, `answer`, `policy`, `format`, `image` (a data URI or None),
      `before`, `after`: exit -> {"text", "redacted", "unsafe", "scores", "labels"}. With `reveal_unsafe` False a
      redacted text says so and nothing else.
    """
    root = study.first.path
    datasets: dict[str, dict[str, list[dict[str, Any]]]] = {}
    for file in sorted((root / "transcripts").glob("*.jsonl")):
        phase, _, dataset = file.stem.partition(".")
        if phase in PHASES:
            rows = [row for row in read_jsonl(file) if _is_transcript(row)]
            datasets.setdefault(dataset or "prompts", {})[phase] = rows
    prompts: list[dict[str, Any]] = []
    known = {dataset_name(dataset): study.kind(dataset) for dataset in reversed(study.datasets)}
    kinds = {dataset: known.get(dataset, "forbidden") for dataset in datasets}
    for dataset in sorted(datasets, key=lambda name: (KINDS.index(kinds[name]), name)):
        prompts += _prompts(root, dataset, kinds[dataset], datasets[dataset], reveal_unsafe)
    return prompts


def _is_transcript(row: dict[str, Any]) -> bool:
    """Whether a row is shown: it has what a response needs, and is the first of several attempts."""
    is_complete = isinstance(row.get("layer"), int) and isinstance(row.get("response"), str) and "id" in row
    return is_complete and not row.get("attempt")


def _prompts(
    root: Path, dataset: str, kind: str, rows: dict[str, list[dict[str, Any]]], reveal_unsafe: bool
) -> list[dict[str, Any]]:
    """One data set's evenly spaced prompts with their responses."""
    ids = list(dict.fromkeys(str(row["id"]) for phase in PHASES for row in rows.get(phase, [])))
    chosen = dict.fromkeys(shown(ids))
    prompts: dict[str, dict[str, Any]] = {}
    for phase in PHASES:
        for row in rows.get(phase, []):
            if (row_id := str(row["id"])) not in chosen:
                continue
            prompt = prompts.setdefault(
                row_id,
                {
                    "dataset": visible(dataset),
                    "id": visible(row_id),
                    "prompt": _short(str(row.get("prompt", ""))),
                    "image": _picture(picture_path(root, dataset, row_id)),
                    "answer": _answer(row, kind),
                    "category": _short(str(row["policy"])) if row.get("policy") is not None else None,
                    "format": _attack(row),
                    "before": {},
                    "after": {},
                },
            )
            prompt[phase][str(row["layer"])] = _response(row, kind, reveal_unsafe)
    return [prompts[row_id] for row_id in chosen if row_id in prompts]


def _response(row: dict[str, Any], kind: str, reveal_unsafe: bool) -> dict[str, Any]:
    """A response with its scores, its text replaced where a judge called it unsafe or none could judge it."""
    raw = row.get("scores")
    values = {str(name): as_value(score) for name, score in raw.items()} if isinstance(raw, dict) else {}
    known = {visible(name): value.mean for name, value in values.items() if value is not None}
    scores = {name: round(mean, 4) for name, mean in known.items() if _is_shown(name, mean)}
    verdicts = {name: score for name, score in scores.items() if name.startswith("asr/")}
    unsafe = [name.partition("/")[2] for name, score in verdicts.items() if score >= 0.5]
    if unsafe:
        reason = f"judged unsafe by {', '.join(unsafe)}"
    elif (row.get("kind") or kind) == "forbidden" and not verdicts:
        reason = "no judge gave a verdict"
    else:
        reason = ""
    raw_labels = row.get("labels")
    labels = (
        {visible(name): visible(str(label)[:MAX_LABEL]) for name, label in raw_labels.items() if label}
        if isinstance(raw_labels, dict)
        else {}
    )
    hidden = bool(reason) and not reveal_unsafe
    text = f"[redacted: {reason}]" if hidden else _short(row["response"])
    return {"text": text, "redacted": hidden, "unsafe": bool(unsafe), "scores": scores, "labels": labels}


def _is_shown(name: str, value: float) -> bool:
    """Scorers' numbers are shown always, the form of a response only where it is odd, its length never."""
    family = name.partition("/")[0]
    return family != "length" and (family not in _ODD or value > 0)


def _short(text: str) -> str:
    """Text made visible and cut at `MAX_TEXT` characters, saying so."""
    cut = f" […{len(text) - MAX_TEXT} more characters]" if len(text) > MAX_TEXT else ""
    return visible(text[:MAX_TEXT]) + cut


def _answer(row: dict[str, Any], kind: str) -> str | None:
    """The right answer of a benign or vqa row; a forbidden row's "answer" would be what must not be given."""
    answer = row.get("answer")
    return None if answer is None or (row.get("kind") or kind) == "forbidden" else _short(str(answer))


def _attack(row: dict[str, Any]) -> str | None:
    """The attack format of a row and whether it is transferred; None where the row says neither."""
    parts = [str(row["format"])] if row.get("format") else []
    if isinstance(row.get("transferred"), bool):
        parts.append("transferred from a language model" if row["transferred"] else "not transferred")
    return _short(", ".join(parts)) if parts else None


def _picture(path: Path) -> str | None:
    """A row's picture as a data URI; None where none was saved."""
    if not path.is_file():
        return None
    data = path.read_bytes()
    if not data.startswith(_PNG) or len(data) > MAX_PICTURE:
        return None
    return f"data:image/png;base64,{base64.b64encode(data).decode()}"
