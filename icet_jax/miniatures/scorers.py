"""Writes toy checkpoints of the paper's scorers: random networks in the formats of the published ones.

The weights of language models are changed so that they answer with a verdict, safe or unsafe by chance, and then stop.
"""

import dataclasses
from collections.abc import Callable
from importlib import resources
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx

from icet_jax.checkpoints import decoders, hf_config, safetensors_io, scorer_config, scorer_tables, tables
from icet_jax.checkpoints.tables import Table
from icet_jax.files import JsonObject
from icet_jax.miniatures.tokenizers import write_json, write_tokenizer
from icet_jax.nn.bert import BertClassifier
from icet_jax.nn.deberta import DebertaRewardModel
from icet_jax.nn.gpt2 import GPT2RewardModel
from icet_jax.nn.llama_text import LlamaLM, LlamaRewardModel
from icet_jax.parallel.sharding import flatten_with_names

_BERT_LABELS = ("toxic", "severe_toxic", "obscene", "threat", "insult", "identity_hate")
_ROBERTA_LABELS = ("toxicity", "severe_toxicity", "obscene", "identity_attack", "insult", "threat", "sexual_explicit")
_WEIGHT_FACTOR = 4.0  # makes random weights larger than usual, so that words change the output
_SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
_LLAMA = {"model_type": "llama", **_SIZES, "num_key_value_heads": 1, "rms_norm_eps": 1e-5, "torch_dtype": "float32"}

# A chat template that renders the built-in text of Llama Guard 3, as the published chat template does.
_GUARD_TEMPLATE = (
    "{{{{ bos_token }}}}{before}{{{{ messages[0]['content'] | trim }}}}"
    "{between}{{{{ messages[1]['content'] | trim }}}}{after}"
)


@dataclasses.dataclass(frozen=True)
class _Network:
    """Describes one architecture: the reader of its config.json, its class and its key table."""

    from_hf: Callable[[JsonObject, str], Any]
    network: Callable[..., nnx.Module]
    table: Callable[[Any], Table]


_BERT = _Network(scorer_config.bert_from_hf, BertClassifier, scorer_tables.bert_table)
_DEBERTA = _Network(scorer_config.deberta_from_hf, DebertaRewardModel, scorer_tables.deberta_table)
_GPT2 = _Network(hf_config.gpt2_from_hf, GPT2RewardModel, tables.gpt2_table)
_LM = _Network(decoders.decoder_from_hf, LlamaLM, scorer_tables.llama_table)
_LLAMA_REWARD = _Network(scorer_config.decoder_reward_from_hf, LlamaRewardModel, scorer_tables.llama_reward_table)


def toxic_bert(folder: Path) -> None:
    """Writes a miniature of unitary/toxic-bert."""
    roles = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    vocabulary = write_tokenizer(folder, tuple(roles.values()), single="[CLS] $A [SEP]", settings=roles)
    values = {
        "architectures": ["BertForSequenceClassification"], "model_type": "bert", **_SIZES,
        "vocab_size": len(vocabulary),
        "max_position_embeddings": 512, "pad_token_id": 0, **_labels(_BERT_LABELS),
    }  # fmt: skip
    _save(folder, _BERT, values, seed=1)


def unbiased_toxic_roberta(folder: Path) -> None:
    """Writes a miniature of unitary/unbiased-toxic-roberta."""
    names = ("<s>", "<pad>", "</s>", "<unk>")
    roles = {"bos_token": "<s>", "pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}
    vocabulary = write_tokenizer(folder, names, single="<s> $A </s>", settings=roles | {"cls_token": "<s>"})
    values = {
        "architectures": ["RobertaForSequenceClassification"], "model_type": "roberta", **_SIZES,
        "vocab_size": len(vocabulary),
        "max_position_embeddings": 514, "type_vocab_size": 1, "pad_token_id": 1, **_labels(_ROBERTA_LABELS),
    }  # fmt: skip
    _save(folder, _BERT, values, seed=2)


def harmless_reward(folder: Path) -> None:
    """Writes a miniature of Ray2333/gpt2-large-harmless-reward_model."""
    end = "<|endoftext|>"
    vocabulary = write_tokenizer(folder, (end,), settings={"bos_token": end, "eos_token": end, "pad_token": end})
    values = {
        "architectures": ["GPT2ForSequenceClassification"], "model_type": "gpt2", "vocab_size": len(vocabulary),
        "n_positions": 256, "n_embd": 32, "n_layer": 2, "n_head": 2, "bos_token_id": 0, "eos_token_id": 0,
        "pad_token_id": 0, **_labels(("LABEL_0",)),
    }  # fmt: skip
    _save(folder, _GPT2, values, seed=3)


def general_reward(folder: Path) -> None:
    """Writes a miniature of OpenAssistant/reward-model-deberta-v3-large-v2."""
    roles = {"pad_token": "[PAD]", "cls_token": "[CLS]", "sep_token": "[SEP]", "unk_token": "[UNK]"}
    vocabulary = write_tokenizer(
        folder, tuple(roles.values()), single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B [SEP]", settings=roles
    )
    values = {
        "architectures": ["DebertaV2ForSequenceClassification"], "model_type": "deberta-v2",
        **_SIZES,
        "vocab_size": len(vocabulary), "max_position_embeddings": 64,
        "position_buckets": 16, "max_relative_positions": -1,
        "relative_attention": True, "position_biased_input": False, "type_vocab_size": 0, "share_att_key": True,
        "norm_rel_ebd": "layer_norm", "pos_att_type": "p2c|c2p", "layer_norm_eps": 1e-7, "pooler_hidden_size": 32,
        "pooler_hidden_act": "gelu", "hidden_act": "gelu", **_labels(("LABEL_0",)),
    }  # fmt: skip
    _save(folder, _DEBERTA, values, seed=4)


def llama_reward(folder: Path) -> None:
    """Writes a Llama reward model (`LlamaForSequenceClassification`) with a chat template."""
    names = ("<unk>", "<s>", "</s>", "<pad>")
    settings = {
        "bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>",
        "chat_template": (
            "{{ bos_token }}{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '\n' }}{% endfor %}"
        ),
    }  # fmt: skip
    vocabulary = write_tokenizer(folder, names, single="<s> $A", settings=settings)
    values = {
        "architectures": ["LlamaForSequenceClassification"],
        **_LLAMA,
        "vocab_size": len(vocabulary), "bos_token_id": 1,
        "eos_token_id": 2, "pad_token_id": 3, "max_position_embeddings": 512, **_labels(("LABEL_0",)),
    }  # fmt: skip
    _save(folder, _LLAMA_REWARD, values, seed=5)


def llama_guard_1(folder: Path) -> None:
    """Writes a miniature of meta-llama/LlamaGuard-7b without a chat template, so that judges use the built-in text."""
    _save_judge(folder, "llama_guard_1", ("unsafe", "safe"), seed=6)


def llama_guard_3(folder: Path) -> None:
    """Writes a miniature of meta-llama/Llama-Guard-3-8B with its own chat template."""
    before, rest = _text("llama_guard_3").split("{prompt}")
    between, after = rest.split("{response}")
    template = _GUARD_TEMPLATE.format(before=before, between=between, after=after)
    _save_judge(folder, "llama_guard_3", ("unsafe", "safe"), seed=7, settings={"chat_template": template})


def harmbench(folder: Path) -> None:
    """Writes a miniature of cais/HarmBench-Llama-2-13b-cls."""
    _save_judge(folder, "harmbench", ("Yes", "No"), seed=8)


WRITERS: dict[str, tuple[str, Callable[[Path], None]]] = {
    "toxic_bert": ("toy-toxic-bert", toxic_bert),
    "unbiased_toxic_roberta": ("toy-unbiased-toxic-roberta", unbiased_toxic_roberta),
    "harmless_reward": ("toy-gpt2-large-harmless-reward_model", harmless_reward),
    "general_reward": ("toy-reward-model-deberta-v3-large-v2", general_reward),
    "llama_reward": ("toy-llama-reward", llama_reward),
    "llama_guard_1": ("toy-LlamaGuard-7b", llama_guard_1),
    "llama_guard_3": ("toy-Llama-Guard-3-8B", llama_guard_3),
    "harmbench": ("toy-HarmBench-Llama-2-13b-cls", harmbench),
}
"""{NAME in `toy:NAME`: (name of the directory, function that writes the checkpoint to a directory)}."""


def _text(template: str) -> str:
    """Returns a judge's built-in template."""
    return resources.files("icet_jax.scorers").joinpath("templates", f"{template}.txt").read_text(encoding="utf-8")


def _labels(names: tuple[str, ...]) -> JsonObject:
    """Returns the fields of config.json that name the labels."""
    return {
        "id2label": {str(index): name for index, name in enumerate(names)},
        "label2id": {name: index for index, name in enumerate(names)},
    }


def _save_judge(
    folder: Path, template: str, words: tuple[str, str], *, seed: int, settings: JsonObject | None = None
) -> None:
    """Writes a language model that answers with one of two words and then ends.

    Args:
      folder: directory of the checkpoint.
      template: name of the judge's built-in template.
      words: the verdicts "unsafe" and "safe" in the judge's words.
      seed: seed of the weights.
      settings: more content for tokenizer_config.json.
    """
    names = ("<unk>", "<s>", "</s>", "<pad>", *(
        name for name in ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>") if name in _text(template)
    ))  # fmt: skip
    roles = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>"}
    vocabulary = write_tokenizer(
        folder, names, single="<s> $A", text=_text(template), words=words, settings=roles | (settings or {})
    )
    values = {
        "architectures": ["LlamaForCausalLM"],
        **_LLAMA, "vocab_size": len(vocabulary), "bos_token_id": 1, "eos_token_id": 2,
        "pad_token_id": 3, "max_position_embeddings": 4096,
    }  # fmt: skip

    def answer_verdicts(params: dict[str, np.ndarray]) -> None:
        # Channel 0 of the hidden states is large after a verdict: only the verdicts' embeddings set it, no layer
        # changes it, and only the logit of EOS reads it. The other channels decide between the two verdicts.
        unsafe, safe = (vocabulary[word] for word in words)
        embedding, head = params["language_model/embed_tokens"], params["language_model/lm_head/kernel"]
        direction = head[:, unsafe].copy()
        direction[0] = 0
        embedding[:, 0] = 0
        embedding[[unsafe, safe], 0] = 1000
        for name in ("o_proj", "down_proj"):
            params[f"language_model/layers/{name}/kernel"][..., 0] = 0
        head[:] = 0
        head[:, unsafe], head[:, safe] = direction, -direction
        head[0, 2] = 100

    _save(folder, _LM, values, seed=seed, change=answer_verdicts)


def _save(
    folder: Path, architecture: _Network, values: JsonObject, *, seed: int,
    change: Callable[[dict[str, np.ndarray]], None] | None = None,
) -> None:  # fmt: skip
    """Writes config.json with the content `values`, and random weights after `change` modified them in place."""
    config = architecture.from_hf(values, str(folder / "config.json"))
    state = nnx.split(architecture.network(config, rngs=nnx.Rngs(seed)))[1]
    params = {
        path: np.array(jax.device_get(leaf)) * (_WEIGHT_FACTOR if leaf.ndim > 1 else 1)
        for path, leaf in flatten_with_names(state).items()
    }
    if change is not None:
        change(params)
    entries = {entry.key: entry for entry in architecture.table(config).entries}

    def tensor(key: str) -> np.ndarray:
        entry = entries[key]
        parameter = params[entry.path]
        return entry.transform.to_hf(parameter if entry.layer is None else parameter[entry.layer])

    specs = {key: (safetensors_io.dtype_name(tensor(key).dtype), tensor(key).shape) for key in entries}
    folder.mkdir(parents=True, exist_ok=True)
    safetensors_io.write_safetensors(folder / safetensors_io.SINGLE, specs, tensor)
    write_json(folder / "config.json", values)  # written last, because it marks the directory as complete
