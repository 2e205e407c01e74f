"""Reads LoRA adapters in PEFT format, and combines two adapters into one."""

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

# Fields of adapter_config.json that may have any value: they are read below, or do not change what an adapter computes.
# Every field that is in neither of the next two tables must be absent, false or empty, because it may switch on an
# unsupported feature.
_ALLOWED_FIELDS = frozenset(
    (
        "r", "lora_alpha", "use_rslora", "peft_type", "target_modules", "exclude_modules", "lora_dropout", "task_type",
        "base_model_name_or_path", "revision", "inference_mode", "auto_mapping", "peft_version", "megatron_core",
        "qalora_group_size", "ensure_weight_tying",
    )
)  # fmt: skip
_ALLOWED_VALUES = {"bias": ("none",), "init_lora_weights": (True, False, None, "gaussian", "orthogonal", "eva")}


def _key_pattern(config: NetworkConfig) -> re.Pattern[str]:
    """Returns the pattern of a tensor's key in the file, with any of the paths of the family's decoder."""
    decoder = "|".join(map(re.escape, family_of(config).decoder_paths))
    return re.compile(
        rf"(base_model\.model\.)?({decoder})\.layers\.(?P<layer>[0-9]{{1,9}})"
        r"\.(?P<module>\w+\.\w+)\.lora_(?P<side>[AB])\.weight"
    )


def hf_modules(config: NetworkConfig) -> dict[tuple[str, int], tuple[int, str]]:
    """Returns the layer and the module of Hugging Face's decoder for each projection that LoRA can adapt.

    Args:
      config: config of a network of any family.

    Returns:
      {(key in `Lora.weights`, layer within its stack): (layer in HF's decoder, name of the module in that layer)}.
    """
    modules, family = {}, family_of(config)
    for entry in family.table(config).entries:
        target = lora_key(entry.path)
        if target is not None and entry.layer is not None:
            hf_layer, module = entry.key.removeprefix(f"{family.decoder_paths[0]}.layers.").split(".", 1)
            modules[target, entry.layer] = int(hf_layer), module.removesuffix(".weight")
    return modules


def concatenate(first: Adapter, second: Adapter, config: NetworkConfig) -> Adapter:
    """Returns one adapter whose change of the weights is the sum of the two adapters' changes.

    Its factors are `[a1 | a2]` and `[b1 ; b2]`, where b1 is rescaled because the result has the scale of `second`.

    Args:
      first, second: adapters of the same model, which may adapt different projections.
      config: config of the network.
    """
    shapes, ratio = config.lora_shapes(), np.float32(first.scale / second.scale)

    def factors_or_zeros(adapter: Adapter, target: str, layer: int) -> tuple[np.ndarray, np.ndarray]:
        """Returns the adapter's factors (a, b) for a projection; zeros if it does not adapt the projection."""
        if target in adapter.targets:
            return adapter.factors(target, layer)
        _, size_in, size_out = shapes[target]
        return np.zeros((size_in, adapter.rank), np.float32), np.zeros((adapter.rank, size_out), np.float32)

    def factors(target: str, layer: int) -> tuple[np.ndarray, np.ndarray]:
        (a1, b1), (a2, b2) = (factors_or_zeros(adapter, target, layer) for adapter in (first, second))
        return np.concatenate([a1, a2], axis=1), np.concatenate([b1 * ratio, b2], axis=0)

    targets = tuple(sorted({*first.targets, *second.targets}))
    return Adapter(first.rank + second.rank, second.scale, targets, factors)


def read_adapter(directory: str | Path, config: NetworkConfig) -> Adapter:
    """Returns the adapter in a PEFT directory; its file stays memory-mapped while the adapter is in use.

    The tensors may have the keys of transformers before version 4.52, the later ones, or both.

    Args:
      directory: directory with adapter_config.json and adapter_model.safetensors.
      config: config of the network that the adapter was trained for.

    Raises:
      UserError: files are missing or broken; the adapter uses an unsupported PEFT feature (the message names it); or
        tensors do not belong to decoder projections, have a wrong shape, lack the other factor (A or B), or occur under
        both keys with different values (the message lists all such tensors).
    """
    directory = Path(directory)
    rank, scale = _read_config(directory / CONFIG)
    if not (directory / WEIGHTS).is_file():
        raise UserError(
            f"{directory / WEIGHTS}: not found; adapters are read from safetensors only (of a pickled one: "
            f"python scripts/convert_pickle.py {directory})"
        )
    reader = TensorReader([directory / WEIGHTS])
    keys = _keys_in_file(reader, config, rank, str(directory / WEIGHTS))
    shapes = config.lora_shapes()

    def factors(target: str, layer: int) -> tuple[np.ndarray, np.ndarray]:
        if (target, layer, "A") not in keys:
            _, size_in, size_out = shapes[target]
            return np.zeros((size_in, rank), np.float32), np.zeros((rank, size_out), np.float32)
        a, b = (reader.read(keys[target, layer, side]).T.astype(np.float32) for side in "AB")
        return a, b

    return Adapter(rank, scale, tuple(sorted({target for target, _, _ in keys})), factors)


def _read_config(path: Path) -> tuple[int, float]:
    """Returns the rank and the scale (alpha / rank, or alpha / sqrt(rank) for rsLoRA) in an adapter_config.json.

    Raises:
      UserError: see `read_adapter`.
    """
    if not path.is_file():
        raise UserError(f"{path}: not found; give a PEFT adapter directory")
    try:
        values = parse_json(path.read_text(encoding="utf-8"))
        empty = [name for name in ("peft_type", "r", "lora_alpha") if values[name] is None]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{path}: not a LoRA adapter's config ({error!r}); it needs peft_type, r, lora_alpha"
        ) from error
    fields = Fields(values, {}, str(path))
    if empty or values["peft_type"] != "LORA":
        raise fields.fail(empty[0] if empty else "peft_type", "'LORA' with r and lora_alpha")
    rank, alpha = fields.size("r"), fields.number("lora_alpha")
    unsupported = [f"{name}={value!r}" for name, value in sorted(values.items()) if not _is_supported(name, value)]
    if unsupported:
        raise UserError(f"{path}: {', '.join(unsupported)} is not supported; merge the adapter with PEFT first")
    return rank, alpha / (math.sqrt(rank) if values.get("use_rslora") else rank)


def _is_supported(name: str, value: object) -> bool:
    """Returns whether a field of adapter_config.json may have this value."""
    if name in _ALLOWED_VALUES:
        return value in _ALLOWED_VALUES[name]
    return name in _ALLOWED_FIELDS or not value


def _keys_in_file(
    reader: TensorReader, config: NetworkConfig, rank: int, where: str
) -> dict[tuple[str, int, str], str]:
    """Returns {(target, layer of its stack, "A" or "B"): the tensor's key in the file}.

    Raises:
      UserError: see `read_adapter`; `where` names the file.
    """
    problems = Problems()
    shapes = config.lora_shapes()
    target_of_module = {module: target for target, module in hf_modules(config).items()}
    keys: dict[tuple[str, int, str], str] = {}
    pattern = _key_pattern(config)
    for key, shape in reader.shapes.items():
        match = pattern.fullmatch(key)
        target_and_layer = None if match is None else target_of_module.get((int(match["layer"]), match["module"]))
        if match is None or target_and_layer is None:
            problems.add("not on a decoder projection", key)
            continue
        _, size_in, size_out = shapes[target_and_layer[0]]
        expected_shape = (rank, size_in) if match["side"] == "A" else (size_out, rank)
        if shape != expected_shape or reader.dtypes[key] not in DTYPES:
            problems.add(f"{reader.dtypes[key]} {list(shape)} instead of floating {list(expected_shape)}", key)
            continue
        factor = *target_and_layer, match["side"]
        if factor in keys and not np.array_equal(reader.read(keys[factor]), reader.read(key)):
            problems.add("different under its two names", key)
        keys[factor] = key
    for target, layer, side in keys:
        if (target, layer, "B" if side == "A" else "A") not in keys:
            problems.add("without its other half", f"layers.{layer}.{target}.lora_{side}")
    problems.raise_if_any(where, "the adapter does not fit the model")
    if not keys:
        raise UserError(f"{where}: holds no tensors")
    return keys
