"""Writes vision-language models of every family as HF checkpoints; see `icet_jax.checkpoints.hf_export`."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import jax
from flax import nnx

from icet_jax.checkpoints.adapter import Adapter, adapter_from_lora
from icet_jax.checkpoints.hf_export import MAX_SHARD_BYTES, save_network
from icet_jax.files import JsonObject
from icet_jax.models import family_of
from icet_jax.nn.layers import Lora
from icet_jax.nn.protocols import NetworkConfig


def save_vlm(
    out_dir: str | Path,
    config: NetworkConfig,
    params: nnx.State,
    *,
    source_dir: str | Path | None = None,
    start: Adapter | None = None,
    lora: Lora | None = None,
    trained: Sequence[str] | None = None,
    value_head: dict[str, jax.Array] | None = None,
    texts: Mapping[str, str] | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    exit_layer: int | None = None,
) -> Path:
    """Writes a vision-language model's checkpoint directory; if this is interrupted, `out_dir` is unchanged.

    Args:
      out_dir: a new directory, or an earlier export, which is replaced.
      config: config of the network, of any family.
      params: parameters of the network, as `load_vlm` returned them or training changed them.
      source_dir: directory that `params` were loaded from. It provides dtypes, unchanged tensors, unknown config keys,
        generation config, tokenizer and processor files. None for a new network; the files then have the dtypes of
        `params`.
      start: the adapter that was merged into `params` at loading (`Checkpoint.adapter`); the written weights include
        it.
      lora: trained adapters to merge, in float32, into the written weights.
      trained: prefixes of the paths of parameters that training may have changed, such as ("language_model",). Only
        these parameters are compared with the source; None compares all, () compares none (LoRA on a frozen base).
      value_head: saved as `value_head.safetensors`, which transformers does not read.
      texts: {file name: content} of further files, such as the model card.
      max_shard_bytes: larger models are split into several files with an index.
      exit_layer: the only exit of the written model, whose image encoder has no blocks behind it. Loaded here, the
        model has exits 1..exit_layer, of which the last is the default. None writes the whole model.

    Returns:
      `out_dir`.

    Raises:
      UserError: the directory cannot be written, or contains something other than an export; or the source does not fit
        `config`; or there is no such exit, or the family's files cannot describe a model with one exit alone.
    """
    family = family_of(config)
    table, keys, written = family.table(config), None, config
    if exit_layer is not None:
        written = family.config_at_exit(config, exit_layer, "exit_layer")
        keys = {entry.key for entry in family.table(written).entries}

    def config_json(values: JsonObject | None, dtype: str, tied: set[str]) -> JsonObject:
        """Returns the config.json, which declares tied embeddings if `tied` (the keys of tied tensors) is not empty."""
        out = family.config_to_hf(written, values, dtype)
        if out["tie_word_embeddings"] and not tied:
            # Some families have the decoder's fields at the root.
            out["tie_word_embeddings"] = out.get("text_config", out)["tie_word_embeddings"] = False
        return out

    return save_network(
        out_dir, table, params, config_json, source_dir=source_dir, start=start,
        lora=None if lora is None else adapter_from_lora(lora), trained=trained, value_head=value_head, texts=texts,
        max_shard_bytes=max_shard_bytes, keys=keys,
    )  # fmt: skip
