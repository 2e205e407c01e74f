"""Prepared data sets: TFDS `array_record` folders, written and read without TensorFlow.

    DIRECTORY/NAME/rows/1.0.0/      one record per row; `images` are record numbers in the folder next to it
    DIRECTORY/NAME/images/1.0.0/    one record per distinct image: the bytes of the original image file
    DIRECTORY/NAME/source.json      facts about the set: the source of its rows, how many were left out and why

`tfds.builder_from_directory(FOLDER).as_data_source(SPLIT)` opens either folder (splits "rows" and "images"). A set is
always complete, because it is written to a temporary folder that is renamed at the end.
"""

import hashlib
import io
import json
import shutil
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from itertools import islice
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from icet_jax.data.records import Example, Records
from icet_jax.errors import UserError, write_error
from icet_jax.files import JsonObject, parse_json, read_text, replace_dir_atomic, write_text_atomic
from icet_jax.media.images import ImageLike

SCHEMA = 1
_VERSION = "1.0.0"
_PER_SHARD = {"rows": 100_000, "images": 2_000}  # records per file, so that a file has a few hundred megabytes
_PER_CALL = 64  # records per call of the writer, which rewrites its metadata at every call
_LISTED_PROBLEMS = 100
_TRANSFERRED = {None: "", True: "yes", False: "no"}
_COUNTS = ("read", "kept", "repeats", "animated", "images", "image_bytes")


@dataclass(frozen=True)
class PreparedImage:
    """An image of a prepared set, whose bytes are read when they are needed (an `icet_jax.media.images.StoredImage`).

    Attributes:
      folder: folder of the set.
      index: index of the image's record.
      name: name of the image in error messages.
    """

    folder: Path
    index: int
    name: str

    def read(self) -> bytes:
        """Returns the bytes of the image file."""
        return bytes(_record(self.folder, "images", self.index)["bytes"])

    def __str__(self) -> str:
        return self.name


def fingerprint(source: str, limit: int | None, records: Records) -> str:
    """Returns a hash that changes when a set must be prepared again.

    It covers the source string, the limit, all fields of the rows, the rows that were left out, and path, size and
    modification time of all image files.
    """
    digest = hashlib.sha256(repr((SCHEMA, source, limit, records.problems)).encode("utf-8", "surrogatepass"))
    for example in records.examples:
        images = [_image_version(image) for image in example.images]
        digest.update(repr((_text_fields(example), images)).encode("utf-8", "surrogatepass"))
    return digest.hexdigest()


def write_set(directory: Path, name: str, records: Records, facts: Mapping[str, Any]) -> JsonObject:
    """Writes one set, replacing an earlier one of that name, and returns the content of its `source.json`.

    Args:
      directory: directory of all sets.
      name: name of this set.
      records: rows of the set; an image is a path or a uint8 array, which is stored as PNG.
      facts: further fields for `source.json`: `source`, `limit` and `fingerprint` of the set.

    Raises:
      UserError: an image no longer exists, the folder cannot be written to, or the disk is full. The incomplete set is
        then removed, and an earlier set of that name is kept.
    """
    partial = directory / f".{name}.partial"
    try:
        shutil.rmtree(partial, ignore_errors=True)
        pool = _ImagePool()
        _write_table(partial / "images", "images", pool.records(records.examples))
        _write_table(partial / "rows", "rows", (_to_record(example, pool) for example in records.examples))
        content = {
            "schema": SCHEMA,
            **facts,
            "complete": records.complete,
            **counts(records),
            "images": len(pool.indices),
            "image_bytes": pool.total_bytes,
        }
        write_text_atomic(partial / "source.json", json.dumps(content, indent=1) + "\n")
        replace_dir_atomic(partial, directory / name)
    except (OSError, RuntimeError) as error:
        raise write_error(directory / name, error) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    _data_source.cache_clear()
    return content


def counts(records: Records) -> JsonObject:
    """Returns how many rows of a source were read, kept, dropped (by reason) and so on, and its first problems."""
    return {
        "read": records.read,
        "kept": len(records.examples),
        "dropped": records.dropped(),
        "repeats": records.repeats,
        "animated": records.animated,
        "replaced_images": list(records.replaced),
        "problems": [
            {"row": problem.row, "line": problem.line, "reason": problem.reason, "detail": problem.detail}
            for problem in records.problems[:_LISTED_PROBLEMS]
        ],
    }


def read_facts(directory: Path, name: str) -> JsonObject | None:
    """Returns the content of a set's `source.json`; None if there is no such set or another version wrote it.

    Raises:
      UserError: the file is damaged.
    """
    path = directory / name / "source.json"
    try:
        facts = parse_json(read_text(path))
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read ({error}); run --mode=prepare again") from error
    if not isinstance(facts, dict) or facts.get("schema") != SCHEMA:
        return None
    if not _has_valid_fields(facts):
        raise UserError(f"{path}: a field is missing or of another type; run --mode=prepare again")
    return facts


def _has_valid_fields(facts: Mapping[str, Any]) -> bool:
    """Returns whether the content of a `source.json` has all fields that are used, each of the right type."""
    dropped, limit, replaced = facts.get("dropped"), facts.get("limit"), facts.get("replaced_images", [])
    return (
        all(isinstance(facts.get(name), str) for name in ("source", "fingerprint"))
        and all(type(facts.get(name)) is int and facts[name] >= 0 for name in _COUNTS)
        and type(facts.get("complete")) is bool
        and (type(limit) is int or limit is None and facts["complete"])
        and isinstance(dropped, dict)
        and all(type(count) is int for count in dropped.values())
        and isinstance(replaced, list)
        and all(isinstance(image, str) for image in replaced)
    )


def read_set(directory: str | Path, name: str, source: str, limit: int | None = None) -> list[Example]:
    """Returns at most `limit` rows of a prepared set in the order of its source; images are read when they are needed.

    `source` is the source string in the config, from which the set must have been prepared.

    Raises:
      UserError: the set is not prepared, was prepared from another source, or has fewer rows than requested.
    """
    directory = Path(directory)
    facts = read_facts(directory, name)
    if facts is None:
        raise UserError(f"{directory / name}: this data set is not prepared; run --mode=prepare with the same config")
    if facts["source"] != source:
        raise UserError(
            f"{directory / name}: prepared from {facts['source']}, but the config names {source}; "
            "run --mode=prepare with this config"
        )
    if not facts["complete"] and (limit is None or limit > facts["limit"]):
        raise UserError(
            f"{directory / name}: prepared with config.sweep.limit={facts['limit']}, but {limit or 'all'} rows are "
            "needed; run --mode=prepare with this config"
        )
    folder = directory / name
    total = facts["kept"] if limit is None else min(limit, facts["kept"])
    return [_from_record(folder, _record(folder, "rows", index)) for index in range(total)]


def dropped_rows(directory: str | Path, name: str) -> dict[str, int]:
    """Returns {reason: number of rows that were left out for it when a set was prepared}; empty without that set."""
    return (read_facts(Path(directory), name) or {"dropped": {}})["dropped"]


class _ImagePool:
    """Assigns an index to each distinct image of a set, in the order of first use; equal bytes mean the same image."""

    def __init__(self) -> None:
        self.indices: dict[bytes, int] = {}  # {hash of an image's bytes: index of its record}
        self.total_bytes = 0  # size of all distinct images
        self._digest_of_path: dict[Path, bytes] = {}

    def records(self, examples: Iterable[Example]) -> Iterator[JsonObject]:
        """Yields a record for each image that has not occurred before."""
        for example in examples:
            for position, image in enumerate(example.images):
                if isinstance(image, Path) and image in self._digest_of_path:
                    continue
                data = _encode(image)
                digest = hashlib.sha256(data).digest()
                if isinstance(image, Path):
                    self._digest_of_path[image] = digest
                if digest in self.indices:
                    continue
                self.indices[digest] = len(self.indices)
                self.total_bytes += len(data)
                name = image.name if isinstance(image, Path) else f"{example.id}-{position}.png"
                yield {"name": name.encode("utf-8", "replace"), "bytes": data}

    def index(self, image: ImageLike) -> int:
        """Returns the index of an image whose record `records` has yielded."""
        digest = self._digest_of_path.get(image) if isinstance(image, Path) else None
        return self.indices[digest or hashlib.sha256(_encode(image)).digest()]


def _encode(image: ImageLike) -> bytes:
    """Returns the bytes of an image file, or of an array as PNG."""
    if isinstance(image, Path):
        try:
            return image.read_bytes()
        except OSError as error:
            raise UserError(f"{image}: cannot be read ({error.strerror})") from error
    from PIL import Image

    file = io.BytesIO()
    Image.fromarray(np.asarray(image)).save(file, "PNG")
    return file.getvalue()


def _image_version(image: ImageLike) -> tuple[str, int, int] | str:
    """Returns path, size and modification time of an image file, or the hash of an array."""
    if isinstance(image, Path):
        status = image.stat()
        return str(image), status.st_size, status.st_mtime_ns
    return hashlib.sha256(np.asarray(image).tobytes()).hexdigest()


def _text_fields(example: Example) -> tuple[object, ...]:
    """Returns the fields of a row except its images.

    `format` and `transferred`, which were added later, are left out if neither is set. The fingerprints of sets that
    earlier versions prepared therefore stay valid.
    """
    fields = (
        example.id, example.prompt, example.kind, example.answer, example.category, example.answers,
        example.answer_type,
    )  # fmt: skip
    attack = (example.format, example.transferred)
    return fields if attack == ("", None) else (*fields, *attack)


def _to_record(example: Example, pool: _ImagePool) -> JsonObject:
    """Converts a row to a record for TFDS, with "" in place of None."""
    return {
        "id": example.id,
        "prompt": example.prompt,
        "images": [pool.index(image) for image in example.images],
        "kind": example.kind,
        "answer": example.answer or "",
        "policy": example.category or "",
        "answers": list(example.answers),
        "answer_type": example.answer_type or "",
        "format": example.format,
        "transferred": _TRANSFERRED[example.transferred],
    }


def _from_record(folder: Path, record: Mapping[str, Any]) -> Example:
    """Converts a TFDS record to a row; records of earlier versions have neither `format` nor `transferred`."""

    def field(name: str) -> str:
        return bytes(record[name]).decode("utf-8")

    identity = field("id")
    return Example(
        id=identity,
        prompt=field("prompt"),
        images=tuple(
            PreparedImage(folder, int(number), f"{folder.name}: image {int(number)} (row {identity})")
            for number in record["images"]
        ),
        kind=field("kind"),
        answer=field("answer") or None,
        category=field("policy") or None,
        answers=tuple(bytes(answer).decode("utf-8") for answer in record["answers"]),
        answer_type=field("answer_type") or None,
        format=field("format") if "format" in record else "",
        transferred={"yes": True, "no": False}.get(field("transferred")) if "transferred" in record else None,
    )


def _write_table(folder: Path, split: str, records: Iterable[JsonObject]) -> None:
    """Writes records in their order as a TFDS data set whose only split is `split`, "rows" or "images"."""
    tfds = _tfds()
    features, text, tensor = tfds.features, tfds.features.Text(), tfds.features.Tensor
    if split == "images":
        columns: JsonObject = {"name": text, "bytes": tensor(shape=(), dtype=np.object_)}
    else:
        columns = dict.fromkeys(
            ("id", "prompt", "kind", "answer", "policy", "answer_type", "format", "transferred"), text
        )
        columns |= {
            "images": features.Sequence(features.Scalar(np.int64)),
            "answers": features.Sequence(features.Text()),
        }
    target = folder / _VERSION
    target.mkdir(parents=True)
    identity = tfds.core.DatasetIdentity(
        name=f"icet_{split}", version=tfds.core.Version(_VERSION), data_dir=str(target), module_name=__name__
    )
    info = tfds.core.DatasetInfo(builder=identity, features=features.FeaturesDict(columns), disable_shuffling=True)
    writer = tfds.core.SequentialWriter(info, max_examples_per_shard=_PER_SHARD[split], file_format="array_record")
    writer.initialize_splits([split])
    records = iter(records)
    while chunk := list(islice(records, _PER_CALL)):
        writer.add_examples({split: chunk})
    writer.close_all()


def _record(folder: Path, split: str, index: int) -> Mapping[str, Any]:
    """Returns one record of a prepared set, from its "rows" or "images"."""
    try:
        return _data_source(folder, split)[index]
    # A damaged folder causes any of OSError, RuntimeError, ValueError, KeyError, ...
    except Exception as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(f"{folder / split}: cannot be read ({reason}); run --mode=prepare again") from error


@lru_cache(maxsize=64)
def _data_source(folder: Path, split: str) -> Any:
    """Returns TFDS's random access to the records of a split."""
    return _tfds().builder_from_directory(folder / split / _VERSION).as_data_source(split)


def _tfds() -> ModuleType:
    """Imports TFDS, which takes seconds, when it is first needed."""
    import tensorflow_datasets

    return tensorflow_datasets
