"""Scores kept on disk, so that judging the same (prompt, response) again with the same scorer costs nothing.

    FOLDER/NAME-DIGEST/TOKEN.jsonl      {"key": KEY, "scores": {scorer name: [value, label]}, "crc32": ...}

DIGEST is of the scorer's name and fingerprint, KEY of prompt and response: no text is stored. Every process appends to
a file of its own (TOKEN) and reads all files, so that no two ever write to the same one. A line that a killed process
left half written is a row not yet scored. A row whose score is an error (NaN) is never stored: the next run asks again.
"""

import hashlib
import json
import math
import os
import re
import secrets
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from icet_jax.errors import UserError
from icet_jax.files import append_text, read_bytes, seal, unseal
from icet_jax.parallel.distributed import is_writer, on_first
from icet_jax.scorers.base import Scorer, Scores

_FORMAT = "2"  # part of every digest: another layout of the files starts anew
_WHOLE = 1 << 20  # bytes; files up to this size are read in full for a fingerprint, and the start of larger ones
_BLOCK = 4096  # bytes of each further block that is read of a larger file
_BLOCKS = 256  # how many, at even distances

_LARGEST = float(np.finfo(np.float32).max)  # scores are float32

Entry = dict[str, tuple[float | None, str | None]]
"""One row's scores: scorer name -> (value, label). None: no value, which only side results may have."""


class ScoreCache:
    """The scores in a folder, by scorer; several processes may use it at once."""

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        """`folder` is made when the first score is stored."""
        self.folder = Path(folder)
        self._tables: dict[Path, _Table] = {}

    def table(self, scorer: Scorer) -> "_Table":
        """The scores of one scorer that has a fingerprint; read once, whole lines alone."""
        digest = _digest(scorer.name, scorer.metric, getattr(scorer, "fingerprint", ""))[:16]
        path = self.folder / f"{re.sub(r'[^A-Za-z0-9_.-]+', '_', scorer.name)}-{digest}"
        if path not in self._tables:
            self._tables[path] = _Table(path, scorer.name)
        return self._tables[path]


def cached(scorer: Scorer, cache: ScoreCache) -> Scorer:
    """The same scorer, asked only for rows that `cache` does not hold.

    A scorer without a `fingerprint` says nothing of what its numbers depend on, and comes back as it is (the refusal
    keywords are as fast as the cache).
    """
    return CachedScorer(scorer, cache) if getattr(scorer, "fingerprint", None) else scorer


class CachedScorer:
    """A scorer behind a cache; made by `cached`.

    A scorer may say `reads_prompts = False`: its score depends on the response alone, and one entry serves all prompts.
    Of several processes the first one has the cache and tells the others what it holds, because all of them must enter
    the same jitted calls.

    Attributes:
      name, metric, fingerprint, label_shares, families: the scorer's own.
      scorer: what is asked where the cache has no answer.
      hits: rows answered from the cache.
      misses: rows asked.
    """

    def __init__(self, scorer: Scorer, cache: ScoreCache) -> None:
        """`scorer` has a `fingerprint`."""
        self.scorer, self.name, self.metric = scorer, scorer.name, scorer.metric
        self.fingerprint: str = getattr(scorer, "fingerprint")  # noqa: B009 (optional in the protocol)
        self.label_shares: Mapping[str, str] = getattr(scorer, "label_shares", {})
        self.families: Mapping[str, str] = getattr(scorer, "families", {})
        self.hits = self.misses = 0
        self._table = cache.table(scorer)

    def __call__(self, prompts: Sequence[str], responses: Sequence[str]) -> dict[str, Scores]:
        """Scores B pairs; see `Scorer`.

        Raises:
          UserError: the cache cannot be written, or holds entries of other names than the scorer gives.
        """
        reads_prompts = getattr(self.scorer, "reads_prompts", True)
        keys = [
            _digest(prompt if reads_prompts else "", response)
            for prompt, response in zip(prompts, responses, strict=True)
        ]
        held: list[Any] = on_first(lambda: [self._table.entries.get(key, {}) for key in keys])
        entries: list[Entry] = [{name: (value, label) for name, (value, label) in row.items()} for row in held]
        asked = [row for row, entry in enumerate(entries) if not entry]
        self.hits, self.misses = self.hits + len(keys) - len(asked), self.misses + len(asked)
        if asked:
            results = self.scorer([prompts[row] for row in asked], [responses[row] for row in asked])
            for place, row in enumerate(asked):
                entries[row] = {name: (_number(s.values[place]), s.labels[place]) for name, s in results.items()}
            self._table.add({keys[row]: entries[row] for row in asked})
        return self._joined(entries)

    def _joined(self, entries: Sequence[Entry]) -> dict[str, Scores]:
        names = list(entries[0]) if entries else [self.name]
        if any(set(entry) != set(names) for entry in entries):
            raise UserError(f"{self._table.folder}: holds scores of other names than {self.name} gives; remove it")
        return {
            name: Scores(np.array([entry[name][0] for entry in entries], np.float32), [e[name][1] for e in entries])
            for name in names
        }


class _Table:
    """One scorer's entries, in memory and on disk."""

    def __init__(self, folder: Path, name: str) -> None:
        self.folder, self._name = folder, name
        self.entries: dict[str, Entry] = {}
        self._own = folder / f"{secrets.token_hex(8)}.jsonl"
        for path in sorted(folder.glob("*.jsonl")) if is_writer() else ():
            self._read(path)

    def add(self, rows: Mapping[str, Entry]) -> None:
        """Keeps the rows that are no errors."""
        new = {key: entry for key, entry in rows.items() if self._is_scored(entry)}
        if not new or not is_writer():
            return
        self.entries |= new
        lines = "".join(seal({"key": key, "scores": entry}) + "\n" for key, entry in new.items())
        append_text(self._own, lines)

    def _is_scored(self, entry: Entry) -> bool:
        return self._name in entry and entry[self._name][0] is not None

    def _read(self, path: Path) -> None:
        try:
            lines = read_bytes(path).split(b"\n")[:-1]  # what follows the last line end was never finished
        except OSError as error:
            raise UserError(f"{path}: cannot be read ({error.strerror}); choose another score cache") from error
        for line in lines:
            try:
                row = unseal(line.decode("utf-8"))
                key, entry = row["key"], {name: _checked(*pair) for name, pair in row["scores"].items()}
            except (ValueError, KeyError, TypeError, AttributeError):
                continue  # damaged: the row is scored again
            if isinstance(key, str) and self._is_scored(entry):
                self.entries[key] = entry


def _checked(value: Any, label: Any) -> tuple[float | None, str | None]:
    number = value is None or type(value) in (int, float) and abs(value) <= _LARGEST
    if not number or not (label is None or isinstance(label, str)):
        raise ValueError(value, label)
    return None if value is None else float(value), label


def _number(value: Any) -> float | None:
    return float(value) if math.isfinite(value) else None


def _digest(*parts: str) -> str:
    return hashlib.sha256(json.dumps([_FORMAT, *parts]).encode()).hexdigest()[:32]


def directory_fingerprint(directory: str | os.PathLike[str]) -> str:
    """A short mark of a checkpoint's content, the same for a copy of it elsewhere.

    Of every file (hidden ones and *.md apart): its name and size, all of it up to 1 MiB, and of a larger one the
    first MiB (a safetensors header) and 256 blocks of 4 KiB spread evenly, the last bytes among them. Seconds for any
    size; a change between the blocks of a large file that keeps its size goes unseen.

    Raises:
      UserError: a file cannot be read.
    """
    root, mark = Path(directory), hashlib.sha256()
    try:
        names = sorted(path.relative_to(root).as_posix() for path in root.rglob("*") if path.is_file())
        for name in names:
            if name.endswith(".md") or any(part.startswith(".") for part in name.split("/")):
                continue
            size = (root / name).stat().st_size
            mark.update(f"{name}\0{size}\0".encode())
            with (root / name).open("rb") as file:
                mark.update(file.read(_WHOLE))
                for block in range(_BLOCKS if size > _WHOLE else 0):
                    file.seek(_WHOLE + (size - _WHOLE - min(_BLOCK, size - _WHOLE)) * block // (_BLOCKS - 1))
                    mark.update(file.read(_BLOCK))
    except OSError as error:
        raise UserError(f"{directory}: cannot be read ({error.strerror}); check the files' permissions") from error
    return mark.hexdigest()[:16]
