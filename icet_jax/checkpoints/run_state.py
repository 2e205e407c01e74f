"""The state of a run on disk (Orbax): atomic saves, the last few kept, bit-exact restores, damage noticed."""

import logging
import shutil
import zlib
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from icet_jax.errors import UserError
from icet_jax.parallel.sharding import flatten_with_names

_LOG = logging.getLogger("icet_jax")
_STATE, _METADATA = "state", "metadata"


class RunState:
    """Numbered checkpoints of one run in one directory.

        states = RunState(workdir / "checkpoints", keep=2)
        restored = states.restore(like=state)        # None on the first start
        states.save(step, state, {"any": "JSON"})

    A save is complete or absent, whenever the process is killed. Each array's checksum is stored with it, since Orbax
    itself does not notice a changed byte.
    """

    def __init__(self, directory: str | Path, *, keep: int):
        """Opens (or makes) `directory`; saves beyond the newest `keep` are deleted.

        Raises:
          UserError: the directory cannot be written to.
        """
        # Orbax takes seconds to import, and only runs that train need it.
        import orbax.checkpoint as ocp

        self._ocp = ocp
        self.directory = Path(directory).absolute()
        options = ocp.CheckpointManagerOptions(
            max_to_keep=keep, enable_async_checkpointing=False, cleanup_tmp_directories=True
        )
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
            self._manager = ocp.CheckpointManager(self.directory, options=options)
        except OSError as error:
            raise UserError(
                f"{self.directory}: cannot be written ({error.strerror}); choose another workdir"
            ) from error

    @property
    def steps(self) -> list[int]:
        """Steps of the complete saves, ascending."""
        return sorted(self._manager.all_steps())

    def save(self, step: int, state: Any, metadata: dict[str, Any]) -> None:
        """Saves a pytree of non-empty arrays and Python numbers, and a JSON-able dict; returns when it is on disk.

        Raises:
          UserError: it cannot be written, for example because the disk is full.
        """
        arrays = _named(state)
        described = {"arrays": {name: _describe(array) for name, array in arrays.items()}, "user": metadata}
        args = self._ocp.args
        try:
            self._manager.save(
                step,
                args=args.Composite(
                    **{_STATE: args.StandardSave(arrays), _METADATA: args.JsonSave(described)},
                ),
            )
            self._manager.wait_until_finished()
        except OSError as error:
            raise UserError(f"{self.directory}: step {step} cannot be saved ({error}); free space") from error

    def restore(self, like: Any) -> tuple[int, Any, dict[str, Any]] | None:
        """The newest save that is intact; damaged newer ones are reported in the log and deleted.

        Args:
          like: pytree of the saved structure; arrays or `jax.ShapeDtypeStruct`s with the shapes, dtypes and (where
            given) shardings wanted. Numpy arrays and Python numbers come back as such.

        Returns:
          Step, state and metadata, or None if nothing was ever saved.

        Raises:
          UserError: the save has other arrays than `like` (another config), or every save is damaged.
        """
        damaged = []
        for step in reversed(self.steps):
            try:
                saved, metadata = self._read_metadata(step)
            except Exception as error:
                damaged.append(self._report(step, error))
                continue
            self._check(step, saved, _named(like))
            try:
                arrays = self._read_arrays(step, saved, _named(like))
            except Exception as error:
                damaged.append(self._report(step, error))
                continue
            for newer in damaged:
                shutil.rmtree(self.directory / str(newer), ignore_errors=True)
            self._manager.reload()
            return step, _rebuild(like, arrays), metadata
        if damaged:
            raise UserError(
                f"{self.directory}: every checkpoint is damaged (steps {sorted(damaged)}); "
                "remove the directory to start the run again"
            )
        return None

    def close(self) -> None:
        """Releases Orbax's threads."""
        self._manager.close()

    def _report(self, step: int, error: Exception) -> int:
        reason = str(error).strip().splitlines()
        _LOG.error(
            "CHECKPOINT OF STEP %d IS DAMAGED, falling back to the one before it: %s/%d (%s: %s)",
            step, self.directory, step, type(error).__name__, reason[0] if reason else "",
        )  # fmt: skip
        return step

    def _read_metadata(self, step: int) -> tuple[dict[str, Any], dict[str, Any]]:
        """Descriptions of the saved arrays, and the caller's metadata."""
        args = self._ocp.args
        described = self._manager.restore(step, args=args.Composite(**{_METADATA: args.JsonRestore()}))[_METADATA]
        return described["arrays"], described["user"]

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
        restored = self._manager.restore(step, args=args.Composite(**{_STATE: args.StandardRestore(wanted)}))
        for name, array in restored[_STATE].items():
            if saved[name]["crc32"] != _describe(array)["crc32"]:
                raise ValueError(f"{name} does not have the checksum it was saved with")
        return restored[_STATE]


def _named(tree: Any) -> dict[str, Any]:
    """Leaves by path with '.' between the parts (Orbax makes folders of '/'); Python numbers become numpy's."""
    named = flatten_with_names(tree)
    return {
        name.replace("/", "."): np.asarray(leaf) if isinstance(leaf, bool | int | float) else leaf
        for name, leaf in named.items()
    }


def _describe(array: Any) -> dict[str, Any]:
    """Shape, dtype and checksum; arrays spread over processes have no checksum, as no process holds them whole."""
    whole = not isinstance(array, jax.Array) or array.is_fully_addressable
    data = np.ascontiguousarray(array).view(np.uint8).reshape(-1).data if whole and array.size else b""
    return {"shape": list(array.shape), "dtype": str(array.dtype), "crc32": zlib.crc32(data) if whole else None}


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
