"""Converts a Llama decoder from GGUF to Hugging Face's layout: weights, config and tokenizer.

Written for SmolLM2-135M-Instruct (Q4_1). The weights are dequantised to float32, which is exact. Needs the package
`gguf` (`pip install "icet-jax[real]"`).
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from icet_jax.errors import UserError
from icet_jax.files import JsonObject

_LAYER_NAMES = {
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_NAMES = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
_CONTROL_TOKEN = 3  # GGUF's token type of special tokens


@dataclass(frozen=True)
class Decoder:
    """Holds a Llama decoder in Hugging Face's layout.

    Attributes:
      tensors: {key of `LlamaForCausalLM`: float32 array}; without `lm_head.weight` if the embeddings are tied.
      config: content of its `config.json`.
      tokenizer: a `tokenizers.Tokenizer`.
      special: {"bos_token": text, ...} of the tokenizer.
    """

    tensors: dict[str, np.ndarray]
    config: JsonObject
    tokenizer: Any
    special: dict[str, str]


def read_decoder(path: Path) -> Decoder:
    """Returns the decoder in a GGUF file.

    Raises:
      UserError: the package `gguf` is not installed, or the file holds something other than a Llama with SmolLM's
        tokenizer.
    """
    try:
        from gguf import GGUFReader
    except ImportError as error:
        raise UserError('the package gguf is not installed; pip install "icet-jax[real]"') from error
    reader = GGUFReader(path)
    fields = {name: field.contents() for name, field in reader.fields.items()}
    kinds = (fields.get("general.architecture"), fields.get("tokenizer.ggml.pre"))
    if kinds != ("llama", "smollm"):
        raise UserError(f"{path}: architecture and tokenizer are {kinds}; this converter is for ('llama', 'smollm')")
    tensors = _tensors(reader, fields, path)
    tokens, ids = fields["tokenizer.ggml.tokens"], ("bos", "eos", "unknown", "padding")
    special = {name: tokens[fields[f"tokenizer.ggml.{name}_token_id"]] for name in ids}
    names = {"bos": "bos_token", "eos": "eos_token", "unknown": "unk_token", "padding": "pad_token"}
    return Decoder(
        tensors, _config(fields, tied="lm_head.weight" not in tensors), _tokenizer(fields),
        {names[name]: token for name, token in special.items()},
    )  # fmt: skip


def _tensors(reader: Any, fields: JsonObject, path: Path) -> dict[str, np.ndarray]:
    """Returns all tensors under Hugging Face's names, in float32."""
    from gguf.quants import dequantize

    heads = {"attn_q": fields["llama.attention.head_count"], "attn_k": fields["llama.attention.head_count_kv"]}
    tensors = {}
    for tensor in reader.tensors:
        shape = tuple(int(size) for size in reversed(tensor.shape))
        weight = dequantize(tensor.data, tensor.tensor_type).astype(np.float32).reshape(shape)
        parts = tensor.name.split(".")
        if parts[0] == "blk" and parts[2] in _LAYER_NAMES:
            if parts[2] in heads:
                weight = _unpermute(weight, heads[parts[2]])
            key = f"model.layers.{parts[1]}.{_LAYER_NAMES[parts[2]]}.{parts[3]}"
        elif parts[0] in _NAMES:
            key = f"{_NAMES[parts[0]]}.{parts[1]}"
        else:
            raise UserError(f"{path}: the tensor '{tensor.name}' is unknown; this converter is for Llama")
        tensors[key] = np.ascontiguousarray(weight)
    return tensors


def _unpermute(weight: np.ndarray, heads: int) -> np.ndarray:
    """Returns a query or key projection with its rows in Hugging Face's order.

    llama.cpp turns neighbouring pairs of rows by the rotary embedding, Hugging Face rows that are half a head apart.
    """
    rows, columns = weight.shape
    return weight.reshape(heads, rows // heads // 2, 2, columns).swapaxes(1, 2).reshape(rows, columns)


def _config(fields: JsonObject, *, tied: bool) -> JsonObject:
    """Returns the content of the decoder's `config.json`."""
    width, heads = fields["llama.embedding_length"], fields["llama.attention.head_count"]
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "attention_bias": False,
        "attention_dropout": 0.0,
        "mlp_bias": False,
        "hidden_act": "silu",
        "hidden_size": width,
        "intermediate_size": fields["llama.feed_forward_length"],
        "num_hidden_layers": fields["llama.block_count"],
        "num_attention_heads": heads,
        "num_key_value_heads": fields["llama.attention.head_count_kv"],
        "head_dim": width // heads,
        "max_position_embeddings": fields["llama.context_length"],
        "rms_norm_eps": round(float(fields["llama.attention.layer_norm_rms_epsilon"]), 9),  # stored in float32
        "rope_theta": float(fields["llama.rope.freq_base"]),
        "rope_scaling": None,
        "tie_word_embeddings": tied,
        "vocab_size": len(fields["tokenizer.ggml.tokens"]),
        "initializer_range": 0.02,
        "bos_token_id": fields["tokenizer.ggml.bos_token_id"],
        "eos_token_id": fields["tokenizer.ggml.eos_token_id"],
        "pad_token_id": fields["tokenizer.ggml.padding_token_id"],
        "torch_dtype": "float32",
    }


def _tokenizer(fields: JsonObject) -> Any:
    """Returns the tokenizer: byte-level BPE that splits numbers into digits first, as SmolLM's does."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    tokens, types = fields["tokenizer.ggml.tokens"], fields["tokenizer.ggml.token_type"]
    merges = [tuple(merge.split(" ")) for merge in fields["tokenizer.ggml.merges"]]
    tokenizer = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    special = [token for token, kind in zip(tokens, types, strict=True) if kind == _CONTROL_TOKEN]
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    return tokenizer
