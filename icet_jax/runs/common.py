"""Loads what a run needs before any work starts: the model, its judges and its rows; and claims its run directory."""

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

from jax.sharding import Mesh
from ml_collections import ConfigDict

from icet_jax import report
from icet_jax.checkpoints.source import local_directory
from icet_jax.config import check_exits
from icet_jax.data.records import Example
from icet_jax.errors import UserError, during
from icet_jax.files import JsonObject, write_text_atomic
from icet_jax.parallel.distributed import is_writer, on_first
from icet_jax.parallel.mesh import visible_mesh, visible_shape
from icet_jax.parallel.mesh_fit import check_heads, slices
from icet_jax.runs import fingerprints, loading, provenance, run_dir, run_lock, sources
from icet_jax.runs.scorers import ScorerLoader
from icet_jax.runs.sources import TRAIN, LoadedRows
from icet_jax.runs.too_long import REASON, fitting_rows
from icet_jax.scorers.base import Scorer
from icet_jax.vlm import VLM

_LISTED = 100  # most rows of a set that data.json lists as too long
_VISIBLE_SECONDS = 60  # a network file system shows a new file to every machine within this time


@dataclass(frozen=True, eq=False)
class RunInputs:
    """Holds the model, the judges and the rows of a run.

    Attributes:
      vlm: the model before training.
      scorers: judges of `config.sweep.datasets`, in the order of the config.
      utility_scorers: judges of `config.sweep.utility`.
      tests: {name of a data set in `config.sweep.datasets` or `config.sweep.utility`: its rows}.
      train: rows of `config.data.train`; empty if nothing is trained.
    """

    vlm: VLM
    scorers: list[Scorer]
    utility_scorers: list[Scorer]
    tests: dict[str, list[Example]]
    train: list[Example]


def load_inputs(config: ConfigDict, workdir: Path, *, training: bool = False) -> RunInputs:
    """Loads model, judges and rows, checks the exits in the config, and writes data.json and fingerprints.json.

    Args:
      config: config of the run.
      workdir: run directory.
      training: whether the run trains and therefore needs the rows of `config.data.train`.

    Raises:
      UserError: something is missing, broken or does not fit (the mesh is checked first), or rows or weights differ
        from those that the run in `workdir` started with.
    """
    data, fsdp, _ = visible_shape(**config.mesh)
    # Rows first, so that their errors are found before weights are downloaded and read.
    sources_by_name = {**config.sweep.datasets, **config.sweep.utility}
    tests = {
        name: _load_rows(config, source, name, workdir, config.sweep.limit) for name, source in sources_by_name.items()
    }
    train = train_rows(config, workdir) if training else None
    all_sets = tests if train is None else {TRAIN: train, **tests}
    fingerprints.check_rows(workdir, {name: rows.examples for name, rows in all_sets.items()})
    _write_data_facts(workdir, tests, train, {})
    if training and data * fsdp > 1:
        slices(config, data * fsdp)
    vlm = load_model(config, workdir)
    check_exits(config, vlm.num_exits)
    tests, train, too_long = _drop_too_long(config, vlm, tests, train)
    if too_long:
        _write_data_facts(workdir, tests, train, too_long)
    facts = sources.organism_facts(str(vlm.directory))
    if facts is not None:
        write_text_atomic(workdir / "organism.json", json.dumps(facts, indent=1) + "\n")
    load = ScorerLoader(config, workdir, vlm.mesh)
    judges = load.judges(config.sweep.scorers)
    utility_judges = load.judges(config.sweep.utility_scorers) or judges
    test_rows = {name: rows.examples for name, rows in tests.items()}
    return RunInputs(vlm, judges, utility_judges, test_rows, train.examples if train else [])


@during("loading the model")
def load_model(config: ConfigDict, workdir: Path, *, record: bool = True) -> VLM:
    """Loads the model of `config.model`, with the start adapter (if any) merged into its weights, split over all
    devices.

    Args:
      config: config of the run.
      workdir: run directory.
      record: whether to record the hashes of the model's files in fingerprints.json, if they are not recorded yet.

    Raises:
      UserError: the checkpoint or adapter does not exist or is broken, its files differ from those that the run in
        `workdir` started with, or the mesh does not fit the devices or the number of heads.
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
    """Loads the model from the files of a run's export, with the dtype, mesh and exit definition of the run.

    Args:
      config: config of the run.
      vlm: the model that was exported; only its folder and mesh are used.
      folder: folder of the export.
      is_adapter: whether the export is a PEFT adapter, which is merged into the run's base model.

    Raises:
      UserError: files are missing or broken.
    """
    directory, adapter = (vlm.directory, folder) if is_adapter else (folder, None)
    return _load(config, directory, adapter, vlm.mesh)


def _load(config: ConfigDict, directory: Path, adapter: Path | None, mesh: Mesh | None) -> VLM:
    """Loads the model in `directory` as `config.model` says."""
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


def train_rows(config: ConfigDict, workdir: Path) -> LoadedRows:
    """Returns the rows of `config.data.train`, including those whose prompts are too long for the model.

    Raises:
      UserError: the source does not exist, or a file has no usable row.
    """
    return _load_rows(config, config.data.train, TRAIN, workdir)


def _load_rows(config: ConfigDict, source: str, name: str, workdir: Path, limit: int | None = None) -> LoadedRows:
    """Returns the rows of one data set of the config, searched for in the folders that `config.data` names."""
    data = config.data
    where = {"root": data.root, "image_root": data.image_root, "directory": data.directory}
    return sources.load_set(source, name=name, limit=limit, workdir=workdir, **where)


def _drop_too_long(
    config: ConfigDict, vlm: VLM, tests: dict[str, LoadedRows], train: LoadedRows | None
) -> tuple[dict[str, LoadedRows], LoadedRows | None, dict[str, dict[str, int]]]:
    """Removes the rows whose prompts are too long for the model.

    Returns:
      `tests` and `train` without these rows, and {set: {row id: positions of its prompt}} of the rows left out.
    """
    sources_by_name = {**config.sweep.datasets, **config.sweep.utility}
    too_long: dict[str, dict[str, int]] = {}

    def drop(name: str, source: str, rows: LoadedRows, *, training: bool = False) -> LoadedRows:
        """Returns the rows of the set `name` that fit, and records the others in `too_long`."""
        fitting, lengths = fitting_rows(
            config, vlm.processor, vlm.max_positions, source, name, rows.examples, training=training
        )
        if lengths:
            too_long[name] = lengths
        return LoadedRows(fitting, rows.left_out | ({REASON: len(lengths)} if lengths else {}))

    if train is not None:
        train = drop(TRAIN, config.data.train, train, training=True)
    return {name: drop(name, sources_by_name[name], rows) for name, rows in tests.items()}, train, too_long


def _write_data_facts(
    workdir: Path, tests: dict[str, LoadedRows], train: LoadedRows | None, too_long: dict[str, dict[str, int]]
) -> None:
    """Writes `data.json`, which describes the rows of the run.

    It has the number of rows by set and kind, the number of rows left out by reason, the rows that are too long, and
    the number of test prompts that are also training prompts.
    """
    sets = tests if train is None else {TRAIN: train, **tests}
    content: JsonObject = {
        "rows": {name: dict(Counter(row.kind for row in rows.examples)) for name, rows in sets.items()},
        "left_out": {name: rows.left_out for name, rows in sets.items() if rows.left_out},
    }
    if too_long:
        content["too_long"] = {name: dict(islice(lengths.items(), _LISTED)) for name, lengths in too_long.items()}
    if train is not None:
        test_rows = {name: rows.examples for name, rows in tests.items()}
        content["prompts_shared_with_train"] = sources.report_overlap(train.examples, test_rows)
    write_text_atomic(workdir / "data.json", json.dumps(content, indent=1, sort_keys=True) + "\n")


def for_each_seed(config: ConfigDict, workdir: Path, run: Callable[[ConfigDict, Path], None]) -> None:
    """Calls `run` once if `config.seeds` is empty; else once per seed, and then writes the report over all seeds.

    Args:
      config: config of the run.
      workdir: run directory; each seed has the run directory `workdir`/seed_K.
      run: function of (config of one seed, its run directory) that does the work.

    Raises:
      UserError: the folder cannot be written to or belongs to another config, or `run` raises a `UserError`.
    """
    with claimed(workdir, config):
        for seed in config.seeds:
            seed_config = copy.deepcopy(config).unlock()
            seed_config.seed, seed_config.seeds = seed, ()
            folder = workdir / f"seed_{seed}"
            print(f"seed {seed}: {folder}", file=sys.stderr)
            with claimed(folder, seed_config.lock()):
                run(seed_config, folder)
        if not config.seeds:
            run(config, workdir)
        elif is_writer():
            page = report.build(workdir, reveal_unsafe=config.sweep.reveal_unsafe)
            print(f"report over {len(config.seeds)} seeds: {page}")


@contextlib.contextmanager
def claimed(workdir: Path, config: ConfigDict) -> Iterator[None]:
    """Makes `workdir` the run directory of `config`, and keeps other runs from writing there until the block ends.

    The first process calls `run_lock.locked`, `run_dir.claim` and `provenance.record_start` for all processes of the
    run.

    Raises:
      UserError: see those functions; or a process does not see the files that the first process wrote.
    """
    with contextlib.ExitStack() as stack:

        def begin() -> None:
            stack.enter_context(run_lock.locked(workdir))
            run_dir.claim(workdir, config)
            provenance.record_start(workdir)

        on_first(begin)
        _wait_for_config(workdir)
        yield


def _wait_for_config(workdir: Path) -> None:
    """Waits until this process sees the config.json that the first process wrote.

    Raises:
      UserError: the file does not appear within `_VISIBLE_SECONDS`.
    """
    limit = time.monotonic() + _VISIBLE_SECONDS
    while not (workdir / "config.json").is_file():
        if time.monotonic() > limit:
            raise UserError(f"--workdir={workdir}: is not what process 0 sees; give a folder that all machines share")
        time.sleep(0.1)


def model_name(config: ConfigDict) -> str:
    """Returns the model's name in reports: the last part of its path, or its organism or toy name."""
    spec: str = config.model.checkpoint
    return spec if ":" in spec else Path(spec).name or spec
