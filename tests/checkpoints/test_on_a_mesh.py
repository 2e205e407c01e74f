"""From eight (emulated) devices and from two processes: the same parameters in, the same bytes out."""

import json
import socket
import subprocess
import sys

import numpy as np
import pytest

pytest.importorskip("torch")

from icet_jax.models.adapter_export import save_adapter  # noqa: E402
from icet_jax.models.loading import load_vlm  # noqa: E402
from icet_jax.models.saving import save_vlm  # noqa: E402
from icet_jax.parallel.sharding import flatten_with_names  # noqa: E402
from tests import tiny, tiny_families  # noqa: E402
from tests.checkpoints.test_round_trip import tensors  # noqa: E402
from tests.devices import emulating  # noqa: E402
from tests.models.test_adapters import random_lora  # noqa: E402

# Runs in each process: loads spread over the mesh, checks this process's parts against `single`, exports.
PROGRAM = """
import json, pathlib, sys
import jax
options = json.loads(sys.argv[1])
if options["processes"] > 1:
    jax.distributed.initialize(options["address"], options["processes"], int(sys.argv[2]))
import numpy as np
from icet_jax.checkpoints import safetensors_io, streaming
from icet_jax.models.adapter_export import save_adapter
from icet_jax.models.saving import save_vlm
from icet_jax.models.loading import load_vlm
from icet_jax.nn.layers import Lora
from icet_jax.parallel.mesh import make_mesh
from icet_jax.parallel.sharding import flatten_with_names, shardings

streaming.BLOCK_BYTES = 9000
folder = pathlib.Path(options["folder"])
mesh = make_mesh(**options["mesh"])
loaded = load_vlm(folder / "source", dtype="bfloat16", mesh=mesh)
single = np.load(folder / "single.npz")
split = 0
for name, leaf in flatten_with_names(loaded.params).items():
    whole = single[name].view(leaf.dtype)
    for shard in leaf.addressable_shards:
        np.testing.assert_array_equal(np.asarray(shard.data), whole[shard.index])
        split += shard.data.size < leaf.size
assert split > 20, "most kernels must be split"

saved = np.load(folder / "lora.npz")
targets = sorted({name.rpartition(".")[0] for name in saved.files})
weights = {target: {side: saved[f"{target}.{side}"] for side in "ab"} for target in targets}
placed = jax.tree.map(
    lambda x, where: jax.make_array_from_callback(x.shape, where, lambda index: x[index]),
    weights, shardings(weights, mesh),
)
lora = Lora(weights=placed, scale=2.0)
out = folder / options["out"]
common = {"source_dir": folder / "source", "max_shard_bytes": 60_000}
save_vlm(out / "merged", loaded.config, loaded.params, lora=lora, trained=(), **common)
save_vlm(out / "compared", loaded.config, loaded.params, **common)
save_adapter(out / "adapter", lora, loaded.config, base="x/y")
print("exported")
"""


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    folder = tmp_path_factory.mktemp("reference")
    tiny.save_llava(folder / "source", tiny.llava(seed=6), dtype="float16", shards=2, processor=False)
    return on_one_device(folder)


def on_one_device(folder):
    """Beside a source: what one device loads from it, adapters, and what one device exports."""
    source = folder / "source"
    loaded = load_vlm(source, dtype="bfloat16")
    arrays = {name: np.asarray(leaf).view(np.uint16) for name, leaf in flatten_with_names(loaded.params).items()}
    np.savez(folder / "single.npz", **arrays)
    lora = random_lora(loaded.config)
    assert lora.scale == 2.0
    np.savez(
        folder / "lora.npz",
        **{f"{name}.{side}": np.asarray(x) for name, ab in lora.weights.items() for side, x in ab.items()},
    )
    out = folder / "one"
    save_vlm(out / "merged", loaded.config, loaded.params, source_dir=source, lora=lora, max_shard_bytes=60_000)
    save_adapter(out / "adapter", lora, loaded.config, base="x/y")
    return folder


def spread(folder, out, mesh, devices, processes=1):
    """Runs `PROGRAM` and compares what it wrote with the reference."""
    environment = emulating(devices)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    options = {"folder": str(folder), "out": out, "mesh": mesh, "processes": processes, "address": address}
    command = [sys.executable, "-c", PROGRAM, json.dumps(options)]
    running = [
        subprocess.Popen(
            [*command, str(number)], env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        for number in range(processes)
    ]
    for process in running:
        said, _ = process.communicate(timeout=300)
        assert process.returncode == 0 and "exported" in said, said[-3000:]
    assert tensors(folder / out / "merged") == tensors(folder / "one" / "merged")
    assert tensors(folder / out / "compared") == tensors(folder / "source")
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        assert (folder / out / "adapter" / name).read_bytes() == (folder / "one" / "adapter" / name).read_bytes()
    assert tensors(folder / out / "merged") != tensors(folder / "source")


def test_eight_devices(reference):
    spread(reference, "eight", {"data": 2, "fsdp": 2, "tensor": 2}, 8)


def test_two_processes_of_two_devices(reference):
    spread(reference, "two", {"fsdp": 2, "tensor": 2, "data": 1}, 2, processes=2)


@pytest.mark.parametrize("save", [tiny_families.save_llava_next, tiny_families.save_mllama], ids=["next", "mllama"])
def test_the_other_families_on_eight_devices(tmp_path, save):
    save(tmp_path / "source", dtype="float16", shards=2, processor=False)
    spread(on_one_device(tmp_path), "eight", {"data": 2, "fsdp": 2, "tensor": 2}, 8)
