"""Selects the responses that a page shows: a few prompts at every exit, without those that a judge called unsafe.

With `config.sweep.show_prompts=False`, a page shows row ids and scores instead, and no text or picture of a row.
"""

import base64
from pathlib import Path

from icet_jax.files import JsonObject
from icet_jax.report.loading import PHASES, read_jsonl
from icet_jax.report.pictures import picture_path, shown
from icet_jax.report.study import KINDS, Study, as_value, dataset_name
from icet_jax.report.text import visible

MAX_TEXT = 2_000  # most characters of one response or prompt
MAX_LABEL = 24  # most characters of a scorer's label, such as "unsafe"
MAX_PICTURE = 300_000  # most bytes of a picture
_DEFECTS = ("degenerate", "empty", "truncated")  # metric families that are shown only where the value is above 0
_PNG = b"\x89PNG\r\n\x1a\n"


def collect(study: Study, *, reveal_unsafe: bool) -> list[JsonObject]:
    """Returns the prompts and responses that the page shows, as JSON values, from the study's first run.

    The prompts are evenly spaced among the rows of each data set, and the same before and after training. If the run's
    config says that prompts are not shown, each is the id of its row, and the responses are their scores alone.

    Args:
      study: the run.
      reveal_unsafe: whether responses that a judge called unsafe keep their text. Otherwise a note replaces the text
        and says why it was left out.

    Returns:
      One dict per prompt, with `dataset`, `id`, `prompt`, `answer` (the right one), `category`, `format` (of an
      attack), `image` (a data URI or None), and `before` and `after`: {exit: {"text", "redacted", "unsafe", "scores",
      "labels"}}.
    """
    root = study.first_run.path
    datasets: dict[str, dict[str, list[JsonObject]]] = {}
    for file in sorted((root / "transcripts").glob("*.jsonl")):
        side, _, dataset = file.stem.partition(".")
        if side in PHASES:
            rows = [row for row in read_jsonl(file) if _is_transcript(row)]
            datasets.setdefault(dataset or "prompts", {})[side] = rows
    prompts: list[JsonObject] = []
    kind_by_name = {dataset_name(dataset): study.kind(dataset) for dataset in reversed(study.datasets)}
    kinds = {dataset: kind_by_name.get(dataset, "forbidden") for dataset in datasets}
    for dataset in sorted(datasets, key=lambda name: (KINDS.index(kinds[name]), name)):
        prompts += _prompts(root, dataset, kinds[dataset], datasets[dataset], reveal_unsafe)
    return prompts if shows_prompts(study) else [_scores_alone(prompt) for prompt in prompts]


def shows_prompts(study: Study) -> bool:
    """Returns whether the page may hold prompts, pictures and responses; False if the config of any of its runs says
    `config.sweep.show_prompts=False`."""
    sections = (run.config.get("sweep") for run in study.runs)
    return all(section.get("show_prompts", True) is True for section in sections if isinstance(section, dict))


def _scores_alone(prompt: JsonObject) -> JsonObject:
    """Returns a prompt of `collect` with its id in place of its texts and its picture."""
    hidden = {"text": "[not shown]", "redacted": True, "labels": {}}
    sides = {side: {layer: response | hidden for layer, response in prompt[side].items()} for side in PHASES}
    return prompt | {"prompt": f"row {prompt['id']}", "image": None, "answer": None} | sides


def _is_transcript(row: JsonObject) -> bool:
    """Returns whether a row can be shown: it has the fields that the page needs, and is the first of its attempts."""
    is_complete = isinstance(row.get("layer"), int) and isinstance(row.get("response"), str) and "id" in row
    return is_complete and not row.get("attempt")


def _prompts(
    root: Path, dataset: str, kind: str, rows: dict[str, list[JsonObject]], reveal_unsafe: bool
) -> list[JsonObject]:
    """Returns evenly spaced prompts of one data set with their responses, in the form that `collect` describes.

    `rows` is {"before" or "after": lines of the data set's transcript file}; `kind` is the kind of its rows.
    """
    ids = list(dict.fromkeys(str(row["id"]) for side in PHASES for row in rows.get(side, [])))
    shown_ids = dict.fromkeys(shown(ids))
    prompts: dict[str, JsonObject] = {}
    for side in PHASES:
        for row in rows.get(side, []):
            if (row_id := str(row["id"])) not in shown_ids:
                continue
            prompt = prompts.setdefault(
                row_id,
                {
                    "dataset": visible(dataset),
                    "id": visible(row_id),
                    "prompt": _truncate(str(row.get("prompt", ""))),
                    "image": _picture(picture_path(root, dataset, row_id)),
                    "answer": _answer(row, kind),
                    "category": _truncate(str(row["policy"])) if row.get("policy") is not None else None,
                    "format": _attack_format(row),
                    "before": {},
                    "after": {},
                },
            )
            prompt[side][str(row["layer"])] = _response(row, kind, reveal_unsafe)
    return [prompts[row_id] for row_id in shown_ids if row_id in prompts]


def _response(row: JsonObject, kind: str, reveal_unsafe: bool) -> JsonObject:
    """Returns a response with its scores.

    Unless `reveal_unsafe`, a note replaces the text of a response that a judge called unsafe, and of a response to a
    forbidden prompt on which no judge gave a verdict. `kind` is used for rows that have no kind of their own.
    """
    raw_scores = row.get("scores")
    if not isinstance(raw_scores, dict):
        raw_scores = {}
    values = {str(name): as_value(score) for name, score in raw_scores.items()}
    means = {visible(name): value.mean for name, value in values.items() if value is not None}
    scores = {name: round(mean, 4) for name, mean in means.items() if _is_shown(name, mean)}
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
    text = f"[redacted: {reason}]" if hidden else _truncate(row["response"])
    return {"text": text, "redacted": hidden, "unsafe": bool(unsafe), "scores": scores, "labels": labels}


def _is_shown(name: str, value: float) -> bool:
    """Returns whether a score is shown: the length never, a defect only if its value is above 0, all others always."""
    family = name.partition("/")[0]
    return family != "length" and (family not in _DEFECTS or value > 0)


def _truncate(text: str) -> str:
    """Returns text with hidden characters made visible, and the part after `MAX_TEXT` characters replaced by a note."""
    suffix = f" […{len(text) - MAX_TEXT} more characters]" if len(text) > MAX_TEXT else ""
    return visible(text[:MAX_TEXT]) + suffix


def _answer(row: JsonObject, kind: str) -> str | None:
    """Returns the right answer of a row; None if there is none, or if the row is forbidden and must not be answered."""
    answer = row.get("answer")
    return None if answer is None or (row.get("kind") or kind) == "forbidden" else _truncate(str(answer))


def _attack_format(row: JsonObject) -> str | None:
    """Returns a text with a row's attack format and whether the attack was transferred from a language model.

    Returns None if the row records neither.
    """
    parts = [str(row["format"])] if row.get("format") else []
    if isinstance(row.get("transferred"), bool):
        parts.append("transferred from a language model" if row["transferred"] else "not transferred")
    return _truncate(", ".join(parts)) if parts else None


def _picture(path: Path) -> str | None:
    """Returns the picture in a PNG file as a data URI; None if the file does not exist, is broken or is too large."""
    if not path.is_file():
        return None
    data = path.read_bytes()
    if not data.startswith(_PNG) or len(data) > MAX_PICTURE:
        return None
    return f"data:image/png;base64,{base64.b64encode(data).decode()}"
