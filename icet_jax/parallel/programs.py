"""Jitted functions whose traces are cached for later processes.

jax's compilation cache saves a later process the compilation, but the process still traces and lowers every program in
Python. A `Program` caches the lowered program, too, as `jax.export` writes it (StableHLO, never pickle). The cache key
contains everything that the program depends on: this package's source, versions of its dependencies, jax's settings,
the devices, what the function closes over, and structure, shapes, dtypes and shardings of the arguments. A program
whose key cannot be determined is not cached.

With jax's own cache alone, the second start of the embedded organism takes 27 % of the processor time of the first one;
with this module it takes 23 %, below the required 25 % (`benchmarks/start_up.py`, one pair of starts each on a busy
machine). On a quiet machine, the second start takes 37 % and 24 % of the first one's elapsed time.
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
from icet_jax.typing import Keywords, PyTree

_Arguments = Sequence[PyTree]

_ALLOWED_MODULES = (f"{__name__.partition('.')[0]}.", "optax.")  # results may contain classes of these
_DEPENDENCIES = ("jax", "jaxlib", "flax", "optax", "numpy")
_AMBIGUOUS = re.compile(r" at 0x[0-9a-f]|\.\.\.")  # a `repr` with an address or an ellipsis does not identify a value

_LEAF = "array"

_folder: Path | None = None


def keep_traces(folder: Path | None) -> None:
    """Makes this process cache programs in a folder and read those cached there; None switches the cache off."""
    global _folder
    _folder = folder


class Program:
    """Acts as `jax.jit(function)`, but takes the traced program from the cache if an earlier process put it there.

    In a run of several processes, nothing is cached.

    Attributes:
      jitted: `jax.jit(function)` itself, which can be lowered for devices that are not present.
    """

    def __init__(
        self,
        function: Callable[..., Any],
        *,
        cache_key: Sequence[Any] | None,
        donate: int | None = None,
        static: str | None = None,
        out_sharding: Sharding | None = None,
    ) -> None:
        """Stores the function; nothing is traced yet.

        Args:
          function: function of pytrees of arrays.
          cache_key: values that the function closes over; their `repr` is part of the key of the cached program, so two
            values with equal `repr` must be interchangeable. None disables the cache for this program.
          donate: index of the argument whose buffers the results may use, or None.
          static: name of the keyword argument that is not an array, or None.
          out_sharding: sharding of all results; None leaves it to the compiler.
        """
        self._name = f"{function.__module__}.{function.__qualname__}"
        self._cache_key, self._donate, self._out_sharding = cache_key, donate, out_sharding
        donated = () if donate is None else donate
        self.jitted: Any = jax.jit(function, donate_argnums=donated, static_argnames=static, out_shardings=out_sharding)
        self._programs: dict[Any, _CachedProgram | None] = {}

    def __call__(self, *arguments: PyTree, **static: Any) -> PyTree:
        """Calls the function, as a jitted function does."""
        program = self._find(arguments, static)
        return self.jitted(*arguments, **static) if program is None else program(arguments)

    def lower(self, *arguments: PyTree, **static: Any) -> Any:
        """Returns the program traced for these shapes (like `jax.stages.Lowered`); once compiled, it serves calls."""
        program = self._find(arguments, static)
        return self.jitted.lower(*arguments, **static) if program is None else program.lower(arguments)

    def eval_shape(self, *arguments: PyTree, **static: Any) -> PyTree:
        """Returns the shapes of the results, with their sharding if there is an `out_sharding`."""
        program = self._find(arguments, static)
        results = self.jitted.eval_shape(*arguments, **static) if program is None else program.result_shapes()
        if self._out_sharding is None:
            return results
        sharding = self._out_sharding
        return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), results)

    def _find(self, arguments: _Arguments, static: Keywords) -> "_CachedProgram | None":
        """Returns the cached program for these arguments, after creating it if necessary; None if it is not cached."""
        if _folder is None or self._cache_key is None or jax.process_count() > 1:
            return None
        if any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves(arguments)):
            return None
        signature = _signature(arguments, static)
        if signature not in self._programs:
            facts = [self._name, repr(self._cache_key), self._donate, str(self._out_sharding), sorted(static.items())]
            key = _key(facts, arguments)
            path = None if key is None else _folder / f"traced-{key}"
            self._programs[signature] = (
                None if path is None else self._read(path, arguments) or self._trace(path, arguments, static)
            )
        return self._programs[signature]

    def _read(self, path: Path, arguments: _Arguments) -> "_CachedProgram | None":
        """Returns the program in a file of the cache; None if the file is missing or damaged."""
        try:
            digest, head, body = path.read_bytes().split(b"\n", 2)
            if hashlib.sha256(head + body).hexdigest().encode() != digest:
                return None
            results = _rebuild(parse_json(head), arguments)
            return self._wrap(export.deserialize(bytearray(body)), results, arguments)
        except (OSError, ValueError):  # not there, or cut short
            return None

    def _trace(self, path: Path, arguments: _Arguments, static: Keywords) -> "_CachedProgram | None":
        """Returns the program for these arguments, and writes it to a file; None if it cannot be written."""
        leaves, structure = jax.tree.flatten(arguments)

        def flat(*leaves: Any) -> Any:
            return jax.tree.leaves(self.jitted(*jax.tree.unflatten(structure, leaves), **static))

        results = self.jitted.eval_shape(*arguments, **static)
        try:
            description = _describe(results, arguments)
            result_structure: Any = jax.tree.structure(results)
            if result_structure != jax.tree.structure(_rebuild(description, arguments)):
                return None
            head = json.dumps(description).encode()
            exported = export.export(jax.jit(flat, out_shardings=self._out_sharding))(*leaves)
            body = bytes(exported.serialize())
            write_bytes_atomic(path, b"\n".join((hashlib.sha256(head + body).hexdigest().encode(), head, body)))
        except (ValueError, NotImplementedError, UserError):
            # Results that `_describe` does not support, GPU kernels that jax does not export, or a full disk.
            return None
        return self._wrap(exported, results, arguments)

    def _wrap(self, exported: export.Exported, results: PyTree, arguments: _Arguments) -> "_CachedProgram":
        """Returns an exported program that donates as `self` does, and returns results structured like `results`."""
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
    """Holds a traced program whose arguments and results are lists of leaves."""

    jitted: Any  # the program as a jitted function
    exported: export.Exported  # the program as it is in the cache
    structure: Any  # pytree structure of the results
    compiled: Any = None  # the compiled program, as soon as it exists

    def __call__(self, arguments: _Arguments) -> PyTree:
        leaves = jax.tree.leaves(arguments)
        if self.compiled is None:
            self.compile(self.jitted.lower(*leaves))
        try:
            # Not `self.jitted`, which would compile once for arguments that are committed to a device, as an exported
            # program's results are, and once more for those that are not.
            results = self.compiled(*leaves)
        except (TypeError, ValueError):  # raised before anything ran, if these arguments are on other devices
            results = self.jitted(*leaves)
        return jax.tree.unflatten(self.structure, results)

    def lower(self, arguments: _Arguments) -> "_Lowered":
        """Returns the program lowered for arguments with these shapes; compiling it sets `compiled`."""
        return _Lowered(self, self.jitted.lower(*jax.tree.leaves(arguments)))

    def compile(self, lowered: Any) -> Any:
        """Compiles a lowered program and stores the result for all calls."""
        self.compiled = lowered.compile()
        return self.compiled

    def result_shapes(self) -> PyTree:
        """Returns the results as abstract arrays."""
        shapes = [jax.ShapeDtypeStruct(aval.shape, aval.dtype) for aval in self.exported.out_avals]
        return jax.tree.unflatten(self.structure, shapes)


class _Lowered(NamedTuple):
    """Compiles a program so that its calls use the result; it stands in for `jax.stages.Lowered`."""

    program: _CachedProgram
    lowered: Any

    def compile(self) -> Any:
        return self.program.compile(self.lowered)


def _signature(arguments: _Arguments, static: Keywords) -> tuple[Any, ...]:
    """Returns structure, shapes and dtypes of the arguments, by which this process looks up a program.

    Shardings are not included, because a compiled program checks them itself.
    """
    leaves, structure = jax.tree.flatten(arguments)
    return (
        structure,
        tuple((np.shape(leaf), getattr(leaf, "dtype", type(leaf))) for leaf in leaves),
        tuple(static.items()),
    )


def _key(facts: Sequence[object], arguments: _Arguments) -> str | None:
    """Returns the cache key of the program that `facts` identify, for arguments like these.

    Returns None if the `repr` of a fact is ambiguous, so that no key can be computed.
    """
    leaves, structure = jax.tree.flatten(arguments)
    devices = jax.devices()
    text = repr([
        _versions(),
        _settings(),
        (devices[0].platform, devices[0].device_kind, len(devices)),
        *facts,
        str(structure),
        [_leaf_facts(leaf) for leaf in leaves],
    ])  # fmt: skip
    return None if _AMBIGUOUS.search(text) else hashlib.sha256(text.encode()).hexdigest()


def _settings() -> dict[str, Any]:
    """Returns jax's current settings, including those that a `with` block changed for this thread."""
    values = jax.config.values
    return {name: getattr(jax.config, name, values[name]) for name in sorted(values) if "cache" not in name}


def _leaf_facts(leaf: Any) -> tuple[Any, ...]:
    """Returns shape, dtype, weak type and sharding of an argument's leaf."""
    sharding: Any = getattr(leaf, "sharding", None)
    if isinstance(sharding, NamedSharding):
        sharding = str(sharding.spec), str(dict(sharding.mesh.shape)), sharding.memory_kind
    else:
        sharding = ""
    return np.shape(leaf), str(getattr(leaf, "dtype", type(leaf))), getattr(leaf, "weak_type", False), sharding


@functools.cache
def _versions() -> tuple[str, ...]:
    """Returns the hash of this package's source, and the versions of Python and of the dependencies."""
    source = hashlib.sha256()
    root = Path(__file__).parents[1]
    for file in sorted(root.rglob("*.py")):
        source.update(f"{file.relative_to(root)}\0".encode() + file.read_bytes())
    versions = (f"{name} {importlib.metadata.version(name)}" for name in _DEPENDENCIES)
    return source.hexdigest(), platform.python_version(), *versions


def _describe(tree: PyTree, arguments: _Arguments) -> Any:
    """Returns a JSON value from which `_rebuild` rebuilds the structure of a pytree.

    Args:
      tree: the pytree, a program's results.
      arguments: the program's arguments; a part of the tree with the structure of an argument is described as such.

    Raises:
      ValueError: a node is neither a dictionary, a tuple nor of a class in `_ALLOWED_MODULES`.
    """
    structure: Any = jax.tree.structure(tree)
    if tree is None or (structure.num_nodes, structure.num_leaves) == (1, 1):
        return None if tree is None else _LEAF
    for index, argument in enumerate(arguments):
        if structure == jax.tree.structure(argument):
            return {"argument": index}
    describe = functools.partial(_describe, arguments=arguments)
    if type(tree) is dict and all(type(name) is str for name in tree):
        return {"dict": {name: describe(part) for name, part in tree.items()}}
    if type(tree) is tuple:
        return {"tuple": [describe(part) for part in tree]}
    class_path = f"{type(tree).__module__}:{type(tree).__qualname__}"
    if class_path.startswith(_ALLOWED_MODULES) and hasattr(tree, "_asdict"):
        return {class_path: {name: describe(part) for name, part in tree._asdict().items()}}
    if class_path.startswith(_ALLOWED_MODULES) and dataclasses.is_dataclass(tree):
        fields = dataclasses.fields(tree)
        if all(field.metadata.get("pytree_node", True) for field in fields):
            return {class_path: {field.name: describe(getattr(tree, field.name)) for field in fields}}
    raise ValueError(f"the structure of a {class_path} cannot be described")


def _rebuild(description: Any, arguments: _Arguments) -> PyTree:
    """Returns a pytree of the structure that `_describe` described; its leaves have no meaning.

    Raises:
      ValueError: the description is invalid.
    """
    if description is None or description == _LEAF:
        return description
    ((kind, parts),) = description.items()
    if kind == "argument":
        return arguments[parts]
    if kind == "tuple":
        return tuple(_rebuild(part, arguments) for part in parts)
    fields = {name: _rebuild(part, arguments) for name, part in parts.items()}
    if kind == "dict":
        return fields
    module, _, name = kind.partition(":")
    if not module.startswith(_ALLOWED_MODULES):
        raise ValueError(f"{kind} is not a class of {_ALLOWED_MODULES}")
    return getattr(importlib.import_module(module), name)(**fields)
