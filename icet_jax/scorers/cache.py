"""Stores scores on disk, so that the same scorer does not judge the same (prompt, response) twice.

    FOLDER/NAME-DIGEST/TOKEN.jsonl      {"key": KEY, "scores": {scorer name: [value, label]}, "crc32": ...}

DIGEST is a hash of the scorer's name and fingerprint, KEY of prompt and response; no text is stored. Every process
appends to its own file (TOKEN) and reads all files, so that two processes never write to the same one. An incomplete
line of a killed process is ignored. A row whose score is an error (NaN) is never stored, so that the next run judges it
again.
"""

import hashlib
import json
import math
import os
import re
import secrets
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, SupportsFloat

import numpy as np

from icet_jax.errors import UserError
from icet_jax.files import append_text, read_bytes, seal, unseal
from icet_jax.parallel.distributed import is_writer, on_first
from icet_jax.scorers.base import Scorer, Scores

_FORMAT = "2"  # part of every digest, so that a new layout of the files starts with an empty cache
_WHOLE = 1 << 20  # bytes; files up to this size are read in full for a fingerprint, and the start of larger ones
_BLOCK = 4096  # bytes of each further block that is read of a larger file
_BLOCKS = 256  # number of these blocks, evenly spread

_LARGEST = float(np.finfo(np.float32).max)  # scores are float32

Entry = dict[str, tuple[float | None, str | None]]
"""One row's scores, {scorer name: (value, label)}; the value is None if there is none, only for additional results."""


class ScoreCache:
    """Holds the cached scores of a folder by scorer; several processes may use it at once."""

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        """Stores the path of the folder, which is created when the first score is stored."""
        self.folder = Path(folder)
        self._tables: dict[Path, _Table] = {}

    def table(self, scorer: Scorer) -> "_Table":
        """Returns the entries of one scorer that has a fingerprint; complete lines are read once."""
        digest = _digest(scorer.name, scorer.metric, getattr(scorer, "fingerprint", ""))[:16]
        path = self.folder / f"{re.sub(r'[^A-Za-z0-9_.-]+', '_', scorer.name)}-{digest}"
        if path not in self._tables:
            self._tables[path] = _Table(path, scorer.name)
        return self._tables[path]


def cached(scorer: Scorer, cache: ScoreCache) -> Scorer:
    """Returns the same scorer with a cache, which calls the scorer only for rows that the cache does not have.

    A scorer without a `fingerprint` does not say what its numbers depend on and is returned unchanged (the refusal
    keywords are as fast as the cache).
    """
    return CachedScorer(scorer, cache) if getattr(scorer, "fingerprint", None) else scorer


class CachedScorer:
    """Scores with a cache in front of a scorer; created by `cached`.

    If a scorer has `reads_prompts = False`, its score depends only on the response, and one entry serves all prompts.
    With several processes the first one has the cache and sends its content to the others, because all of them must
    enter the same jitted calls.

    Attributes:
      name, metric, fingerprint, label_shares, families: those of the scorer.
      scorer: the scorer that is called for rows that the cache does not have.
      hits: number of rows found in the cache.
      misses: number of rows that the scorer judged.
    """

    def __init__(self, scorer: Scorer, cache: ScoreCache) -> None:
        """Reads the entries of `scorer`, which must have a `fingerprint`."""
        self.scorer, self.name, self.metric = scorer, scorer.name, scorer.metric
        self.fingerprint: str = getattr(scorer, "fingerprint")  # noqa: B009 (optional in the protocol)
        self.label_shares: Mapping[str, str] = getattr(scorer, "label_shares", {})
        self.families: Mapping[str, str] = getattr(scorer, "families", {})
        self.hits = self.misses = 0
        self._table = cache.table(scorer)

    def __call__(self, prompts: Sequence[str], responses: Sequence[str]) -> dict[str, Scores]:
        """Scores B pairs; see `Scorer`.

        Raises:
          UserError: the cache cannot be written, or its entries have other names than the scorer's results.
        """
        reads_prompts = getattr(self.scorer, "reads_prompts", True)
        keys = [
            _digest(prompt if reads_prompts else "", response)
            for prompt, response in zip(prompts, responses, strict=True)
        ]
        stored: list[Any] = on_first(lambda: [self._table.entries.get(key, {}) for key in keys])
        entries: list[Entry] = [{name: (value, label) for name, (value, label) in row.items()} for row in stored]
        missing = [row for row, entry in enumerate(entries) if not entry]
        self.hits, self.misses = self.hits + len(keys) - len(missing), self.misses + len(missing)
        if missing:
            results = self.scorer([prompts[row] for row in missing], [responses[row] for row in missing])
            for place, row in enumerate(missing):
                entries[row] = {name: (_number(s.values[place]), s.labels[place]) for name, s in results.items()}
            self._table.add({keys[row]: entries[row] for row in missing})
        return self._combine(entries)

    def _combine(self, entries: Sequence[Entry]) -> dict[str, Scores]:
        names = list(entries[0]) if entries else [self.name]
        if any(set(entry) != set(names) for entry in entries):
            raise UserError(f"{self._table.folder}: holds scores of other names than {self.name} gives; remove it")
        return {
            name: Scores(np.array([entry[name][0] for entry in entries], np.float32), [e[name][1] for e in entries])
            for name in names
        }


class _Table:
    """Holds one scorer's entries in memory and on disk."""

    def __init__(self, folder: Path, name: str) -> None:
        self.folder, self._name = folder, name
        self.entries: dict[str, Entry] = {}
        self._own = folder / f"{secrets.token_hex(8)}.jsonl"
        for path in sorted(folder.glob("*.jsonl")) if is_writer() else ():
            self._read(path)

    def add(self, rows: Mapping[str, Entry]) -> None:
        """Stores the rows that are not errors."""
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
            lines = read_bytes(path).split(b"\n")[:-1]  # text after the last line end is an incomplete line
        except OSError as error:
            raise UserError(f"{path}: cannot be read ({error.strerror}); choose another score cache") from error
        for line in lines:
            try:
                row = unseal(line.decode("utf-8"))
                key, entry = row["key"], {name: _checked(*pair) for name, pair in row["scores"].items()}
            except (ValueError, KeyError, TypeError, AttributeError):
                continue  # a damaged row is scored again
            if isinstance(key, str) and self._is_scored(entry):
                self.entries[key] = entry


def _checked(value: Any, label: Any) -> tuple[float | None, str | None]:
    number = value is None or type(value) in (int, float) and abs(value) <= _LARGEST
    if not number or not (label is None or isinstance(label, str)):
        raise ValueError(value, label)
    return None if value is None else float(value), label


def _number(value: SupportsFloat) -> float | None:
    return float(value) if math.isfinite(value) else None


def _digest(*parts: str) -> str:
    return hashlib.sha256(json.dumps([_FORMAT, *parts]).encode()).hexdigest()[:32]


def directory_fingerprint(directory: str | os.PathLike[str]) -> str:
    """Returns a short hash of a checkpoint's content, the same for a copy of it elsewhere.

    It covers the name and size of every file except hidden ones and *.md, all content of files up to 1 MiB, and of a
    larger file the first MiB (a safetensors header) and 256 evenly spread blocks of 4 KiB, including the last bytes.
    This takes seconds for any size. A change between the blocks of a large file that keeps its size is not noticed.

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
