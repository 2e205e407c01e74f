"""Reads PEFT LoRA adapters, which are merged into the decoder while it is loaded, and concatenates two of them."""

import math
import re
from pathlib import Path

import numpy as np

from icet_jax.checkpoints.adapter import Adapter
from icet_jax.checkpoints.hf_config import Fields
from icet_jax.checkpoints.problems import Problems
from icet_jax.checkpoints.safetensors_io import DTYPES, TensorReader
from icet_jax.errors import UserError
from icet_jax.files import parse_json
from icet_jax.models import family_of
from icet_jax.nn.protocols import NetworkConfig, lora_key

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"

# Fields that do not change the arithmetic of a saved adapter. Every other field must have a falsy value, because PEFT
# gains features all the time and a feature that is unknown here must not be ignored.
_NEUTRAL = frozenset(
    (
        "r", "lora_alpha", "use_rslora", "peft_type", "target_modules", "exclude_modules", "lora_dropout", "task_type",
        "base_model_name_or_path", "revision", "inference_mode", "auto_mapping", "peft_version", "megatron_core",
        "qalora_group_size", "ensure_weight_tying",
    )
)  # fmt: skip
_PLAIN_VALUES = {"bias": ("none",), "init_lora_weights": (True, False, None, "gaussian", "orthogonal", "eva")}

# The path of the decoder before transformers 4.52 and the path since then.
_KEY = re.compile(
    r"(base_model\.model\.)?(language_model\.model|model\.language_model)\.layers\.(?P<layer>[0-9]{1,9})"
    r"\.(?P<module>\w+\.\w+)\.lora_(?P<side>[AB])\.weight"
)


def places(config: NetworkConfig) -> dict[tuple[str, int], tuple[int, str]]:
    """Returns {(target, layer of its stack): (layer of HF's decoder, module in it)} of every projection that LoRA can
    adapt.

    Args:
      config: config of a network of any family.
    """
    modules = {}
    for slot in family_of(config).table(config).slots:
        target = lora_key(slot.path)
        if target is not None and slot.layer is not None:
            number, module = slot.key.removeprefix("language_model.model.layers.").split(".", 1)
            modules[target, slot.layer] = int(number), module.removesuffix(".weight")
    return modules


def concatenate(first: Adapter, second: Adapter, config: NetworkConfig) -> Adapter:
    """Returns one adapter whose update is the sum of both: `[a1 | a2] @ [b1 ; b2]`, rescaled to the second's scale.

    Args:
      first, second: adapters of the same model; a target that only one of them has is zero in the other.
      config: config of the network.
    """
    shapes, ratio = config.lora_shapes(), np.float32(first.scale / second.scale)

    def part(adapter: Adapter, target: str, layer: int) -> tuple[np.ndarray, np.ndarray]:
        if target in adapter.targets:
            return adapter.factors(target, layer)
        _, size_in, size_out = shapes[target]
        return np.zeros((size_in, adapter.rank), np.float32), np.zeros((adapter.rank, size_out), np.float32)

    def factors(target: str, layer: int) -> tuple[np.ndarray, np.ndarray]:
        (a1, b1), (a2, b2) = part(first, target, layer), part(second, target, layer)
        return np.concatenate([a1, a2], axis=1), np.concatenate([b1 * ratio, b2], axis=0)

    targets = tuple(sorted({*first.targets, *second.targets}))
    return Adapter(first.rank + second.rank, second.scale, targets, factors)


def read_adapter(directory: str | Path, config: NetworkConfig) -> Adapter:
    """Reads the adapter in a PEFT directory; its file stays memory-mapped while the adapter is in use.

    A file may hold the tensors under the names before transformers 4.52, under the names since, or under both.

    Args:
      directory: directory with adapter_config.json and adapter_model.safetensors.
      config: config of the network that it adapts.

    Raises:
      UserError: files are missing or broken; the adapter uses an unsupported PEFT feature, which is named; tensors
        adapt something other than decoder projections, lack their other factor, have a wrong shape, or differ between
        the two names (all are listed).
    """
    directory = Path(directory)
    rank, scale = _read_config(directory / CONFIG)
    if not (directory / WEIGHTS).is_file():
        raise UserError(
            f"{directory / WEIGHTS}: not found; adapters are read from safetensors only (of a pickled one: "
            f"python scripts/convert_pickle.py {directory})"
        )
    reader = TensorReader([directory / WEIGHTS])
    keys = _match(reader, config, rank, str(directory / WEIGHTS))
    shapes = config.lora_shapes()

    def factors(target: str, layer: int) -> tuple[np.ndarray, np.ndarray]:
        if (target, layer, "A") not in keys:
            _, size_in, size_out = shapes[target]
            return np.zeros((size_in, rank), np.float32), np.zeros((rank, size_out), np.float32)
        a, b = (reader.read(keys[target, layer, side]).T.astype(np.float32) for side in "AB")
        return a, b

    return Adapter(rank, scale, tuple(sorted({target for target, _, _ in keys})), factors)


def _read_config(path: Path) -> tuple[int, float]:
    """Reads rank and scale from adapter_config.json.

    Raises:
      UserError: see `read_adapter`.
    """
    if not path.is_file():
        raise UserError(f"{path}: not found; give a PEFT adapter directory")
    try:
        values = parse_json(path.read_text(encoding="utf-8"))
        absent = [name for name in ("peft_type", "r", "lora_alpha") if values[name] is None]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{path}: not a LoRA adapter's config ({error!r}); it needs peft_type, r, lora_alpha"
        ) from error
    fields = Fields(values, {}, str(path))
    if absent or values["peft_type"] != "LORA":
        raise fields.fail(absent[0] if absent else "peft_type", "'LORA' with r and lora_alpha")
    rank, alpha = fields.size("r"), fields.number("lora_alpha")
    unsupported = [f"{name}={value!r}" for name, value in sorted(values.items()) if not _is_plain(name, value)]
    if unsupported:
        raise UserError(f"{path}: {', '.join(unsupported)} is not supported; merge the adapter with PEFT first")
    return rank, alpha / (math.sqrt(rank) if values.get("use_rslora") else rank)


def _is_plain(name: str, value: object) -> bool:
    if name in _PLAIN_VALUES:
        return value in _PLAIN_VALUES[name]
    return name in _NEUTRAL or not value


def _match(reader: TensorReader, config: NetworkConfig, rank: int, where: str) -> dict[tuple[str, int, str], str]:
    """Returns the file's key of every (target, layer, side)."""
    problems = Problems()
    shapes = config.lora_shapes()
    target_of_place = {place: target for target, place in places(config).items()}
    keys: dict[tuple[str, int, str], str] = {}
    for key, shape in reader.shapes.items():
        match = _KEY.fullmatch(key)
        target_and_layer = None if match is None else target_of_place.get((int(match["layer"]), match["module"]))
        if match is None or target_and_layer is None:
            problems.add("not on a decoder projection", key)
            continue
        _, size_in, size_out = shapes[target_and_layer[0]]
        expected_shape = (rank, size_in) if match["side"] == "A" else (size_out, rank)
        if shape != expected_shape or reader.dtypes[key] not in DTYPES:
            problems.add(f"{reader.dtypes[key]} {list(shape)} instead of floating {list(expected_shape)}", key)
            continue
        place = *target_and_layer, match["side"]
        if place in keys and not np.array_equal(reader.read(keys[place]), reader.read(key)):
            problems.add("different under its two names", key)
        keys[place] = key
    for target, layer, side in keys:
        if (target, layer, "B" if side == "A" else "A") not in keys:
            problems.add("without its other half", f"layers.{layer}.{target}.lora_{side}")
    problems.raise_if_any(where, "the adapter does not fit the model")
    if not keys:
        raise UserError(f"{where}: holds no tensors")
    return keys
