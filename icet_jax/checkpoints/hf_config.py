"""Converts HF's `config.json` to the models' config dataclasses and back.

The *old keys* are those of transformers before version 5. Import accepts the old keys, the keys `rope_parameters` and
`dtype` of transformers 5, and the hub's sparse sub-configs, whose absent fields mean the HF class defaults. Export
writes the old keys, which every transformers from 4.46 to 5.x reads.
"""

import copy
from collections.abc import Iterable
from pathlib import Path
from typing import TypeVar

from icet_jax.config.names import FAMILIES
from icet_jax.errors import UserError
from icet_jax.files import JsonObject, parse_json
from icet_jax.nn.gpt2 import GPT2Config

_T = TypeVar("_T")

SUPPORTED = {**{name: family.title for name, family in FAMILIES.items()}, "gpt2": "GPT-2 reward model"}
"""{`model_type` in config.json: description for error messages} of the supported models."""

# transformers' class defaults, used for fields that the file leaves out.
_GPT2_DEFAULTS = {
    "vocab_size": 50257, "n_positions": 1024, "n_embd": 768, "n_layer": 12, "n_head": 12, "layer_norm_epsilon": 1e-5,
}  # fmt: skip
_LAYER_COUNTS = ("num_hidden_layers", "num_global_layers", "n_layer")
_MOST_LAYERS, _LARGEST_SIZE, _LARGEST_NUMBER = 4096, 1 << 24, 1e30
_SHOWN = 200  # characters of a wrong value that an error shows


class Fields:
    """Reads checked values from one (sub-)config; errors name the file and the field.

    Attributes:
      values: the values of the (sub-)config, and defaults for the fields that it lacks.
      where: name of the (sub-)config in error messages.
    """

    def __init__(self, values: object, defaults: JsonObject, where: str):
        """Stores `values`, which must be a mapping; absent or null fields get the values in `defaults`."""
        if not isinstance(values, dict):
            raise UserError(f"{where}: must be a mapping, not {shown(values)}")
        self.values = defaults | {key: value for key, value in values.items() if value is not None}
        self.where = where

    def fail(self, field: str, expected: str) -> UserError:
        """Returns (does not raise) the error for a field whose value is not `expected`, a description for the user."""
        return UserError(f"{self.where}: {field}={shown(self.values.get(field))} is not supported; needs {expected}")

    def size(self, field: str) -> int:
        """Returns the field's positive integer; raises an error above an upper limit, against malicious files."""
        value = self.values.get(field)
        limit = _MOST_LAYERS if field in _LAYER_COUNTS else _LARGEST_SIZE
        if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= limit:
            raise self.fail(field, f"a positive integer, at most {limit}")
        return value

    def number(self, field: str) -> float:
        """Returns the field's finite number as a float."""
        value = self.values.get(field)
        if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) <= _LARGEST_NUMBER:
            raise self.fail(field, "a number")
        return float(value)

    def choice(self, field: str, allowed: Iterable[_T]) -> _T:
        """Returns the field's value if it is one of `allowed`, else raises an error."""
        value = self.values.get(field)
        if value not in tuple(allowed):
            raise self.fail(field, " or ".join(repr(item) for item in allowed))
        return value

    def only(self, field: str, *allowed: object) -> None:
        """Raises an error if the field's value is not in `allowed`, because it would need a different network."""
        if field in self.values and self.values[field] not in allowed:
            raise self.fail(field, " or ".join(repr(item) for item in allowed))


def shown(value: object) -> str:
    """Returns the text of a value for an error message, truncated if it is long."""
    text = "a number of thousands of digits" if isinstance(value, int) and abs(value) >= 10**100 else repr(value)
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}..."


def read_hf_config(directory: str | Path) -> JsonObject:
    """Returns the `config.json` of a checkpoint directory.

    Raises:
      UserError: the directory or file does not exist, is not a JSON object with a `model_type`, or has quantised
        weights.
    """
    path = Path(directory) / "config.json"
    if not path.is_file():
        raise UserError(f"{path}: not found; give a Hugging Face model directory")
    try:
        values = parse_json(path.read_text(encoding="utf-8"))
    except (ValueError, OSError) as error:
        raise UserError(f"{path}: not readable JSON ({error}); download it again") from error
    if not isinstance(values, dict) or not isinstance(values.get("model_type"), str):
        raise UserError(f"{path}: has no model_type; supported are {_supported()}")
    _refuse_quantised(values, str(path))
    return values


def _refuse_quantised(values: JsonObject, where: str) -> None:
    """Raises a `UserError` if the config or a sub-config has a `quantization_config`."""
    sub_configs = ((f"{name}.", values.get(name)) for name in ("text_config", "vision_config"))
    for prefix, config in (("", values), *sub_configs):
        quantization = config.get("quantization_config") if isinstance(config, dict) else None
        if quantization is not None:
            method = quantization.get("quant_method") if isinstance(quantization, dict) else None
            raise UserError(
                f"{where}: {prefix}quantization_config{'' if method is None else f' ({shown(method)})'}: quantised "
                "weights are not supported; give the checkpoint that is not quantised, or remove the field if its "
                "weights are plain"
            )


def _supported() -> str:
    """Returns the supported model types for an error message."""
    return ", ".join(f"{name} ({title})" for name, title in SUPPORTED.items())


def require_model_type(values: JsonObject, expected: str, where: str = "config.json") -> None:
    """Raises a `UserError` that names the supported types if the `model_type` of `values` is not `expected`."""
    model_type = values.get("model_type")
    if model_type == expected:
        return
    if model_type in SUPPORTED:
        raise UserError(
            f"{where}: model_type '{model_type}' is a {SUPPORTED[model_type]}; a {SUPPORTED[expected]} is needed here"
        )
    raise UserError(f"{where}: model_type '{model_type}' is not supported; supported are {_supported()}")


def gpt2_from_hf(values: JsonObject, where: str = "config.json") -> GPT2Config:
    """Returns the network's config for a GPT-2 sequence classifier's `config.json` (HF `GPT2Config`).

    Raises:
      UserError: the model type differs, or a value would need a different network.
    """
    require_model_type(values, "gpt2", where)
    fields = Fields(values, _GPT2_DEFAULTS, where)
    fields.only("activation_function", "gelu_new", "gelu_pytorch_tanh")
    fields.only("scale_attn_weights", True)
    fields.only("scale_attn_by_inverse_layer_idx", False)
    fields.only("reorder_and_upcast_attn", False)
    fields.only("add_cross_attention", False)
    labels = fields.values.get("id2label", {"0": ""})
    if not isinstance(labels, dict) or len(labels) != 1:
        raise fields.fail("id2label", "one label")
    width, heads = fields.size("n_embd"), fields.size("n_head")
    if width % heads:
        raise fields.fail("n_head", f"a divisor of n_embd={width}")
    fields.values.setdefault("n_inner", 4 * width)
    return GPT2Config(
        vocab_size=fields.size("vocab_size"),
        n_positions=fields.size("n_positions"),
        n_embd=width,
        n_layer=fields.size("n_layer"),
        n_head=heads,
        n_inner=fields.size("n_inner"),
        layer_norm_epsilon=fields.number("layer_norm_epsilon"),
    )


def drop_new_keys(values: JsonObject) -> None:
    """Removes from `values` the keys of transformers 5 that duplicate old keys."""
    for key in ("rope_parameters", "dtype", "image_token_id"):
        values.pop(key, None)


def gpt2_to_hf(config: GPT2Config, source: JsonObject | None, dtype: str) -> JsonObject:
    """Returns the `config.json` of a GPT-2 reward model with the old keys (see the module's docstring).

    It always has a `pad_token_id`, which transformers needs for padded batches.

    Args:
      config: config of the network.
      source: the `config.json` that the model was loaded with, whose other keys are kept; None for a new model.
      dtype: torch's name of the dtype of the stored weights.
    """
    out = copy.deepcopy(source or {})
    drop_new_keys(out)
    out |= {
        "architectures": ["GPT2ForSequenceClassification"],
        "model_type": "gpt2",
        **{field: getattr(config, field) for field in _GPT2_DEFAULTS},
        "n_inner": config.n_inner,
        "torch_dtype": dtype,
    }
    defaults = {"activation_function": "gelu_new", "id2label": {"0": "LABEL_0"}, "label2id": {"LABEL_0": 0}}
    end_tokens = {"bos_token_id": config.vocab_size - 1, "eos_token_id": config.vocab_size - 1}
    out = defaults | end_tokens | {key: value for key, value in out.items() if value is not None}
    return {"pad_token_id": out["eos_token_id"]} | out
