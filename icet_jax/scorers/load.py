"""Loads scorers by name, directory, hub id or definition, and saves reward models with their template and name."""

import dataclasses
import functools
import hashlib
import json
import os
import re
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
from flax import nnx
from jax.sharding import Mesh

from icet_jax.checkpoints.hf_config import read_hf_config
from icet_jax.checkpoints.hf_export import save_gpt2_reward
from icet_jax.checkpoints.hf_import import Checkpoint
from icet_jax.checkpoints.scorers import architecture, default_dtype, load_scorer_network
from icet_jax.checkpoints.source import generation_tokens, local_directory
from icet_jax.config.names import SCORER_FIELDS
from icet_jax.errors import UserError
from icet_jax.files import JsonObject, replace_dir_atomic
from icet_jax.generation import Sampling
from icet_jax.media.tokenizer import load_tokenizer
from icet_jax.nn.gpt2 import GPT2RewardModel
from icet_jax.scorers.base import Scorer, metric_name
from icet_jax.scorers.cache import directory_fingerprint
from icet_jax.scorers.chat import Chat
from icet_jax.scorers.conversation import Conversations
from icet_jax.scorers.decoder_judge import DecoderJudge, guard_verdict, word_verdict
from icet_jax.scorers.ensemble import Ensemble
from icet_jax.scorers.keywords import RefusalKeywords
from icet_jax.scorers.pairs import HH_TEMPLATE
from icet_jax.scorers.prompts import Render, built_in, categories, chat_template, named_or_text, probe_text
from icet_jax.scorers.reward_model import RewardModel, reward_render
from icet_jax.scorers.toxicity import Toxicity, head_labels

Template = Callable[[str, str], str] | str | None

KINDS = {
    "reward_model": (
        "GPT2ForSequenceClassification",
        "DebertaV2ForSequenceClassification",
        "LlamaForSequenceClassification",
    ),
    "toxicity": ("BertForSequenceClassification", "RobertaForSequenceClassification"),
    "llama_guard": ("LlamaForCausalLM",),
    "decoder_judge": ("LlamaForCausalLM",),
}
"""Kinds of scorers that are checkpoints, and the HF classes of each."""

_OWN = "icet_jax"
"""Key of config.json under which `save_reward_model` stores the template and the name; transformers ignores it."""

_BATCH = {"LlamaForCausalLM": 16, "LlamaForSequenceClassification": 16}  # batch sizes; 64 for other classes
_LONGEST = 4096  # most tokens of a Llama's input, to limit memory
_ANSWER = {"llama_guard": 20, "decoder_judge": 8}  # most tokens of a judge's response
_GUARDS = (
    ("llama_guard_1", r"llama-?guard-?7b"),
    ("llama_guard_3", r"llama-?guard-?3"),
)  # (template, pattern of checkpoint names)
_WORDS = {"harmbench": ("Yes", "No")}  # words for unsafe and safe of templates that do not use these


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
      kind: kind of the checkpoint, one of `KINDS`; if None it is determined from config.json (and the name of a Llama).
      template: how prompt and response become the scorer's text, instead of its own template. For a reward model on
        GPT-2 or DeBERTa: the first segment, with `{prompt}` in it (`HH_TEMPLATE`; the bare prompt). For any Llama: the
        whole text, with `{prompt}` and `{response}`; by default the checkpoint's chat template. A judge also accepts a
        function of (prompt, response), or the name of a built-in text (`icet_jax.scorers.prompts.BUILT_IN`).
      dtype: dtype of the network, "float32" or "bfloat16"; if None, bfloat16 for a Llama and float32 for the others.
      mesh: mesh for the weights; None for the default device.
      revision: branch, tag or commit of a hub id.
      batch_size: rows judged at once; 16 for a Llama and 64 for the others if None.
      fields: fields of the kind (`icet_jax.config.names.SCORER_FIELDS`): toxicity's `heads`, a judge's
        `max_new_tokens`, a decoder judge's words `unsafe` and `safe`.

    Raises:
      UserError: the kind or a field is unknown, the template has another form, or the checkpoint is not a scorer or
        broken.
    """
    if str(path_or_id) == RefusalKeywords.name:
        return RefusalKeywords()
    directory = local_directory(path_or_id, revision=revision)
    config = read_hf_config(directory)
    hf_class = architecture(config, str(directory / "config.json"))
    tokenizer = load_tokenizer(directory)
    identity = f"{path_or_id} {config.get('_name_or_path') or ''}"
    kind = _detect(hf_class, tokenizer, identity) if kind is None else kind
    _check_kind(str(path_or_id), kind, hf_class, fields)
    dtype = dtype or default_dtype(hf_class)
    source = _ScorerSource(
        config,
        kind,
        tokenizer,
        template,
        identity,
        load=functools.partial(load_scorer_network, directory, dtype=dtype, mesh=mesh),
        common={
            "name": metric_name(str(path_or_id)),
            "mesh": mesh,
            "batch_size": batch_size or _BATCH.get(hf_class, 64),
        },
    )
    try:
        return _MAKERS[kind](source, **fields)
    except UserError as error:
        raise UserError(f"{path_or_id}: {error}") from error


def load_defined(
    name: str,
    definition: Mapping[str, Any],
    *,
    mesh: Mesh | None = None,
    resolve: Callable[[str], Scorer],
) -> Scorer:
    """Loads an entry of `config.scorers`.

    Args:
      name: name of the entry; only an ensemble uses it, other scorers are named after their exact model.
      definition: `{"kind": ..., fields of that kind}`, checked by `icet_jax.config.check`.
      mesh: mesh for the weights.
      resolve: loads a member of an ensemble by its name.

    Raises:
      UserError: any error of the scorer, with the name of the entry in front.
    """
    fields = dict(definition)
    kind = fields.pop("kind")
    try:
        if kind == "refusal_keywords":
            return RefusalKeywords()
        if kind == "chat":
            return load_chat(**fields)
        if kind == "ensemble":
            return Ensemble(name, [(resolve(member), weight) for member, weight in fields["members"].items()])
        return load_scorer(fields.pop("checkpoint"), kind, mesh=mesh, **fields)
    except UserError as error:
        raise UserError(f"config.scorers.{name}: {error}") from error


def load_chat(
    *, endpoint: str, model: str, template: str, unsafe: str | None = None, safe: str | None = None, **fields: Any
) -> Chat:
    """Creates a judge behind a chat endpoint.

    Args:
      endpoint, model: see `Chat`.
      template: text with `{prompt}` and `{response}`, or the name of a built-in text, as for a decoder judge.
      unsafe, safe: words that it answers; if None those of the template, or "unsafe" and "safe".
      fields: further arguments of `Chat`.

    Raises:
      UserError: see `named_or_text` and `Chat`.
    """
    return Chat(endpoint, model, named_or_text(template), words=_words(template, unsafe, safe), **fields)


def save_reward_model(
    directory: str | Path, model: GPT2RewardModel, tokenizer: Any, *, name: str, template: str = HH_TEMPLATE
) -> Path:
    """Writes a trained reward model as HF's `GPT2ForSequenceClassification` with its tokenizer, completely or not at
    all.

    Args:
      directory: target, which is replaced if it holds an older export.
      model: the network.
      tokenizer: transformers' tokenizer; its eos and pad tokens are written to config.json (without a pad token the
        eos).
      name: name of the scorer in metrics.
      template: template that `load_scorer` will use.

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
    """Replaces the class in tokenizer_config.json that only transformers 5 knows by one that transformers 4 knows
    too."""
    values = json.loads(path.read_text(encoding="utf-8"))
    if values.get("tokenizer_class") == "TokenizersBackend":
        values["tokenizer_class"] = "PreTrainedTokenizerFast"
        path.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")


def _detect(hf_class: str, tokenizer: Any, identity: str) -> str:
    """Returns the kind of a checkpoint; that of a judging Llama is recognised by its name or its chat template."""
    fitting = [kind for kind, classes in KINDS.items() if hf_class in classes]
    if len(fitting) == 1:
        return fitting[0]
    if re.search(r"llama-?guard", identity, re.IGNORECASE) or "UNSAFE CONTENT CATEGORIES" in str(
        tokenizer.chat_template
    ):
        return "llama_guard"
    if "harmbench" in identity.lower():
        return "decoder_judge"
    raise UserError(f"{identity.split()[0]}: a {hf_class} may judge in several ways; give kind, {' or '.join(fitting)}")


def _check_kind(path: str, kind: str, hf_class: str, fields: Mapping[str, Any]) -> None:
    if kind not in KINDS:
        raise UserError(f"{path}: kind '{kind}' is unknown; use one of {', '.join(KINDS)}")
    if hf_class not in KINDS[kind]:
        raise UserError(f"{path}: is a {hf_class}; a {kind} is one of {', '.join(KINDS[kind])}")
    for field, value in fields.items():
        if field not in SCORER_FIELDS[kind]:
            raise UserError(f"{path}: a {kind} has no field '{field}'; it has {', '.join(SCORER_FIELDS[kind])}")
        if not value:
            raise UserError(f"{path}: {field} is {value!r}; give a value or leave it out")


@dataclasses.dataclass(frozen=True)
class _ScorerSource:
    """Describes a checkpoint that will become a scorer; its weights are loaded after everything else has been checked.

    Attributes:
      config: its config.json.
      kind: one of `KINDS`.
      tokenizer: transformers' tokenizer.
      template: template of the caller, or None.
      load: loads the weights.
      common: arguments that every kind of scorer takes.
      identity: its path or hub id, and the name in its config.
    """

    config: JsonObject
    kind: str
    tokenizer: Any
    template: Template
    identity: str
    load: Callable[[], Checkpoint]
    common: dict[str, Any]


def _toxicity(source: _ScorerSource, heads: Sequence[str] = ()) -> Scorer:
    if source.template is not None:
        raise UserError("a toxicity classifier reads the response as it is and takes no template")
    labels = head_labels(source.config)
    checkpoint, extra = source.load(), list(heads)
    return Toxicity(
        checkpoint.model,
        source.tokenizer,
        labels=labels,
        heads=heads,
        fingerprint=_fingerprint(checkpoint, extra),
        **source.common,
    )


def _reward_model(source: _ScorerSource) -> Scorer:
    if source.template is not None and not isinstance(source.template, str):
        raise UserError("a reward model's template is text that holds {prompt}, not a function")
    stored = source.config.get(_OWN, {})
    template = stored.get("template") if source.template is None else source.template
    if source.config["model_type"] == "llama":
        reward_render(source.tokenizer, template)
    checkpoint = source.load()
    return RewardModel(
        checkpoint.model,
        source.tokenizer,
        template=template,
        max_length=None if source.config["model_type"] == "gpt2" else _positions(source.config),
        pad_id=source.config.get("pad_token_id"),
        fingerprint=_fingerprint(checkpoint, template),
        **source.common | ({"name": stored["name"]} if "name" in stored else {}),
    )


def _decoder_judge(
    source: _ScorerSource, max_new_tokens: int | None = None, unsafe: str | None = None, safe: str | None = None
) -> Scorer:
    kind, template = source.kind, source.template
    if template is None and kind == "decoder_judge" and "harmbench" in source.identity.lower():
        template = "harmbench"
    words = _words(template, unsafe, safe)
    render = _render(source.tokenizer, kind, template, source.identity)
    if kind == "llama_guard":
        parse = functools.partial(guard_verdict, known=categories(render))
    else:
        parse = functools.partial(word_verdict, unsafe=words[0], safe=words[1])
    length, limit = max_new_tokens or _ANSWER[kind], _positions(source.config)
    encode = Conversations(source.tokenizer, render, max_length=limit - length)
    checkpoint = source.load()
    eos_ids, pad_id = generation_tokens(checkpoint.directory, source.config, checkpoint.config.vocab_size)
    return DecoderJudge(
        checkpoint.model,
        encode,
        parse=parse,
        words=words,
        sampling=Sampling(length, temperature=0.0, eos_ids=eos_ids, pad_id=pad_id),
        fingerprint=_fingerprint(checkpoint, kind, probe_text(render), words, length),
        **source.common,
    )


def _words(template: Template, unsafe: str | None, safe: str | None) -> tuple[str, str]:
    """Returns a judge's words for unsafe and for safe: the given ones, or those of its built-in template."""
    words = _WORDS.get(template, ("unsafe", "safe")) if isinstance(template, str) else ("unsafe", "safe")
    return unsafe or words[0], safe or words[1]


_MAKERS: dict[str, Callable[..., Scorer]] = {
    "toxicity": _toxicity,
    "reward_model": _reward_model,
    "llama_guard": _decoder_judge,
    "decoder_judge": _decoder_judge,
}


def _render(tokenizer: Any, kind: str, template: Template, identity: str) -> Render:
    if callable(template):
        return template
    if template is not None:
        return named_or_text(template)
    if kind == "decoder_judge":
        raise UserError("a decoder judge needs a template: text with {prompt} and {response}, or 'harmbench'")
    if tokenizer.chat_template:
        return chat_template(tokenizer, answer=True)
    for name, pattern in _GUARDS:
        if re.search(pattern, identity, re.IGNORECASE):
            return built_in(name)
    raise UserError(
        "its tokenizer has no chat template and its name does not tell which Llama Guard it is; give "
        f"template, {' or '.join(name for name, _ in _GUARDS)}"
    )


def _positions(config: Mapping[str, Any]) -> int:
    default = {"llama": 2048, "deberta-v2": 512}[config["model_type"]]  # transformers' class defaults
    return min(config.get("max_position_embeddings") or default, _LONGEST)


def _fingerprint(checkpoint: Checkpoint, *settings: Any) -> str:
    """Returns a hash of the weights, the dtype, and the settings of how texts are presented."""
    dtype = str(jax.tree.leaves(checkpoint.params)[0].dtype)
    facts = json.dumps([directory_fingerprint(checkpoint.directory), dtype, *settings])
    return hashlib.sha256(facts.encode()).hexdigest()[:16]
