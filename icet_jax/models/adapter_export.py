"""Writes LoRA weights as a PEFT adapter that every transformers from 4.46 and every peft from 0.13 can load."""

import re
from collections import defaultdict
from collections.abc import Iterator, Mapping
from pathlib import Path

import jax
import numpy as np

from icet_jax.checkpoints import folder, safetensors_io
from icet_jax.checkpoints.adapter import Adapter, adapter_from_lora
from icet_jax.files import JsonObject
from icet_jax.models import family_of
from icet_jax.models.adapters import CONFIG, WEIGHTS, concatenate, hf_modules
from icet_jax.nn.layers import Lora
from icet_jax.nn.protocols import NetworkConfig
from icet_jax.parallel.distributed import barrier


def save_adapter(
    out_dir: str | Path,
    lora: Lora,
    config: NetworkConfig,
    *,
    base: str,
    revision: str | None = None,
    start: Adapter | None = None,
    value_head: dict[str, jax.Array] | None = None,
    texts: Mapping[str, str] | None = None,
) -> Path:
    """Writes trained adapters as a PEFT directory in float32; if this is interrupted, `out_dir` is unchanged.

    Args:
      out_dir: a new directory, or an earlier adapter, which is replaced.
      lora: the trained adapters.
      config: config of the network.
      base: directory or hub id of the base model.
      revision: branch, tag or commit of the hub id.
      start: the adapter that the training began from, or None. The written adapter is then the sum of `start` and
        `lora`, so that applying it to the base model gives the final model; its rank is the sum of their ranks.
      value_head: saved in a separate file, which PEFT does not read.
      texts: {file name: content} of further files, such as the model card.

    Returns:
      `out_dir`.

    Raises:
      UserError: the directory cannot be written, or contains something other than an adapter.
    """
    out_dir = Path(out_dir)
    adapter = adapter_from_lora(lora) if start is None else concatenate(start, adapter_from_lora(lora), config)
    tensors = dict(_tensor_keys(adapter, config))
    shapes = config.lora_shapes()
    specs: dict[str, safetensors_io.Spec] = {
        key: ("F32", (adapter.rank, shapes[target][1]) if side == "A" else (shapes[target][2], adapter.rank))
        for key, (target, _, side) in tensors.items()
    }

    def read(key: str) -> np.ndarray:
        """Returns the factor with this key, transposed as PEFT stores it."""
        target, layer, side = tensors[key]
        return adapter.factors(target, layer)["AB".index(side)].T

    head = folder.head_on_host(value_head)
    if jax.process_index() == 0:
        folder.check_target(out_dir, None, CONFIG)
        with folder.unfinished_folder(out_dir) as unfinished:
            safetensors_io.write_safetensors(unfinished / WEIGHTS, specs, read)
            folder.write_beside_weights(unfinished, head, texts or {})
            modules = _target_modules(adapter, config)
            folder.write_json(unfinished / CONFIG, _adapter_config(adapter, modules, base, revision))
    else:
        for key in safetensors_io.file_order(specs):
            read(key)
    barrier()
    return out_dir


def _tensor_keys(adapter: Adapter, config: NetworkConfig) -> Iterator[tuple[str, tuple[str, int, str]]]:
    """Yields (key in the file, (target, layer of the target's stack, "A" or "B")) of every tensor to write.

    A version of transformers ignores tensors under the decoder's path of other versions, sometimes without an error, so
    every tensor is written under all paths.
    """
    for path in family_of(config).decoder_paths:
        root = f"base_model.model.{path}.layers"
        for (target, layer), (hf_layer, module) in hf_modules(config).items():
            if target in adapter.targets:
                for side in "AB":
                    yield f"{root}.{hf_layer}.{module}.lora_{side}.weight", (target, layer, side)


def _target_modules(adapter: Adapter, config: NetworkConfig) -> str:
    """Returns PEFT's `target_modules`: a regular expression that matches the paths of the adapted modules.

    A list of names would also match modules of the image encoder. Where only some of the layers that have a module are
    adapted (Llama 3.2 Vision has two kinds of layers), the expression lists the numbers of these layers.
    """
    adapted_layers: dict[str, set[int]] = defaultdict(set)
    all_layers: dict[str, set[int]] = defaultdict(set)
    for (target, _), (hf_layer, module) in hf_modules(config).items():
        all_layers[module].add(hf_layer)
        if target in adapter.targets:
            adapted_layers[module].add(hf_layer)
    patterns = []
    for module, numbers in sorted(adapted_layers.items()):
        layers = r"\d+" if numbers == all_layers[module] else f"({'|'.join(map(str, sorted(numbers)))})"
        patterns.append(rf"{layers}\.{re.escape(module)}")
    decoder = "|".join(map(re.escape, reversed(family_of(config).decoder_paths)))
    return rf"({decoder})\.layers\.({'|'.join(patterns)})"


def _adapter_config(adapter: Adapter, modules: str, base: str, revision: str | None) -> JsonObject:
    """Returns the content of adapter_config.json, only with fields that every peft knows, because it refuses others."""
    alpha = adapter.scale * adapter.rank
    config = {
        "peft_type": "LORA",
        "r": adapter.rank,
        "lora_alpha": int(alpha) if alpha == int(alpha) else alpha,
        "target_modules": modules,
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "task_type": None,
        "base_model_name_or_path": base,
    }
    return config if revision is None else config | {"revision": revision}
