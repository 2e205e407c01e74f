"""How tests compile; and programs that need several devices, which run in a process of their own that emulates them."""

import os
import subprocess
import sys

# XLA's flags where programs run once or twice, so that compiling them is most of the time: nothing is optimised, loops
# are emitted by the older and simpler emitters, and a program is not split for threads.
FASTER = (
    "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true "
    "--xla_cpu_use_fusion_emitters=false --xla_cpu_parallel_codegen_split_count=1"
)


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
