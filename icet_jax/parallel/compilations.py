"""Compiles programs in parallel, counts compilations, and caches compiled programs for later processes."""

import hashlib
import os
import platform
import sys
import time
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from threading import Lock, current_thread
from types import TracebackType
from typing import Any, Protocol, runtime_checkable

import jax
import jax.monitoring
from jax.experimental.compilation_cache import compilation_cache

from icet_jax.errors import during
from icet_jax.parallel.programs import keep_traces


@runtime_checkable
class Lowered(Protocol):
    """A traced program that can be compiled: `jax.stages.Lowered`, or what `Program.lower` returns."""

    def compile(self) -> Any:
        """Compiles the program, so that later calls of its jitted function do not have to."""
        ...


OFF = "off"
"""The value of `config.compilation_cache` that disables the cache."""
_MAX_CACHE_BYTES = 8 * 2**30  # if the cache is larger, its oldest programs are deleted
_THREAD_PREFIX = "compile"  # prefix of the names of the threads that compile
_COMPILE_EVENT = "/jax/core/compile/backend_compile_duration"
_CACHE_HIT_EVENT = "/jax/compilation_cache/cache_hits"


def keep_programs(choice: str | None) -> None:
    """Makes this process cache compiled programs in a folder, and use programs that earlier processes cached there.

    If the folder cannot be written to, a line on standard error says so and there is no cache.

    Args:
      choice: a folder, `OFF`, or None for JAX_COMPILATION_CACHE_DIR or else the user's cache folder.
    """
    folder = None
    if choice != OFF:
        environment_folder = None if choice is not None else os.environ.get("JAX_COMPILATION_CACHE_DIR")
        root = Path(choice).expanduser() if choice else _default_folder()
        folder = environment_folder or str(_machine_folder(root))
        if "://" not in folder and not _is_writable(Path(folder)):
            folder = None
    if "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS" not in os.environ:
        # Cache programs however fast they compile: a start needs dozens of small ones, and reading is faster still.
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.config.update("jax_compilation_cache_dir", folder)
    keep_traces(None if folder is None or "://" in folder else Path(folder))
    compilation_cache.reset_cache()  # jax reads this setting only before its first compilation


def _default_folder() -> Path:
    """Returns the folder for compiled programs in the user's cache folder."""
    home = os.environ.get("XDG_CACHE_HOME")
    return (Path(home) if home else Path.home() / ".cache") / "icet_jax" / "compiled"


def _machine_folder(folder: Path) -> Path:
    """Returns a sub-folder of `folder` for this kind of processor.

    jax's cache keys do not contain the kind of processor, and machines of different kinds may share a home folder.
    """
    features = platform.processor()
    if Path("/proc/cpuinfo").exists():
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
        features = next((line for line in lines if line.lower().startswith(("flags", "features"))), features)
    return folder / f"{platform.machine()}-{hashlib.sha256(features.encode()).hexdigest()[:8]}"


def _is_writable(folder: Path) -> bool:
    """Returns whether a cache folder, which is created if necessary, can be written to; prints a line if it cannot."""
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)  # who can write here can run code as this user
        probe = folder / f".probe-{os.getpid()}"
        probe.touch()
        probe.unlink()
        _drop_oldest(folder)
    except OSError as error:
        print(
            f"icet-jax: {folder}: compiled programs cannot be kept there ({error.strerror}); "
            f"give --config.compilation_cache=FOLDER, or {OFF}",
            file=sys.stderr,
        )
        return False
    return True


def _drop_oldest(folder: Path) -> None:
    """Deletes the oldest files of a folder until it has at most `_MAX_CACHE_BYTES`.

    Other processes may call this function for the same folder at the same time.

    jax's own limit, `jax_compilation_cache_max_size`, does not count cached traces, and locks the folder even to read.
    """
    files = [(Path(entry.path), entry.stat()) for entry in os.scandir(folder)]
    total = 0
    for path, stat in sorted(files, key=lambda file: -file[1].st_mtime):
        total += stat.st_size
        if total > _MAX_CACHE_BYTES:
            path.unlink(missing_ok=True)


class Compiling:
    """Compiles programs in threads while the `with` block runs.

    At its end it waits for all of them and prints the seconds of each to standard error. Later calls of the programs'
    jitted functions with the same shapes do not compile again.
    """

    def __init__(self, programs: Iterable[tuple[str, Lowered]]) -> None:
        """Stores the programs; they are traced when the block begins, and each compiles as soon as it is traced.

        Args:
          programs: (name, traced program) pairs; taking the next pair from the iterator usually traces a program.
        """
        self._programs = programs
        self._futures: dict[str, Future[float]] = {}
        self._context = ExitStack()

    def wait(self, name: str) -> None:
        """Waits until the program of this name is compiled; raises what its compilation raised."""
        self._futures[name].result()

    def __enter__(self) -> "Compiling":
        self._start = time.perf_counter()
        with ExitStack() as context:
            self._counter = context.enter_context(CompilationCounter())
            threads = context.enter_context(ThreadPoolExecutor(os.cpu_count(), _THREAD_PREFIX))
            for name, lowered in self._programs:
                self._futures[name] = threads.submit(_compile, name, lowered)
            self._context = context.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with self._context:
            if error is not None:
                return
            parts = ", ".join(f"{name} {future.result():.1f} s" for name, future in self._futures.items())
        seconds, cached = time.perf_counter() - self._start, self._counter.cached
        kept = f", {cached} of {len(self._futures)} kept from before" if cached else ""
        print(f"compiled: {parts}; {seconds:.1f} s in all{kept}", file=sys.stderr)


def _compile(name: str, lowered: Lowered) -> float:
    """Compiles a program and returns the seconds that it took."""
    began = time.perf_counter()
    with during(f"compiling {name}"):
        lowered.compile()
    return time.perf_counter() - began


def compile_programs(programs: Iterable[tuple[str, Lowered]], meanwhile: Callable[[], Any] = lambda: None) -> Any:
    """Compiles programs in parallel, see `Compiling`, and waits for all of them.

    Args:
      programs: (name, traced program) pairs.
      meanwhile: other work, done while the last programs compile.

    Returns:
      The result of `meanwhile`.
    """
    with Compiling(programs):
        return meanwhile()


class CompilationCounter:
    """Counts compilations and their seconds during a `with` block.

    Attributes:
      count: number of programs that were compiled, or read from the cache instead.
      cached: number of programs of `compile_programs` that were read from the cache.
      seconds: sum of the compilation times of all programs, including programs that compiled in parallel.
    """

    def __init__(self) -> None:
        self.count = self.cached = 0
        self.seconds = 0.0
        self._lock = Lock()

    def _listen(self, event: str, duration_secs: float, **_: str | int) -> None:
        if event == _COMPILE_EVENT:
            with self._lock:
                self.count += 1
                self.seconds += duration_secs

    def _listen_cached(self, event: str, **_: str | int) -> None:
        if event == _CACHE_HIT_EVENT and current_thread().name.startswith(_THREAD_PREFIX):
            with self._lock:
                self.cached += 1

    def __enter__(self) -> "CompilationCounter":
        jax.monitoring.register_event_duration_secs_listener(self._listen)
        jax.monitoring.register_event_listener(self._listen_cached)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        jax.monitoring.unregister_event_duration_listener(self._listen)
        jax.monitoring.unregister_event_listener(self._listen_cached)
