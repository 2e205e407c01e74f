"""Defines the supported decoders, which are all the network `nn.llama` with different fields of config.json.

The text part of a vision-language model, a judge and a reward model are read by the same functions. To add a decoder,
add an entry to `icet_jax.config.names.DECODERS` and one to `DECODERS` here.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal

from icet_jax.checkpoints.hf_config import Fields, shown
from icet_jax.errors import UserError
from icet_jax.files import JsonObject
from icet_jax.nn.llama import LlamaConfig, RopeScaling

_SIZES = (
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "rms_norm_eps",
)  # fmt: skip
_ATTENTION, _MLP = ("q_proj", "k_proj", "v_proj", "o_proj"), ("gate_proj", "up_proj", "down_proj")
_BIAS_FIELDS = ("attention_bias", "mlp_bias")


@dataclasses.dataclass(frozen=True)
class Decoder:
    """Describes one kind of decoder.

    Attributes:
      model_type: `model_type` in the decoder's part of config.json.
      defaults: transformers' class defaults, used for fields that the file leaves out.
      biased: projections that always have a bias.
      bias_fields: {field of config.json: projections that have a bias if the field is true}. A file in which another
        field of this sort is true is refused.
      qk_norm: whether each head's queries and keys are normalised before the rotary embedding.
      window: when attention is limited to the last `sliding_window` tokens: "never"; "unless null", if the field
        `sliding_window` is set; "if used", if the field `use_sliding_window` is true.
    """

    model_type: str
    defaults: JsonObject
    biased: tuple[str, ...] = ()
    bias_fields: Mapping[str, tuple[str, ...]] = dataclasses.field(default_factory=dict)
    qk_norm: bool = False
    window: Literal["never", "unless null", "if used"] = "never"


_LLAMA = {
    "vocab_size": 32000, "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32,
    "num_attention_heads": 32, "rms_norm_eps": 1e-6, "hidden_act": "silu", "max_position_embeddings": 2048,
}  # fmt: skip
_MISTRAL = {"intermediate_size": 14336, "num_key_value_heads": 8, "max_position_embeddings": 131072}
_QWEN2 = {
    "vocab_size": 151936, "intermediate_size": 22016, "num_key_value_heads": 32, "max_position_embeddings": 32768,
}  # fmt: skip
_QWEN3 = _QWEN2 | {"head_dim": 128}
_WINDOW = {"sliding_window": 4096}

DECODERS = {
    "llama": Decoder("llama", _LLAMA, bias_fields={"attention_bias": _ATTENTION, "mlp_bias": _MLP}),
    "mistral": Decoder("mistral", _LLAMA | _MISTRAL | _WINDOW, window="unless null"),
    "qwen2": Decoder("qwen2", _LLAMA | _QWEN2 | _WINDOW, biased=("q_proj", "k_proj", "v_proj"), window="if used"),
    "qwen3": Decoder(
        "qwen3", _LLAMA | _QWEN3 | _WINDOW, bias_fields={"attention_bias": _ATTENTION}, qk_norm=True, window="if used"
    ),
}
"""{`model_type`: decoder}; the keys are those of `icet_jax.config.names.DECODERS`."""


def decoder_kind(values: Any, where: str) -> Decoder:
    """Returns the kind of decoder that a part of config.json describes, Llama if the part has no `model_type`.

    Raises:
      UserError: the part is not a mapping, or its `model_type` is not in `DECODERS`.
    """
    fields = Fields(values, {"model_type": "llama"}, where)
    return DECODERS[fields.choice("model_type", DECODERS)]


def decoder_from_hf(
    values: Any, where: str = "config.json", *, kind: Decoder | None = None, tied: bool = False
) -> LlamaConfig:
    """Returns the network's config for a decoder's part of config.json (HF `LlamaConfig`, `MistralConfig`, ...).

    The result does not contain the sliding window: callers read it with `attention_window` and refuse longer texts.

    Args:
      values: the parsed config.json, or the part of it that describes the decoder.
      where: name of `values` in error messages.
      kind: kind of the decoder; None for the one that `values` name.
      tied: whether the enclosing config says that the head shares the weights of the embeddings.

    Raises:
      UserError: a value would need a different network.
    """
    kind = decoder_kind(values, where) if kind is None else kind
    fields = Fields(values, kind.defaults, where)
    fields.only("model_type", kind.model_type)
    fields.only("hidden_act", "silu")
    fields.only("partial_rotary_factor", 1, 1.0)
    heads, width = fields.size("num_attention_heads"), fields.size("hidden_size")
    fields.values.setdefault("num_key_value_heads", heads)
    if "head_dim" not in fields.values:
        if width % heads:
            raise UserError(f"{where}: hidden_size={width} is not a multiple of num_attention_heads={heads}")
        fields.values["head_dim"] = width // heads
    if heads % fields.size("num_key_value_heads"):
        raise fields.fail("num_key_value_heads", f"a divisor of num_attention_heads={heads}")
    if fields.size("head_dim") % 2:
        raise fields.fail("head_dim", "an even number")
    _check_layer_types(fields, kind, _window(values, kind, where))
    theta, scaling = _rope(fields)
    return LlamaConfig(
        vocab_size=fields.size("vocab_size"),
        hidden_size=width,
        intermediate_size=fields.size("intermediate_size"),
        num_hidden_layers=fields.size("num_hidden_layers"),
        num_attention_heads=heads,
        num_key_value_heads=fields.size("num_key_value_heads"),
        head_dim=fields.size("head_dim"),
        rms_norm_eps=fields.number("rms_norm_eps"),
        rope_theta=theta,
        rope_scaling=scaling,
        tie_word_embeddings=tied or bool(fields.values.get("tie_word_embeddings", False)),
        biased=_biased(fields, kind),
        qk_norm=kind.qk_norm,
    )


def _biased(fields: Fields, kind: Decoder) -> tuple[str, ...]:
    """Returns the projections that have a bias."""
    names = kind.biased
    for field in _BIAS_FIELDS:
        if field not in kind.bias_fields:
            fields.only(field, False)
            continue
        fields.values.setdefault(field, False)
        if fields.choice(field, (True, False)):
            names += kind.bias_fields[field]
    return names


def _check_layer_types(fields: Fields, kind: Decoder, window: int | None) -> None:
    """Raises a `UserError` if `layer_types` names layers that are not the network's for texts within the window."""
    types = fields.values.get("layer_types", []) if kind.window == "if used" else []
    allowed = ("full_attention",) if window is None else ("full_attention", "sliding_attention")
    if not isinstance(types, list) or any(layer not in allowed for layer in types):
        raise fields.fail("layer_types", f"a list of {' or '.join(map(repr, allowed))}")


def _rope(fields: Fields) -> tuple[float, RopeScaling | None]:
    """Returns base and scaling of the rotary embedding.

    Transformers before version 5 writes them as `rope_theta` and `rope_scaling`, later ones as `rope_parameters`.
    """
    merged: JsonObject = {"rope_theta": fields.values.get("rope_theta", 10000.0)}
    for name in ("rope_scaling", "rope_parameters"):
        part = fields.values.get(name, {})
        if not isinstance(part, dict):
            raise fields.fail(name, "a mapping")
        merged |= part
    inner = Fields(merged, {}, f"{fields.where}: rope")
    theta = inner.number("rope_theta")
    kind = merged.get("rope_type", merged.get("type", "default"))
    if kind == "default":
        return theta, None
    if kind != "llama3":
        raise UserError(f"{fields.where}: rope_type {shown(kind)} is not supported; needs 'default' or 'llama3'")
    return theta, RopeScaling(
        factor=inner.number("factor"),
        low_freq_factor=inner.number("low_freq_factor"),
        high_freq_factor=inner.number("high_freq_factor"),
        original_max_position_embeddings=inner.size("original_max_position_embeddings"),
    )


def attention_window(values: JsonObject, where: str = "config.json") -> int | None:
    """Returns how many tokens each token attends to (itself and the last ones before it); None if there is no limit.

    Raises:
      UserError: the part has no supported `model_type`, or its `sliding_window` is not a positive integer.
    """
    return _window(values, decoder_kind(values, where), where)


def _window(values: JsonObject, kind: Decoder, where: str) -> int | None:
    """Returns `attention_window` of a decoder of this kind."""
    is_null = "sliding_window" in values and values["sliding_window"] is None
    if kind.window == "never" or is_null or (kind.window == "if used" and not values.get("use_sliding_window")):
        return None
    return Fields(values, kind.defaults, where).size("sliding_window")


def readable_tokens(values: JsonObject, where: str = "config.json") -> int:
    """Returns the largest number of tokens for which `nn.llama` gives the same result as the published decoder.

    It is the decoder's number of positions or, if smaller, its attention window: `nn.llama` has no window, which makes
    no difference for texts that fit into it.

    Raises:
      UserError: a value is not a positive integer.
    """
    fields = Fields(values, decoder_kind(values, where).defaults, where)
    positions = fields.size("max_position_embeddings")
    return min(positions, attention_window(values, where) or positions)


def decoder_to_hf(config: LlamaConfig, dtype: str, model_type: str = "llama") -> JsonObject:
    """Returns a decoder's part of config.json, with the keys of transformers before version 5.

    Args:
      config: config of the decoder.
      dtype: torch name of the dtype of the stored weights.
      model_type: model type of the part.

    Raises:
      ValueError: a decoder of this model type cannot have biases at exactly the projections that have one, or its
        queries and keys are normalised and the config's are not, or the other way round.
    """
    rope, kind = config.rope_scaling, DECODERS.get(model_type, Decoder(model_type, {}))
    bias_fields = [field for field, names in kind.bias_fields.items() if set(names) <= set(config.biased)]
    if {*kind.biased, *(name for field in bias_fields for name in kind.bias_fields[field])} != set(config.biased):
        raise ValueError(f"a {model_type} decoder has no way to say that the biased projections are {config.biased}")
    if config.qk_norm != kind.qk_norm:
        raise ValueError(f"a {model_type} decoder has no way to say that qk_norm is {config.qk_norm}")
    return {
        "model_type": model_type,
        **{field: getattr(config, field) for field in _SIZES},
        "hidden_act": "silu",
        "num_key_value_heads": config.num_key_value_heads,
        "head_dim": config.head_dim,
        "rope_theta": config.rope_theta,
        "rope_scaling": None if rope is None else {"rope_type": "llama3", **vars(rope)},
        "tie_word_embeddings": config.tie_word_embeddings,
        # Without this key transformers would assume a window.
        **({"sliding_window": None} if kind.window == "unless null" else {}),
        **dict.fromkeys(bias_fields, True),
        "torch_dtype": dtype,
    }
