"""Several processes that form one run: how they find each other, exchange values, and end together.

Every process runs the same program on the same values and makes the same compiled calls. What only one may do (write
files, call a service) is done by the first process. Values that may differ between processes (files, the clock,
signals) must be exchanged here before anything depends on them. These messages go through the coordinator service that
`jax.distributed` starts in the first process, not through the devices. All processes must call `agree`, `gather`,
`on_first` and `barrier` in the same order, from their main threads.
"""

import contextlib
import dataclasses
import functools
import itertools
import json
import logging
import os
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple, NoReturn, TypeVar

import jax
import numpy as np
from jax.sharding import Mesh

from icet_jax import files
from icet_jax.errors import RESUMABLE, StopRun, UserError, full_disk, out_of_memory
from icet_jax.files import JsonObject
from icet_jax.parallel.sharding import batch_sharding, replicated, row_shards
from icet_jax.typing import Keywords, PyTree

_T = TypeVar("_T")

_START_SECONDS = 300  # time within which all processes must have started
_HEARTBEAT_SECONDS = 60  # a process that is silent for longer counts as dead, and all others end
_PATIENCE_SECONDS = 3600.0  # longest wait for another process, which may be writing a large export
_SLICE_MS = 1000  # longest single wait in the coordinator's library, so that signals are handled in between
_GRACE_SECONDS = 5.0  # time for a failed process to report the cause of a broken connection
_ENDED = "icet_jax/ended"  # key of the message with which the run ends: None, or the first error
_CALLS = itertools.count()  # numbers the exchanges, whose messages must have different keys
_alone: list[bool] = []  # not empty while the first process works without the others
_own_keys: list[str] = []  # keys of messages that this process wrote and others may still be reading


class Address(NamedTuple):
    """Holds what a process needs to join a run."""

    coordinator: str  # HOST:PORT of the first process
    process_id: int  # index of this process, from 0
    process_count: int


@contextlib.contextmanager
def join_processes(coordinator: str | None, process_id: int | None, process_count: int | None) -> Iterator[None]:
    """Runs the block as one process of several, if the arguments or the environment say so.

    If the block raises an error in any process, all processes exit at once with the exit code of the process that
    raised it first. That process prints the error, and every other process prints a line that names it. With one
    process this does nothing, and errors are raised normally.

    Args:
      coordinator: HOST:PORT of the first process, "auto" if jax can ask the cluster, or None (see `find_address`).
      process_id: index of this process, from 0; None if the environment contains it.
      process_count: number of processes; None if the environment contains it.

    Raises:
      UserError: the address is incomplete, or not all processes start within five minutes.
    """
    if not _start(coordinator, process_id, process_count):
        yield
        return
    watcher = threading.Thread(target=_watch, daemon=True)
    watcher.start()
    try:
        yield
        barrier()
    except BaseException as error:
        _fail(error)
    if jax.process_index() == 0:
        _client().key_value_set(_ENDED, json.dumps(None))
    watcher.join()
    jax.distributed.shutdown()


def find_address(
    coordinator: str | None, process_id: int | None, process_count: int | None, environment: Mapping[str, str]
) -> Address | str | None:
    """Returns how to join the processes of a run: an address, "auto" to let jax find it, or None for one process.

    The arguments (from flags) come first, then JAX_COORDINATOR_ADDRESS, JAX_PROCESS_ID and JAX_NUM_PROCESSES. If the
    coordinator's address is known, index and count may also come from Open MPI or SLURM. If it is not known, jax can
    find everything under SLURM, under Open MPI 4, and on the hosts of a TPU.

    This function decides whether to let jax search, and does not simply call `jax.distributed.initialize()` (0.10.2),
    for two reasons. With Open MPI 5, that call raises the same `ValueError` whether there are several processes or one.
    If that error meant "one process", several processes would run independently and write into one run directory. In a
    SLURM step of one task, it starts a coordinator on a port that depends on the job alone, so that a second step of
    the job could not start.

    Args:
      coordinator, process_id, process_count: see `join_processes`.
      environment: environment variables.

    Raises:
      UserError: the address is incomplete, or a number is invalid.
    """
    coordinator = coordinator or environment.get("JAX_COORDINATOR_ADDRESS")
    if coordinator not in (None, "auto"):
        index = _number(process_id, environment, ("JAX_PROCESS_ID", "OMPI_COMM_WORLD_RANK", "SLURM_PROCID"))
        count = _number(process_count, environment, ("JAX_NUM_PROCESSES", "OMPI_COMM_WORLD_SIZE", "SLURM_NTASKS"))
        if index is None or count is None:
            raise UserError(f"--coordinator={coordinator} needs --process-id and --process-count")
        if not 0 <= index < count:
            raise UserError(f"--process-id={index}: must be one of 0..{count - 1}, as --process-count is {count}")
        if not coordinator.rpartition(":")[2].isdigit():
            raise UserError(f"--coordinator={coordinator}: must be HOST:PORT of process 0, or auto")
        return Address(coordinator, index, count) if count > 1 else None
    if process_id is not None or process_count is not None:
        raise UserError("--process-id and --process-count need --coordinator=HOST:PORT, where process 0 runs")
    if coordinator == "auto":
        return "auto"
    if int(environment.get("OMPI_COMM_WORLD_SIZE", "1")) > 1 and "OMPI_MCA_orte_hnp_uri" not in environment:
        raise UserError("Open MPI 5 does not say where its first process runs; add --coordinator=HOST:PORT")
    slurm = "SLURM_STEP_NODELIST" in environment and int(environment.get("SLURM_NTASKS", "1")) > 1
    mpi = int(environment.get("OMPI_COMM_WORLD_SIZE", "1")) > 1
    tpu = any("," in environment.get(name, "") for name in ("TPU_WORKER_HOSTNAMES", "TPU_PROCESS_ADDRESSES"))
    return "auto" if slurm or mpi or tpu or "MEGASCALE_COORDINATOR_ADDRESS" in environment else None


def is_writer() -> bool:
    """Returns whether this process writes the files of the run: true in the first process alone."""
    return jax.process_index() == 0


def gather(value: Any) -> list[Any]:
    """Returns the `value` (a JSON value) of every process, by process index, after all processes have called it."""
    if _is_alone():
        return [value]
    client, call, index = _client(), next(_CALLS), jax.process_index()
    prefix, old_keys = f"icet_jax/{call}", _own_keys.copy()
    if index:
        _set(f"{prefix}/{index}", value)
        values: list[Any] = _get(f"{prefix}/all")
    else:
        values = [value, *(_get(f"{prefix}/{other}") for other in range(1, jax.process_count()))]
        _set(f"{prefix}/all", values)
    for key in old_keys:  # all processes are in this call, so they have read the messages of earlier calls
        client.key_value_delete(key)
        _own_keys.remove(key)
    return values


def agree(value: _T) -> _T:
    """Returns the first process's `value` (a JSON value) in all processes."""
    return on_first(lambda: value)


def on_first(function: Callable[[], _T]) -> _T:
    """Calls `function` in the first process, and returns its result (a JSON value) in all processes.

    If `function` raises an error, all processes end.
    """
    if _is_alone():
        return function()
    call = next(_CALLS)
    key = f"icet_jax/{call}"
    if not is_writer():
        result: _T = _get(key)
    else:
        with _working_alone():
            result = function()
        _set(key, result)
    if call % 100 == 99:  # now and then
        barrier()  # deletes the messages that all processes have read
    return result


def any_of(flag: bool) -> bool:
    """Returns in all processes whether `flag` is true in any of them, for example because one received a signal."""
    return any(gather(bool(flag)))


def barrier() -> None:
    """Waits until every process has called this function."""
    gather(None)


@contextlib.contextmanager
def first_before_others() -> Iterator[None]:
    """Runs the block in the first process and then in the others, which thus find the files that the first created."""
    if _is_alone():
        yield
    elif is_writer():
        with _working_alone():
            yield
        barrier()
    else:
        barrier()
        yield


def fetch(tree: PyTree) -> PyTree:
    """Returns a pytree with numpy arrays in place of jax arrays.

    All processes must call this function, because it gathers the parts of arrays that are spread over processes.
    """
    arrays = [leaf for leaf in jax.tree.leaves(tree) if isinstance(leaf, jax.Array)]
    if jax.process_count() == 1 or all(array.is_fully_replicated for array in arrays):
        return jax.device_get(tree)

    def fetch_leaf(leaf: Any) -> Any:
        if not isinstance(leaf, jax.Array) or leaf.is_fully_addressable or leaf.is_fully_replicated:
            return jax.device_get(leaf)
        mesh = leaf.sharding.mesh  # type: ignore[attr-defined]
        return np.asarray(_replicate(mesh)(leaf).addressable_data(0))

    return jax.tree.map(fetch_leaf, tree)


@dataclasses.dataclass(frozen=True)
class Share:
    """Names the rows of a batch that a process opens: part `index` (from 0) of `count` equal, contiguous parts."""

    index: int
    count: int

    def rows(self, total: int) -> slice:
        """Returns the rows of this part as a slice of `total` rows; `count` divides `total`."""
        size = total // self.count
        return slice(self.index * size, (self.index + 1) * size)


def row_share(mesh: Mesh | None, rows: int) -> Share:
    """Returns the part of a batch of `rows` rows that this process's devices get from `sharding.place_rows`.

    Processes whose devices get the same rows (because heads are split across them) have the same share. The share is
    the whole batch, part 0 of 1, if the rows cannot be divided evenly, if some process's rows are not contiguous, or if
    processes have different numbers of rows.
    """
    if mesh is None or jax.process_count() == 1 or rows % row_shards(mesh):
        return Share(0, 1)
    shards = row_shards(mesh)
    shards_by_process: dict[int, set[int]] = {}
    index_by_device: dict[Any, Any] = dict(batch_sharding(mesh).devices_indices_map((shards,)))
    for device, (index,) in index_by_device.items():
        shards_by_process.setdefault(device.process_index, set()).update(range(shards)[index])
    shard_sets = shards_by_process.values()
    sizes = {len(shard_set) for shard_set in shard_sets}
    size = min(sizes)
    are_contiguous = all(min(part) % size == 0 and max(part) - min(part) == size - 1 for part in shard_sets)
    if len(sizes) > 1 or not are_contiguous:
        return Share(0, 1)
    return Share(min(shards_by_process[jax.process_index()]) // size, shards // size)


@contextlib.contextmanager
def _working_alone() -> Iterator[None]:
    """Marks a block that the first process runs without the others, so that nothing in it waits for them."""
    _alone.append(True)
    try:
        yield
    finally:
        _alone.pop()


def _is_alone() -> bool:
    """Returns whether there is nobody to wait for: in a run of one process, and in a block of `_working_alone`."""
    return bool(_alone) or jax.process_count() == 1


def _start(coordinator: str | None, process_id: int | None, process_count: int | None) -> bool:
    """Starts `jax.distributed` if there are several processes, and returns whether there are."""
    address = find_address(coordinator, process_id, process_count, os.environ)
    if address is None:
        return False
    jax.config.update("jax_enable_preemption_service", False)  # it would take SIGTERM away from the run
    if isinstance(address, Address):
        options: Keywords = {
            "coordinator_address": address.coordinator,
            "process_id": address.process_id,
            "num_processes": address.process_count,
            "cluster_detection_method": "deactivate",
        }
        who, where = f"process {address.process_id} of {address.process_count}", f"at {address.coordinator}"
    else:
        options, who, where = {}, "this process", "in this cluster (--coordinator=auto)"
    line = f"{who} did not find the others {where}"
    timer = threading.Timer(_START_SECONDS, _give_up, [f"{line} within {_START_SECONDS} s; are all of them started?"])
    timer.daemon = True
    timer.start()  # jax's own timeout is later, because it aborts the process without such a line
    try:
        jax.distributed.initialize(
            initialization_timeout=_START_SECONDS + 60, heartbeat_timeout_seconds=_HEARTBEAT_SECONDS, **options
        )
    except (RuntimeError, ValueError, OSError) as error:
        raise UserError(f"{line}: {(str(error).strip().splitlines() or [''])[0]}") from error
    finally:
        timer.cancel()
    try:
        count = jax.process_count()
    except RuntimeError as error:  # this call connects to the devices
        raise UserError(f"{who}: {_explain_no_devices(error)}") from error
    if count == 1:
        return False
    if not is_writer():
        _silence(jax.process_index())
    return True


def _explain_no_devices(error: RuntimeError) -> str:
    """Returns why jax could not connect to the devices."""
    name = socket.gethostname()
    try:
        socket.getaddrinfo(name, None)
    except OSError:  # CPU collectives need the address of this machine's name, but their error does not say so
        return f"this machine's name, {name}, does not resolve to an address; add it to /etc/hosts"
    return str(error).strip().splitlines()[0]


def _give_up(line: str) -> None:
    """Ends this process with an error line."""
    print(f"icet-jax: {line}", file=sys.stderr, flush=True)
    os._exit(2)


def _silence(index: int) -> None:
    """Stops this process from writing files and from printing, except for errors, whose lines carry its index."""
    files.write_nothing()
    handler = logging.StreamHandler(sys.stderr)
    handler.setLevel(logging.ERROR)
    handler.setFormatter(logging.Formatter(f"icet-jax: process {index}: %(message)s"))
    logging.getLogger("icet_jax").addHandler(handler)
    logging.getLogger("icet_jax").propagate = False
    sys.stdout = sys.stderr = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115 (to the end of the process)


def _number(value: int | None, environment: Mapping[str, str], names: tuple[str, ...]) -> int | None:
    """Returns `value` or, if it is None, the number in the first environment variable of `names` that is set.

    Returns None if none of them is set.

    Raises:
      UserError: the variable is not a whole number.
    """
    if value is not None:
        return value
    name = next((name for name in names if name in environment), None)
    if name is None:
        return None
    if not environment[name].isdigit():
        raise UserError(f"{name}={environment[name]}: must be a whole number")
    return int(environment[name])


def _client() -> Any:
    """Returns the client of the coordinator's key-value store, which has no public name in jax."""
    from jax._src import distributed

    return distributed.global_state.client


def _set(key: str, value: Any) -> None:
    """Writes a message, a JSON value, for the other processes."""
    _client().key_value_set(key, json.dumps(value))
    _own_keys.append(key)


def _get(key: str) -> Any:
    """Returns the message with this key, after waiting until a process writes it.

    Raises:
      UserError: nobody writes it within an hour.
    """
    limit = time.monotonic() + _PATIENCE_SECONDS
    while True:
        try:
            return json.loads(_client().blocking_key_value_get(key, _SLICE_MS))
        except RuntimeError as error:  # jax raises a subclass
            if "DEADLINE_EXCEEDED" not in str(error):
                raise
        if time.monotonic() > limit:
            raise UserError(f"another process has not answered for {_PATIENCE_SECONDS:.0f} s ({key}); start again")


@functools.cache
def _replicate(mesh: Mesh) -> Callable[[jax.Array], jax.Array]:
    """Returns a function that copies a whole array to every device of the mesh."""
    return jax.jit(lambda leaf: leaf, out_shardings=replicated(mesh))


def _watch() -> None:
    """Waits for the end of the run, and ends this process if another one has failed; runs in a thread."""
    failure: JsonObject | None = None
    while True:
        try:
            failure = json.loads(_client().blocking_key_value_get(_ENDED, _SLICE_MS))
            break
        except RuntimeError as error:
            if "DEADLINE_EXCEEDED" not in str(error):
                failure = {"process": 0, "line": "is gone", "code": 1}
                break
    if failure is None or failure["process"] == jax.process_index():
        return
    _print_error(f"ends with process {failure['process']}: {failure['line']}")
    with contextlib.suppress(RuntimeError):
        _client().key_value_set(f"{_ENDED}/{jax.process_index()}", "")
    _exit(failure["code"])


def _fail(error: BaseException) -> NoReturn:
    """Reports this process's error to the others, unless another process has failed before, and ends this process."""
    error = out_of_memory(error) or error
    line, code = describe(error)
    client, index = _client(), jax.process_index()
    if not isinstance(error, UserError | KeyboardInterrupt | SystemExit):
        time.sleep(_GRACE_SECONDS)  # if another process failed and broke a connection, `_watch` now ends this one
    try:
        client.key_value_set(_ENDED, json.dumps({"process": index, "line": line, "code": code}))
    except RuntimeError:
        time.sleep(_GRACE_SECONDS)  # another process failed first, and `_watch` is about to end this one
        _exit(code)
    if not isinstance(error, UserError | KeyboardInterrupt | SystemExit):
        traceback.print_exception(error, file=sys.__stderr__)
    _print_error(line)
    if index == 0:  # the coordinator ends with this process, so wait until the others have read the message
        deadline = time.monotonic() + _GRACE_SECONDS
        for other in range(1, jax.process_count()):
            with contextlib.suppress(RuntimeError):
                milliseconds = max(1, int(1000 * (deadline - time.monotonic())))
                client.blocking_key_value_get(f"{_ENDED}/{other}", milliseconds)
    _exit(code)


def describe(error: BaseException) -> tuple[str, int]:
    """Returns an error as one line for the user, and the exit code of a process that ends because of it."""
    if isinstance(error, KeyboardInterrupt):
        return "interrupted; the same command goes on from the last checkpoint", 130
    if isinstance(error, StopRun):
        return error.line, RESUMABLE
    if isinstance(error, SystemExit):
        return f"exit code {error.code}", error.code if isinstance(error.code, int) else 1
    error = full_disk(error) or out_of_memory(error) or error
    first = (str(error).strip().splitlines() or [""])[0]
    if isinstance(error, UserError):
        return first, error.exit_code
    return f"{type(error).__name__}: {first}", 1


def _print_error(line: str) -> None:
    """Prints a line with the index of this process to the original standard error, even if it was silenced."""
    index = jax.process_index()
    print(f"icet-jax: {f'process {index}: ' if index else ''}{line}", file=sys.__stderr__, flush=True)


def _exit(code: int) -> NoReturn:
    """Ends this process at once, because an orderly exit would wait for other processes that have ended already."""
    for stream in (sys.stdout, sys.stderr, sys.__stderr__):
        with contextlib.suppress(OSError, ValueError, AttributeError):
            stream.flush()  # type: ignore[union-attr]
    os._exit(code)
