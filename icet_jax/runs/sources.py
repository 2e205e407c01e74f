"""Finds a run's rows and weights: a user's files, hub ids, the organism (the embedded test model), or toys.

rows        FILE.csv | FILE.jsonl | FORMAT:PATH[?options] (icet_jax/data/published.py)
            | organism:SPLIT[:KIND[:COUNT[:NOUNS]]], NOUNS of forbidden rows: all | seen | unseen
            | toy:KIND | toy:FORMAT | several of these, joined by " + "
weights     DIRECTORY | hub id | organism:vlm | organism:control | organism:reward_model | toy:mllama | ...
"""

import dataclasses
import functools
import sys
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

from icet_jax.config.names import KINDS
from icet_jax.data import prepared
from icet_jax.data.published import read_source
from icet_jax.data.records import Example, Records, prompt_overlap
from icet_jax.errors import UserError
from icet_jax.files import JsonObject, parse_json
from icet_jax.parallel.distributed import first_before_others
from icet_jax.runs import shipped

# Rows of an organism source: enough for 95% intervals of a few points, and for a run that repeats no row.
_ORGANISM_ROWS = {"train": dict.fromkeys(KINDS, 2048), "test": {"forbidden": 256, "benign": 256, "vqa": 1024}}

SOURCE_JOIN = " + "
"""Separates sources whose rows form one set."""

TRAIN = "train"
"""Name of the training set among the prepared sets."""


class LoadedRows(NamedTuple):
    """Holds the usable rows of a data set, and {reason: number of rows that were left out for it}."""

    examples: list[Example]
    left_out: dict[str, int]


def checkpoint_directory(spec: str, workdir: Path | None = None) -> str:
    """Returns the directory (or hub id) of `spec`; toy weights are created in `workdir` or in a temporary folder.

    Raises:
      UserError: there is no such organism or toy checkpoint.
    """
    origin, _, name = spec.partition(":")
    if origin == "organism" and name:
        from icet_jax.organism import weights_directory

        return str(weights_directory(name))
    if origin == "toy" and name:
        from icet_jax import miniatures as toy

        with first_before_others():
            return str(toy.checkpoint(name, workdir))
    return spec


def load_set(
    source: str,
    *,
    root: str | None = None,
    image_root: str | None = None,
    limit: int | None = None,
    seed: int = 0,
    directory: str | None = None,
    name: str | None = None,
    workdir: Path | None = None,
) -> LoadedRows:
    """Returns at most `limit` rows of `source`, and prints a report of bad rows to standard error.

    Args:
      source: see the top of this module.
      root: folder for a source's relative paths.
      image_root: folder for a file's relative image paths.
      limit: number of usable rows after which reading stops; None means all.
      seed: seed of the images and the row order of `organism:` sources.
      directory: directory of prepared data sets (`--mode=prepare`); if None the source itself is read.
      name: name of the set in `directory`.
      workdir: directory for toy files; a temporary folder if None.

    Raises:
      UserError: the source does not exist, a file has no usable row, or the set is not prepared.
    """
    if directory is not None and name is not None:
        rows = prepared.read_set(directory, name, source, limit)
        return LoadedRows(rows, prepared.dropped_rows(directory, name))
    records = read_rows(source, root=root, image_root=image_root, limit=limit, seed=seed, workdir=workdir)
    if records.problems or records.repeats or records.animated or records.replaced:
        print(f"icet-jax: {records.report()}", file=sys.stderr)
    return LoadedRows(records.examples, records.dropped())


def load_rows(source: str, **where: Any) -> list[Example]:
    """Returns the rows of a source, such as "prompts.csv" or "organism:test:forbidden:64" (see the top of this module).

    Args:
      source: a file, a data set in a published format, or generated rows; see the module's docstring.
      where: `limit`, `seed`, `root`, `image_root` and so on, as for `load_set`.

    Raises:
      UserError: the source does not exist, or a file has no usable row.
    """
    return load_set(source, **where).examples


def read_rows(
    source: str,
    *,
    root: str | None = None,
    image_root: str | None = None,
    limit: int | None = None,
    seed: int = 0,
    workdir: Path | None = None,
    decode: bool = False,
) -> Records:
    """Reads the usable rows of `source`, and records which rows were left out and why.

    Args:
      source, root, image_root, limit, seed, workdir: as for `load_set`; reading stops after `limit` usable rows.
      decode: whether to decode all images while reading, so that rows with damaged images are left out too.

    Raises:
      UserError: the source does not exist, or a file has no usable row.
    """
    if SOURCE_JOIN in source:
        read_one = functools.partial(
            read_rows, root=root, image_root=image_root, seed=seed, workdir=workdir, decode=decode
        )
        return _read_several(source, limit, read_one)
    origin, _, name = source.partition(":")
    if origin == "toy" and name not in ("", "mixed", *KINDS):
        from icet_jax.miniatures import published

        folder = _temporary_folder() if workdir is None else workdir / "toy"
        with first_before_others():
            source, root = published.source(name, folder / "data"), None
    elif origin in ("organism", "toy") and name:
        rows = _organism_rows(source, seed) if origin == "organism" else _toy_rows(name)
        return Records(source, rows[:limit], [], complete=limit is None or len(rows) <= limit)
    for field, path in (("root", root), ("image_root", image_root)):
        if path and not Path(path).is_dir():
            raise UserError(f"config.data.{field}={path}: no such folder; give the folder of the data sets' files")
    source = source if root else str(shipped.example(source))
    return read_source(source, root=root, image_root=image_root, limit=limit, decode=decode)


def _read_several(source: str, limit: int | None, read_one: Callable[..., Records]) -> Records:
    """Returns the rows of several sources joined by `SOURCE_JOIN`, one after another, at most `limit` in all.

    Each row id gets its source's index as a prefix, so that ids of different sources stay different. `read_one` is
    `read_rows` with all arguments bound except source and limit.
    """
    parts = [part.strip() for part in source.split(SOURCE_JOIN)]
    if not all(parts):
        raise UserError(f"{source}: a source is missing beside '{SOURCE_JOIN}'; write SOURCE{SOURCE_JOIN}SOURCE")
    all_records: list[Records] = []
    for number, part in enumerate(parts, 1):
        remaining = None if limit is None else limit - sum(len(records.examples) for records in all_records)
        if remaining == 0:
            break
        records = read_one(part, limit=remaining)
        examples = [dataclasses.replace(row, id=f"{number}:{row.id}") for row in records.examples]
        problems = [dataclasses.replace(row, detail=f"{part}: {row.detail}") for row in records.problems]
        all_records.append(dataclasses.replace(records, examples=examples, problems=problems))
    return Records(
        source,
        [row for records in all_records for row in records.examples],
        [problem for records in all_records for problem in records.problems],
        repeats=sum(records.repeats for records in all_records),
        animated=sum(records.animated for records in all_records),
        replaced=tuple(image for records in all_records for image in records.replaced),
        complete=len(all_records) == len(parts) and all(records.complete for records in all_records),
    )


@functools.cache
def _temporary_folder() -> Path:
    """Returns one temporary folder for all toy files of this process."""
    return Path(tempfile.mkdtemp(prefix="icet_jax_toy_"))


def _toy_rows(kind: str) -> list[Example]:
    """Returns a few generated rows of one kind, or of all kinds if `kind` is "mixed"."""
    from icet_jax import miniatures as toy

    return toy.rows(kind)


def _organism_rows(source: str, seed: int) -> list[Example]:
    """Returns generated rows from the organism's world for a source "organism:SPLIT[:KIND[:COUNT[:NOUNS]]]"."""
    from icet_jax.organism import world

    _, split, kind, count, nouns, *rest = [*source.split(":"), "", "", ""]
    counts = _ORGANISM_ROWS["test" if split == "test" else "train"]
    is_counted = not count or (count.isdigit() and int(count) > 0)
    has_nouns = not nouns or (kind == "forbidden" and nouns in world.NOUN_SETS)
    if any(rest) or (kind and kind not in counts) or not is_counted or not has_nouns:
        raise UserError(
            f"{source}: write organism:SPLIT[:KIND[:COUNT[:NOUNS]]], with a kind of {', '.join(KINDS)}; forbidden rows "
            f"alone have NOUNS, {', '.join(world.NOUN_SETS)}"
        )
    kinds = {kind: int(count or counts[kind])} if kind else counts
    return [row for name, size in kinds.items() for row in world.examples(split, name, size, seed, nouns or "all")]


def report_overlap(train: Iterable[Example], tests: dict[str, list[Example]]) -> dict[str, int]:
    """Returns {data set: number of test rows whose prompt is also a training prompt}, and prints it if any are.

    Questions about images (VQA rows) naturally repeat their wording and are not counted.
    """
    train_requests = [example for example in train if example.kind != "vqa"]
    overlaps = {}
    for name, rows in tests.items():
        requests = [row for row in rows if row.kind != "vqa"]
        overlaps[name] = prompt_overlap(train_requests, requests)
        if overlaps[name]:
            print(
                f"icet-jax: {overlaps[name]} of {len(requests)} rows of {name} have a prompt of the training set",
                file=sys.stderr,
            )
    return overlaps


def organism_facts(directory: str) -> JsonObject | None:
    """Returns the content of organism.json in `directory`; None if it is not the directory of an organism.

    The file says which hole was planted in the embedded model.
    """
    path = Path(directory) / "organism.json"
    if not path.is_file():
        return None
    try:
        facts = parse_json(path.read_text(encoding="utf-8"))
        if not isinstance(facts, dict):
            raise ValueError("not an object")
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: not readable JSON ({error}); copy it again or remove it") from error
    return facts
