"""Loads scorers by name, checkpoint directory, hub id or config entry; saves trained reward models."""

import functools
import importlib
import json
import os
import re
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from flax import nnx
from jax.sharding import Mesh

from icet_jax.checkpoints.hf_config import read_hf_config
from icet_jax.checkpoints.hf_export import save_network
from icet_jax.checkpoints.source import local_directory
from icet_jax.config.names import SCORERS
from icet_jax.errors import UserError
from icet_jax.files import JsonObject, replace_dir_atomic
from icet_jax.media.tokenizer import Tokenizer, load_tokenizer
from icet_jax.nn.gpt2 import GPT2RewardModel
from icet_jax.nn.llama_text import LlamaRewardModel
from icet_jax.scorers.base import Scorer, metric_name
from icet_jax.scorers.keywords import RefusalKeywords
from icet_jax.scorers.networks import (
    architecture,
    default_batch_size,
    default_dtype,
    load_scorer_network,
    trainable_family,
)
from icet_jax.scorers.pairs import HH_TEMPLATE
from icet_jax.scorers.source import STORED_SETTINGS, CheckpointSource, Entry, Template


def load_scorer(
    path_or_id: str | os.PathLike[str],
    kind: str | None = None,
    template: Template = None,
    *,
    dtype: str | None = None,
    mesh: Mesh | None = None,
    revision: str | None = None,
    batch_size: int | None = None,
    **fields: Any,
) -> Scorer:
    """Loads a scorer by its name, or from a checkpoint.

    Args:
      path_or_id: "refusal_keywords", or the directory or hub id of a checkpoint.
      kind: kind of scorer, a key of `icet_jax.config.names.SCORERS`. None determines it from config.json and, for a
        Llama or Qwen3, also from the checkpoint's name.
      template: how prompt and response become the text that the scorer reads. For a reward model on GPT-2 or DeBERTa,
        the first segment, which contains `{prompt}` (by default `HH_TEMPLATE` and "{prompt}"). For a decoder, the whole
        text with `{prompt}` and `{response}` (by default the checkpoint's chat template). For a judge, also a function
        of (prompt, response) or the name of a built-in template (`icet_jax.scorers.prompts.BUILT_IN`).
      dtype: dtype of the network, "float32" or "bfloat16"; if None, bfloat16 for a decoder and float32 for the others.
      mesh: mesh for the weights; None for the default device.
      revision: branch, tag or commit of a hub id.
      batch_size: rows scored at once; 16 for a decoder and 64 for the others if None.
      fields: settings of this kind of scorer (`icet_jax.config.names.SCORERS`), such as `heads` of a toxicity
        classifier.

    Raises:
      UserError: the kind or a field is unknown, the template has the wrong form, or the checkpoint is broken or is not
        a scorer.
    """
    if str(path_or_id) == RefusalKeywords.name:
        return RefusalKeywords()
    directory = local_directory(path_or_id, revision=revision)
    config = read_hf_config(directory)
    hf_class = architecture(config, str(directory / "config.json"))
    tokenizer = load_tokenizer(directory)
    identity = f"{path_or_id} {config.get('_name_or_path') or ''}"
    kind = _detect_kind(hf_class, tokenizer, identity) if kind is None else kind
    _check_kind(str(path_or_id), kind, hf_class, fields)
    dtype = dtype or default_dtype(hf_class)
    source = CheckpointSource(
        config,
        kind,
        tokenizer,
        template,
        identity,
        load=functools.partial(load_scorer_network, directory, dtype=dtype, mesh=mesh),
        common={
            "name": metric_name(str(path_or_id)),
            "mesh": mesh,
            "batch_size": batch_size or default_batch_size(hf_class),
        },
    )
    try:
        return _scorer_factory(kind)(source, **fields)
    except UserError as error:
        raise UserError(f"{path_or_id}: {error}") from error


def load_defined(
    name: str,
    definition: Mapping[str, Any],
    *,
    mesh: Mesh | None = None,
    resolve: Callable[[str], Scorer],
) -> Scorer:
    """Loads the scorer that an entry of `config.scorers` describes.

    Args:
      name: name of the entry. It becomes the name of an ensemble; other scorers are named after their exact model.
      definition: value of the entry, `{"kind": ..., fields of that kind}`, checked by `icet_jax.config.check`.
      mesh: mesh for the weights.
      resolve: loads a member of an ensemble by its name.

    Raises:
      UserError: the scorer cannot be loaded; the message begins with the name of the entry.
    """
    fields = dict(definition)
    kind = fields.pop("kind")
    try:
        if SCORERS[kind].architectures:
            return load_scorer(fields.pop("checkpoint"), kind, mesh=mesh, **fields)
        return _scorer_factory(kind)(Entry(name, resolve), **fields)
    except UserError as error:
        raise UserError(f"config.scorers.{name}: {error}") from error


def save_reward_model(
    directory: str | Path, model: GPT2RewardModel | LlamaRewardModel, tokenizer: Tokenizer, *, name: str,
    template: str | None = HH_TEMPLATE, base: JsonObject | None = None,
) -> Path:  # fmt: skip
    """Writes a trained reward model and its tokenizer in the form of HF's `...ForSequenceClassification`.

    If this is interrupted, the directory is unchanged.

    Args:
      directory: directory to write; an older export in it is replaced.
      model: the network.
      tokenizer: transformers' tokenizer; its special token ids are written to config.json (EOS as pad if it has none).
      name: name of the scorer in metrics.
      template: template that `load_scorer` will use; None for a decoder's chat template.
      base: config.json of the model that training started from, whose other keys are kept; None for a new GPT-2.

    Returns:
      `directory`.

    Raises:
      UserError: the directory cannot be written.
    """
    directory = Path(directory)
    directory.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=directory.parent, prefix=f".{directory.name}.") as scratch:
        folder = _save_network(Path(scratch) / "model", model, {"model_type": "gpt2"} if base is None else base)
        tokenizer.save_pretrained(folder)
        _replace_new_tokenizer_class(folder / "tokenizer_config.json")
        path = folder / "config.json"
        config = json.loads(path.read_text(encoding="utf-8"))
        ends = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
        config |= ends | {"pad_token_id": pad_token(tokenizer)}
        config[STORED_SETTINGS] = {"name": name, "template": template}
        path.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        replace_dir_atomic(folder, directory)
    return directory


def pad_token(tokenizer: Tokenizer) -> int | None:
    """Returns the id of the token that pads texts for a trained reward model: EOS if the tokenizer has none for it."""
    return tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id


def _save_network(folder: Path, model: GPT2RewardModel | LlamaRewardModel, base: JsonObject) -> Path:
    """Writes weights and config.json of a reward model, whose base model has the config.json `base`."""
    family = trainable_family(base)
    to_hf = family.to_hf
    assert to_hf is not None

    def config_json(values: JsonObject | None, dtype: str, tied: set[str]) -> JsonObject:
        return to_hf(model.config, base, dtype)

    return save_network(folder, family.table(model.config), nnx.split(model)[1], config_json)


def _replace_new_tokenizer_class(path: Path) -> None:
    """Replaces a class name in tokenizer_config.json that transformers 4 does not know and could not load."""
    values = json.loads(path.read_text(encoding="utf-8"))
    if values.get("tokenizer_class") == "TokenizersBackend":
        values["tokenizer_class"] = "PreTrainedTokenizerFast"
        path.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")


def _scorer_factory(kind: str) -> Callable[..., Scorer]:
    """Returns the function `make_scorer` of this kind's module."""
    return importlib.import_module(SCORERS[kind].module).make_scorer


def _detect_kind(hf_class: str, tokenizer: Tokenizer, identity: str) -> str:
    """Returns the kind of scorer that a checkpoint is.

    Most Hugging Face classes belong to one kind. A Llama or Qwen3 that generates its verdict is a guard of that family
    or a decoder judge; which of the two follows from its name (`identity`) or chat template.

    Raises:
      UserError: the class belongs to several kinds, and neither name nor chat template shows which.
    """
    kinds = [kind for kind, scorer in SCORERS.items() if hf_class in scorer.architectures]
    if len(kinds) == 1:
        return kinds[0]
    is_guard = re.search(r"(llama|qwen3)-?guard", identity, re.IGNORECASE)
    if is_guard or "UNSAFE CONTENT CATEGORIES" in str(tokenizer.chat_template):
        return next(kind for kind in kinds if kind.endswith("_guard"))
    if "harmbench" in identity.lower():
        return "decoder_judge"
    raise UserError(f"{identity.split()[0]}: a {hf_class} may judge in several ways; give kind, {' or '.join(kinds)}")


def _check_kind(path: str, kind: str, hf_class: str, fields: Mapping[str, Any]) -> None:
    """Raises a UserError unless a checkpoint of class `hf_class` can be a scorer of this kind with these fields."""
    architectures = {name: scorer.architectures for name, scorer in SCORERS.items() if scorer.architectures}
    if kind not in architectures:
        raise UserError(f"{path}: kind '{kind}' is unknown; use one of {', '.join(architectures)}")
    if hf_class not in architectures[kind]:
        raise UserError(f"{path}: is a {hf_class}; a {kind} is one of {', '.join(architectures[kind])}")
    for field, value in fields.items():
        if field not in SCORERS[kind].fields:
            raise UserError(f"{path}: a {kind} has no field '{field}'; it has {', '.join(SCORERS[kind].fields)}")
        if not value:
            raise UserError(f"{path}: {field} is {value!r}; give a value or leave it out")
