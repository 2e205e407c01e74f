"""Stores scores on disk, so that the same scorer does not judge the same (prompt, response) twice.

    FOLDER/NAME-DIGEST/TOKEN.jsonl      {"key": KEY, "scores": {result name: [value, label]}, "crc32": ...}

DIGEST is a hash of the scorer's name and fingerprint, and KEY is a hash of prompt and response; no text is stored.
Every process reads all files, and appends only to a file of its own, whose name TOKEN is random. Two processes thus
never write to the same file. An incomplete line of a killed process is ignored. A row whose score is NaN is not stored,
so that the next run judges it again.
"""

import hashlib
import json
import math
import os
import re
import secrets
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import SupportsFloat

import numpy as np

from icet_jax.errors import UserError
from icet_jax.files import append_text, read_bytes, seal, unseal
from icet_jax.parallel.distributed import is_writer, on_first
from icet_jax.scorers.base import Scorer, Scores

_FORMAT = "2"  # part of every digest, so that a new layout of the files starts with an empty cache
# What `directory_fingerprint` reads of a file: all of its first MiB, and blocks of the rest.
_READ_IN_FULL = 1 << 20  # bytes
_BLOCK_SIZE = 4096  # bytes
_NUM_BLOCKS = 256  # number of blocks, evenly spread

_LARGEST_SCORE = float(np.finfo(np.float32).max)  # scores are float32

RowScores = dict[str, tuple[float | None, str | None]]
"""The scores of one (prompt, response) pair: {result name: (value, label)}; a value of None stands for NaN."""


class ScoreCache:
    """Gives access to the cached scores in a folder; several processes may use the folder at once."""

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        """Stores the path of the folder, which is created when the first score is stored."""
        self.folder = Path(folder)
        self._tables: dict[Path, _Table] = {}

    def table(self, scorer: Scorer) -> "_Table":
        """Returns the cached scores of one scorer, which are read from disk at the first call."""
        digest = _digest(scorer.name, scorer.metric, getattr(scorer, "fingerprint", ""))[:16]
        path = self.folder / f"{re.sub(r'[^A-Za-z0-9_.-]+', '_', scorer.name)}-{digest}"
        if path not in self._tables:
            self._tables[path] = _Table(path, scorer.name)
        return self._tables[path]


def cached(scorer: Scorer, cache: ScoreCache) -> Scorer:
    """Returns the scorer wrapped with a cache: it is called only for rows that the cache does not have.

    A scorer without a `fingerprint` is returned unchanged, because it is unknown when its cached scores would become
    outdated. (The only such scorer of the package, the refusal keywords, is as fast as the cache.)
    """
    return CachedScorer(scorer, cache) if getattr(scorer, "fingerprint", None) else scorer


class CachedScorer:
    """Looks scores up in a cache and calls a scorer for the missing ones; created by `cached`.

    If a scorer has `reads_prompts = False`, a stored score serves all prompts with the same response. With several
    processes the first one reads the cache and sends the stored scores to the others, because all of them must enter
    the same jitted calls.

    Attributes:
      name, metric, fingerprint, label_shares, families: the scorer's attributes, see `Scorer`.
      scorer: the scorer that is called for rows that the cache does not have.
      hits: number of rows found in the cache.
      misses: number of rows that the scorer judged.
    """

    def __init__(self, scorer: Scorer, cache: ScoreCache) -> None:
        """Reads the cached scores of `scorer`, which must have a `fingerprint`."""
        self.scorer, self.name, self.metric = scorer, scorer.name, scorer.metric
        self.fingerprint: str = getattr(scorer, "fingerprint")  # noqa: B009 (optional in the protocol)
        self.label_shares: Mapping[str, str] = getattr(scorer, "label_shares", {})
        self.families: Mapping[str, str] = getattr(scorer, "families", {})
        self.hits = self.misses = 0
        self._table = cache.table(scorer)

    def __call__(self, prompts: Sequence[str], responses: Sequence[str]) -> dict[str, Scores]:
        """Returns the scores of B pairs as {result name: scores}; see `Scorer`.

        Raises:
          UserError: the cache cannot be written, or its rows have other result names than the scorer.
        """
        reads_prompts = getattr(self.scorer, "reads_prompts", True)
        keys = [
            _digest(prompt if reads_prompts else "", response)
            for prompt, response in zip(prompts, responses, strict=True)
        ]
        stored = on_first(lambda: [self._table.rows.get(key, {}) for key in keys])
        # On other processes JSON has turned the tuples into lists.
        rows: list[RowScores] = [{name: (value, label) for name, (value, label) in row.items()} for row in stored]
        missing = [index for index, row in enumerate(rows) if not row]
        self.hits, self.misses = self.hits + len(keys) - len(missing), self.misses + len(missing)
        if missing:
            results = self.scorer([prompts[index] for index in missing], [responses[index] for index in missing])
            for position, index in enumerate(missing):
                rows[index] = {
                    name: (_finite_or_none(scores.values[position]), scores.labels[position])
                    for name, scores in results.items()
                }
            self._table.add({keys[index]: rows[index] for index in missing})
        return self._combine(rows)

    def _combine(self, rows: Sequence[RowScores]) -> dict[str, Scores]:
        """Returns the scores of all rows as {result name: scores}.

        Raises:
          UserError: the rows do not all have the same result names.
        """
        names = list(rows[0]) if rows else [self.name]
        if any(set(row) != set(names) for row in rows):
            raise UserError(f"{self._table.folder}: holds scores of other names than {self.name} gives; remove it")
        return {
            name: Scores(np.array([row[name][0] for row in rows], np.float32), [row[name][1] for row in rows])
            for name in names
        }


class _Table:
    """Holds one scorer's cached scores, in memory and in a folder.

    `rows` is {hash of prompt and response: scores}.
    """

    def __init__(self, folder: Path, name: str) -> None:
        """Reads the files in `folder`, in the first process only; `name` is the scorer's main result."""
        self.folder, self._name = folder, name
        self.rows: dict[str, RowScores] = {}
        self._file_of_process = folder / f"{secrets.token_hex(8)}.jsonl"
        for path in sorted(folder.glob("*.jsonl")) if is_writer() else ():
            self._read(path)

    def add(self, rows: Mapping[str, RowScores]) -> None:
        """Stores rows whose main result has a value, in memory and on disk; only the first process does so."""
        scored_rows = {key: row for key, row in rows.items() if self._is_scored(row)}
        if not scored_rows or not is_writer():
            return
        self.rows |= scored_rows
        lines = "".join(seal({"key": key, "scores": row}) + "\n" for key, row in scored_rows.items())
        append_text(self._file_of_process, lines)

    def _is_scored(self, row: RowScores) -> bool:
        return self._name in row and row[self._name][0] is not None

    def _read(self, path: Path) -> None:
        """Adds the complete and undamaged lines of one file to `rows`."""
        try:
            lines = read_bytes(path).split(b"\n")[:-1]  # text after the last line end is an incomplete line
        except OSError as error:
            raise UserError(f"{path}: cannot be read ({error.strerror}); choose another score cache") from error
        for line in lines:
            try:
                record = unseal(line.decode("utf-8"))
                key, row = record["key"], {name: _check_score(*score) for name, score in record["scores"].items()}
            except (ValueError, KeyError, TypeError, AttributeError):
                continue  # a damaged row is scored again
            if isinstance(key, str) and self._is_scored(row):
                self.rows[key] = row


def _check_score(value: object, label: object) -> tuple[float | None, str | None]:
    """Returns (value, label) as read from a file; raises a `ValueError` if a type or the size of the value is wrong."""
    if label is not None and not isinstance(label, str):
        raise ValueError(label)
    if value is None:
        return None, label
    if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) <= _LARGEST_SCORE:
        raise ValueError(value)
    return float(value), label


def _finite_or_none(value: SupportsFloat) -> float | None:
    return float(value) if math.isfinite(value) else None


def _digest(*parts: str) -> str:
    return hashlib.sha256(json.dumps([_FORMAT, *parts]).encode()).hexdigest()[:32]


def directory_fingerprint(directory: str | os.PathLike[str]) -> str:
    """Returns a short hash of the files in a checkpoint's directory; a copy elsewhere has the same hash.

    It covers the name and size of every file except hidden files and *.md. Files up to 1 MiB are read in full. Of
    larger files it covers the first MiB (which includes a safetensors header) and 256 evenly spread blocks of 4 KiB,
    the last of which ends the file. This takes only seconds, however large the files are. A change between the blocks
    that does not change the file's size remains unnoticed.

    Raises:
      UserError: a file cannot be read.
    """
    root, digest = Path(directory), hashlib.sha256()
    try:
        names = sorted(path.relative_to(root).as_posix() for path in root.rglob("*") if path.is_file())
        for name in names:
            if name.endswith(".md") or any(part.startswith(".") for part in name.split("/")):
                continue
            size = (root / name).stat().st_size
            digest.update(f"{name}\0{size}\0".encode())
            with (root / name).open("rb") as file:
                digest.update(file.read(_READ_IN_FULL))
                rest = size - _READ_IN_FULL
                for block in range(_NUM_BLOCKS if rest > 0 else 0):
                    file.seek(_READ_IN_FULL + (rest - min(_BLOCK_SIZE, rest)) * block // (_NUM_BLOCKS - 1))
                    digest.update(file.read(_BLOCK_SIZE))
    except OSError as error:
        raise UserError(f"{directory}: cannot be read ({error.strerror}); check the files' permissions") from error
    return digest.hexdigest()[:16]
