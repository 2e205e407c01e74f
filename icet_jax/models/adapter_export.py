"""Writes LoRA weights as a PEFT adapter that every transformers from 4.46 and every peft from 0.13 can load."""

import re
from collections import defaultdict
from collections.abc import Iterator, Mapping
from pathlib import Path

import jax
import numpy as np

from icet_jax.checkpoints import folder, safetensors_io
from icet_jax.checkpoints.adapter import Adapter, of_lora
from icet_jax.files import JsonObject
from icet_jax.models.adapters import CONFIG, WEIGHTS, concatenate, places
from icet_jax.nn.layers import Lora
from icet_jax.nn.protocols import NetworkConfig
from icet_jax.parallel.distributed import together

ROOTS = ("base_model.model.language_model.model.layers", "base_model.model.model.language_model.layers")
"""Paths of the decoder's layers before transformers 4.52 and since. Other versions ignore a file that uses only one
path, some without an error; ours has both and loads everywhere."""


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
    """Writes a PEFT adapter directory in float32, completely or not at all; it adapts only the language model.

    Args:
      out_dir: a new directory, or an earlier adapter, which is replaced.
      lora: the trained adapters.
      config: config of the network.
      base: directory or hub id of the model that they adapt.
      revision: revision of the hub id.
      start: the adapter that the training began from. The written adapter holds both side by side, so its rank is the
        sum of their ranks, and applying it to the original base gives the final model.
      value_head: saved in a file of its own, which PEFT does not read.
      texts: further files by name, such as the model card.

    Returns:
      `out_dir`.

    Raises:
      UserError: the directory cannot be written or holds something else.
    """
    out_dir = Path(out_dir)
    adapter = of_lora(lora) if start is None else concatenate(start, of_lora(lora), config)
    tensors = dict(_tensors(adapter, config))
    shapes = config.lora_shapes()
    specs: dict[str, safetensors_io.Spec] = {
        key: ("F32", (adapter.rank, shapes[target][1]) if side == "A" else (shapes[target][2], adapter.rank))
        for key, (target, _, side) in tensors.items()
    }

    def read(key: str) -> np.ndarray:
        target, layer, side = tensors[key]
        return adapter.factors(target, layer)["AB".index(side)].T

    head = folder.head_on_host(value_head)
    if jax.process_index() == 0:
        folder.check_target(out_dir, None, CONFIG)
        with folder.beside(out_dir) as unfinished:
            safetensors_io.write_safetensors(unfinished / WEIGHTS, specs, read)
            folder.write_beside_weights(unfinished, head, texts or {})
            folder.write_json(unfinished / CONFIG, _config(adapter, _modules(adapter, config), base, revision))
    else:
        for key in safetensors_io.file_order(specs):
            read(key)
    together()
    return out_dir


def _tensors(adapter: Adapter, config: NetworkConfig) -> Iterator[tuple[str, tuple[str, int, str]]]:
    """Yields (file key, (target, layer, side)) of every tensor."""
    for root in ROOTS:
        for (target, layer), (number, module) in places(config).items():
            if target in adapter.targets:
                for side in "AB":
                    yield f"{root}.{number}.{module}.lora_{side}.weight", (target, layer, side)


def _modules(adapter: Adapter, config: NetworkConfig) -> str:
    """Returns a regular expression for the adapted modules; a list of names would also match modules of the image
    encoder.

    If another stack has a module of the same name, the layers are listed.
    """
    adapted: dict[str, set[int]] = defaultdict(set)
    every: dict[str, set[int]] = defaultdict(set)
    for (target, _), (number, module) in places(config).items():
        every[module].add(number)
        if target in adapter.targets:
            adapted[module].add(number)
    patterns = []
    for module, numbers in sorted(adapted.items()):
        layers = r"\d+" if numbers == every[module] else f"({'|'.join(map(str, sorted(numbers)))})"
        patterns.append(rf"{layers}\.{re.escape(module)}")
    return rf"(model\.language_model|language_model\.model)\.layers\.({'|'.join(patterns)})"


def _config(adapter: Adapter, modules: str, base: str, revision: str | None) -> JsonObject:
    """Returns the fields of adapter_config.json that every peft knows; an older peft refuses files with unknown
    fields."""
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
