"""Several processes that form one run: how they find each other, agree, and end together.

Every process runs the same program on the same values and enters the same compiled calls. What only one may do (write
files, call a service) the first one does. What each process sees for itself (files, the clock, signals) must be agreed
here before it decides anything. Host-side messages go through the coordinator service that `jax.distributed` starts in
the first process, not through the devices. All processes call `agree`, `gather`, `on_first` and `together` in the same
order, from their main threads.
"""

import contextlib
import dataclasses
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
from icet_jax.parallel.sharding import batch_sharding, replicated, row_shards

_T = TypeVar("_T")

_START_SECONDS = 300  # time within which all processes must have started
_HEARTBEAT_SECONDS = 60  # a process that is silent for longer counts as dead, and all others end
_PATIENCE_SECONDS = 3600.0  # longest wait for another process, which may be writing a large export
_SLICE_MS = 1000  # longest single wait in the coordinator's library, so that signals are handled in between
_GRACE_SECONDS = 5.0  # time for a failed process to report the cause of a broken connection
_ENDED = "icet_jax/ended"
_CALLS = itertools.count()
_alone: list[bool] = []  # not empty while the first process works without the others
_spent: list[str] = []  # keys that this process wrote and others may still be reading


class Address(NamedTuple):
    """Holds where the processes meet, the first one's HOST:PORT, and the number of this process and of all."""

    coordinator: str
    process_id: int
    process_count: int


@contextlib.contextmanager
def joined(coordinator: str | None, process_id: int | None, process_count: int | None) -> Iterator[None]:
    """Runs the block as one process of several, if the arguments or the environment say so.

    An error in the block ends all processes with the exit code of the process that raised it. That process prints the
    error, and each other prints one line that names it; the block's own process does not return then. With one process
    this does nothing, and errors are raised normally.

    Args:
      coordinator: HOST:PORT of the first process, "auto" (the cluster knows it), or None (see `find`).
      process_id: number of this process from 0; None if the environment has it.
      process_count: number of all processes; None if the environment has it.

    Raises:
      UserError: the address is incomplete, or not all processes start within five minutes.
    """
    if not _start(coordinator, process_id, process_count):
        yield
        return
    watch = threading.Thread(target=_watch, daemon=True)
    watch.start()
    try:
        yield
        together()
    except BaseException as error:
        _fail(error)
    if jax.process_index() == 0:
        _client().key_value_set(_ENDED, json.dumps(None))
    watch.join()
    jax.distributed.shutdown()


def find(
    coordinator: str | None, process_id: int | None, process_count: int | None, environment: Mapping[str, str]
) -> Address | str | None:
    """Returns what is known about the processes: an address, "auto" if jax asks the cluster, or None for one process.

    Flags come first, then JAX_COORDINATOR_ADDRESS, JAX_PROCESS_ID and JAX_NUM_PROCESSES. With an address, Open MPI and
    SLURM may provide the numbers. Without one, jax is asked under SLURM, Open MPI 4, and on the hosts of a TPU.

    jax finds the addresses, but whether to ask it is decided here. `jax.distributed.initialize()` (0.10.2) raises the
    same `ValueError` for one process and for two of Open MPI 5, which would both write into one run directory. In a
    SLURM step of one task it starts a coordinator on a port that follows from the job, so that a second step's could
    not start.

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
        raise UserError("Open MPI 5 does not tell where its first process runs; add --coordinator=HOST:PORT")
    slurm = "SLURM_STEP_NODELIST" in environment and int(environment.get("SLURM_NTASKS", "1")) > 1
    mpi = int(environment.get("OMPI_COMM_WORLD_SIZE", "1")) > 1
    tpu = any("," in environment.get(name, "") for name in ("TPU_WORKER_HOSTNAMES", "TPU_PROCESS_ADDRESSES"))
    return "auto" if slurm or mpi or tpu or "MEGASCALE_COORDINATOR_ADDRESS" in environment else None


def is_writer() -> bool:
    """Returns whether this process writes the common results; only the first one does."""
    return jax.process_index() == 0


def gather(value: Any) -> list[Any]:
    """Returns every process's `value`, a JSON value, in order of process, after all processes have called it."""
    if _one():
        return [value]
    client, call, index = _client(), next(_CALLS), jax.process_index()
    prefix, old = f"icet_jax/{call}", _spent.copy()
    if index:
        _set(f"{prefix}/{index}", value)
        values: list[Any] = _get(f"{prefix}/all")
    else:
        values = [value, *(_get(f"{prefix}/{other}") for other in range(1, jax.process_count()))]
        _set(f"{prefix}/all", values)
    for key in old:  # all processes are in this call and have read the messages of earlier ones
        client.key_value_delete(key)
        _spent.remove(key)
    return values


def agree(value: _T) -> _T:
    """Returns the first process's `value`, a JSON value, on all processes."""
    return on_first(lambda: value)


def on_first(function: Callable[[], _T]) -> _T:
    """Calls `function` only in the first process and returns its JSON result in all of them; an error ends them all."""
    if _one():
        return function()
    call = next(_CALLS)
    key = f"icet_jax/{call}"
    if not is_writer():
        result: _T = _get(key)
    else:
        with _by_itself():
            result = function()
        _set(key, result)
    if call % 100 == 99:
        together()  # so that messages that all have read can be deleted
    return result


def any_of(flag: bool) -> bool:
    """Returns whether `flag` is set in any process, for example for a signal that only one of them received."""
    return any(gather(bool(flag)))


def together() -> None:
    """Waits until every process has called this function."""
    gather(None)


@contextlib.contextmanager
def first_before_others() -> Iterator[None]:
    """Runs the block in the first process and then in the others, which find the files that it created."""
    if _one():
        yield
    elif is_writer():
        with _by_itself():
            yield
        together()
    else:
        together()
        yield


def fetch(tree: Any) -> Any:
    """Returns arrays as numpy on every process; parts on other processes' devices are gathered, so all must call it."""
    far = [leaf for leaf in jax.tree.leaves(tree) if isinstance(leaf, jax.Array) and not leaf.is_fully_replicated]
    if jax.process_count() == 1 or not far:
        return jax.device_get(tree)

    def near(leaf: Any) -> Any:
        if not isinstance(leaf, jax.Array) or leaf.is_fully_addressable or leaf.is_fully_replicated:
            return jax.device_get(leaf)
        return np.asarray(_whole(leaf.sharding.mesh)(leaf).addressable_data(0))  # type: ignore[attr-defined]

    return jax.tree.map(near, tree)


@dataclasses.dataclass(frozen=True)
class Share:
    """Part `index` of `count` equal, contiguous parts of a batch's rows, which this process opens."""

    index: int
    count: int

    def rows(self, total: int) -> slice:
        """Returns the rows of this part as a slice of `total` rows; `count` divides `total`."""
        part = total // self.count
        return slice(self.index * part, (self.index + 1) * part)


def row_share(mesh: Mesh | None, rows: int) -> Share:
    """Returns the part of a batch of `rows` rows that this process's devices hold after `sharding.place_rows`.

    It is the whole batch (0 of 1) if the rows cannot be divided evenly, or the devices of a process do not hold
    contiguous rows, or not as many as those of every other process. Processes that hold the same rows (because heads
    are split across them) have the same share.
    """
    if mesh is None or jax.process_count() == 1 or rows % row_shards(mesh):
        return Share(0, 1)
    shards = row_shards(mesh)
    rows_by_process: dict[int, set[int]] = {}
    devices: dict[Any, Any] = dict(batch_sharding(mesh).devices_indices_map((shards,)))
    for device, (part,) in devices.items():
        rows_by_process.setdefault(device.process_index, set()).update(range(shards)[part])
    sizes = {len(own) for own in rows_by_process.values()}
    size = min(sizes)
    regular = all(min(own) % size == 0 and max(own) - min(own) == size - 1 for own in rows_by_process.values())
    if len(sizes) > 1 or not regular:
        return Share(0, 1)
    return Share(min(rows_by_process[jax.process_index()]) // size, shards // size)


@contextlib.contextmanager
def _by_itself() -> Iterator[None]:
    """Marks a block that only the first process runs, so that nothing in it waits for the others."""
    _alone.append(True)
    try:
        yield
    finally:
        _alone.pop()


def _one() -> bool:
    return bool(_alone) or jax.process_count() == 1


def _start(coordinator: str | None, process_id: int | None, process_count: int | None) -> bool:
    """Starts `jax.distributed` if there are several processes, and returns whether there are."""
    address = find(coordinator, process_id, process_count, os.environ)
    if address is None:
        return False
    jax.config.update("jax_enable_preemption_service", False)  # it would take SIGTERM away from the run
    options: dict[str, Any] = {}
    if isinstance(address, Address):
        options = dict(zip(("coordinator_address", "process_id", "num_processes"), _ordered(address), strict=True))
        options["cluster_detection_method"] = "deactivate"
    who = f"process {address.process_id} of {address.process_count}" if isinstance(address, Address) else "this process"
    where = f"at {address.coordinator}" if isinstance(address, Address) else "in this cluster (--coordinator=auto)"
    line = f"{who} did not find the others {where}"
    clock = threading.Timer(_START_SECONDS, _give_up, [f"{line} within {_START_SECONDS} s; are all of them started?"])
    clock.daemon = True
    clock.start()  # the library's own timeout aborts the process, and comes later
    try:
        times: dict[str, Any] = {
            "initialization_timeout": _START_SECONDS + 60,
            "heartbeat_timeout_seconds": _HEARTBEAT_SECONDS,
        }
        jax.distributed.initialize(**options, **times)
    except (RuntimeError, ValueError, OSError) as error:
        raise UserError(f"{line}: {(str(error).strip().splitlines() or [''])[0]}") from error
    finally:
        clock.cancel()
    try:
        count = jax.process_count()
    except RuntimeError as error:  # from here on the devices are there, or never
        raise UserError(f"{who}: {_no_devices(error)}") from error
    if count == 1:
        return False
    if not is_writer():
        _be_quiet(jax.process_index())
    return True


def _no_devices(error: RuntimeError) -> str:
    name = socket.gethostname()
    try:
        socket.getaddrinfo(name, None)
    except OSError:  # CPU collectives look for this machine by its name, and say nothing of it
        return f"this machine's name, {name}, does not resolve to an address; add it to /etc/hosts"
    return str(error).strip().splitlines()[0]


def _give_up(line: str) -> None:
    print(f"icet-jax: {line}", file=sys.stderr, flush=True)
    os._exit(2)


def _ordered(address: Address) -> tuple[str, int, int]:
    return address.coordinator, address.process_id, address.process_count


def _be_quiet(index: int) -> None:
    """Stops this process from writing files or printing, except for errors, which carry its number."""
    files.write_nothing()
    handler = logging.StreamHandler(sys.stderr)
    handler.setLevel(logging.ERROR)
    handler.setFormatter(logging.Formatter(f"icet-jax: process {index}: %(message)s"))
    logging.getLogger("icet_jax").addHandler(handler)
    logging.getLogger("icet_jax").propagate = False
    sys.stdout = sys.stderr = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115 (to the end of the process)


def _number(value: int | None, environment: Mapping[str, str], names: tuple[str, ...]) -> int | None:
    if value is not None:
        return value
    name = next((name for name in names if name in environment), None)
    if name is None:
        return None
    if not environment[name].isdigit():
        raise UserError(f"{name}={environment[name]}: must be a whole number")
    return int(environment[name])


def _client() -> Any:
    from jax._src import distributed  # the coordinator's store has no public name

    return distributed.global_state.client


def _set(key: str, value: Any) -> None:
    _client().key_value_set(key, json.dumps(value))
    _spent.append(key)


def _get(key: str) -> Any:
    """Returns the value of a key as soon as it exists.

    Raises:
      UserError: it does not appear in time.
    """
    limit = time.monotonic() + _PATIENCE_SECONDS
    while True:
        try:
            return json.loads(_client().blocking_key_value_get(key, _SLICE_MS))
        except RuntimeError as error:  # jax's own type is a kind of it
            if "DEADLINE_EXCEEDED" not in str(error):
                raise
        if time.monotonic() > limit:
            raise UserError(f"another process has not answered for {_PATIENCE_SECONDS:.0f} s ({key}); start again")


def _whole(mesh: Mesh) -> Callable[[Any], Any]:
    if mesh not in _WHOLE:
        _WHOLE[mesh] = jax.jit(lambda leaf: leaf, out_shardings=replicated(mesh))
    return _WHOLE[mesh]


_WHOLE: dict[Mesh, Callable[[Any], Any]] = {}


def _watch() -> None:
    """Ends this process as soon as another one has failed."""
    end = None
    while True:
        try:
            end = json.loads(_client().blocking_key_value_get(_ENDED, _SLICE_MS))
            break
        except RuntimeError as error:
            if "DEADLINE_EXCEEDED" not in str(error):
                end = {"process": 0, "line": "is gone", "code": 1}
                break
    if end is None or end["process"] == jax.process_index():
        return
    _say(f"ends with process {end['process']}: {end['line']}")
    with contextlib.suppress(RuntimeError):
        _client().key_value_set(f"{_ENDED}/{jax.process_index()}", "")
    _exit(end["code"])


def _fail(error: BaseException) -> NoReturn:
    """Reports this process's error to all unless another one failed before, and ends with its exit code."""
    error = out_of_memory(error) or error
    line, code = describe(error)
    client, index = _client(), jax.process_index()
    if not isinstance(error, UserError | KeyboardInterrupt | SystemExit):
        time.sleep(_GRACE_SECONDS)  # a broken connection is another's failure: the watch ends us with that one's name
    try:
        client.key_value_set(_ENDED, json.dumps({"process": index, "line": line, "code": code}))
    except RuntimeError:
        time.sleep(_GRACE_SECONDS)  # another was first, and the watch is about to end this process
        _exit(code)
    if not isinstance(error, UserError | KeyboardInterrupt | SystemExit):
        traceback.print_exception(error, file=sys.__stderr__)
    _say(line)
    if index == 0:  # the coordinator goes with this process: the others must have heard first
        limit = time.monotonic() + _GRACE_SECONDS
        for other in range(1, jax.process_count()):
            with contextlib.suppress(RuntimeError):
                left = max(1, int(1000 * (limit - time.monotonic())))
                client.blocking_key_value_get(f"{_ENDED}/{other}", left)
    _exit(code)


def describe(error: BaseException) -> tuple[str, int]:
    """Returns one line about an error, and the exit code of a process that ends because of it."""
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


def _say(line: str) -> None:
    index = jax.process_index()
    print(f"icet-jax: {f'process {index}: ' if index else ''}{line}", file=sys.__stderr__, flush=True)


def _exit(code: int) -> NoReturn:
    for stream in (sys.stdout, sys.stderr, sys.__stderr__):
        with contextlib.suppress(OSError, ValueError, AttributeError):
            stream.flush()  # type: ignore[union-attr]
    os._exit(code)  # the other processes are gone: an orderly end would wait for them
