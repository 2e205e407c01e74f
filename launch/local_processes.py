"""Several processes with emulated CPU devices on one machine, as one run: what a cluster does, without one.

    python launch/local_processes.py --processes 2 --devices 2 -- --config=configs/llava15_lppo.py --workdir=runs/two

What stands after `--` goes to `python -m icet_jax.main` in every process. They speak over the loopback interface. When
one ends with an error or is killed the others end too, and the exit code is that of the first that failed (128 and the
signal's number if it was killed).
"""

import argparse
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence

GRACE = 20.0  # seconds in which the others should end by themselves after one has named its error
KILLED_GRACE = 5.0  # after one was killed and could not: the others may be waiting in a collective
_POLL = 0.05
# Threads of XLA's pool for each device. A device may wait in several collectives of a program at once; with one each,
# as it is by default, those that wait can take the thread of a device that they wait for.
_THREADS = 4


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the processes; returns the exit code of all."""
    parser = argparse.ArgumentParser(
        prog="local_processes.py", usage="python launch/local_processes.py --processes N --devices M -- ARGUMENTS"
    )
    parser.add_argument("--processes", type=int, default=2, help="how many")
    parser.add_argument("--devices", type=int, default=1, help="emulated CPU devices of each")
    parser.add_argument("arguments", nargs="*", help="of icet_jax.main, after --")
    options = parser.parse_args(arguments)
    if min(options.processes, options.devices) < 1:
        parser.error("--processes and --devices must be at least 1")
    command = [sys.executable, "-m", "icet_jax.main", *options.arguments]
    children = start(command, processes=options.processes, devices=options.devices)
    signal.signal(signal.SIGTERM, lambda *_: send(children, signal.SIGTERM))
    signal.signal(signal.SIGINT, lambda *_: None)  # the terminal has sent it to the children as well
    return wait(children)


def start(command: Sequence[str], *, processes: int, devices: int) -> list[subprocess.Popen[bytes]]:
    """Starts `command` in every process; it must enter `icet_jax.parallel.distributed.join_processes`."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    children = []
    for index in range(processes):
        environment = os.environ | {
            "JAX_PLATFORMS": "cpu",
            "XLA_FLAGS": f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={devices}".strip(),
            "JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{port}",
            "JAX_PROCESS_ID": str(index),
            "JAX_NUM_PROCESSES": str(processes),
            "NPROC": str(max(_THREADS * devices, os.cpu_count() or 1)),
        }
        # Those after the first have nothing to say on stdout, where the collectives' library greets every peer.
        quiet = subprocess.DEVNULL if index else None
        children.append(subprocess.Popen(list(command), env=environment, stdout=quiet))
    return children


def wait(children: Sequence[subprocess.Popen[bytes]]) -> int:
    """Waits for all, and ends the rest after the first failure; returns its exit code, or 0."""
    failed, limit, running = 0, float("inf"), True
    while running:
        codes = [child.poll() for child in children]
        running = None in codes
        for index, code in enumerate(codes):
            if code and not failed:
                failed, limit = exit_code(code), time.monotonic() + (GRACE if code > 0 else KILLED_GRACE)
                if code < 0:
                    name = signal.Signals(-code).name
                    print(f"local_processes: process {index} was killed ({name}); the others end", file=sys.stderr)
        if time.monotonic() > limit:
            send(children, signal.SIGKILL)
        time.sleep(_POLL)
    return failed


def exit_code(returncode: int) -> int:
    """As a shell gives it: 128 and the signal's number for a process that was killed."""
    return returncode if returncode >= 0 else 128 - returncode


def send(children: Sequence[subprocess.Popen[bytes]], number: int) -> None:
    """A signal to every child that still runs."""
    for child in children:
        if child.poll() is None:
            child.send_signal(number)


if __name__ == "__main__":
    sys.exit(main())
