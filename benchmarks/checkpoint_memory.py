"""How much host memory importing and exporting a checkpoint takes beyond the arrays themselves.

    python benchmarks/checkpoint_memory.py --dir /tmp/checkpoint            # 4 GB, one device and a mesh of eight
    python benchmarks/checkpoint_memory.py --dir /tmp/checkpoint --layers 2 # 2 GB
    python benchmarks/checkpoint_memory.py --dir /tmp/checkpoint --logits   # and transformers' and peft's logits

A synthetic checkpoint of LLaVA-1.5's shapes (float16, fewer decoder layers than 32) is written once. Then a fresh
process imports it in bfloat16, exports it with random adapters merged, and exports the adapters alone, while this one
samples its anonymous memory (RssAnon: mapped files do not count, the operating system can drop them). What must hold
whatever the size: beyond the arrays less than the largest tensor and 1 GiB. Results go to DIR/memory.json.
"""

import argparse
import functools
import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

GIB = 2**30
CONFIG = {
    "architectures": ["LlavaForConditionalGeneration"],
    "model_type": "llava",
    "image_token_index": 32000,
    "pad_token_id": 32001,
    "torch_dtype": "float16",
    "vision_feature_layer": -2,
    "text_config": {"model_type": "llama", "vocab_size": 32064, "rms_norm_eps": 1e-5, "max_position_embeddings": 4096},
}
MESHES = {"one device": {}, "8 devices, fsdp=4 tensor=2": {"fsdp": 4, "tensor": 2}}


def make(directory: Path, layers: int) -> None:
    """Writes the checkpoint, one random tensor at a time."""
    import numpy as np

    from icet_jax.checkpoints import hf_config, safetensors_io, tables
    from icet_jax.checkpoints.hf_import import abstract_params, hf_shape
    from icet_jax.models.llava.network import Llava
    from icet_jax.parallel.sharding import flatten_with_names

    values = CONFIG | {"text_config": CONFIG["text_config"] | {"num_hidden_layers": layers}}
    config = hf_config.llava_from_hf(values)
    entries = {entry.key: entry for entry in tables.llava_table(config).entries}
    shapes = flatten_with_names(abstract_params(functools.partial(Llava, config), "float16", "float16")[1])
    specs = {key: ("F16", hf_shape(entry, shapes[entry.path].shape)) for key, entry in entries.items()}
    random = np.random.default_rng(0)

    def tensor(key: str) -> np.ndarray:
        shape = specs[key][1]
        noise = random.standard_normal(shape, np.float32)
        if "norm" in key and key.endswith("weight"):
            noise = 1 + 0.1 * noise
        elif len(shape) > 1:
            noise *= (0.02 if "embed" in key else 1.0) / np.sqrt(np.prod(shape[1:]) if "embed" not in key else 1.0)
        else:
            noise *= 0.02
        return noise.astype(np.float16)

    directory.mkdir(parents=True)
    groups = list(safetensors_io.shard(specs, 2_000_000_000))
    weight_map = {}
    for number, group in enumerate(groups, start=1):
        name = f"model-{number:05d}-of-{len(groups):05d}.safetensors"
        safetensors_io.write_safetensors(directory / name, {key: specs[key] for key in group}, tensor)
        weight_map |= dict.fromkeys(group, name)
    total = sum(safetensors_io.tensor_bytes(*spec) for spec in specs.values())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    (directory / "config.json").write_text(json.dumps(hf_config.llava_to_hf(config, values, "float16")))


def child(directory: Path, mesh: dict[str, int]) -> None:
    """Imports and exports, and says when each phase began and ended; runs in a process of its own."""
    import jax
    import jax.numpy as jnp

    from icet_jax.models.adapter_export import save_adapter
    from icet_jax.models.loading import load_vlm
    from icet_jax.models.saving import save_vlm
    from icet_jax.nn.protocols import init_lora
    from icet_jax.parallel.mesh import make_mesh
    from icet_jax.parallel.sharding import shardings

    devices = make_mesh(**mesh) if mesh else None
    jnp.zeros(8).block_until_ready()

    def say(phase: str, began: float, arrays: float = 0.0) -> None:
        print(json.dumps({"phase": phase, "began": began, "ended": time.monotonic(), "arrays": arrays}), flush=True)

    began = time.monotonic()
    time.sleep(0.2)
    say("idle", began)
    began = time.monotonic()
    loaded = load_vlm(directory / "source", dtype="bfloat16", mesh=devices)
    leaves = jax.tree.leaves(loaded.params)
    say("import", began, sum(shard.data.nbytes for leaf in leaves for shard in leaf.addressable_shards))
    shapes, targets = loaded.config.lora_shapes(), ("q_proj", "v_proj", "down_proj")
    lora = init_lora(shapes, rank=16, alpha=16.0, targets=targets, key=jax.random.key(0))
    lora = jax.tree.map(lambda x: 0.02 * jax.random.normal(jax.random.key(x.size), x.shape), lora)
    if devices is not None:
        lora = lora.replace(weights=jax.device_put(lora.weights, shardings(lora.weights, devices)))
    began = time.monotonic()
    save_vlm(directory / "merged", loaded.config, loaded.params, source_dir=directory / "source", lora=lora, trained=())
    say("export merged", began)
    began = time.monotonic()
    save_adapter(directory / "adapter", lora, loaded.config, base=str(directory / "source"))
    say("export adapter", began)
    began = time.monotonic()
    save_vlm(directory / "compared", loaded.config, loaded.params, source_dir=directory / "source")
    say("export, every tensor compared", began)


def anonymous(pid: int) -> int:
    """Anonymous resident bytes of a process; 0 once it is gone."""
    try:
        for line in Path(f"/proc/{pid}/status").read_text().splitlines():
            if line.startswith("RssAnon:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    return 0


def measure(directory: Path, name: str) -> list[dict]:
    """Peak anonymous memory of each phase, beyond what the process had before it and the arrays it made."""
    environment = os.environ | {"JAX_PLATFORMS": "cpu"}
    if MESHES[name]:
        environment["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8"
    command = [sys.executable, __file__, "--dir", str(directory), "--child", name]
    process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)
    samples: list[tuple[float, int]] = []

    def sample() -> None:
        while process.poll() is None:
            samples.append((time.monotonic(), anonymous(process.pid)))
            time.sleep(0.005)

    sampler = threading.Thread(target=sample)
    sampler.start()
    phases = [json.loads(line) for line in process.stdout if line.startswith("{")]
    sampler.join()
    if process.returncode:
        raise SystemExit(f"{name}: the measured process failed")
    rows, held = [], 0.0
    for phase in phases:
        inside = [size for moment, size in samples if phase["began"] <= moment <= phase["ended"]]
        if phase["phase"] == "idle":
            held = min(inside)
            continue
        beyond = max(inside) - inside[0] - phase["arrays"]
        seconds = phase["ended"] - phase["began"]
        rows.append(
            {
                "devices": name,
                "phase": phase["phase"],
                "seconds": seconds,
                "arrays": phase["arrays"],
                "beyond": beyond,
                "before": inside[0] - held,
            }
        )
    return rows


def compare_logits(directory: Path) -> dict[str, float]:
    """Largest differences between transformers' logits: merged model, base with the adapter in peft, base."""
    import torch
    from peft import PeftModel
    from transformers import LlavaForConditionalGeneration

    tokens = torch.randint(3, 32000, (2, 12), generator=torch.Generator().manual_seed(0))

    def logits(model) -> torch.Tensor:
        with torch.no_grad():
            return model.eval()(input_ids=tokens).logits.float()

    def load(name: str):
        return LlavaForConditionalGeneration.from_pretrained(directory / name, dtype=torch.float32)

    merged = logits(load("merged"))
    base = load("source")
    plain = logits(base)
    adapted = logits(PeftModel.from_pretrained(base, directory / "adapter"))
    return {
        "merged - adapter in peft": float((merged - adapted).abs().max()),
        "adapter in peft - base": float((adapted - plain).abs().max()),
        "standard deviation": float(plain.std()),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dir", type=Path, required=True, help="scratch folder: three times the checkpoint's size")
    parser.add_argument("--layers", type=int, default=7, help="decoder layers; 7 make 4 GB, 32 the whole model")
    parser.add_argument("--logits", action="store_true", help="compare the exports in transformers and peft")
    parser.add_argument("--child", choices=MESHES, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        child(options.dir, MESHES[options.child])
        return
    if not (options.dir / "source" / "config.json").is_file():
        make(options.dir / "source", options.layers)
    sizes = json.loads((options.dir / "source" / "model.safetensors.index.json").read_text())["metadata"]
    largest = 32064 * 4096 * 2
    rows = [row for name in MESHES for row in measure(options.dir, name)]
    print(f"checkpoint {sizes['total_size'] / 1e9:.2f} GB, largest tensor {largest / GIB:.2f} GiB")
    print(f"{'devices':28}{'phase':32}{'seconds':>8}{'arrays GiB':>12}{'beyond GiB':>12}{'allowed':>9}")
    for row in rows:
        row["allowed"] = largest + GIB
        print(
            f"{row['devices']:28}{row['phase']:32}{row['seconds']:8.1f}{row['arrays'] / GIB:12.2f}"
            f"{row['beyond'] / GIB:12.2f}{row['allowed'] / GIB:9.2f}"
        )
    result = {"bytes": sizes["total_size"], "largest": largest, "rows": rows}
    if options.logits:
        result["logits"] = compare_logits(options.dir)
        print(json.dumps(result["logits"], indent=1))
    (options.dir / "memory.json").write_text(json.dumps(result, indent=1) + "\n")
    over = [row for row in rows if row["beyond"] > row["allowed"]]
    if over:
        raise SystemExit("more than is allowed: " + ", ".join(f"{row['phase']} on {row['devices']}" for row in over))


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    main()
