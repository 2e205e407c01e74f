"""Loads the network of a text scorer, chosen by `architectures` in its config.json."""

import dataclasses
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

from flax import nnx
from jax.sharding import Mesh

from icet_jax import models
from icet_jax.checkpoints import hf_config, scorer_config, scorer_tables, tables
from icet_jax.checkpoints.decoders import decoder_from_hf, readable_tokens
from icet_jax.checkpoints.hf_import import Checkpoint, abstract_params, load_network
from icet_jax.checkpoints.tables import Table
from icet_jax.config.names import DECODERS, FAMILIES
from icet_jax.errors import UserError
from icet_jax.files import JsonObject
from icet_jax.nn.bert import BertClassifier, BertConfig
from icet_jax.nn.deberta import DebertaConfig, DebertaRewardModel
from icet_jax.nn.gpt2 import GPT2Config, GPT2RewardModel
from icet_jax.nn.llama import LlamaConfig
from icet_jax.nn.llama_text import LlamaLM, LlamaRewardModel
from icet_jax.nn.protocols import NetworkConfig

_Config = BertConfig | DebertaConfig | GPT2Config | LlamaConfig | NetworkConfig


@dataclasses.dataclass(frozen=True)
class _Family:
    """Describes how one HF architecture is loaded, and written if it is a reward model that can be trained.

    Attributes:
      model_type: `model_type` in config.json.
      from_hf: function of the parsed config.json and its name in error messages that returns the network's config.
      network: class of the network.
      table: function from the network's config to its key table.
      to_hf: function of (network's config, config.json of the base model or None, torch's name of the dtype) that
        returns the config.json of a trained reward model; None if `--mode=reward` cannot train this architecture.
      positions: function of (config.json, network's config) that returns the largest number of tokens of a text; None
        if `--mode=reward` cannot train this architecture.
    """

    model_type: str
    from_hf: Callable[[JsonObject, str], _Config]
    network: Callable[..., nnx.Module]
    table: Callable[[Any], Table]
    to_hf: Callable[[Any, JsonObject | None, str], JsonObject] | None = None
    positions: Callable[[JsonObject, Any], int] | None = None


_BERT = (scorer_config.bert_from_hf, BertClassifier, scorer_tables.bert_table)
_LANGUAGE_MODEL = (decoder_from_hf, LlamaLM, scorer_tables.llama_table)
_REWARD_MODEL = (
    scorer_config.decoder_reward_from_hf, LlamaRewardModel, scorer_tables.llama_reward_table,
    scorer_config.decoder_reward_to_hf, lambda values, config: readable_tokens(values),
)  # fmt: skip
_FAMILIES = {
    "BertForSequenceClassification": _Family("bert", *_BERT),
    "RobertaForSequenceClassification": _Family("roberta", *_BERT),
    "DebertaV2ForSequenceClassification": _Family(
        "deberta-v2", scorer_config.deberta_from_hf, DebertaRewardModel, scorer_tables.deberta_table
    ),
    "GPT2ForSequenceClassification": _Family(
        "gpt2",
        hf_config.gpt2_from_hf,
        GPT2RewardModel,
        tables.gpt2_table,
        hf_config.gpt2_to_hf,
        lambda values, config: config.n_positions,
    ),  # fmt: skip
    **{f"{name}ForCausalLM": _Family(kind, *_LANGUAGE_MODEL) for kind, name in DECODERS.items()},
    **{f"{name}ForSequenceClassification": _Family(kind, *_REWARD_MODEL) for kind, name in DECODERS.items()},
}
_MODEL_TYPES = {
    **{hf_class: family.model_type for hf_class, family in _FAMILIES.items()},
    **{family.architecture: model_type for model_type, family in FAMILIES.items()},
}
ARCHITECTURES = tuple(_MODEL_TYPES)
"""HF classes that `load_scorer_network` loads."""


def architecture(values: JsonObject, where: str = "config.json") -> str:
    """Returns the name of a scorer's HF class, one of `ARCHITECTURES`.

    It is the first entry of `architectures` or, if that field is absent, the only class of the `model_type`.

    Args:
      values: the parsed `config.json`.
      where: name of the file in error messages.

    Raises:
      UserError: the class is unknown or does not fit `model_type`, or several classes fit.
    """
    model_type, named = values.get("model_type"), values.get("architectures")
    if named:
        hf_class = str(named[0] if isinstance(named, list) else named)
        if hf_class not in _MODEL_TYPES:
            raise UserError(
                f"{where}: architecture '{hf_class}' is not a scorer; supported are {', '.join(ARCHITECTURES)}"
            )
        if _MODEL_TYPES[hf_class] != model_type:
            raise UserError(f"{where}: model_type '{model_type}' does not fit architecture '{hf_class}'")
        return hf_class
    fitting = [name for name, own_type in _MODEL_TYPES.items() if own_type == model_type]
    if len(fitting) != 1:
        names = ", ".join(fitting or ARCHITECTURES)
        raise UserError(f"{where}: model_type '{model_type}' without architectures; set it to one of {names}")
    return fitting[0]


def trainable_family(values: JsonObject, where: str = "config.json") -> _Family:
    """Returns the architecture of a reward model that can be trained from a base model.

    Args:
      values: the parsed config.json of the base model, a language model or a reward model.
      where: name of the file in error messages.

    Raises:
      UserError: no reward model of this `model_type` can be trained.
    """
    families = {family.model_type: family for family in _FAMILIES.values() if family.to_hf is not None}
    if values.get("model_type") not in families:
        raise UserError(
            f"{where}: model_type '{values.get('model_type')}' cannot become a reward model; give one of "
            f"{', '.join(families)}"
        )
    return families[values["model_type"]]


def readable_positions(checkpoint: Checkpoint) -> int:
    """Returns the largest number of tokens of a text that a reward model can be trained on.

    Args:
      checkpoint: the base model, of a `trainable_family`.
    """
    positions = trainable_family(checkpoint.hf_config).positions
    assert positions is not None
    return positions(checkpoint.hf_config, checkpoint.config)


def load_scorer_network(directory: str | Path, *, dtype: str = "float32", mesh: Mesh | None = None) -> Checkpoint:
    """Loads the network of a classifier, a reward model or a judge (a language model) from an HF checkpoint directory.

    A vision-language model is loaded completely, although a judge does not use its image encoder.

    Args:
      directory: directory with config.json and safetensors weights, in one file or in shards.
      dtype: dtype of parameters and computation, "float32" or "bfloat16".
      mesh: mesh for the parameters; None for the default device.

    Returns:
      The checkpoint. Its `config` is the network's (`BertConfig`, `DebertaConfig`, ...), the names of its labels are in
      `hf_config["id2label"]`, and `architecture(checkpoint.hf_config)` is its HF class.

    Raises:
      UserError: the architecture or a config value is not supported, files are missing, corrupt or truncated, or
        tensors do not fit (all are listed).
    """
    directory = Path(directory)
    where = str(directory / "config.json")
    values = hf_config.read_hf_config(directory)
    family, config, build_network = _network(values, where)
    graphdef, params = load_network(
        directory, build_network, family.table(config), dtype=dtype, param_dtype=dtype, mesh=mesh
    )
    return Checkpoint(graphdef, params, config, values, directory)


def abstract_scorer(values: JsonObject, where: str, dtype: str | None = None) -> nnx.State:
    """Returns the parameters that `load_scorer_network` would load as abstract arrays (shapes and dtypes).

    Args:
      values: the parsed config.json.
      where: name of the file in error messages.
      dtype: dtype of the parameters; None for the default of this architecture (`default_dtype`).

    Raises:
      UserError: the architecture or a config value is not supported.
    """
    build_network = _network(dict(values), where)[2]
    dtype = dtype or default_dtype(architecture(values, where))
    return abstract_params(build_network, dtype, dtype)[1]


def default_dtype(hf_class: str) -> str:
    """Returns the dtype in which scorers load the parameters of this HF class unless a config says otherwise."""
    return "bfloat16" if _is_decoder(hf_class) else "float32"


def default_batch_size(hf_class: str) -> int:
    """Returns how many rows a scorer of this HF class takes at once unless a config says otherwise."""
    return 16 if _is_decoder(hf_class) else 64


def _is_decoder(hf_class: str) -> bool:
    """Returns whether a class has a decoder like Llama's, alone or in a vision-language model."""
    return _MODEL_TYPES[hf_class] in (*DECODERS, *FAMILIES)


def _network(values: JsonObject, where: str) -> tuple[_Family, _Config, Callable[..., nnx.Module]]:
    """Returns a scorer's family, the config of its network, and the network's class with that config bound."""
    hf_class = architecture(values, where)
    if hf_class in _FAMILIES:
        family = _FAMILIES[hf_class]
    else:
        vlm = models.family(_MODEL_TYPES[hf_class])
        family = _Family(vlm.name, vlm.config_from_hf, vlm.network, vlm.table)
    config = family.from_hf(values, where)
    return family, config, functools.partial(family.network, config)
