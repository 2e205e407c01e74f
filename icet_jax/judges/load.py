"""Scorers by name, directory or hub id; and reward-model directories that say how they want to be read."""

import json
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from flax import nnx

from icet_jax.checkpoints.hf_config import read_hf_config
from icet_jax.checkpoints.hf_export import save_gpt2_reward
from icet_jax.checkpoints.hf_import import load_gpt2_reward
from icet_jax.checkpoints.source import local_directory
from icet_jax.data.tokenizer import load_tokenizer
from icet_jax.errors import UserError
from icet_jax.files import replace_dir_atomic
from icet_jax.judges.base import Scorer, metric_name
from icet_jax.judges.keywords import RefusalKeywords
from icet_jax.judges.reward_model import HH_TEMPLATE, RewardModel
from icet_jax.models.gpt2 import GPT2RewardModel

KINDS = ("reward_model",)

_OWN = "icet_jax"
"""Key of config.json under which `save_reward_model` keeps the template and the name; transformers ignores it."""


def load_scorer(
    path_or_id: str | os.PathLike[str],
    kind: str | None = None,
    template: Callable[[str, str], str] | str | None = None,
    *,
    dtype: str = "float32",
    mesh: Any = None,
) -> Scorer:
    """Loads what judges responses.

    Args:
      path_or_id: "refusal_keywords", or the directory or hub id of a checkpoint.
      kind: what the checkpoint is ("reward_model"); read from its config.json if None.
      template: a reward model's first segment, with `{prompt}` in it; if None the checkpoint's own, or else that of
        the paper's reward model (`HH_TEMPLATE`).
      dtype: of the network, "float32" or "bfloat16".
      mesh: where the weights go; None for the default device.

    Raises:
      UserError: an unknown kind, a template of another form, a checkpoint that is no scorer, or broken files.
    """
    if str(path_or_id) == RefusalKeywords.name:
        return RefusalKeywords()
    directory = local_directory(path_or_id)
    config = read_hf_config(directory)
    kind = _kind(config, directory) if kind is None else kind
    if kind not in KINDS:
        raise UserError(f"{path_or_id}: kind '{kind}' is unknown; use one of {', '.join(KINDS)}")
    if template is not None and not isinstance(template, str):
        raise UserError(f"{path_or_id}: a reward model's template is text that holds {{prompt}}, not a function")
    checkpoint = load_gpt2_reward(directory, dtype=dtype, mesh=mesh)
    own = config.get(_OWN, {})
    return RewardModel(
        checkpoint.model,
        load_tokenizer(directory),
        name=own.get("name", metric_name(str(path_or_id))),
        template=own.get("template", HH_TEMPLATE) if template is None else template,
    )


def save_reward_model(
    directory: str | Path, model: GPT2RewardModel, tokenizer: Any, *, name: str, template: str = HH_TEMPLATE
) -> Path:
    """Writes a trained reward model as HF's `GPT2ForSequenceClassification` with its tokenizer; all or nothing.

    Args:
      directory: replaced if it holds an older export.
      model: the network.
      tokenizer: transformers'; its eos and pad tokens go into config.json (a pad it lacks is the eos).
      name: what metrics call it.
      template: what `load_scorer` will use.

    Raises:
      UserError: the directory cannot be written.
    """
    directory = Path(directory)
    directory.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=directory.parent, prefix=f".{directory.name}.") as scratch:
        folder = save_gpt2_reward(Path(scratch) / "model", model.config, nnx.split(model)[1])
        tokenizer.save_pretrained(folder)
        _name_tokenizer_class(folder / "tokenizer_config.json")
        path = folder / "config.json"
        config = json.loads(path.read_text(encoding="utf-8"))
        eos = tokenizer.eos_token_id
        pad = eos if tokenizer.pad_token_id is None else tokenizer.pad_token_id
        config |= {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": eos, "pad_token_id": pad}
        config[_OWN] = {"name": name, "template": template}
        path.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        replace_dir_atomic(folder, directory)
    return directory


def _name_tokenizer_class(path: Path) -> None:
    """Writes transformers 5's class of tokenizer.json under the name that transformers 4 knows too."""
    values = json.loads(path.read_text(encoding="utf-8"))
    if values.get("tokenizer_class") == "TokenizersBackend":
        values["tokenizer_class"] = "PreTrainedTokenizerFast"
        path.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")


def _kind(config: dict[str, Any], directory: Path) -> str:
    if config.get("architectures") == ["GPT2ForSequenceClassification"]:
        return "reward_model"
    raise UserError(
        f"{directory}: config.json names {config.get('architectures')}, which is no known scorer; "
        f"give kind= one of {', '.join(KINDS)} if it is one"
    )
