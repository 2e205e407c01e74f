"""Jitted functions whose traces are cached for later processes.

jax caches what XLA compiles, but a process that finds it there still traces and lowers every program in Python. A
`Program` also caches the lowered program, as `jax.export` writes it (StableHLO, never pickle). Its key contains
everything that it depends on: this package's source, versions of its dependencies, jax's settings, the devices, what
the function closes over, and structure, shapes, dtypes and shardings of the arguments. A program whose key cannot be
determined is traced in every process, as with `jax.jit`.

With jax's own cache alone, a warm start of the embedded organism takes 27 % of the processor time of a cold one; with
this module it takes 23 %, below the limit of a quarter (`benchmarks/start_up.py`, one pair each on a busy machine). In
seconds on a quiet machine it is 37 % and 24 %.
"""

import dataclasses
import functools
import hashlib
import importlib
import importlib.metadata
import json
import platform
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jax import export
from jax.sharding import NamedSharding, Sharding

from icet_jax.errors import UserError
from icet_jax.files import parse_json, write_bytes_atomic

_OWNERS = (f"{__name__.partition('.')[0]}.", "optax.")  # modules whose classes results may contain
_BUILT_ON = ("jax", "jaxlib", "flax", "optax", "numpy")
_NO_NAME = re.compile(r" at 0x[0-9a-f]|\.\.\.")  # a `repr` with an address or an ellipsis does not identify a value

_LEAF = "array"

_folder: Path | None = None


def keep_traces(folder: Path | None) -> None:
    """Makes this process write programs to a folder of the user, and read them from there; None stops that."""
    global _folder
    _folder = folder


class Program:
    """Acts as `jax.jit(function)`, which an earlier process may have traced already.

    Programs of several processes are not cached.

    Attributes:
      jitted: the function after `jax.jit`, which can be lowered for devices that are not present.
    """

    def __init__(
        self,
        function: Callable[..., Any],
        *,
        about: Sequence[Any] | None,
        donate: int | None = None,
        static: str | None = None,
        out_sharding: Sharding | None = None,
    ) -> None:
        """Stores the function; nothing is traced yet.

        Args:
          function: function of pytrees of arrays.
          about: values that it closes over; two values with equal `repr` must be interchangeable. None means that it is
            never cached.
          donate: number of the argument whose arrays the results may replace.
          static: name of the keyword argument that is not an array.
          out_sharding: sharding of all results.
        """
        self._name = f"{function.__module__}.{function.__qualname__}"
        self._about, self._donate, self._out_sharding = about, donate, out_sharding
        donated = () if donate is None else donate
        self.jitted: Any = jax.jit(function, donate_argnums=donated, static_argnames=static, out_shardings=out_sharding)
        self._kept: dict[Any, _CachedProgram | None] = {}

    def __call__(self, *arguments: Any, **static: Any) -> Any:
        """Calls the function, as a jitted function does."""
        kept = self._find(arguments, static)
        return self.jitted(*arguments, **static) if kept is None else kept(arguments)

    def lower(self, *arguments: Any, **static: Any) -> Any:
        """Returns a program that can be compiled (`jax.stages.Lowered`); calls with these shapes then use it."""
        kept = self._find(arguments, static)
        return self.jitted.lower(*arguments, **static) if kept is None else kept.lower(arguments)

    def eval_shape(self, *arguments: Any, **static: Any) -> Any:
        """Returns the shapes of the results, with their sharding if there is an `out_sharding`."""
        kept = self._find(arguments, static)
        results = self.jitted.eval_shape(*arguments, **static) if kept is None else kept.results()
        if self._out_sharding is None:
            return results
        sharding = self._out_sharding
        return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), results)

    def _find(self, arguments: Any, static: Any) -> "_CachedProgram | None":
        if _folder is None or self._about is None or jax.process_count() > 1:
            return None
        if any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves(arguments)):
            return None
        shapes = _shapes(arguments, static)
        if shapes not in self._kept:
            facts = [self._name, repr(self._about), self._donate, str(self._out_sharding), sorted(static.items())]
            key = _key(*facts, arguments)
            path = None if key is None else _folder / f"traced-{key}"
            self._kept[shapes] = (
                None if path is None else self._read(path, arguments) or self._make(path, arguments, static)
            )
        return self._kept[shapes]

    def _read(self, path: Path, arguments: Any) -> "_CachedProgram | None":
        try:
            digest, head, body = path.read_bytes().split(b"\n", 2)
            if hashlib.sha256(head + body).hexdigest().encode() != digest:
                return None
            results = _described(parse_json(head), arguments)
            return self._wrapped(export.deserialize(bytearray(body)), results, arguments)
        except (OSError, ValueError):  # not there, or cut short
            return None

    def _make(self, path: Path, arguments: Any, static: Any) -> "_CachedProgram | None":
        leaves, structure = jax.tree.flatten(arguments)

        def flat(*leaves: Any) -> Any:
            return jax.tree.leaves(self.jitted(*jax.tree.unflatten(structure, leaves), **static))

        results = self.jitted.eval_shape(*arguments, **static)
        try:
            described = _description(results, arguments)
            result_structure: Any = jax.tree.structure(results)
            if result_structure != jax.tree.structure(_described(described, arguments)):
                return None
            head = json.dumps(described).encode()
            exported = export.export(jax.jit(flat, out_shardings=self._out_sharding))(*leaves)
            body = bytes(exported.serialize())
            write_bytes_atomic(path, b"\n".join((hashlib.sha256(head + body).hexdigest().encode(), head, body)))
        except (ValueError, NotImplementedError, UserError):
            # Results of a kind that has no description, kernels that jax does not export, or a full disk.
            return None
        return self._wrapped(exported, results, arguments)

    def _wrapped(self, exported: export.Exported, results: Any, arguments: Any) -> "_CachedProgram":
        sizes = [len(jax.tree.leaves(argument)) for argument in arguments]
        donated: Sequence[int] = ()
        if self._donate is not None:
            first = sum(sizes[: self._donate])
            donated = range(first, first + sizes[self._donate])

        def run(*leaves: Any) -> Any:
            return exported.call(*leaves)

        run.__name__ = self._name.rpartition(".")[2]
        jitted = jax.jit(run, donate_argnums=tuple(donated), out_shardings=self._out_sharding)
        return _CachedProgram(jitted, exported, jax.tree.structure(results))


@dataclasses.dataclass
class _CachedProgram:
    """Holds a program over the leaves of its arguments and results."""

    jitted: Any
    exported: export.Exported
    structure: Any
    compiled: Any = None

    def __call__(self, arguments: Any) -> Any:
        leaves = jax.tree.leaves(arguments)
        if self.compiled is None:
            self.compile(self.jitted.lower(*leaves))
        try:
            # The jitted function is not called: an exported program's results are committed to their device, and it
            # would compile again for committed and for uncommitted arguments.
            results = self.compiled(*leaves)
        except (TypeError, ValueError):  # raised before anything ran, because these arguments are on other devices
            results = self.jitted(*leaves)
        return jax.tree.unflatten(self.structure, results)

    def lower(self, arguments: Any) -> "_Lowered":
        return _Lowered(self, self.jitted.lower(*jax.tree.leaves(arguments)))

    def compile(self, lowered: Any) -> Any:
        self.compiled = lowered.compile()
        return self.compiled

    def results(self) -> Any:
        shapes = [jax.ShapeDtypeStruct(aval.shape, aval.dtype) for aval in self.exported.out_avals]
        return jax.tree.unflatten(self.structure, shapes)


class _Lowered(NamedTuple):
    """Compiles a program for its calls, as `jax.stages.Lowered` does."""

    kept: _CachedProgram
    lowered: Any

    def compile(self) -> Any:
        return self.kept.compile(self.lowered)


def _shapes(arguments: Any, static: dict[str, Any]) -> Any:
    """Returns what distinguishes calls of one program, without shardings, which jax compares."""
    leaves, structure = jax.tree.flatten(arguments)
    return (
        structure,
        tuple((np.shape(leaf), getattr(leaf, "dtype", type(leaf))) for leaf in leaves),
        tuple(static.items()),
    )


def _key(*facts: Any) -> str | None:
    """Returns the cache key of a program, or None if some part cannot be identified; the last fact is the arguments."""
    leaves, structure = jax.tree.flatten(facts[-1])
    devices = jax.devices()
    text = repr([
        _surroundings(),
        _settings(),
        (devices[0].platform, devices[0].device_kind, len(devices)),
        *facts[:-1],
        str(structure),
        [_leaf(leaf) for leaf in leaves],
    ])  # fmt: skip
    return None if _NO_NAME.search(text) else hashlib.sha256(text.encode()).hexdigest()


def _settings() -> dict[str, Any]:
    """Returns jax's current settings, which a `with` block may have changed for this thread."""
    values = jax.config.values
    return {name: getattr(jax.config, name, values[name]) for name in sorted(values) if "cache" not in name}


def _leaf(leaf: Any) -> tuple[Any, ...]:
    place = getattr(leaf, "sharding", None)
    where = (
        (str(place.spec), str(dict(place.mesh.shape)), place.memory_kind) if isinstance(place, NamedSharding) else ""
    )
    return np.shape(leaf), str(getattr(leaf, "dtype", type(leaf))), getattr(leaf, "weak_type", False), where


@functools.cache
def _surroundings() -> tuple[str, ...]:
    """Returns the hash of this package's source, the version of Python, and those of the dependencies."""
    source = hashlib.sha256()
    root = Path(__file__).parents[1]
    for file in sorted(root.rglob("*.py")):
        source.update(f"{file.relative_to(root)}\0".encode() + file.read_bytes())
    versions = (f"{name} {importlib.metadata.version(name)}" for name in _BUILT_ON)
    return source.hexdigest(), platform.python_version(), *versions


def _description(tree: Any, arguments: Any) -> Any:
    """Returns JSON that describes the structure of a tree.

    Raises:
      ValueError: a node is not an argument, dictionary, tuple or a class of `_OWNERS`.
    """
    structure: Any = jax.tree.structure(tree)
    if tree is None or (structure.num_nodes, structure.num_leaves) == (1, 1):
        return None if tree is None else _LEAF
    for number, argument in enumerate(arguments):
        if structure == jax.tree.structure(argument):
            return {"argument": number}
    describe = functools.partial(_description, arguments=arguments)
    if type(tree) is dict and all(type(name) is str for name in tree):
        return {"dict": {name: describe(part) for name, part in tree.items()}}
    if type(tree) is tuple:
        return {"tuple": [describe(part) for part in tree]}
    kind = type(tree)
    where = f"{kind.__module__}:{kind.__qualname__}"
    if where.startswith(_OWNERS) and hasattr(tree, "_asdict"):
        return {where: {name: describe(part) for name, part in tree._asdict().items()}}
    if where.startswith(_OWNERS) and dataclasses.is_dataclass(tree):
        fields = dataclasses.fields(tree)
        if all(field.metadata.get("pytree_node", True) for field in fields):
            return {where: {field.name: describe(getattr(tree, field.name)) for field in fields}}
    raise ValueError(f"no description of {where}")


def _described(description: Any, arguments: Any) -> Any:
    """Returns a tree of the structure that `_description` returned.

    Raises:
      ValueError: the description is invalid.
    """
    if description is None or description == _LEAF:
        return description
    ((kind, parts),) = description.items()
    if kind == "argument":
        return arguments[parts]
    if kind == "tuple":
        return tuple(_described(part, arguments) for part in parts)
    named = {name: _described(part, arguments) for name, part in parts.items()}
    if kind == "dict":
        return named
    module, _, name = kind.partition(":")
    if not module.startswith(_OWNERS):
        raise ValueError(f"{kind} is not one of {_OWNERS}")
    return getattr(importlib.import_module(module), name)(**named)
