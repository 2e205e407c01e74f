"""Reads a PEFT LoRA adapter, to be merged into the decoder as it is loaded."""

import json
import math
import re
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from icet_jax.checkpoints.problems import Problems
from icet_jax.checkpoints.safetensors_io import DTYPES, TensorReader
from icet_jax.errors import UserError
from icet_jax.models.layers import Lora
from icet_jax.models.llama import LlamaConfig, lora_shapes

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"

# Fields that say nothing about the arithmetic of a saved adapter. Every other field must have a falsy value: features
# are added to PEFT all the time, and one that is not known here must not be skipped.
_NEUTRAL = frozenset(
    (
        "r", "lora_alpha", "use_rslora", "peft_type", "target_modules", "exclude_modules", "lora_dropout", "task_type",
        "base_model_name_or_path", "revision", "inference_mode", "auto_mapping", "peft_version", "megatron_core",
        "qalora_group_size", "ensure_weight_tying",
    )
)  # fmt: skip
_PLAIN_VALUES = {"bias": ("none",), "init_lora_weights": (True, False, None, "gaussian", "orthogonal", "eva")}

# Both names of the decoder: before transformers 4.52, and since.
_KEY = re.compile(
    r"(base_model\.model\.)?(language_model\.model|model\.language_model)\.layers\.(?P<layer>\d+)"
    r"\.(self_attn|mlp)\.(?P<target>\w+)\.lora_(?P<side>[AB])\.weight"
)


def read_adapter(directory: str | Path, config: LlamaConfig) -> Lora:
    """The adapter in a PEFT directory, stacked over layers, float32; layers that it leaves alone are zero.

    A file may hold the tensors under the names before and since transformers 4.52, or under both.

    Args:
      directory: with adapter_config.json and adapter_model.safetensors.
      config: of the decoder that it adapts.

    Raises:
      UserError: files are missing or broken; the adapter uses a PEFT feature that is not supported, which is named;
        tensors that adapt something else than decoder projections, lack their other half, have a wrong shape, or
        differ between the two names, all listed.
    """
    directory = Path(directory)
    rank, scale = _read_config(directory / CONFIG)
    if not (directory / WEIGHTS).is_file():
        raise UserError(f"{directory / WEIGHTS}: not found; adapters are read from safetensors only")
    with TensorReader([directory / WEIGHTS]) as reader:
        tensors = _collect(reader, config, rank, str(directory / WEIGHTS))
    shapes, depth = lora_shapes(config), config.num_hidden_layers
    weights = {}
    for target in sorted({target for target, _, _ in tensors}):
        size_in, size_out = shapes[target]
        a = np.zeros((depth, size_in, rank), np.float32)
        b = np.zeros((depth, rank, size_out), np.float32)
        for layer in range(depth):
            if (target, layer, "A") in tensors:
                a[layer], b[layer] = tensors[target, layer, "A"].T, tensors[target, layer, "B"].T
        weights[target] = {"a": jnp.asarray(a), "b": jnp.asarray(b)}
    return Lora(weights=weights, scale=scale)


def _read_config(path: Path) -> tuple[int, float]:
    """Rank and scale.

    Raises:
      UserError: see `read_adapter`.
    """
    if not path.is_file():
        raise UserError(f"{path}: not found; give a PEFT adapter directory")
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        kind, rank, alpha = values["peft_type"], int(values["r"]), float(values["lora_alpha"])
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{path}: not a LoRA adapter's config ({error!r}); it needs peft_type, r, lora_alpha"
        ) from error
    if kind != "LORA" or rank < 1:
        raise UserError(f"{path}: peft_type={kind!r}, r={rank} is not supported; needs 'LORA' with r >= 1")
    unsupported = [f"{name}={value!r}" for name, value in sorted(values.items()) if not _is_plain(name, value)]
    if unsupported:
        raise UserError(f"{path}: {', '.join(unsupported)} is not supported; merge the adapter with PEFT first")
    return rank, alpha / (math.sqrt(rank) if values.get("use_rslora") else rank)


def _is_plain(name: str, value: Any) -> bool:
    if name in _PLAIN_VALUES:
        return value in _PLAIN_VALUES[name]
    return name in _NEUTRAL or not value


def _collect(
    reader: TensorReader, config: LlamaConfig, rank: int, where: str
) -> dict[tuple[str, int, str], np.ndarray]:
    """Float32 tensors by (target, layer, side)."""
    problems = Problems()
    shapes = lora_shapes(config)
    tensors: dict[tuple[str, int, str], np.ndarray] = {}
    for key, shape in reader.shapes.items():
        match = _KEY.fullmatch(key)
        if match is None or match["target"] not in shapes or int(match["layer"]) >= config.num_hidden_layers:
            problems.add("not on a decoder projection", key)
            continue
        size_in, size_out = shapes[match["target"]]
        wanted = (rank, size_in) if match["side"] == "A" else (size_out, rank)
        if shape != wanted or reader.dtypes[key] not in DTYPES:
            problems.add(f"{reader.dtypes[key]} {list(shape)} instead of floating {list(wanted)}", key)
            continue
        place = match["target"], int(match["layer"]), match["side"]
        tensor = reader.read(key).astype(np.float32)
        if place in tensors and not np.array_equal(tensors[place], tensor):
            problems.add("different under its two names", key)
        tensors[place] = tensor
    for target, layer, side in tensors:
        if (target, layer, "B" if side == "A" else "A") not in tensors:
            problems.add("without its other half", f"layers.{layer}.{target}.lora_{side}")
    problems.raise_if_any(where, "the adapter does not fit the model")
    if not tensors:
        raise UserError(f"{where}: holds no tensors")
    return tensors
