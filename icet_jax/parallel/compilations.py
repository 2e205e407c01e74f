"""Compiles programs: several at the same time, counted, and cached for later processes."""

import hashlib
import os
import platform
import sys
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Lock, current_thread
from types import TracebackType
from typing import Any

import jax
import jax.monitoring
from jax.experimental.compilation_cache import compilation_cache

from icet_jax.errors import during
from icet_jax.parallel.programs import keep_traces

OFF = "off"
_LARGEST = 8 * 2**30  # most bytes of cached programs; the oldest are deleted
_THREADS = "compile"
_COMPILE_EVENT = "/jax/core/compile/backend_compile_duration"
_KEPT_EVENT = "/jax/compilation_cache/cache_hits"


def keep_programs(choice: str | None) -> None:
    """Makes this process write compiled programs to a folder, where later processes find them.

    If the folder cannot be written to, one line is printed and programs are compiled again.

    Args:
      choice: a folder, `OFF`, or None for JAX_COMPILATION_CACHE_DIR or else the user's cache folder.
    """
    folder = None
    if choice != OFF:
        own = None if choice is not None else os.environ.get("JAX_COMPILATION_CACHE_DIR")
        folder = own or str(_machine_folder(Path(choice).expanduser() if choice else _default_folder()))
        if "://" not in folder and not _is_writable(Path(folder)):
            folder = None
    if "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS" not in os.environ:
        # A start needs dozens of small programs, and reading each is faster than compiling it.
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.config.update("jax_compilation_cache_dir", folder)
    keep_traces(None if folder is None or "://" in folder else Path(folder))
    compilation_cache.reset_cache()  # jax reads this setting only before its first compilation


def _default_folder() -> Path:
    home = os.environ.get("XDG_CACHE_HOME")
    return (Path(home) if home else Path.home() / ".cache") / "icet_jax" / "compiled"


def _machine_folder(folder: Path) -> Path:
    """Returns a sub-folder for machines like this one, because jax's keys do not distinguish processors that share a
    home."""
    features = platform.processor()
    if Path("/proc/cpuinfo").exists():
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
        features = next((line for line in lines if line.lower().startswith(("flags", "features"))), features)
    return folder / f"{platform.machine()}-{hashlib.sha256(features.encode()).hexdigest()[:8]}"


def _is_writable(folder: Path) -> bool:
    """Returns whether the folder exists or can be created, and is writable; prints a message if not."""
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
    """Deletes the oldest files beyond `_LARGEST` bytes; other processes may do the same at the same time.

    jax's own limit, `jax_compilation_cache_max_size`, does not count the cached traces, and locks the folder for a
    read.
    """
    files = sorted(((entry.stat(), entry.path) for entry in os.scandir(folder)), key=lambda file: -file[0].st_mtime)
    total = 0
    for facts, path in files:
        total += facts.st_size
        if total > _LARGEST:
            Path(path).unlink(missing_ok=True)


def compile_programs(programs: Iterable[tuple[str, Any]], meanwhile: Callable[[], Any] = lambda: None) -> Any:
    """Compiles all programs in parallel, each as soon as it is traced, and prints how long that took.

    The jitted functions find the results: calling one with the same shapes compiles nothing.

    Args:
      programs: (name, `jax.stages.Lowered`) pairs; while the next one is traced, earlier ones are compiled.
      meanwhile: called after the last one was traced.

    Returns:
      The result of `meanwhile`.
    """

    def seconds_of(name: str, lowered: Any) -> float:
        began = time.perf_counter()
        with during(f"compiling {name}"):
            lowered.compile()
        return time.perf_counter() - began

    start = time.perf_counter()
    with CompilationCounter() as counter, ThreadPoolExecutor(os.cpu_count(), _THREADS) as threads:
        futures = [(name, threads.submit(seconds_of, name, lowered)) for name, lowered in programs]
        result = meanwhile()
        parts = ", ".join(f"{name} {future.result():.1f} s" for name, future in futures)
    kept = f", {counter.kept} of {len(futures)} kept from before" if counter.kept else ""
    print(f"compiled: {parts}; {time.perf_counter() - start:.1f} s in all{kept}", file=sys.stderr)
    return result


class CompilationCounter:
    """Counts XLA compilations and their seconds while the `with` block is open.

    Attributes:
      count: programs that were compiled or read from a persistent cache.
      kept: programs of `compile_programs` that were read from the cache.
      seconds: total time; programs that compile in parallel each count fully.
    """

    def __init__(self) -> None:
        self.count = self.kept = 0
        self.seconds = 0.0
        self._lock = Lock()

    def _listen(self, event: str, duration_secs: float, **_: str | int) -> None:
        if event == _COMPILE_EVENT:
            with self._lock:
                self.count += 1
                self.seconds += duration_secs

    def _listen_kept(self, event: str, **_: str | int) -> None:
        if event == _KEPT_EVENT and current_thread().name.startswith(_THREADS):
            with self._lock:
                self.kept += 1

    def __enter__(self) -> "CompilationCounter":
        jax.monitoring.register_event_duration_secs_listener(self._listen)
        jax.monitoring.register_event_listener(self._listen_kept)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        jax.monitoring.unregister_event_duration_listener(self._listen)
        jax.monitoring.unregister_event_listener(self._listen_kept)
