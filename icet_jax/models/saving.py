"""Writes vision-language models of every family as HF checkpoints; see `icet_jax.checkpoints.hf_export`."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
from flax import nnx

from icet_jax.checkpoints.adapter import Adapter, of_lora
from icet_jax.checkpoints.hf_export import MAX_SHARD_BYTES, save_network
from icet_jax.models import family_of
from icet_jax.nn.layers import Lora


def save_vlm(
    out_dir: str | Path,
    config: Any,
    params: nnx.State,
    *,
    source_dir: str | Path | None = None,
    start: Adapter | None = None,
    lora: Lora | None = None,
    trained: Sequence[str] | None = None,
    value_head: dict[str, jax.Array] | None = None,
    texts: Mapping[str, str] | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> Path:
    """Writes a vision-language model's checkpoint directory, all of it or nothing.

    Args:
      out_dir: new, or an earlier export, which is replaced.
      config: of the network, of any family.
      params: its parameters, as `load_vlm` returned or training left them.
      source_dir: the directory they were loaded from: gives dtypes, untouched tensors, config keys unknown here,
        generation config, tokenizer and processor files. None for a network made here: dtypes are the parameters'.
      start: the adapter that was merged when they were loaded (`Checkpoint.adapter`); the export contains it.
      lora: trained adapters to merge, in float32, into the source's weights.
      trained: roots of the paths that training may have changed: () for none (LoRA on a frozen base), in which case no
        parameter is looked at; ("language_model",). None compares every parameter with its source, one at a time.
      value_head: saved beside the model as `value_head.safetensors`, which transformers does not read.
      texts: further files by name, such as the model card.
      max_shard_bytes: larger models are cut into shards with an index.

    Returns:
      `out_dir`.

    Raises:
      UserError: the directory cannot be written or holds something else; the source does not fit `config`.
    """
    family = family_of(config)

    def config_json(values: dict[str, Any] | None, dtype: str, tied: set[str]) -> dict[str, Any]:
        out = family.config_to_hf(config, values, dtype)
        if out["tie_word_embeddings"] and not tied:
            out["tie_word_embeddings"] = out["text_config"]["tie_word_embeddings"] = False
        return out

    return save_network(
        out_dir, family.table(config), params, config_json, source_dir=source_dir, start=start,
        lora=None if lora is None else of_lora(lora), trained=trained, value_head=value_head, texts=texts,
        max_shard_bytes=max_shard_bytes,
    )  # fmt: skip
