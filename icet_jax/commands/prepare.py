"""`--mode=prepare` checks every image of a config's data sets, and writes the sets to the folder that runs read."""

import argparse
import functools
import json
import sys
from collections.abc import Callable
from pathlib import Path

from ml_collections import ConfigDict

from icet_jax.checkpoints.hf_config import read_hf_config
from icet_jax.data import prepared
from icet_jax.data.records import Example, Records
from icet_jax.errors import UserError, one_line
from icet_jax.files import JsonObject, write_text_atomic
from icet_jax.media.limits import max_positions
from icet_jax.models.base.processor import load_processor
from icet_jax.runs import sources
from icet_jax.runs.sources import TRAIN
from icet_jax.runs.too_long import fitting_rows

SCHEMA = 1


def run(config: ConfigDict, workdir: Path | None, options: argparse.Namespace) -> int:
    """Writes `config.data.train` and the sets of the sweeps, skipping those whose sources have not changed; returns 0.

    It prints one line per set and writes the same facts to `report.json` next to the sets: how many rows were read,
    kept, repeated, and left out (by reason); how many test prompts are training prompts; and, if the model's tokenizer
    is on this machine, how many prompts are too long for the model. Rows that are too long stay in the sets, because
    other models can use them; a run leaves them out.

    Args:
      config: its `data` and `sweep` name the sources.
      workdir: directory for toy files; a temporary folder if None.
      options: `out`, the target folder instead of `config.data.directory`.

    Raises:
      UserError: no folder or no data set is named, a source cannot be read, a folder cannot be written to, or a prompt
        is too long and `config.data.too_long` is "stop".
    """
    directory = options.out if options.out is not None else config.data.directory
    if not directory:
        raise UserError("--mode=prepare needs a folder to write to: --config.data.directory=DIR or --out=DIR")
    sets = named_sets(config)
    if not sets:
        raise UserError("--mode=prepare: the config names no data set (data.train, sweep.datasets, sweep.utility)")
    directory = Path(directory)
    reports, rows = {}, {}
    model = _model_directory(config, workdir)
    read_rows = functools.partial(
        sources.read_rows, root=config.data.root, image_root=config.data.image_root, workdir=workdir
    )
    undecoded = {name: read_rows(source, limit=limit) for name, (source, limit) in sets.items()}
    too_long = {} if model is None else _too_long(config, model, sets, undecoded)
    for name, (source, limit) in sets.items():
        reports[name] = _write_if_changed(directory, name, source, limit, undecoded[name], read_rows)
        if model is not None:
            reports[name]["too_long"] = too_long[name]
        rows[name] = prepared.read_set(directory, name, source, limit)
        print(_summary(name, reports[name]))
    train: list[Example] = rows.pop(TRAIN, [])
    overlap = sources.report_overlap(train, rows)
    content = {"schema": SCHEMA, "sets": reports, "prompts_shared_with_train": overlap}
    write_text_atomic(directory / "report.json", json.dumps(content, indent=1) + "\n")
    print(f"report: {directory / 'report.json'}", file=sys.stderr)
    return 0


def named_sets(config: ConfigDict) -> dict[str, tuple[str, int | None]]:
    """Returns {name: (source, limit)} of every data set that the config names; the training set has the name `TRAIN`.

    The limit is the largest number of rows to read, None for all.

    Raises:
      UserError: a test set has the training set's name.
    """
    tests = {**config.sweep.datasets, **config.sweep.utility}
    if TRAIN in tests:
        raise UserError(f"config.sweep names a data set '{TRAIN}', which is what the training set is called; rename it")
    train = {TRAIN: (config.data.train, None)} if config.data.train else {}
    return train | {name: (source, config.sweep.limit) for name, source in tests.items()}


def _model_directory(config: ConfigDict, workdir: Path | None) -> Path | None:
    """Returns the folder of `config.model.checkpoint`; None if the config names no model.

    If the model's files are not on this machine, it prints a message and returns None too.
    """
    spec = config.model.checkpoint
    if spec is None:
        return None
    directory = Path(sources.checkpoint_directory(spec, workdir)).expanduser()
    if directory.is_dir():
        return directory
    print(
        f"lengths of prompts are not measured: the files of config.model.checkpoint={one_line(spec)} are not on this "
        "machine; every run measures them at its start",
        file=sys.stderr,
    )
    return None


def _too_long(
    config: ConfigDict, model: Path, sets: dict[str, tuple[str, int | None]], undecoded: dict[str, Records]
) -> dict[str, dict[str, int]]:
    """Returns {set: {row id: positions of its prompt}} of the rows that a run will leave out as too long.

    Args:
      config: config of the run.
      model: folder of the model.
      sets: result of `named_sets`.
      undecoded: {set: its rows, read without decoding images}.
    """
    processor, positions = load_processor(model, template=config.data.template), max_positions(read_hf_config(model))
    too_long = {}
    for name, (source, _) in sets.items():
        examples = undecoded[name].examples
        _, too_long[name] = fitting_rows(config, processor, positions, source, name, examples, training=name == TRAIN)
    return too_long


def _write_if_changed(
    directory: Path, name: str, source: str, limit: int | None, undecoded: Records, read_rows: Callable[..., Records]
) -> JsonObject:
    """Writes the data set `name` to `directory` unless the same set is already there.

    Returns the content of the set's `source.json` with one more key, "unchanged": whether nothing was written.
    `undecoded` has the set's rows, read without decoding images. `read_rows` is `sources.read_rows` with the config's
    folders bound.
    """
    # The hash of the undecoded rows shows whether anything has changed, without decoding the images.
    fingerprint = prepared.fingerprint(source, limit, undecoded)
    try:
        stored = prepared.read_facts(directory, name)
    except UserError:  # a damaged set is written again
        stored = None
    if stored is not None and stored["fingerprint"] == fingerprint:
        return {**stored, "unchanged": True}
    print(f"{name}: checking every image of {len(undecoded.examples)} rows, then writing", file=sys.stderr)
    records = read_rows(source, limit=limit, decode=True)
    facts = {"source": source, "limit": limit, "fingerprint": fingerprint}
    return {**prepared.write_set(directory, name, records, facts), "unchanged": False}


def _summary(name: str, report: JsonObject) -> str:
    """Returns one line about a prepared set: rows kept and dropped, images, and what is unusual about it."""
    dropped = ", ".join(f"{count} {reason}" for reason, count in report["dropped"].items())
    parts = [
        f"{name}: {report['kept']} of {report['read']} rows kept",
        f"{sum(report['dropped'].values())} dropped ({dropped})" if dropped else "none dropped",
        f"{report['images']} images, {report['image_bytes'] / 1e6:.1f} MB",
    ]
    for key, what in (("repeats", "repeated rows kept"), ("animated", "animated images (first frame used)")):
        if report[key]:
            parts.append(f"{report[key]} {what}")
    if report.get("too_long"):
        parts.append(f"{len(report['too_long'])} too long for the model, which runs leave out")
    if report.get("replaced_images"):
        images = report["replaced_images"]
        more = ", ..." if len(images) > 1 else ""
        parts.append(f"{len(images)} unusable images, for which others were drawn ({one_line(images[0])}{more})")
    return "; ".join(parts) + (" (unchanged)" if report["unchanged"] else "")
