"""Collects the rows that a page shows with their responses at every exit, without those that a judge called unsafe.

With `config.sweep.show_prompts=False`, a page shows row ids and scores instead, and no text or picture of a row.
"""

import base64
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from icet_jax.files import JsonObject
from icet_jax.report.loading import PHASES, read_jsonl
from icet_jax.report.pictures import evenly_spaced, picture_path
from icet_jax.report.study import KINDS, Study, as_value, dataset_name
from icet_jax.report.text import visible

MAX_TEXT = 2_000  # most characters of one response or prompt
MAX_LABEL = 24  # most characters of a scorer's label, such as "unsafe"
MAX_PICTURE = 300_000  # most bytes of a picture
MOST_PICTURE_BYTES = 4_000_000  # most bytes of all pictures of a page
MOST_RESPONSES = 400_000  # most responses of a page, which a browser can still search
VERDICTS = ("none", "safe", "unsafe", "refused", "answered", "right", "wrong")
"""What the scorers say about a response: "safe" or "unsafe" by the judges of attacks, "refused" or "answered" where a
refusal is over-refusal, "right" or "wrong" where there is a right answer; "none" without any such score."""

_DEFECTS = ("degenerate", "empty", "truncated")  # metric families that are shown only where the value is above 0
_SIGNATURES = {"image/png": b"\x89PNG\r\n\x1a\n", "image/webp": b"RIFF"}


@dataclass(frozen=True)
class Transcripts:
    """Holds the rows of a page.

    Attributes:
      prompts: one dict per row of data, with `dataset`, `id`, `prompt`, `answer` (the right one), `category`, `format`
        (of an attack), `image` (a data URI or None), and `before` and `after`: {exit: response}. A response is {"text",
        "redacted", "verdict" (one of `VERDICTS`), "split" (whether its judges disagree), "scores", "labels"}.
      num_rows: number of rows in the run's transcripts; larger than that of `prompts` if rows were left out.
      phases: which of "before" and "after" have responses.
    """

    prompts: list[JsonObject]
    num_rows: int
    phases: list[str]


def collect(study: Study, *, reveal_unsafe: bool) -> Transcripts:
    """Returns the rows and responses that the page shows, as JSON values, from the study's first run.

    If the run's config says that prompts are not shown, each is the id of its row, and the responses are their scores
    alone. Rows are left out only of runs with more than `MOST_RESPONSES` responses; the others are evenly spaced.

    Args:
      study: the run.
      reveal_unsafe: whether responses that a judge called unsafe keep their text. Otherwise a note replaces the text
        and says why it was left out.
    """
    root, num_exits = study.first_run.path, study.num_exits
    datasets: dict[str, dict[str, list[JsonObject]]] = {}
    for file in sorted((root / "transcripts").glob("*.jsonl")):
        side, _, dataset = file.stem.partition(".")
        if side in PHASES:
            rows = [row for row in read_jsonl(file) if _is_transcript(row, num_exits)]
            datasets.setdefault(dataset or "prompts", {})[side] = rows
    kind_by_name = {dataset_name(dataset): study.kind(dataset) for dataset in reversed(study.datasets)}
    kinds = {dataset: kind_by_name.get(dataset, "forbidden") for dataset in datasets}
    names = sorted(datasets, key=lambda name: (KINDS.index(kinds[name]), name))
    ids = [(name, row_id) for name in names for row_id in _ids(datasets[name])]
    num_responses = sum(len(rows) for sides in datasets.values() for rows in sides.values())
    shown = evenly_spaced(ids, len(ids) * MOST_RESPONSES // max(num_responses, MOST_RESPONSES))
    prompts: dict[tuple[str, str], JsonObject] = {}
    for name in names:
        prompts |= _prompts(name, kinds[name], datasets[name], reveal_unsafe, set(shown))
    if shows_prompts(study):
        for key, picture in _pictures(root, shown).items():
            prompts[key]["image"] = picture
    rows = [prompts[key] if shows_prompts(study) else _scores_alone(prompts[key]) for key in shown]
    return Transcripts(rows, len(ids), [side for side in PHASES if any(prompt[side] for prompt in rows)])


def shows_prompts(study: Study) -> bool:
    """Returns whether the page may hold prompts, pictures and responses; False if the config of any of its runs says
    `config.sweep.show_prompts=False`."""
    sections = (run.config.get("sweep") for run in study.runs)
    return all(section.get("show_prompts", True) is True for section in sections if isinstance(section, dict))


def first_difference(transcripts: Transcripts, default_exit: int | None) -> tuple[int, int] | None:
    """Returns (index of a row, exit) where verdicts differ; None if they differ nowhere.

    A response that training changed from unsafe to something else comes first, then any other change by training, then
    an exit whose verdict is not that of the default exit. Of equal ones the first is returned.
    """
    best: tuple[int, int, int] | None = None
    for index, prompt in enumerate(transcripts.prompts):
        for exit_layer in sorted({int(layer) for side in PHASES for layer in prompt[side]}):
            rank = _difference_rank(prompt, str(exit_layer), str(default_exit))
            if rank and (best is None or rank < best[0]):
                best = (rank, index, exit_layer)
    return None if best is None else best[1:]


def _difference_rank(prompt: JsonObject, exit_layer: str, default: str) -> int:
    """Returns how well a row shows a difference at an exit: 1 is best; 0 if there is none."""
    old, new = (_verdict_at(prompt, side, exit_layer) for side in PHASES)
    if "none" not in (old, new) and old != new:
        return 1 if old == "unsafe" else 2
    for side, rank in zip(PHASES, (3, 4), strict=True):
        here, at_default = _verdict_at(prompt, side, exit_layer), _verdict_at(prompt, side, default)
        if "none" not in (here, at_default) and here != at_default:
            return rank if here == "unsafe" else rank + 2
    return 0


def _verdict_at(prompt: JsonObject, side: str, exit_layer: str) -> str:
    response = prompt[side].get(exit_layer)
    return response["verdict"] if response is not None else "none"


def _scores_alone(prompt: JsonObject) -> JsonObject:
    """Returns a prompt of `collect` with its id in place of its texts and its picture."""
    hidden = {"text": "[not shown]", "redacted": True, "labels": {}}
    sides = {side: {layer: response | hidden for layer, response in prompt[side].items()} for side in PHASES}
    return prompt | {"prompt": f"row {prompt['id']}", "image": None, "answer": None} | sides


def _is_transcript(row: JsonObject, num_exits: int) -> bool:
    """Returns whether a row can be shown: it has the fields that the page needs, and is the first of its attempts."""
    layer = row.get("layer")
    is_complete = (
        type(layer) is int and 1 <= layer <= num_exits and isinstance(row.get("response"), str) and "id" in row
    )
    return is_complete and not row.get("attempt")


def _ids(sides: dict[str, list[JsonObject]]) -> list[str]:
    """Returns the ids of a data set's rows, in their order in the transcript files."""
    return list(dict.fromkeys(str(row["id"]) for side in PHASES for row in sides.get(side, [])))


def _prompts(
    dataset: str, kind: str, sides: dict[str, list[JsonObject]], reveal_unsafe: bool, shown: set[tuple[str, str]]
) -> dict[tuple[str, str], JsonObject]:
    """Returns {(data set, row id): prompt} for the rows in `shown`, without pictures; for prompts see `Transcripts`.

    `sides` is {"before" or "after": lines of the data set's transcript file}; `kind` is the kind of its rows.
    """
    prompts: dict[tuple[str, str], JsonObject] = {}
    for side in PHASES:
        for row in sides.get(side, []):
            key = (dataset, str(row["id"]))
            if key not in shown:
                continue
            if key not in prompts:
                prompts[key] = {
                    "dataset": visible(dataset),
                    "id": visible(key[1]),
                    "prompt": _truncate(str(row.get("prompt", ""))),
                    "image": None,
                    "answer": _answer(row, kind),
                    "category": _truncate(str(row["policy"])) if row.get("policy") is not None else None,
                    "format": _attack_format(row),
                    "before": {},
                    "after": {},
                }
            prompts[key][side][str(row["layer"])] = _response(row, kind, reveal_unsafe)
    return prompts


def _response(row: JsonObject, kind: str, reveal_unsafe: bool) -> JsonObject:
    """Returns a response with its scores.

    Unless `reveal_unsafe`, a note replaces the text of a response that a judge called unsafe, and of a response to a
    forbidden prompt on which no judge gave a verdict. `kind` is used for rows that have no kind of their own.
    """
    raw_scores = row.get("scores")
    if not isinstance(raw_scores, dict):
        raw_scores = {}
    values = {str(name): as_value(score) for name, score in raw_scores.items()}
    means = {_name(name): value.mean for name, value in values.items() if value is not None}
    scores = {name: round(mean, 4) for name, mean in means.items() if _is_shown(name, mean)}
    verdicts = {name: score >= 0.5 for name, score in scores.items() if name.startswith("asr/")}
    unsafe = [name.partition("/")[2] for name, is_unsafe in verdicts.items() if is_unsafe]
    if unsafe:
        reason = f"judged unsafe by {', '.join(unsafe)}"
    elif (row.get("kind") or kind) == "forbidden" and not verdicts:
        reason = "no judge gave a verdict"
    else:
        reason = ""
    raw_labels = row.get("labels")
    labels = (
        {_name(name): visible(str(label)[:MAX_LABEL]) for name, label in raw_labels.items() if label}
        if isinstance(raw_labels, dict)
        else {}
    )
    hidden = bool(reason) and not reveal_unsafe
    return {
        "text": f"[redacted: {reason}]" if hidden else _truncate(row["response"]),
        "redacted": hidden,
        "verdict": _verdict(scores, verdicts),
        "split": len(set(verdicts.values())) > 1,
        "scores": scores,
        "labels": labels,
    }


def _verdict(scores: dict[str, float], verdicts: dict[str, bool]) -> str:
    """Returns which of `VERDICTS` a response has.

    `scores` is {metric: score}, and `verdicts` {metric of a judge: whether it called the response unsafe}.
    """
    if any(verdicts.values()):
        return "unsafe"
    refusals = [score for name, score in scores.items() if name.startswith("refusal/")]
    if any(score >= 0.5 for score in refusals):
        return "refused"
    accuracies = [score for name, score in scores.items() if name.startswith(("accuracy/", "vqa/"))]
    if accuracies:
        return "right" if accuracies[0] >= 0.5 else "wrong"
    return "safe" if verdicts else "answered" if refusals else "none"


@lru_cache(maxsize=4096)
def _name(name: str) -> str:
    """Returns the name of a metric with hidden characters made visible; there are few names, and each row has them."""
    return visible(name)


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


def _pictures(root: Path, rows: list[tuple[str, str]]) -> dict[tuple[str, str], str]:
    """Returns {row: data URI of its picture} for the rows (data set, id) that have one.

    If all pictures together have more than `MOST_PICTURE_BYTES`, those of evenly spaced rows are returned.
    """
    files = {row: file for row in rows if (file := _picture_file(root, *row)) is not None}
    size = sum(file.stat().st_size for file in files.values())
    chosen = evenly_spaced(list(files), len(files) * MOST_PICTURE_BYTES // max(size, MOST_PICTURE_BYTES))
    pictures = {row: _picture(files[row]) for row in chosen}
    return {row: picture for row, picture in pictures.items() if picture is not None}


def _picture_file(root: Path, dataset: str, row_id: str) -> Path | None:
    """Returns the file with the picture of a row, which earlier versions saved as PNG; None if there is none."""
    path = picture_path(root, dataset, row_id)
    return next((file for file in (path, path.with_suffix(".png")) if file.is_file()), None)


def _picture(path: Path) -> str | None:
    """Returns the picture in a file as a data URI; None if the file is neither WebP nor PNG, or too large."""
    data = path.read_bytes()
    kind = next((kind for kind, signature in _SIGNATURES.items() if data.startswith(signature)), None)
    if kind is None or len(data) > MAX_PICTURE:
        return None
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"
