"""Programs that need several devices run in a process of their own, which emulates them."""

import os
import subprocess
import sys


def emulating(devices: int) -> dict[str, str]:
    """The environment of such a process: that of the tests (see conftest.py), with so many CPU devices."""
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={devices}".strip()
    return {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags}


def assert_agreed(program: str, devices: int, timeout: float) -> None:
    """Runs a Python program on so many emulated CPU devices; it ends well and its last word is that results agree."""
    threads = str(4 * devices)  # see launch/local_processes.py
    environment = emulating(devices) | {"NPROC": threads}
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=timeout)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "agreed" in done.stdout
