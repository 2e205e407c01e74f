"""Saves the state of a run with Orbax while the run continues, keeps the last few, and detects damage when
restoring."""

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
_MEASURED = "measured.json"  # file of the values that `measure` recorded for the saves


class RunState:
    """Manages the numbered checkpoints of one run in one directory.

        states = RunState(workdir / "checkpoints", keep=2)
        restored = states.restore(like=state)        # None on the first start
        states.save(step, state, {"any": "JSON"})    # returns as soon as `state` may be changed or donated
        states.wait()                                # now the last save is on disk, or its error is raised
        states.measure(step, value)                  # later: the measured quality of this state

    A save is complete or absent, whenever the process is killed; older ones are deleted once it is complete. Each
    array's checksum is stored with it, because Orbax itself does not notice a changed byte. Several processes call all
    methods together, and their number may differ when restoring.
    """

    def __init__(self, directory: str | Path, *, keep: int, keep_best: bool = False, keep_measured: bool = False):
        """Opens or creates `directory`; saves beyond the newest `keep` are deleted.

        Args:
          directory: directory that only this run uses.
          keep: number of the newest saves to keep.
          keep_best: whether the save with the highest value is kept too (`measure`).
          keep_measured: whether the newest measured save is kept too.

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
        """Returns the steps of the complete saves, and of one that is being written, in ascending order."""
        return sorted(self._manager.all_steps())

    @property
    def best(self) -> int | None:
        """Returns the step with the highest value (the first of equal ones); None if no save has a value."""
        values = {step: value for step, value in self._measured.items() if value is not None}
        return max(sorted(values), key=values.__getitem__, default=None)

    @property
    def measured(self) -> dict[int, float | None]:
        """Returns the values that `measure` recorded, by step, for the existing saves."""
        return dict(self._measured)

    def measure(self, step: int, value: float | None) -> None:
        """Records that the state of a save was measured, because its numbers are known only after it is saved.

        Args:
          step: step of the save.
          value: quality of the state, higher is better (`keep_best`); None or NaN if it cannot be the best.

        Raises:
          UserError: the value cannot be written.
        """
        self._measured[step] = None if value is None or math.isnan(value) else value
        self._write_measured()

    def save(self, step: int, state: Any, metadata: dict[str, Any]) -> None:
        """Starts to save a pytree of non-empty arrays and Python numbers, and a dict of JSON values; see `wait`.

        Args:
          step: larger than the saved steps.
          state: may be donated when this returns.
          metadata: dict that `restore` returns.

        Raises:
          UserError: this or the last save cannot be written, for example because the disk is full.
        """
        arrays = _leaves_by_name(state)
        content = json.dumps({"arrays": _describe_arrays(arrays), "user": metadata})
        sealed = {"content": content, "crc32": zlib.crc32(content.encode())}
        args = self._ocp.args
        with self._named_errors():
            self._manager.save(
                step,
                args=args.Composite(
                    **{_STATE: args.StandardSave(arrays), _METADATA: args.JsonSave(sealed)},
                ),
            )

    def wait(self) -> None:
        """Waits until the last save is complete.

        Raises:
          UserError: it could not be written; earlier saves are unchanged.
        """
        with self._named_errors():
            self._manager.wait_until_finished()

    def restore(self, like: Any, *, best: bool = False) -> tuple[int, Any, dict[str, Any]] | None:
        """Restores the newest intact save; damaged newer ones are reported in the log and deleted.

        Args:
          like: pytree of the saved structure; arrays or `jax.ShapeDtypeStruct`s with the requested shapes, dtypes and
            (optionally) shardings. Numpy arrays and Python numbers are returned as such.
          best: restores the save with the highest value instead, if there is one and it is intact.

        Returns:
          Step, state and metadata, or None if there is no save.

        Raises:
          UserError: a save has another structure, or all are damaged.
        """
        self.wait()
        damaged: list[int] = []
        steps = sorted(self.steps, reverse=True)
        first = self.best if best else None
        for step in steps if first is None else [first, *steps]:
            if step in damaged:
                continue
            state_and_metadata = self._intact(step, like)
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
        """Names of the arrays of the newest save whose metadata can be read; none where there is no such save."""
        self.wait()
        for step in reversed(self.steps):
            with contextlib.suppress(Exception):  # a damaged save is named when it is restored
                return set(self._read_metadata(step)["arrays"])
        return set()

    def go_back(self, like: Any) -> tuple[int, Any, dict[str, Any]] | None:
        """Restores the newest measured save and deletes later ones; returns None if there is none.

        Args:
          like: see `restore`.

        Raises:
          UserError: see `restore`; or the last save could not be written.
        """
        self.wait()
        last = max(self._measured, default=None)
        self._delete([step for step in self.steps if last is None or step > last])
        return self.restore(like)

    def _intact(self, step: int, like: Any) -> tuple[Any, dict[str, Any]] | None:
        """Returns state and metadata of a save; None if any process finds it damaged."""
        error: Exception | None = None
        result = None
        try:
            metadata, named_like = self._read_metadata(step), _leaves_by_name(like)
            self._check(step, metadata["arrays"], named_like)
            result = _rebuild(like, self._read_arrays(step, metadata["arrays"], named_like)), metadata["user"]
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
        """Waits for a save that is being written and releases Orbax's threads; errors are no longer raised."""
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
        """Returns the values that an earlier process recorded; empty if there is no such file."""
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
        existing = set(self.steps)
        self._measured = {step: value for step, value in self._measured.items() if step in existing}
        write_text_atomic(self.directory / _MEASURED, json.dumps(self._measured) + "\n")

    def _read_metadata(self, step: int) -> dict[str, Any]:
        """Returns the descriptions of the saved arrays, and the caller's metadata."""
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
        found = _describe_arrays(restored)
        changed = [name for name in restored if saved[name]["checksum"] != found[name]["checksum"]]
        if changed:
            raise ValueError(f"{changed[0]} does not have the checksum it was saved with")
        return restored


class _PreservationPolicy:
    """Tells Orbax which saves to keep: the newest ones, the best, and the newest measured one."""

    def __init__(self, states: RunState):
        self._states = states

    def should_preserve(self, checkpoints: Sequence[Any], *, context: Any) -> list[bool]:
        """Returns whether each of the ascending `checkpoints` is kept; see Orbax's `PreservationPolicy`."""
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


def _leaves_by_name(tree: Any) -> dict[str, Any]:
    """Returns leaves by path with '.' between the parts (Orbax makes folders of '/'); Python numbers become numpy's."""
    named = flatten_with_names(tree)
    return {
        name.replace("/", "."): np.asarray(leaf) if isinstance(leaf, bool | int | float) else leaf
        for name, leaf in named.items()
    }


def _describe_arrays(arrays: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Returns shape, dtype and checksum of each array."""
    on_devices = {name: array for name, array in arrays.items() if isinstance(array, jax.Array)}
    sums = {name: int(_checksum(np.asarray(array), np)) for name, array in arrays.items() if name not in on_devices}
    sums |= {name: int(checksum) for name, checksum in jax.device_get(_checksums(on_devices)).items()}
    return {
        name: {"shape": list(array.shape), "dtype": str(array.dtype), "checksum": sums[name]}
        for name, array in arrays.items()
    }


@jax.jit
def _checksums(arrays: dict[str, Any]) -> dict[str, Any]:
    """Returns the checksums of arrays on any devices, as whole numbers, so that splitting does not change them."""
    return {name: _checksum(array, jnp) for name, array in arrays.items()}


def _checksum(array: Any, xp: Any) -> Any:
    """Returns uint32 of an array's bits: a weighted sum that changes whenever a single element changes."""
    bits, place, stride = _bits(array), xp.zeros((), np.uint32), 1
    for axis in reversed(range(bits.ndim)):
        steps = xp.arange(bits.shape[axis], dtype=np.uint32) * np.uint32(stride % 2**32)
        place = place + steps.reshape([-1 if other == axis else 1 for other in range(bits.ndim)])
        stride *= bits.shape[axis]
    odd = place * np.uint32(2 * 0x9E3779B1 % 2**32) + np.uint32(1)
    return xp.sum((bits ^ place) * odd, dtype=np.uint32)


def _bits(array: Any) -> Any:
    """Returns the bits of each element as one or more uint32."""
    size = array.dtype.itemsize
    if array.dtype == bool:
        return array.astype(np.uint32)
    if isinstance(array, np.ndarray):
        return np.atleast_1d(array).view(f"u{min(size, 4)}").astype(np.uint32)
    return jax.lax.bitcast_convert_type(array, f"uint{8 * size}").astype(np.uint32)


def _rebuild(like: Any, arrays: dict[str, Any]) -> Any:
    leaves, structure = jax.tree.flatten(like)
    restored = (arrays[name] for name in _leaves_by_name(like))
    return jax.tree.unflatten(structure, [_as(old, array) for old, array in zip(leaves, restored, strict=True)])


def _as(old: Any, array: Any) -> Any:
    """Returns `array` in the form of the leaf that it replaces."""
    if isinstance(old, bool | int | float):
        return type(old)(array.item())
    if isinstance(old, jax.Array) and not old.committed:
        # Orbax commits restored arrays to a device; this one must follow the arrays it is used with.
        return jnp.asarray(np.asarray(array))
    return array
