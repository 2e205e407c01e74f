"""Records hashes of a run's rows and model files in `fingerprints.json`, and checks them whenever the run is continued.

    {"schema": 1, "rows": {SET: {ROW ID: SHA-256}}, "checkpoints": {"model": {FILE: SHA-256}, "adapter": {...}}}

Hashes are cut to 16 hexadecimal digits. The hash of a weight file covers only its size, its header and 64 blocks.
"""

import hashlib
import json
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from icet_jax.data.hh_rlhf import PreferencePair
from icet_jax.data.records import Example
from icet_jax.errors import UserError
from icet_jax.files import parse_json, read_text, write_text_atomic
from icet_jax.media.images import StoredImage
from icet_jax.parallel.distributed import on_first
from icet_jax.runs.run_dir import has_begun

NAME = "fingerprints.json"
SCHEMA = 1
_ROWS, _CHECKPOINTS = "rows", "checkpoints"
_DIGITS = 16
_FULLY_HASHED = (".json", ".txt", ".model", ".jinja")  # suffixes of the files beside the weights that a loader reads
_BLOCKS, _BLOCK_BYTES = 64, 1 << 16  # blocks of a weight file that are hashed, 4 MiB in total
_LARGEST_HEADER = 1 << 27
_FILES_AT_ONCE = 8
_SHOWN = 3  # most rows or files that an error names

Fingerprints = dict[str, dict[str, str]]
"""{set: {row id: hash}} or {checkpoint: {file: hash}}."""


def check_rows(workdir: Path, sets: Mapping[str, Sequence[Example]]) -> None:
    """Records hashes of the rows of a new run, or checks that the rows of a continued run have not changed.

    Only the first process does this. A run of an earlier version that has no fingerprints counts as new.

    Args:
      workdir: the run directory.
      sets: rows by data set, including the training set.

    Raises:
      UserError: rows have changed since the run started; the message names the set and the number of rows.
    """
    on_first(lambda: _check(workdir, _ROWS, _hash_rows(sets), record=True))


def check_pairs(workdir: Path, sets: Mapping[str, Sequence[PreferencePair]]) -> None:
    """Records or checks the hashes of a reward model's preference pairs, as `check_rows` does for rows.

    Args:
      workdir: the run directory.
      sets: {name of the set: its preference pairs}. In fingerprints.json, pairs are numbered from 1.

    Raises:
      UserError: pairs have changed since the run started; the message names the set and the number of pairs.
    """

    def check() -> None:
        hashes = {
            name: {
                str(number): _hash(json.dumps(pair).encode())[:_DIGITS] for number, pair in enumerate(pairs, start=1)
            }
            for name, pairs in sets.items()
        }
        _check(workdir, _ROWS, hashes, record=True)

    on_first(check)


def recorded_rows(workdir: Path) -> Fingerprints:
    """Returns {set: {row id: hash}} as `check_rows` recorded it. All processes must call this function.

    Raises:
      UserError: the file is damaged.
    """
    return on_first(lambda: _read(workdir / NAME).get(_ROWS, {}))


def model_differences(workdir: Path, other: Path) -> dict[str, str]:
    """Returns {"model" or "adapter": differences} of the model files that two runs recorded; empty if there are none.

    All processes call it.

    Args:
      workdir: a run directory.
      other: another one; the differences are those of `workdir` from it, such as "1 changed (config.json)".

    Raises:
      UserError: a file of fingerprints is damaged.
    """

    def compare() -> dict[str, str]:
        own, others = (_read(folder / NAME).get(_CHECKPOINTS, {}) for folder in (workdir, other))
        changes = {name: _changes(others.get(name, {}), own.get(name, {})) for name in sorted({*own, *others})}
        return {name: what for name, what in changes.items() if what}

    return on_first(compare)


def copy_to(workdir: Path, other: Path) -> None:
    """Copies the fingerprints of a run to a run directory for the same rows and model, unless a run has begun there."""
    if not has_begun(other):
        write_text_atomic(other / NAME, read_text(workdir / NAME))


def check_checkpoint(workdir: Path, directories: Mapping[str, Path | None], *, record: bool = True) -> None:
    """Records or checks the hashes of a model's files, as `check_rows` does for rows.

    Args:
      workdir: the run directory.
      directories: {"model": its folder, "adapter": folder of the adapter that training starts from, or None}.
      record: whether to record hashes if the run directory has none.

    Raises:
      UserError: files have changed since the run started; the message names them.
    """

    def check() -> None:
        files = {name: _hash_files(directory) for name, directory in directories.items() if directory is not None}
        _check(workdir, _CHECKPOINTS, files, record=record)

    on_first(check)


def _check(workdir: Path, kind: str, current: Fingerprints, *, record: bool) -> None:
    """Compares the `current` fingerprints with those of the same name recorded by this run and by its other seeds.

    Args:
      workdir: run directory.
      kind: "rows" or "checkpoints".
      current: fingerprints of the inputs that were just loaded.
      record: whether to write fingerprints that are not recorded yet.

    Raises:
      UserError: a current fingerprint differs from a recorded one.
    """
    path = workdir / NAME
    all_recorded = {**_read(path)}
    recorded = all_recorded.get(kind, {}) if has_begun(workdir) else {}
    for expected in (recorded, *_fingerprints_of_other_seeds(workdir, kind)):
        changes = {name: _changes(expected[name], current[name]) for name in sorted({*expected} & {*current})}
        different = "; ".join(f"{name}: {what}" for name, what in changes.items() if what)
        if different:
            raise UserError(
                f"--workdir={workdir}: the {kind} are not those that this run began with ({different}); put them back "
                "or choose another --workdir"
            )
    # Keep the recorded fingerprints of sets that this call did not load: a sweep does not load the training rows.
    if record and {**recorded, **current} != all_recorded.get(kind):
        all_recorded[kind] = {**recorded, **current}
        write_text_atomic(path, json.dumps({"schema": SCHEMA, **all_recorded}, indent=0) + "\n")


def _fingerprints_of_other_seeds(workdir: Path, kind: str) -> Iterable[Fingerprints]:
    """Yields the fingerprints recorded by other seeds of the same run, which have the same rows and model."""
    if re.fullmatch(r"seed_\d+", workdir.name) and (workdir.parent / "config.json").is_file():
        for folder in sorted(workdir.parent.glob("seed_*")):
            if folder != workdir and has_begun(folder):
                yield _read(folder / NAME).get(kind, {})


def _read(path: Path) -> dict[str, Fingerprints]:
    """Returns {"rows" or "checkpoints": fingerprints} from the file `path`; empty if it does not exist.

    Raises:
      UserError: the file is damaged.
    """
    try:
        content = parse_json(read_text(path))
        if not isinstance(content, dict):
            raise ValueError("not an object")
        kinds = {kind: content[kind] for kind in (_ROWS, _CHECKPOINTS) if kind in content}
        hashes = [value for groups in kinds.values() for group in groups.values() for value in group.values()]
        if not all(isinstance(value, str) for value in hashes):
            raise ValueError("a hash is no text")
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise UserError(f"{path}: not a run's fingerprints ({error}); remove it to have them taken again") from error
    return kinds


def _changes(before: Mapping[str, str], now: Mapping[str, str]) -> str:
    """Returns the differences in words, such as "1 changed (ID), 2 added (ID, ID)"; "" if there are none."""
    differences = {
        "changed": [key for key in before if key in now and before[key] != now[key]],
        "added": [key for key in now if key not in before],
        "removed": [key for key in before if key not in now],
    }
    parts = []
    for what, keys in differences.items():
        if keys:
            more = ", ..." if len(keys) > _SHOWN else ""
            parts.append(f"{len(keys)} {what} ({', '.join(keys[:_SHOWN])}{more})")
    return ", ".join(parts)


def _hash_rows(sets: Mapping[str, Sequence[Example]]) -> Fingerprints:
    """Returns {set: {row id: hash of the row's texts and of the bytes or pixels of its images}}."""
    images = {image for rows in sets.values() for row in rows for image in row.images if isinstance(image, str | Path)}
    with ThreadPoolExecutor(_FILES_AT_ONCE) as pool:
        file_hashes = dict(zip(images, pool.map(_hash_file, images), strict=True))
    stored_hashes: dict[StoredImage, str] = {}  # of images in prepared sets

    def image_hash(image: Any) -> str:
        """Returns the hash of an image: of its file's bytes, or of the pixels of an image in memory."""
        if isinstance(image, str | Path):
            return file_hashes[image]
        if isinstance(image, StoredImage):
            if image not in stored_hashes:
                stored_hashes[image] = _hash(image.read())
            return stored_hashes[image]
        pixels = image if isinstance(image, bytes) else np.asarray(image)
        return _hash(pixels if isinstance(pixels, bytes) else f"{pixels.shape}".encode() + pixels.tobytes())

    def row_hash(row: Example) -> str:
        # Attack formats are left out: responses and scores do not depend on them, and older runs have none.
        fields = (row.prompt, row.kind, row.answer, row.category, row.answers, row.answer_type)
        return _hash(json.dumps([*fields, *map(image_hash, row.images)]).encode())[:_DIGITS]

    return {name: {row.id: row_hash(row) for row in rows} for name, rows in sets.items()}


def _hash_file(path: str | Path) -> str:
    """Returns the hash of all bytes of a file."""
    try:
        with open(path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from error


def _hash_files(directory: Path) -> dict[str, str]:
    """Returns the hashes of a model's files by file name; files that no loader reads are left out."""
    paths = [path for path in sorted(directory.iterdir()) if path.suffix in (*_FULLY_HASHED, ".safetensors")]
    try:
        return {
            path.name: (_hash_weights if path.suffix == ".safetensors" else _hash_file)(path)[:_DIGITS]
            for path in paths
            if path.is_file()
        }
    except OSError as error:
        raise UserError(f"{error.filename}: cannot be read ({error.strerror})") from error


def _hash_weights(path: Path) -> str:
    """Returns a hash of a safetensors file, computed from its size, its header and `_BLOCKS` evenly spaced blocks.

    Of a small file, all bytes are read.
    """
    with path.open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        length = file.read(8)
        header = file.read(min(int.from_bytes(length, "little"), _LARGEST_HEADER))
        digest = hashlib.sha256(f"{size}\n".encode() + length + header)
        start = file.tell()
        last = size - _BLOCK_BYTES
        if size - start <= _BLOCKS * _BLOCK_BYTES:
            digest.update(file.read())
        else:
            for block in range(_BLOCKS):
                file.seek(start + (last - start) * block // (_BLOCKS - 1))
                digest.update(file.read(_BLOCK_BYTES))
    return digest.hexdigest()


def _hash(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
