"""Packs the rows and responses of a page into one compressed text, which the page's script unpacks."""

import base64
import gzip
import json
from collections.abc import Callable, Hashable
from typing import Any, Generic, TypeVar

from icet_jax.files import JsonObject
from icet_jax.report.transcripts import VERDICTS, Transcripts

REDACTED, SPLIT = 1, 2
"""Bits of a packed response: its text is left out; its judges disagree."""

_T = TypeVar("_T", bound=Hashable)


class _Index(Generic[_T]):
    """A list of different values; calling it with a value returns the value's position, and None for None."""

    def __init__(self) -> None:
        self._positions: dict[_T, int] = {}

    def __call__(self, value: _T | None) -> int | None:
        return None if value is None else self._positions.setdefault(value, len(self._positions))

    @property
    def values(self) -> list[_T]:
        return list(self._positions)


def pack(transcripts: Transcripts, num_exits: int) -> JsonObject:
    """Returns the rows and responses as JSON values in which every text occurs once.

    Returns:
      A dict with the lists `datasets`, `categories`, `formats`, `pictures` (data URIs), `texts`, `metrics` and
      `verdicts`, with `phases`, and with `rows`. A row has `id`, `prompt`, `answer`, and positions in the lists named
      `dataset`, `category`, `format` and `picture`. Its `before` and `after` have an entry per exit: None, or
      [position in `texts`, position in `verdicts`, bits, [score or None by metric], {metric: label}].
    """
    datasets, categories, formats, pictures, texts, metrics = (_Index[str]() for _ in range(6))
    for prompt in transcripts.prompts:
        for side in transcripts.phases:
            for response in prompt[side].values():
                for name in response["scores"]:
                    metrics(name)

    names = metrics.values

    def pack_response(response: JsonObject | None) -> list[Any] | None:
        if response is None:
            return None
        bits = REDACTED * response["redacted"] + SPLIT * response["split"]
        scores = [response["scores"].get(name) for name in names]
        packed = [texts(response["text"]), VERDICTS.index(response["verdict"]), bits, scores]
        return [*packed, response["labels"]] if response["labels"] else packed

    rows = [
        {
            "id": prompt["id"],
            "prompt": prompt["prompt"],
            "answer": prompt["answer"],
            "dataset": datasets(prompt["dataset"]),
            "category": categories(prompt["category"]),
            "format": formats(prompt["format"]),
            "picture": pictures(prompt["image"]),
        }
        | {side: _by_exit(prompt[side], num_exits, pack_response) for side in transcripts.phases}
        for prompt in transcripts.prompts
    ]
    return {
        "phases": transcripts.phases,
        "verdicts": VERDICTS,
        "datasets": datasets.values,
        "categories": categories.values,
        "formats": formats.values,
        "pictures": pictures.values,
        "texts": texts.values,
        "metrics": metrics.values,
        "rows": rows,
    }


def _by_exit(
    responses: dict[str, JsonObject], num_exits: int, pack_response: Callable[[JsonObject | None], Any]
) -> list[Any]:
    """Returns the packed response of each exit, from exit 1 on."""
    return [pack_response(responses.get(str(layer))) for layer in range(1, num_exits + 1)]


def compress(data: JsonObject) -> str:
    """Returns JSON values as compressed text (gzip, base64); equal values give equal text."""
    text = json.dumps(data, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    return base64.b64encode(gzip.compress(text.encode("utf-8", "replace"), mtime=0)).decode()
