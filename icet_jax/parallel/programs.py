"""Jitted functions whose tracing is kept from one process to the next.

jax keeps what XLA compiles, but a process that finds it there still traces and lowers every program, in Python. A
`Program` keeps what that makes too, as `jax.export` writes it (StableHLO, never pickle), under everything that it
follows from: this package's source, the versions of what it is built on, jax's settings, the devices, what the
function closes over, and structure, shapes, dtypes and places of the arguments. Whatever cannot be named so is traced
in every process, as by `jax.jit`.

With jax's own cache alone a warm start of the embedded organism takes more than the quarter of a cold one that it may
take: 27 % of the processor time, 23 % with this (`benchmarks/start_up.py`, one pair each on a busy machine); 37 % and
24 % of the seconds on a quiet one.
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

_OWNERS = (f"{__name__.partition('.')[0]}.", "optax.")  # of the classes that results may be made of
_BUILT_ON = ("jax", "jaxlib", "flax", "optax", "numpy")
_NO_NAME = re.compile(r" at 0x[0-9a-f]|\.\.\.")  # in a repr: of an address, or cut short

_LEAF = "array"

_folder: Path | None = None


def keep_traces(folder: Path | None) -> None:
    """From now on programs are written to a folder that is the user's own, and looked for there; None: no more."""
    global _folder
    _folder = folder


class Program:
    """`jax.jit(function)`, which may have been traced by an earlier process.

    Programs of several processes are not kept.

    Attributes:
      jitted: the function, as `jax.jit` gives it: to be lowered for devices that are not here.
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
        """Nothing is traced yet.

        Args:
          function: of pytrees of arrays.
          about: what it closes over, and differs with; their reprs tell all of it. None: it is never kept.
          donate: number of the argument whose arrays the results may take the place of.
          static: name of the keyword argument that is no array.
          out_sharding: where all results lie.
        """
        self._name = f"{function.__module__}.{function.__qualname__}"
        self._about, self._donate, self._out_sharding = about, donate, out_sharding
        donated = () if donate is None else donate
        self.jitted: Any = jax.jit(function, donate_argnums=donated, static_argnames=static, out_shardings=out_sharding)
        self._kept: dict[Any, _Kept | None] = {}

    def __call__(self, *arguments: Any, **static: Any) -> Any:
        """As of a jitted function."""
        kept = self._find(arguments, static)
        return self.jitted(*arguments, **static) if kept is None else kept(arguments)

    def lower(self, *arguments: Any, **static: Any) -> Any:
        """What `.compile()` compiles (`jax.stages.Lowered`); calls with these shapes find it."""
        kept = self._find(arguments, static)
        return self.jitted.lower(*arguments, **static) if kept is None else kept.lower(arguments)

    def eval_shape(self, *arguments: Any, **static: Any) -> Any:
        """The results, abstractly; with an `out_sharding` also where they lie."""
        kept = self._find(arguments, static)
        found = self.jitted.eval_shape(*arguments, **static) if kept is None else kept.results()
        if self._out_sharding is None:
            return found
        where = self._out_sharding
        return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=where), found)

    def _find(self, arguments: Any, static: Any) -> "_Kept | None":
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

    def _read(self, path: Path, arguments: Any) -> "_Kept | None":
        try:
            digest, head, body = path.read_bytes().split(b"\n", 2)
            if hashlib.sha256(head + body).hexdigest().encode() != digest:
                return None
            results = _described(parse_json(head), arguments)
            return self._wrapped(export.deserialize(bytearray(body)), results, arguments)
        except (OSError, ValueError):  # not there, or cut short
            return None

    def _make(self, path: Path, arguments: Any, static: Any) -> "_Kept | None":
        leaves, given = jax.tree.flatten(arguments)

        def flat(*leaves: Any) -> Any:
            return jax.tree.leaves(self.jitted(*jax.tree.unflatten(given, leaves), **static))

        results = self.jitted.eval_shape(*arguments, **static)
        try:
            described = _description(results, arguments)
            made_of: Any = jax.tree.structure(results)
            if made_of != jax.tree.structure(_described(described, arguments)):
                return None
            head = json.dumps(described).encode()
            made = export.export(jax.jit(flat, out_shardings=self._out_sharding))(*leaves)
            body = bytes(made.serialize())
            write_bytes_atomic(path, b"\n".join((hashlib.sha256(head + body).hexdigest().encode(), head, body)))
        except (ValueError, NotImplementedError, UserError):
            # Results of a kind that has no description, kernels that jax does not export, or a full disk.
            return None
        return self._wrapped(made, results, arguments)

    def _wrapped(self, made: export.Exported, results: Any, arguments: Any) -> "_Kept":
        sizes = [len(jax.tree.leaves(argument)) for argument in arguments]
        donated: Sequence[int] = ()
        if self._donate is not None:
            first = sum(sizes[: self._donate])
            donated = range(first, first + sizes[self._donate])

        def run(*leaves: Any) -> Any:
            return made.call(*leaves)

        run.__name__ = self._name.rpartition(".")[2]
        jitted = jax.jit(run, donate_argnums=tuple(donated), out_shardings=self._out_sharding)
        return _Kept(jitted, made, jax.tree.structure(results))


@dataclasses.dataclass
class _Kept:
    """A program over the leaves of its arguments and results."""

    jitted: Any
    made: export.Exported
    structure: Any
    compiled: Any = None

    def __call__(self, arguments: Any) -> Any:
        leaves = jax.tree.leaves(arguments)
        if self.compiled is None:
            self.compile(self.jitted.lower(*leaves))
        try:
            # Not by the jitted function: an exported program's results are tied to their device, and it would compile
            # again for arguments that are and for those that are not.
            results = self.compiled(*leaves)
        except (TypeError, ValueError):  # before anything ran: these arguments lie elsewhere
            results = self.jitted(*leaves)
        return jax.tree.unflatten(self.structure, results)

    def lower(self, arguments: Any) -> "_Lowered":
        return _Lowered(self, self.jitted.lower(*jax.tree.leaves(arguments)))

    def compile(self, lowered: Any) -> Any:
        self.compiled = lowered.compile()
        return self.compiled

    def results(self) -> Any:
        shapes = [jax.ShapeDtypeStruct(aval.shape, aval.dtype) for aval in self.made.out_avals]
        return jax.tree.unflatten(self.structure, shapes)


class _Lowered(NamedTuple):
    """What compiles a program for its calls, as `jax.stages.Lowered` does."""

    kept: _Kept
    lowered: Any

    def compile(self) -> Any:
        return self.kept.compile(self.lowered)


def _shapes(arguments: Any, static: dict[str, Any]) -> Any:
    """What tells calls of one program apart; places do not, which jax compares."""
    leaves, structure = jax.tree.flatten(arguments)
    return (
        structure,
        tuple((np.shape(leaf), getattr(leaf, "dtype", type(leaf))) for leaf in leaves),
        tuple(static.items()),
    )


def _key(*facts: Any) -> str | None:
    """The name of a program, or None where something of it has none. The last fact is the arguments."""
    leaves, structure = jax.tree.flatten(facts[-1])
    devices = jax.devices()
    told = repr([
        _surroundings(),
        _settings(),
        (devices[0].platform, devices[0].device_kind, len(devices)),
        *facts[:-1],
        str(structure),
        [_leaf(leaf) for leaf in leaves],
    ])  # fmt: skip
    return None if _NO_NAME.search(told) else hashlib.sha256(told.encode()).hexdigest()


def _settings() -> dict[str, Any]:
    """jax's, as they are here and now: a `with` block may have changed them for this thread."""
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
    """This package's source, Python, and the versions of what it is built on."""
    source = hashlib.sha256()
    root = Path(__file__).parents[1]
    for file in sorted(root.rglob("*.py")):
        source.update(f"{file.relative_to(root)}\0".encode() + file.read_bytes())
    versions = (f"{name} {importlib.metadata.version(name)}" for name in _BUILT_ON)
    return source.hexdigest(), platform.python_version(), *versions


def _description(tree: Any, arguments: Any) -> Any:
    """JSON of a tree's structure.

    Raises:
      ValueError: it has a node of another kind than arguments, dictionaries, tuples and the classes of `_OWNERS`.
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
    """A tree of the structure that `_description` told.

    Raises:
      ValueError: it told none.
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
