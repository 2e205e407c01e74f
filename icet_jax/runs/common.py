"""What every run that measures starts with: the model, its judges and its rows, all loaded before anything is done."""

import contextlib
import copy
import json
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from icet_jax import report
from icet_jax.checkpoints.source import local_directory
from icet_jax.config import check_exits
from icet_jax.data.records import Example
from icet_jax.errors import UserError, during
from icet_jax.files import write_text_atomic
from icet_jax.parallel.distributed import is_writer, on_first
from icet_jax.parallel.mesh import visible_mesh, visible_shape
from icet_jax.parallel.mesh_fit import check_heads, slices
from icet_jax.runs import fingerprints, loading, run_dir, run_lock, sources
from icet_jax.runs.scorers import ScorerLoader
from icet_jax.runs.sources import TRAIN
from icet_jax.runs.too_long import REASON, fitting_rows
from icet_jax.scorers.base import Scorer
from icet_jax.vlm import VLM

_LISTED = 100  # rows of a set that data.json names as too long
_SEEN_SECONDS = 60  # after which a network's file system shows every machine a new file


@dataclass(frozen=True, eq=False)
class Setting:
    """What a run works with.

    Attributes:
      vlm: the model before training.
      scorers: judges of the sweeps, in the config's order.
      utility_scorers: judges of the utility rows.
      tests: rows by data set, those of `config.sweep.datasets` and `config.sweep.utility`.
      train: rows of `config.data.train`; none where nothing is trained.
    """

    vlm: VLM
    scorers: list[Scorer]
    utility_scorers: list[Scorer]
    tests: dict[str, list[Example]]
    train: list[Example]


Rows = tuple[list[Example], dict[str, int]]
"""The rows of a data set, and {reason: rows left out for it}."""


def load_setting(config: ConfigDict, workdir: Path, *, training: bool = False) -> Setting:
    """Loads model, judges and rows, checks the exits that the config names, and writes data.json and fingerprints.json.

    Raises:
      UserError: anything that is missing, broken or does not fit (a mesh that does not fit the devices first), and rows
        or weights that are not those that the run in `workdir` began with.
    """
    data, fsdp, _ = visible_shape(**config.mesh)
    # Rows first: what is wrong with them is known before weights are fetched and read.
    named = {**config.sweep.datasets, **config.sweep.utility}
    tests = {name: _load_rows(config, source, name, workdir, config.sweep.limit) for name, source in named.items()}
    train = train_rows(config, workdir) if training else None
    loaded = {name: found for name, (found, _) in tests.items()}
    fingerprints.check_rows(workdir, loaded if train is None else {TRAIN: train[0], **loaded})
    _write_data_facts(workdir, tests, train, {})
    if training and data * fsdp > 1:
        slices(config, data * fsdp)
    vlm = load_model(config, workdir)
    check_exits(config, vlm.num_exits)
    tests, train, too_long = _fitting(config, vlm, tests, train)
    if too_long:
        _write_data_facts(workdir, tests, train, too_long)
    facts = sources.organism_facts(str(vlm.directory))
    if facts is not None:
        write_text_atomic(workdir / "organism.json", json.dumps(facts, indent=1) + "\n")
    load = ScorerLoader(config, workdir, vlm.mesh)
    judges = load.judges(config.sweep.scorers)
    utility_judges = load.judges(config.sweep.utility_scorers) or judges
    rows = {name: found for name, (found, _) in tests.items()}
    return Setting(vlm, judges, utility_judges, rows, train[0] if train else [])


@during("loading the model")
def load_model(config: ConfigDict, workdir: Path, *, record: bool = True) -> VLM:
    """The model that `config.model` names, with its start adapter, over all devices if there are several.

    Args:
      config: of the run.
      workdir: its run directory.
      record: whether a run directory without fingerprints of the model's files gets them.

    Raises:
      UserError: no such checkpoint or adapter, broken files, files that are not those that the run in `workdir` began
        with, a mesh that does not fit the devices, or heads that do not divide over it.
    """
    model, mesh = config.model, visible_mesh(**config.mesh)
    directory = local_directory(sources.checkpoint_directory(model.checkpoint, workdir), model.revision)
    adapter = None if model.adapter is None else local_directory(model.adapter)
    fingerprints.check_checkpoint(workdir, {"model": directory, "adapter": adapter}, record=record)
    vlm = _load(config, directory, adapter, mesh)
    if vlm.mesh is not None:
        check_heads(vlm.mesh.shape["tensor"], vlm.config)
    return vlm


@during("loading the exported model")
def load_exported(config: ConfigDict, vlm: VLM, folder: Path, *, is_adapter: bool) -> VLM:
    """The model in a run's export, as the run's own config reads a model.

    Args:
      config: of the run.
      vlm: what was exported; its weights are not looked at.
      folder: of the export.
      is_adapter: whether it is a PEFT adapter, which is merged into the base model of the run.

    Raises:
      UserError: missing or broken files.
    """
    directory, adapter = (vlm.directory, folder) if is_adapter else (folder, None)
    return _load(config, directory, adapter, vlm.mesh)


def _load(config: ConfigDict, directory: Path, adapter: Path | None, mesh: Any) -> VLM:
    model = config.model
    return loading.load(
        directory,
        dtype=model.dtype,
        mesh=mesh,
        remat=model.remat,
        adapter=adapter,
        exit_rule=model.exit_rule,
        capture=model.intermediate_capture,
        template=config.data.template,
    )


def train_rows(config: ConfigDict, workdir: Path) -> Rows:
    """The rows of `config.data.train`, whatever their lengths.

    Raises:
      UserError: no such source, or a file without a usable row.
    """
    return _load_rows(config, config.data.train, TRAIN, workdir)


def _load_rows(config: ConfigDict, source: str, name: str, workdir: Path, limit: int | None = None) -> Rows:
    """The rows of one of the config's data sets, as `config.data` says where they are."""
    data = config.data
    where = {"root": data.root, "image_root": data.image_root, "directory": data.directory}
    return sources.load_set(source, name=name, limit=limit, workdir=workdir, **where)


def _fitting(
    config: ConfigDict, vlm: VLM, tests: dict[str, Rows], train: Rows | None
) -> tuple[dict[str, Rows], Rows | None, dict[str, dict[str, int]]]:
    """The rows of each set that fit, with those that do not among the ones left out, and {set: {id: positions}}."""
    named = {**config.sweep.datasets, **config.sweep.utility}
    too_long: dict[str, dict[str, int]] = {}

    def fitting(name: str, source: str, rows: Rows, *, training: bool = False) -> Rows:
        examples, left_out = rows
        kept, long = fitting_rows(config, vlm.processor, vlm.max_positions, source, name, examples, training=training)
        if long:
            too_long[name] = long
        return kept, left_out | ({REASON: len(long)} if long else {})

    if train is not None:
        train = fitting(TRAIN, config.data.train, train, training=True)
    return {name: fitting(name, named[name], rows) for name, rows in tests.items()}, train, too_long


def _write_data_facts(
    workdir: Path, tests: dict[str, Rows], train: Rows | None, too_long: dict[str, dict[str, int]]
) -> None:
    """`data.json`: rows by set and kind, rows left out by reason, those too long, prompts shared with the training."""
    sets = tests if train is None else {TRAIN: train, **tests}
    content: dict[str, Any] = {
        "rows": {name: dict(Counter(row.kind for row in rows)) for name, (rows, _) in sets.items()},
        "left_out": {name: reasons for name, (_, reasons) in sets.items() if reasons},
    }
    if too_long:
        content["too_long"] = {name: dict(islice(rows.items(), _LISTED)) for name, rows in too_long.items()}
    if train is not None:
        rows = {name: found for name, (found, _) in tests.items()}
        content["prompts_shared_with_train"] = sources.report_overlap(train[0], rows)
    write_text_atomic(workdir / "data.json", json.dumps(content, indent=1, sort_keys=True) + "\n")


def for_each_seed(config: ConfigDict, workdir: Path, run: Callable[[ConfigDict, Path], None]) -> None:
    """Runs once in `workdir`, or once per seed of `config.seeds` under workdir/seed_K, then writes the report.

    Raises:
      UserError: the folder cannot be written to or is another config's; whatever a run raises.
    """
    with claimed(workdir, config):
        for seed in config.seeds:
            single = copy.deepcopy(config).unlock()
            single.seed, single.seeds = seed, ()
            folder = workdir / f"seed_{seed}"
            print(f"seed {seed}: {folder}", file=sys.stderr)
            with claimed(folder, single.lock()):
                run(single, folder)
        if not config.seeds:
            run(config, workdir)
        elif is_writer():
            page = report.build(workdir, reveal_unsafe=config.sweep.reveal_unsafe)
            print(f"report over {len(config.seeds)} seeds: {page}")


@contextlib.contextmanager
def claimed(workdir: Path, config: ConfigDict) -> Iterator[None]:
    """Makes `workdir` the run directory of `config`, which no other run writes into until the block ends.

    The first process calls `run_lock.locked` and `run_dir.claim`, for all processes of the run.

    Raises:
      UserError: see there; or another process does not see what the first one wrote.
    """
    with contextlib.ExitStack() as around:

        def begin() -> None:
            around.enter_context(run_lock.locked(workdir))
            run_dir.claim(workdir, config)

        on_first(begin)
        _wait_for_config(workdir)
        yield


def _wait_for_config(workdir: Path) -> None:
    """Returns when this process sees the config.json that the first one wrote."""
    limit = time.monotonic() + _SEEN_SECONDS
    while not (workdir / "config.json").is_file():
        if time.monotonic() > limit:
            raise UserError(f"--workdir={workdir}: is not what process 0 sees; give a folder that all machines share")
        time.sleep(0.1)


def model_name(config: ConfigDict) -> str:
    """How reports call the model: the last part of its path, or its organism or toy name."""
    spec: str = config.model.checkpoint
    return spec if ":" in spec else Path(spec).name or spec
