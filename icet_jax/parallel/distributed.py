"""Several processes that are one run: how they find each other, agree, and end together.

Every process runs the same program on the same values and enters the same compiled calls. What only one of them may do
(write, ask a service) the first one does; what each sees for itself (files, the clock, signals) must not decide
anything before it has been agreed here. Words on the host travel through the coordinator that `jax.distributed` starts
in the first process, not through the devices; all processes call `agree`, `gather`, `on_first` and `together` in one
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
from icet_jax.errors import RESUMABLE, Stopped, UserError, full_disk, out_of_memory
from icet_jax.parallel.sharding import batch_sharding, replicated, row_shards

_T = TypeVar("_T")

_START_SECONDS = 300  # in which all processes must have come
_HEARTBEAT_SECONDS = 60  # of silence after which a process counts as dead, and all others are ended
_PATIENCE_SECONDS = 3600.0  # that one process waits for another's word: the first may be writing a large export
_SLICE_MS = 1000  # a wait in the coordinator's library is this long at most: signals are handled between two
_GRACE_SECONDS = 5.0  # in which the cause of a broken connection should have been named by the process that failed
_ENDED = "icet_jax/ended"
_CALLS = itertools.count()
_alone: list[bool] = []  # not empty while the first process does something by itself
_spent: list[str] = []  # keys of this process that the others may still be reading


class Address(NamedTuple):
    """Where the processes meet: the first one's HOST:PORT, and which of how many this one is."""

    coordinator: str
    process_id: int
    process_count: int


@contextlib.contextmanager
def joined(coordinator: str | None, process_id: int | None, process_count: int | None) -> Iterator[None]:
    """Runs the block as one process of several, if the arguments or the environment say so.

    An error in the block ends all processes with this one's exit code, after the error was printed once by the process
    that met it (and named in a line of each other's); the block's own process does not return then. With one process
    nothing happens here, and errors pass.

    Args:
      coordinator: HOST:PORT of the first process, "auto" (the cluster tells), or None (as `find` finds out).
      process_id: from 0; None as the environment says.
      process_count: of all processes; None as the environment says.

    Raises:
      UserError: half an address, or the processes do not all come within five minutes.
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
    """What is known of the processes: an address, "auto" where jax asks the cluster itself, or None for one process.

    The flags come first, then JAX_COORDINATOR_ADDRESS, JAX_PROCESS_ID and JAX_NUM_PROCESSES. Beside an address, Open
    MPI and SLURM may tell the numbers. Without one, jax is asked under SLURM, Open MPI 4, and on the hosts of a TPU.

    jax finds the addresses; whether to ask it is decided here, because `jax.distributed.initialize()` (0.10.2) gives
    the same `ValueError` for one process and for two of Open MPI 5, which would both write into one run directory, and
    in a SLURM step of one task starts a coordinator on a port that follows from the job: a second step's could not
    start.

    Raises:
      UserError: half an address, or numbers that are none.
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
    """Whether this process writes what all have found: the first one does."""
    return jax.process_index() == 0


def gather(value: Any) -> list[Any]:
    """Every process's `value`, in order of process; a JSON value. Returns when all processes have called it."""
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
    for key in old:  # everyone is in this call, and has read what was said in those before
        client.key_value_delete(key)
        _spent.remove(key)
    return values


def agree(value: _T) -> _T:
    """The first process's `value`, on all of them; a JSON value."""
    return on_first(lambda: value)


def on_first(function: Callable[[], _T]) -> _T:
    """Calls `function` in the first process alone; the others wait, and get its JSON result. An error ends them all."""
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
        together()  # so that what has been read by all can be forgotten
    return result


def any_of(flag: bool) -> bool:
    """Whether `flag` is set in any process: for what one process alone sees, a signal for example."""
    return any(gather(bool(flag)))


def together() -> None:
    """Waits until every process is here."""
    gather(None)


@contextlib.contextmanager
def first_before_others() -> Iterator[None]:
    """The first process runs the block, then the others do: what it makes and keeps on disk, they find there."""
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
    """Arrays as numpy on every process; what lies on other processes' devices is gathered, so all must call it."""
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
    """Part `index` of `count` equal, contiguous parts of a batch's rows: those that this process opens."""

    index: int
    count: int

    def rows(self, total: int) -> slice:
        """Which of `total` rows they are; `count` divides `total`."""
        part = total // self.count
        return slice(self.index * part, (self.index + 1) * part)


def row_share(mesh: Mesh | None, rows: int) -> Share:
    """What this process's devices hold of a batch of `rows` rows that `sharding.place_rows` splits over the mesh.

    The whole (0 of 1) where the rows do not divide, or the devices of a process do not hold contiguous rows, or not as
    many as those of every other process. Processes that hold the same rows (heads split across them) share the share.
    """
    if mesh is None or jax.process_count() == 1 or rows % row_shards(mesh):
        return Share(0, 1)
    shards = row_shards(mesh)
    held: dict[int, set[int]] = {}
    devices: dict[Any, Any] = dict(batch_sharding(mesh).devices_indices_map((shards,)))
    for device, (part,) in devices.items():
        held.setdefault(device.process_index, set()).update(range(shards)[part])
    sizes = {len(own) for own in held.values()}
    size = min(sizes)
    regular = all(min(own) % size == 0 and max(own) - min(own) == size - 1 for own in held.values())
    if len(sizes) > 1 or not regular:
        return Share(0, 1)
    return Share(min(held[jax.process_index()]) // size, shards // size)


@contextlib.contextmanager
def _by_itself() -> Iterator[None]:
    """What the first process does here the others do not: there is nobody to wait for in it."""
    _alone.append(True)
    try:
        yield
    finally:
        _alone.pop()


def _one() -> bool:
    return bool(_alone) or jax.process_count() == 1


def _start(coordinator: str | None, process_id: int | None, process_count: int | None) -> bool:
    """Starts `jax.distributed` where there are several processes; returns whether there are."""
    found = find(coordinator, process_id, process_count, os.environ)
    if found is None:
        return False
    jax.config.update("jax_enable_preemption_service", False)  # it would take SIGTERM away from the run
    how: dict[str, Any] = {}
    if isinstance(found, Address):
        how = dict(zip(("coordinator_address", "process_id", "num_processes"), _ordered(found), strict=True))
        how["cluster_detection_method"] = "deactivate"
    who = f"process {found.process_id} of {found.process_count}" if isinstance(found, Address) else "this process"
    where = f"at {found.coordinator}" if isinstance(found, Address) else "in this cluster (--coordinator=auto)"
    line = f"{who} did not find the others {where}"
    clock = threading.Timer(_START_SECONDS, _give_up, [f"{line} within {_START_SECONDS} s; are all of them started?"])
    clock.daemon = True
    clock.start()  # the library's own end of patience is an abort, and comes later
    try:
        times: dict[str, Any] = {
            "initialization_timeout": _START_SECONDS + 60,
            "heartbeat_timeout_seconds": _HEARTBEAT_SECONDS,
        }
        jax.distributed.initialize(**how, **times)
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
    """Nothing is written or said by this process but its errors, which carry its number."""
    files.write_nothing()
    handler = logging.StreamHandler(sys.stderr)
    handler.setLevel(logging.ERROR)
    handler.setFormatter(logging.Formatter(f"icet-jax: process {index}: %(message)s"))
    logging.getLogger("icet_jax").addHandler(handler)
    logging.getLogger("icet_jax").propagate = False
    sys.stdout = sys.stderr = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115 (to the end of the process)


def _number(given: int | None, environment: Mapping[str, str], names: tuple[str, ...]) -> int | None:
    if given is not None:
        return given
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
    """The value of a key as soon as it is there.

    Raises:
      UserError: it does not come.
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
    """Ends this process as soon as another has failed."""
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
    """Names this process's error to all, unless another process has failed before, and ends with its exit code."""
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
    """One line about an error, and the exit code that a process ends with for it."""
    if isinstance(error, KeyboardInterrupt):
        return "interrupted; the same command goes on from the last checkpoint", 130
    if isinstance(error, Stopped):
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
