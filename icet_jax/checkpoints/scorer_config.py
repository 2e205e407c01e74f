"""Converts HF's `config.json` to the configs of the scorers' networks.

A field that the file lacks has the default of its transformers class. DeBERTa-v3 uses the class of DeBERTa-v2, whose
defaults are not the values of DeBERTa-v3.
"""

import copy

from icet_jax.checkpoints.decoders import decoder_from_hf, decoder_to_hf
from icet_jax.checkpoints.hf_config import Fields, drop_new_keys
from icet_jax.config.names import DECODERS
from icet_jax.files import JsonObject
from icet_jax.nn.bert import BertConfig
from icet_jax.nn.deberta import DebertaConfig
from icet_jax.nn.layers import ACTIVATIONS
from icet_jax.nn.llama import LlamaConfig

_BERT_DEFAULTS = {
    "vocab_size": 30522, "hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12,
    "intermediate_size": 3072, "hidden_act": "gelu", "max_position_embeddings": 512, "type_vocab_size": 2,
    "layer_norm_eps": 1e-12, "pad_token_id": 0,
}  # fmt: skip
_DEBERTA_DEFAULTS = {
    "vocab_size": 128100, "hidden_size": 1536, "num_hidden_layers": 24, "num_attention_heads": 24,
    "intermediate_size": 6144, "hidden_act": "gelu", "pooler_hidden_act": "gelu", "max_position_embeddings": 512,
    "type_vocab_size": 0, "layer_norm_eps": 1e-7, "relative_attention": False, "position_biased_input": True,
    "share_att_key": False, "norm_rel_ebd": "none", "position_buckets": -1, "max_relative_positions": -1,
    "conv_kernel_size": 0, "pos_att_type": [],
}  # fmt: skip
_ROBERTA_DEFAULTS = _BERT_DEFAULTS | {"vocab_size": 50265, "pad_token_id": 1}


def label_count(fields: Fields) -> int:
    """Returns the number of labels: of `id2label` or, if that is absent, `num_labels`, which defaults to 2.

    Raises:
      UserError: a field has the wrong type.
    """
    labels = fields.values.get("id2label")
    if labels is None:
        fields.values.setdefault("num_labels", 2)
        return fields.size("num_labels")
    if not isinstance(labels, dict) or not labels:
        raise fields.fail("id2label", "a mapping of label numbers to names")
    return len(labels)


def attention_heads(fields: Fields) -> int:
    """Returns `num_attention_heads`.

    Raises:
      UserError: `hidden_size` is not a multiple of `num_attention_heads`.
    """
    heads, width = fields.size("num_attention_heads"), fields.size("hidden_size")
    if width % heads:
        raise fields.fail("num_attention_heads", f"a divisor of hidden_size={width}")
    return heads


def bert_from_hf(values: JsonObject, where: str = "config.json") -> BertConfig:
    """Returns the config of a BERT or RoBERTa sequence classifier (HF `BertConfig`, `RobertaConfig`).

    Args:
      values: the parsed file; its `model_type` is "bert" or "roberta".
      where: name of the file in error messages.

    Raises:
      UserError: a value would need a different network.
    """
    kind = values["model_type"]
    fields = Fields(values, _ROBERTA_DEFAULTS if kind == "roberta" else _BERT_DEFAULTS, where)
    fields.only("position_embedding_type", "absolute")
    fields.only("is_decoder", False)
    fields.only("add_cross_attention", False)
    pad = fields.values["pad_token_id"]
    positions = fields.size("max_position_embeddings")
    if isinstance(pad, bool) or not isinstance(pad, int) or not 0 <= pad < positions - 1:
        raise fields.fail("pad_token_id", "a token id below max_position_embeddings")
    return BertConfig(
        kind=kind,
        vocab_size=fields.size("vocab_size"),
        hidden_size=fields.size("hidden_size"),
        num_hidden_layers=fields.size("num_hidden_layers"),
        num_attention_heads=attention_heads(fields),
        intermediate_size=fields.size("intermediate_size"),
        max_position_embeddings=positions,
        type_vocab_size=fields.size("type_vocab_size"),
        num_labels=label_count(fields),
        pad_token_id=pad,
        hidden_act=fields.choice("hidden_act", ACTIVATIONS),
        layer_norm_eps=fields.number("layer_norm_eps"),
    )


def deberta_from_hf(values: JsonObject, where: str = "config.json") -> DebertaConfig:
    """Returns the config of a DeBERTa-v3 reward model (HF `DebertaV2Config`).

    Args:
      values: the parsed file.
      where: name of the file in error messages.

    Raises:
      UserError: there are several labels, or a value would need a different network (as a DeBERTa-v2's values would).
    """
    fields = Fields(values, _DEBERTA_DEFAULTS, where)
    require_one_label(fields)
    width, heads = fields.size("hidden_size"), attention_heads(fields)
    for field, expected in {
        "relative_attention": True, "position_biased_input": False, "type_vocab_size": 0, "share_att_key": True,
        "norm_rel_ebd": "layer_norm", "conv_kernel_size": 0, "embedding_size": width, "pooler_hidden_size": width,
        "attention_head_size": width // heads,
    }.items():  # fmt: skip
        fields.only(field, expected)
    terms = fields.values["pos_att_type"]
    named = terms.lower().replace(" ", "").split("|") if isinstance(terms, str) else terms
    if named not in (["c2p", "p2c"], ["p2c", "c2p"]):
        raise fields.fail("pos_att_type", "both c2p and p2c")
    if fields.values["max_relative_positions"] in (-1, 0):
        fields.values["max_relative_positions"] = fields.size("max_position_embeddings")
    distance, buckets = fields.size("max_relative_positions"), fields.size("position_buckets")
    # The logarithmic buckets divide by log((distance - 1) / (buckets / 2)), which must be positive.
    if buckets < 4 or buckets % 2 or distance - 1 <= buckets // 2:
        raise fields.fail("position_buckets", f"an even number from 4 to {2 * distance - 4}")
    return DebertaConfig(
        vocab_size=fields.size("vocab_size"),
        hidden_size=width,
        num_hidden_layers=fields.size("num_hidden_layers"),
        num_attention_heads=heads,
        intermediate_size=fields.size("intermediate_size"),
        position_buckets=buckets,
        max_relative_positions=distance,
        hidden_act=fields.choice("hidden_act", ACTIVATIONS),
        pooler_hidden_act=fields.choice("pooler_hidden_act", ACTIVATIONS),
        layer_norm_eps=fields.number("layer_norm_eps"),
    )


def decoder_reward_from_hf(values: JsonObject, where: str = "config.json") -> LlamaConfig:
    """Returns the config of a decoder as reward model, a sequence classifier with one label.

    Raises:
      UserError: there are several labels, or a value would need a different network.
    """
    require_one_label(Fields(values, {}, where))
    return decoder_from_hf(values, where)


def decoder_reward_to_hf(config: LlamaConfig, source: JsonObject | None, dtype: str) -> JsonObject:
    """Returns the `config.json` of a decoder as reward model, with the keys of transformers before version 5.

    Args:
      config: config of the network.
      source: the `config.json` of the base model, whose other keys are kept; None for a new Llama.
      dtype: torch's name of the dtype of the stored weights.
    """
    out = copy.deepcopy(source or {"model_type": "llama"})
    drop_new_keys(out)
    labels = {"id2label": {"0": "LABEL_0"}, "label2id": {"LABEL_0": 0}}
    hf_class = f"{DECODERS[out['model_type']]}ForSequenceClassification"
    return out | decoder_to_hf(config, dtype, out["model_type"]) | labels | {"architectures": [hf_class]}


def require_one_label(fields: Fields) -> None:
    """Raises a `UserError` if the model has several labels, because a reward model has one."""
    if label_count(fields) != 1:
        raise fields.fail("id2label" if "id2label" in fields.values else "num_labels", "one label (a reward model)")
