"""Saves the state of a run with Orbax while the run continues, keeps the last few saves, and detects damaged ones."""

import contextlib
import json
import logging
import math
import shutil
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from icet_jax.errors import RESUMABLE, UserError
from icet_jax.files import JsonObject, parse_json, read_text, write_text_atomic
from icet_jax.parallel.distributed import barrier, gather, is_writer
from icet_jax.parallel.sharding import flatten_with_names
from icet_jax.typing import ArrayLike, PyTree

_LOG = logging.getLogger("icet_jax")
_STATE, _METADATA = "state", "metadata"
_MEASURED = "measured.json"  # file with the values that `measure` recorded for the saves


def saved_steps(directory: Path) -> list[int]:
    """Returns the steps of the complete saves in a directory of `RunState`, ascending, without opening it."""
    return sorted(int(path.name) for path in directory.glob("*") if path.name.isdecimal())


class RunState:
    """Manages the numbered checkpoints of one run in one directory.

        states = RunState(workdir / "checkpoints", keep=2)
        restored = states.restore(like=state)        # None on the first start
        states.save(step, state, {"any": "JSON"})    # returns as soon as `state` may be changed or donated
        states.wait()                                # returns when the last save is on disk, or raises its error
        states.measure(step, value)                  # later: records how good this state is

    A save is either complete or absent, even if the process is killed; older saves are deleted once a new one is
    complete. A checksum of each array is stored as well, because Orbax itself does not notice a changed byte. All
    processes of a run must call each method. A run with another number of processes can restore its saves.
    """

    def __init__(self, directory: str | Path, *, keep: int, keep_best: bool = False, keep_measured: bool = False):
        """Opens or creates `directory`.

        Args:
          directory: directory that only this run uses.
          keep: how many of the newest saves to keep; older ones are deleted.
          keep_best: whether the save with the highest recorded value (`measure`) is kept too.
          keep_measured: whether the newest save for which `measure` was called is kept too.

        Raises:
          UserError: the directory cannot be written to.
        """
        # Imported here because it takes seconds, and only runs that train need it.
        import orbax.checkpoint as ocp

        self._ocp = ocp
        self.directory = Path(directory).absolute()
        self._measured: dict[int, float | None] = {}
        self._keep, self._keep_best, self._keep_measured = keep, keep_best, keep_measured
        options = ocp.CheckpointManagerOptions(
            preservation_policy=_PreservationPolicy(self), enable_async_checkpointing=True, cleanup_tmp_directories=True
        )
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
            self._manager = ocp.CheckpointManager(self.directory, options=options)
        except OSError as error:
            raise UserError(
                f"{self.directory}: cannot be written ({error.strerror}); choose another workdir"
            ) from error
        self._measured = self._read_measured()

    @property
    def steps(self) -> list[int]:
        """The steps of all saves in ascending order, including one that is still being written."""
        return sorted(self._manager.all_steps())

    @property
    def best(self) -> int | None:
        """The step with the highest value recorded by `measure`, the first of several; None if none was recorded."""
        values = {step: value for step, value in self._measured.items() if value is not None}
        return max(sorted(values), key=values.__getitem__, default=None)

    @property
    def measured(self) -> dict[int, float | None]:
        """{step: value recorded by `measure`} of the existing saves; None if a save must not count as the best."""
        return dict(self._measured)

    def measure(self, step: int, value: float | None) -> None:
        """Records how good the state of a save is, which is known only after the state was saved.

        Args:
          step: step of the save.
          value: quality, higher is better (`keep_best`); None or NaN if this save must not count as the best.

        Raises:
          UserError: the value cannot be written.
        """
        self._measured[step] = None if value is None or math.isnan(value) else value
        self._write_measured()

    def save(self, step: int, state: PyTree, metadata: JsonObject) -> None:
        """Starts to write a save in the background; `wait` waits for its end.

        Args:
          step: number of the save, larger than those of all earlier saves.
          state: pytree of non-empty arrays and Python numbers; it may be donated as soon as this returns.
          metadata: JSON values that `restore` returns together with the state.

        Raises:
          UserError: this save or the one before it cannot be written, for example because the disk is full.
        """
        arrays = _leaves_by_name(state)
        content = json.dumps({"arrays": _describe_arrays(arrays), "user": metadata})
        sealed = {"content": content, "crc32": zlib.crc32(content.encode())}
        args = self._ocp.args
        with self._user_errors():
            self._manager.save(
                step, args=args.Composite(**{_STATE: args.StandardSave(arrays), _METADATA: args.JsonSave(sealed)})
            )

    def wait(self) -> None:
        """Waits until the last save is complete.

        Raises:
          UserError: the save could not be written; earlier saves are unchanged.
        """
        with self._user_errors():
            self._manager.wait_until_finished()

    def restore(self, like: PyTree, *, best: bool = False) -> tuple[int, PyTree, JsonObject] | None:
        """Returns the newest intact save; damaged saves that are newer are reported in the log and deleted.

        Args:
          like: pytree of the saved structure, whose leaves (arrays or `jax.ShapeDtypeStruct`s) have the requested
            shapes, dtypes and, optionally, shardings. Where `like` has a numpy array or a Python number, the result has
            one too.
          best: whether to return the save with the highest recorded value instead, if it exists and is intact.

        Returns:
          Step, state and metadata; None if there is no save.

        Raises:
          UserError: a save has another structure than `like`, or all saves are damaged.
        """
        self.wait()
        damaged: list[int] = []
        steps = sorted(self.steps, reverse=True)
        first = self.best if best else None
        for step in steps if first is None else [first, *steps]:
            if step in damaged:
                continue
            state_and_metadata = self._read_if_intact(step, like)
            if state_and_metadata is None:
                damaged.append(step)
                continue
            self._delete(damaged)
            return step, *state_and_metadata
        if damaged:
            raise UserError(
                f"{self.directory}: every checkpoint is damaged (steps {sorted(damaged)}); "
                "remove the directory to start the run again"
            )
        return None

    def array_names(self) -> set[str]:
        """Returns the names of the arrays in the newest save with readable metadata; empty if there is no such save."""
        self.wait()
        for step in reversed(self.steps):
            with contextlib.suppress(Exception):  # `restore` reports a damaged save
                return set(self._read_metadata(step)["arrays"])
        return set()

    def go_back(self, like: PyTree) -> tuple[int, PyTree, JsonObject] | None:
        """Returns to the newest save for which `measure` was called: deletes all later saves and restores it.

        If `measure` was called for no save, all saves are deleted and the result is None.

        Args:
          like: see `restore`.

        Raises:
          UserError: see `restore`; or the last save could not be written.
        """
        self.wait()
        last = max(self._measured, default=None)
        self._delete([step for step in self.steps if last is None or step > last])
        return self.restore(like)

    def _read_if_intact(self, step: int, like: PyTree) -> tuple[PyTree, JsonObject] | None:
        """Returns state and metadata of a save; None on all processes if one of them finds the save damaged."""
        error: Exception | None = None
        result = None
        try:
            metadata, named_like = self._read_metadata(step), _leaves_by_name(like)
            self._check_structure(step, metadata["arrays"], named_like)
            result = _unflatten(like, self._read_arrays(step, metadata["arrays"], named_like)), metadata["user"]
        except UserError:
            raise
        except Exception as caught:
            error = caught
        reasons = [reason for reason in gather(None if error is None else _summary(error)) if reason is not None]
        if reasons:
            _LOG.error(
                "CHECKPOINT OF STEP %d IS DAMAGED, falling back to the one before it: %s/%d (%s)",
                step, self.directory, step, reasons[0],
            )  # fmt: skip
        return None if reasons else result

    def _delete(self, steps: Sequence[int]) -> None:
        """Deletes the saves of these steps and their recorded values."""
        if not steps:
            return
        for step in steps:
            if is_writer():
                shutil.rmtree(self.directory / str(step), ignore_errors=True)
        if self._measured.keys() & set(steps):
            self._measured = {step: value for step, value in self._measured.items() if step not in steps}
            self._write_measured()
        barrier()
        self._manager.reload()

    def close(self) -> None:
        """Waits for a save that is being written and ends Orbax's threads; errors are ignored."""
        with contextlib.suppress(Exception):
            self._manager.close()

    @contextlib.contextmanager
    def _user_errors(self) -> Iterator[None]:
        """Returns a context that converts every exception of a block that saves into a `UserError`."""
        try:
            yield
        except Exception as error:  # of the file system, or of the libraries through which Orbax writes
            raise UserError(
                f"{self.directory}: a checkpoint cannot be saved ({_summary(error)}); those before it are kept: free "
                "space and start again",
                exit_code=RESUMABLE,
            ) from error

    def _read_measured(self) -> dict[int, float | None]:
        """Returns {step: value} of the existing saves, as recorded in the file by an earlier process.

        It is empty if the file does not exist or is damaged.
        """
        try:
            content = parse_json(read_text(self.directory / _MEASURED))
            values = {int(step): value for step, value in content.items()}
        except FileNotFoundError:
            return {}
        except (OSError, ValueError, AttributeError):
            _LOG.error("%s cannot be read: it is not known how good the checkpoints are", self.directory / _MEASURED)
            return {}
        return {step: values[step] for step in self.steps if step in values}

    def _write_measured(self) -> None:
        """Writes the recorded values of the existing saves to their file."""
        existing = set(self.steps)
        self._measured = {step: value for step, value in self._measured.items() if step in existing}
        write_text_atomic(self.directory / _MEASURED, json.dumps(self._measured) + "\n")

    def _read_metadata(self, step: int) -> JsonObject:
        """Returns the metadata of a save: {"arrays": {name: description}, "user": `metadata` of `save`}."""
        args = self._ocp.args
        sealed = self._manager.restore(step, args=args.Composite(**{_METADATA: args.JsonRestore()}))[_METADATA]
        if zlib.crc32(sealed["content"].encode()) != sealed["crc32"]:
            raise ValueError("the metadata does not have the checksum it was saved with")
        return json.loads(sealed["content"])

    def _check_structure(self, step: int, saved: JsonObject, requested: dict[str, Any]) -> None:
        """Raises a `UserError` unless the saved arrays have the names, shapes and dtypes of the requested ones."""
        problems = [f"{name} is missing" for name in requested if name not in saved]
        problems += [f"{name} is not part of this run" for name in saved if name not in requested]
        for name in requested.keys() & saved.keys():
            shape, dtype = list(requested[name].shape), str(requested[name].dtype)
            if (shape, dtype) != (saved[name]["shape"], saved[name]["dtype"]):
                problems.append(f"{name} is {saved[name]['dtype']} {saved[name]['shape']}, not {dtype} {shape}")
        if problems:
            raise UserError(
                f"{self.directory / str(step)}: belongs to a run with another config ({'; '.join(sorted(problems))}); "
                "choose another workdir"
            )

    def _read_arrays(self, step: int, saved: JsonObject, requested: dict[str, Any]) -> dict[str, ArrayLike]:
        """Returns the arrays of a save by name; raises a `ValueError` if one does not have its saved checksum."""
        args = self._ocp.args
        restored = self._manager.restore(step, args=args.Composite(**{_STATE: args.StandardRestore(requested)}))[_STATE]
        descriptions = _describe_arrays(restored)
        changed = [name for name in restored if saved[name]["checksum"] != descriptions[name]["checksum"]]
        if changed:
            raise ValueError(f"{changed[0]} does not have the checksum it was saved with")
        return restored


class _PreservationPolicy:
    """Decides for Orbax which saves to keep: the newest ones, the best, and the newest with a recorded value."""

    def __init__(self, states: RunState):
        self._states = states

    def should_preserve(self, checkpoints: Sequence[Any], *, context: Any) -> list[bool]:
        """Returns for each of `checkpoints`, which ascend, whether to keep it (Orbax's `PreservationPolicy`)."""
        steps_to_keep = {checkpoint.step for checkpoint in checkpoints[-self._states._keep :]}
        if self._states._keep_best:
            steps_to_keep.add(self._states.best)
        if self._states._keep_measured:
            steps_to_keep.add(max(self._states._measured, default=None))
        return [checkpoint.step in steps_to_keep for checkpoint in checkpoints]


def _summary(error: Exception) -> str:
    """Returns the type of an error and the first line of its message."""
    return f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0]}"


def _leaves_by_name(tree: PyTree) -> dict[str, Any]:
    """Returns the leaves by path, with Python numbers converted to numpy arrays.

    The parts of a path are separated by '.', because Orbax would create a folder for each '/'.
    """
    named = flatten_with_names(tree)
    return {
        name.replace("/", "."): np.asarray(leaf) if isinstance(leaf, bool | int | float) else leaf
        for name, leaf in named.items()
    }


def _describe_arrays(arrays: dict[str, ArrayLike]) -> dict[str, JsonObject]:
    """Returns shape, dtype and checksum of each array."""
    on_devices = {name: array for name, array in arrays.items() if isinstance(array, jax.Array)}
    on_host = {name: np.asarray(array) for name, array in arrays.items() if name not in on_devices}
    checksums = {name: int(_checksum(array, np)) for name, array in on_host.items()}
    checksums |= {name: int(checksum) for name, checksum in jax.device_get(_checksums(on_devices)).items()}
    return {
        name: {"shape": list(array.shape), "dtype": str(array.dtype), "checksum": checksums[name]}
        for name, array in arrays.items()
    }


@jax.jit
def _checksums(arrays: dict[str, jax.Array]) -> dict[str, jax.Array]:
    """Returns the checksum of each array. It is a sum of integers, so it does not depend on the array's sharding."""
    return {name: _checksum(array, jnp) for name, array in arrays.items()}


def _checksum(array: ArrayLike, xp: Any) -> Any:
    """Returns a uint32 checksum of an array's bits: a weighted sum that changes whenever a single element changes.

    Args:
      array: array of any shape.
      xp: module that computes it, numpy or jax.numpy.
    """
    bits, index, stride = _bits(array), xp.zeros((), np.uint32), 1  # `index`: position of each element, flattened
    for axis in reversed(range(bits.ndim)):
        offsets = xp.arange(bits.shape[axis], dtype=np.uint32) * np.uint32(stride % 2**32)
        index = index + offsets.reshape([-1 if other == axis else 1 for other in range(bits.ndim)])
        stride *= bits.shape[axis]
    # 2^32 / golden ratio spreads the weights of neighbouring elements; odd weights keep every change of a single one.
    odd_weights = index * np.uint32(2 * 0x9E3779B1 % 2**32) + np.uint32(1)
    return xp.sum((bits ^ index) * odd_weights, dtype=np.uint32)


def _bits(array: ArrayLike) -> ArrayLike:
    """Returns the bits of each element as one or more uint32."""
    size = array.dtype.itemsize
    if array.dtype == bool:
        return array.astype(np.uint32)
    if isinstance(array, np.ndarray):
        return np.atleast_1d(array).view(f"u{min(size, 4)}").astype(np.uint32)
    return jax.lax.bitcast_convert_type(array, f"uint{8 * size}").astype(np.uint32)


def _unflatten(like: PyTree, arrays: dict[str, ArrayLike]) -> PyTree:
    """Returns a pytree of the structure of `like`, with `arrays` (named as in `_leaves_by_name`) as its leaves."""
    leaves, structure = jax.tree.flatten(like)
    restored = (arrays[name] for name in _leaves_by_name(like))
    return jax.tree.unflatten(structure, [_convert(array, old) for old, array in zip(leaves, restored, strict=True)])


def _convert(array: ArrayLike, old: Any) -> Any:
    """Returns a restored `array` in the form of `old`, the leaf that it replaces.

    If `old` is a Python number, the result is one too. Otherwise it is an array on the same devices as `old`, and not
    committed to a device if `old` is not.
    """
    if isinstance(old, bool | int | float):
        return type(old)(array.item())
    if isinstance(old, jax.Array) and not old.committed:
        # Orbax commits restored arrays to a device; an uncommitted one follows the arrays that it is used with.
        return jnp.asarray(np.asarray(array))
    return array
