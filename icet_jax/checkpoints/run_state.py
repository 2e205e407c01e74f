"""The state of a run on disk (Orbax): saved while the run goes on, the last few kept, damage noticed at the restore."""

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
from icet_jax.files import parse_json, read_text, write_text_atomic
from icet_jax.parallel.distributed import gather, is_writer, together
from icet_jax.parallel.sharding import flatten_with_names

_LOG = logging.getLogger("icet_jax")
_STATE, _METADATA = "state", "metadata"
_MEASURED = "measured.json"  # beside the saves: what `measure` was told of each


class RunState:
    """Numbered checkpoints of one run in one directory.

        states = RunState(workdir / "checkpoints", keep=2)
        restored = states.restore(like=state)        # None on the first start
        states.save(step, state, {"any": "JSON"})    # returns as soon as `state` may be changed or donated
        states.wait()                                # now the last save is on disk, or its error is raised
        states.measure(step, value)                  # later: how good this state was found to be

    A save is complete or absent, whenever the process is killed; older ones are deleted once it is complete. Each
    array's checksum is stored with it, since Orbax itself does not notice a changed byte. Several processes call all of
    this together, and may be more or fewer at the restore.
    """

    def __init__(self, directory: str | Path, *, keep: int, keep_best: bool = False, keep_measured: bool = False):
        """Opens (or makes) `directory`; saves beyond the newest `keep` are deleted.

        Args:
          directory: of this run alone.
          keep: how many of the newest are kept.
          keep_best: whether the save of the highest value is kept beside them (`measure`).
          keep_measured: whether the newest save that was measured is kept beside them.

        Raises:
          UserError: the directory cannot be written to.
        """
        # Orbax takes seconds to import, and only runs that train need it.
        import orbax.checkpoint as ocp

        self._ocp = ocp
        self.directory = Path(directory).absolute()
        self._measured: dict[int, float | None] = {}
        self._keep, self._keep_best, self._keep_measured = keep, keep_best, keep_measured
        options = ocp.CheckpointManagerOptions(
            preservation_policy=_Kept(self), enable_async_checkpointing=True, cleanup_tmp_directories=True
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
        """Steps of the complete saves, and of one that is being written, ascending."""
        return sorted(self._manager.all_steps())

    @property
    def best(self) -> int | None:
        """The step of the highest value (of equal ones the first); None where no save has one."""
        values = {step: value for step, value in self._measured.items() if value is not None}
        return max(sorted(values), key=values.__getitem__, default=None)

    @property
    def measured(self) -> dict[int, float | None]:
        """What `measure` was told, by step, of the saves that are there."""
        return dict(self._measured)

    def measure(self, step: int, value: float | None) -> None:
        """Notes that the state of a save was measured: the numbers about it are known later than it is saved.

        Args:
          step: of the save.
          value: how good it is, higher is better (`keep_best`); None or NaN: it does not compete.

        Raises:
          UserError: it cannot be written.
        """
        self._measured[step] = None if value is None or math.isnan(value) else value
        self._write_measured()

    def save(self, step: int, state: Any, metadata: dict[str, Any]) -> None:
        """Begins to save a pytree of non-empty arrays and Python numbers, and a JSON-able dict; see `wait`.

        Args:
          step: beyond those that are saved.
          state: may be donated when this returns.
          metadata: comes back with it.

        Raises:
          UserError: this or the last save cannot be written, for example because the disk is full.
        """
        arrays = _named(state)
        described = json.dumps({"arrays": _described(arrays), "user": metadata})
        sealed = {"content": described, "crc32": zlib.crc32(described.encode())}
        args = self._ocp.args
        with self._named_errors():
            self._manager.save(
                step,
                args=args.Composite(
                    **{_STATE: args.StandardSave(arrays), _METADATA: args.JsonSave(sealed)},
                ),
            )

    def wait(self) -> None:
        """Returns when the last save is complete.

        Raises:
          UserError: it could not be written; those before it are as they were.
        """
        with self._named_errors():
            self._manager.wait_until_finished()

    def restore(self, like: Any, *, best: bool = False) -> tuple[int, Any, dict[str, Any]] | None:
        """The newest save that is intact; damaged newer ones are reported in the log and deleted.

        Args:
          like: pytree of the saved structure; arrays or `jax.ShapeDtypeStruct`s with the shapes, dtypes and (where
            given) shardings wanted. Numpy arrays and Python numbers come back as such.
          best: the one of the highest value instead, if there is one and it is intact.

        Returns:
          Step, state and metadata, or None if nothing was ever saved.

        Raises:
          UserError: a save is of another structure, or all are damaged.
        """
        self.wait()
        damaged: list[int] = []
        steps = sorted(self.steps, reverse=True)
        first = self.best if best else None
        for step in steps if first is None else [first, *steps]:
            if step in damaged:
                continue
            found = self._intact(step, like)
            if found is None:
                damaged.append(step)
                continue
            self._delete(damaged)
            return step, *found
        if damaged:
            raise UserError(
                f"{self.directory}: every checkpoint is damaged (steps {sorted(damaged)}); "
                "remove the directory to start the run again"
            )
        return None

    def array_names(self) -> set[str]:
        """Names of the arrays of the newest save whose metadata can be read; none where there is no such save."""
        self.wait()
        for step in reversed(self.steps):
            with contextlib.suppress(Exception):  # a damaged save is named when it is restored
                return set(self._read_metadata(step)["arrays"])
        return set()

    def go_back(self, like: Any) -> tuple[int, Any, dict[str, Any]] | None:
        """`restore` of the newest save that was measured; those after it are deleted, and None is given without one.

        Args:
          like: see `restore`.

        Raises:
          UserError: as `restore`, or the last save could not be written.
        """
        self.wait()
        last = max(self._measured, default=None)
        self._delete([step for step in self.steps if last is None or step > last])
        return self.restore(like)

    def _intact(self, step: int, like: Any) -> tuple[Any, dict[str, Any]] | None:
        """State and metadata of a save; None where any process finds it damaged."""
        error: Exception | None = None
        result = None
        try:
            found, wanted = self._read_metadata(step), _named(like)
            self._check(step, found["arrays"], wanted)
            result = _rebuild(like, self._read_arrays(step, found["arrays"], wanted)), found["user"]
        except UserError:
            raise
        except Exception as caught:
            error = caught
        reasons = [reason for reason in gather(_reason(error)) if reason is not None]
        if reasons:
            _LOG.error(
                "CHECKPOINT OF STEP %d IS DAMAGED, falling back to the one before it: %s/%d (%s)",
                step, self.directory, step, reasons[0],
            )  # fmt: skip
        return None if reasons else result

    def _delete(self, steps: Sequence[int]) -> None:
        if not steps:
            return
        for step in steps:
            if is_writer():
                shutil.rmtree(self.directory / str(step), ignore_errors=True)
        if self._measured.keys() & set(steps):
            self._measured = {step: value for step, value in self._measured.items() if step not in steps}
            self._write_measured()
        together()
        self._manager.reload()

    def close(self) -> None:
        """Waits for a save that is being written, and releases Orbax's threads; an error is not raised any more."""
        with contextlib.suppress(Exception):
            self._manager.close()

    @contextlib.contextmanager
    def _named_errors(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # the file system's, or those of the libraries that Orbax writes through
            raise UserError(
                f"{self.directory}: a checkpoint cannot be saved ({_reason(error)}); those before it are kept: free "
                "space and start again",
                exit_code=RESUMABLE,
            ) from error

    def _read_measured(self) -> dict[int, float | None]:
        """What an earlier process was told; nothing where none was, as before there was such a file."""
        try:
            found = parse_json(read_text(self.directory / _MEASURED))
            told = {int(step): value for step, value in found.items()}
        except FileNotFoundError:
            return {}
        except (OSError, ValueError, AttributeError):
            _LOG.error("%s cannot be read: it is not known how good the checkpoints are", self.directory / _MEASURED)
            return {}
        return {step: told[step] for step in self.steps if step in told}

    def _write_measured(self) -> None:
        there = set(self.steps)
        self._measured = {step: value for step, value in self._measured.items() if step in there}
        write_text_atomic(self.directory / _MEASURED, json.dumps(self._measured) + "\n")

    def _read_metadata(self, step: int) -> dict[str, Any]:
        """Descriptions of the saved arrays, and the caller's metadata."""
        args = self._ocp.args
        sealed = self._manager.restore(step, args=args.Composite(**{_METADATA: args.JsonRestore()}))[_METADATA]
        if zlib.crc32(sealed["content"].encode()) != sealed["crc32"]:
            raise ValueError("the metadata does not have the checksum it was saved with")
        return json.loads(sealed["content"])

    def _check(self, step: int, saved: dict[str, Any], wanted: dict[str, Any]) -> None:
        problems = [f"{name} is missing" for name in wanted if name not in saved]
        problems += [f"{name} is not part of this run" for name in saved if name not in wanted]
        for name in wanted.keys() & saved.keys():
            shape, dtype = list(wanted[name].shape), str(wanted[name].dtype)
            if (shape, dtype) != (saved[name]["shape"], saved[name]["dtype"]):
                problems.append(f"{name} is {saved[name]['dtype']} {saved[name]['shape']}, not {dtype} {shape}")
        if problems:
            raise UserError(
                f"{self.directory / str(step)}: belongs to a run with another config ({'; '.join(sorted(problems))}); "
                "choose another workdir"
            )

    def _read_arrays(self, step: int, saved: dict[str, Any], wanted: dict[str, Any]) -> dict[str, Any]:
        args = self._ocp.args
        restored = self._manager.restore(step, args=args.Composite(**{_STATE: args.StandardRestore(wanted)}))[_STATE]
        found = _described(restored)
        changed = [name for name in restored if saved[name]["checksum"] != found[name]["checksum"]]
        if changed:
            raise ValueError(f"{changed[0]} does not have the checksum it was saved with")
        return restored


class _Kept:
    """Orbax's rule of what stays: the newest, the best, and the newest that was measured."""

    def __init__(self, states: RunState):
        self._states = states

    def should_preserve(self, checkpoints: Sequence[Any], *, context: Any) -> list[bool]:
        """See Orbax's `PreservationPolicy`; `checkpoints` are ascending."""
        kept = {checkpoint.step for checkpoint in checkpoints[-self._states._keep :]}
        if self._states._keep_best:
            kept.add(self._states.best)
        if self._states._keep_measured:
            kept.add(max(self._states._measured, default=None))
        return [checkpoint.step in kept for checkpoint in checkpoints]


def _reason(error: Exception | None) -> str | None:
    if error is None:
        return None
    return f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0]}"


def _named(tree: Any) -> dict[str, Any]:
    """Leaves by path with '.' between the parts (Orbax makes folders of '/'); Python numbers become numpy's."""
    named = flatten_with_names(tree)
    return {
        name.replace("/", "."): np.asarray(leaf) if isinstance(leaf, bool | int | float) else leaf
        for name, leaf in named.items()
    }


def _described(arrays: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Shape, dtype and checksum of each array."""
    on_devices = {name: array for name, array in arrays.items() if isinstance(array, jax.Array)}
    sums = {name: int(_checksum(np.asarray(array), np)) for name, array in arrays.items() if name not in on_devices}
    sums |= {name: int(found) for name, found in jax.device_get(_checksums(on_devices)).items()}
    return {
        name: {"shape": list(array.shape), "dtype": str(array.dtype), "checksum": sums[name]}
        for name, array in arrays.items()
    }


@jax.jit
def _checksums(arrays: dict[str, Any]) -> dict[str, Any]:
    """Of arrays wherever they lie: whole numbers, so that the split over devices does not matter."""
    return {name: _checksum(array, jnp) for name, array in arrays.items()}


def _checksum(array: Any, xp: Any) -> Any:
    """uint32 of an array's bits: a weighted sum that any single changed element changes."""
    bits, place, stride = _bits(array), xp.zeros((), np.uint32), 1
    for axis in reversed(range(bits.ndim)):
        steps = xp.arange(bits.shape[axis], dtype=np.uint32) * np.uint32(stride % 2**32)
        place = place + steps.reshape([-1 if other == axis else 1 for other in range(bits.ndim)])
        stride *= bits.shape[axis]
    odd = place * np.uint32(2 * 0x9E3779B1 % 2**32) + np.uint32(1)
    return xp.sum((bits ^ place) * odd, dtype=np.uint32)


def _bits(array: Any) -> Any:
    """The bits as uint32, as many of them as the element has."""
    size = array.dtype.itemsize
    if array.dtype == bool:
        return array.astype(np.uint32)
    if isinstance(array, np.ndarray):
        return np.atleast_1d(array).view(f"u{min(size, 4)}").astype(np.uint32)
    return jax.lax.bitcast_convert_type(array, f"uint{8 * size}").astype(np.uint32)


def _rebuild(like: Any, arrays: dict[str, Any]) -> Any:
    leaves, structure = jax.tree.flatten(like)
    restored = (arrays[name] for name in _named(like))
    return jax.tree.unflatten(structure, [_as(old, array) for old, array in zip(leaves, restored, strict=True)])


def _as(old: Any, array: Any) -> Any:
    """`array` in the form of the leaf that it replaces."""
    if isinstance(old, bool | int | float):
        return type(old)(array.item())
    if isinstance(old, jax.Array) and not old.committed:
        # Orbax pins what it restores to a device; this one has to follow the arrays it is used with.
        return jnp.asarray(np.asarray(array))
    return array
