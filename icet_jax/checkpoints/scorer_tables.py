"""Key tables of the scorers' networks: BERT, RoBERTa, DeBERTa-v2, Llama (language model and reward model)."""

import re
from collections.abc import Callable, Iterator

from icet_jax.checkpoints.tables import (
    LINEAR,
    NORM,
    SAME,
    TRANSPOSED,
    Table,
    TableEntry,
    llama_entries,
    single,
    stacked,
)
from icet_jax.nn.bert import BertConfig
from icet_jax.nn.deberta import DebertaConfig
from icet_jax.nn.llama import LlamaConfig

_LEGACY_NORM = re.compile(r"LayerNorm\.(gamma|beta)$")


def modern_norm(key: str) -> str:
    """Returns a key with `LayerNorm.weight` and `.bias` in place of TensorFlow's `LayerNorm.gamma` and `.beta`."""
    return _LEGACY_NORM.sub(lambda match: "LayerNorm." + ("weight" if match[1] == "gamma" else "bias"), key)


def normaliser(prefix: str, heads: tuple[str, ...], ignored: str) -> Callable[[str], str | None]:
    """Returns a function for `Table.normalise` that adds a prefix to keys without it (files of a headless network).

    Args:
      prefix: prefix of all keys except those of the head, with its dot: "bert.".
      heads: beginnings of the head's keys.
      ignored: regular expression of the keys (without the prefix) of tensors that the network does not use.
    """
    unused = re.compile(ignored)

    def normalise(key: str) -> str | None:
        bare = modern_norm(key.removeprefix(prefix))
        if unused.fullmatch(bare):
            return None
        return bare if bare.startswith(heads) and not key.startswith(prefix) else prefix + bare

    return normalise


def encoder_entries(keys: str, projections: tuple[str, str, str], depth: int) -> Iterator[TableEntry]:
    """Yields the entries of `PostNormBlocks` with `depth` layers, whose keys begin with `keys`.

    `projections` are HF's names of the query, key and value projections.
    """
    attention = zip((f"attention.self.{name}" for name in projections), ("q_proj", "k_proj", "v_proj"), strict=True)
    linears = (
        *attention,
        ("attention.output.dense", "out_proj"),
        ("intermediate.dense", "fc1"),
        ("output.dense", "fc2"),
    )
    norms = (("attention.output.LayerNorm", "attention_norm"), ("output.LayerNorm", "output_norm"))
    yield from stacked(keys, "layers", linears, LINEAR, depth)
    yield from stacked(keys, "layers", norms, NORM, depth)


def bert_table(config: BertConfig) -> Table:
    """Returns the key table of a BERT or RoBERTa classifier (201 tensors at base size)."""
    root = config.kind
    names = ("word_embeddings", "position_embeddings", "token_type_embeddings")
    if root == "bert":
        heads = (("bert.pooler.dense", "pooler"), ("classifier", "classifier"))
        ignored = r".*position_ids"
    else:
        heads = (("classifier.dense", "pooler"), ("classifier.out_proj", "classifier"))
        ignored = r".*position_ids|pooler\..*"  # RoBERTa's classifier does not use the pooler
    entries = (
        *(TableEntry(f"{root}.embeddings.{name}.weight", name, None, SAME) for name in names),
        *single(((f"{root}.embeddings.LayerNorm", "embeddings_norm"),), NORM),
        *encoder_entries(f"{root}.encoder.layer", ("query", "key", "value"), config.num_hidden_layers),
        *single(heads, LINEAR),
    )
    return Table(entries, normaliser(f"{root}.", ("classifier.",), ignored))


def deberta_table(config: DebertaConfig) -> Table:
    """Returns the key table of a DeBERTa-v2 reward model (394 tensors at v3-large).

    Absolute position embeddings and language-model heads in the file are ignored.
    """
    projections = ("query_proj", "key_proj", "value_proj")
    norms = (("deberta.embeddings.LayerNorm", "embeddings_norm"), ("deberta.encoder.LayerNorm", "rel_norm"))
    entries = (
        TableEntry("deberta.embeddings.word_embeddings.weight", "word_embeddings", None, SAME),
        TableEntry("deberta.encoder.rel_embeddings.weight", "rel_embeddings", None, SAME),
        *single(norms, NORM),
        *encoder_entries("deberta.encoder.layer", projections, config.num_hidden_layers),
        *single((("pooler.dense", "pooler"), ("classifier", "classifier")), LINEAR),
    )
    ignored = r".*position_(ids|embeddings.*)|(lm|mask)_predictions\..*"
    return Table(entries, normaliser("deberta.", ("pooler.", "classifier."), ignored))


_LLAMA_IGNORED = r".*rotary_emb\.inv_freq"


def llama_table(config: LlamaConfig) -> Table:
    """Returns the key table of a Llama language model (HF `LlamaForCausalLM`)."""
    entries = tuple(llama_entries(config, "model", "language_model", "lm_head.weight"))
    return Table(entries, normaliser("model.", ("lm_head.",), _LLAMA_IGNORED))


def llama_reward_table(config: LlamaConfig) -> Table:
    """Returns the key table of a Llama reward model (HF `LlamaForSequenceClassification` with one label)."""
    entries = (
        *llama_entries(config, "model", "language_model", None),
        TableEntry("score.weight", "score/kernel", None, TRANSPOSED),
    )
    return Table(entries, normaliser("model.", ("score.",), rf"{_LLAMA_IGNORED}|lm_head\.weight"))
