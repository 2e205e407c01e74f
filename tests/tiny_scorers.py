"""Tiny HF checkpoint directories of the text scorers: BERT, RoBERTa, DeBERTa-v2 and Llama, with their tokenizers.

    directory = tiny_scorers.save(tmp_path / "toxic", tiny_scorers.bert(labels=("toxic", "insult")))
    directory = tiny_scorers.save(tmp_path / "guard", tiny_scorers.llama_lm())
    ids, mask = tiny_scorers.rows([3, 9, 1], vocab=255)

Each builder returns the torch model in float32 with every parameter random (norms and biases too) and takes overrides
of its HF config; `scale` multiplies the embeddings (1e-2 makes wrong norm epsilons visible). `save` writes what
transformers itself would write. torch and transformers are imported inside the functions.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np

from tests import tiny

LETTERS = [chr(code) for code in range(33, 127) if not chr(code).isupper()]
BERT_SPECIALS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
BERT_VOCAB = len(BERT_SPECIALS) + 2 * len(LETTERS) + 1
ROBERTA_VOCAB = 263
DEBERTA_VOCAB = 131
SIZES = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 3, "intermediate_size": 37}
LLAMA_SIZES = SIZES | {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 6, "intermediate_size": 53}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
"""Llama 3's rotary scaling, with an original length so short that a test sees it."""

LLAMA_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{{ '<|' + message['role'] + '|>' + message['content'] }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)


def randomise(model: Any, seed: int = 0, scale: float = 1.0) -> Any:
    """Fills every parameter: norm weights 1 +- 0.2, biases +- 0.1, matrices 1 / fan-in, embedding tables +- `scale`."""
    import torch

    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in sorted(model.named_parameters()):
            noise = torch.randn(parameter.shape, generator=generator)
            if name.endswith("bias"):
                parameter.copy_(0.1 * noise)
            elif parameter.ndim == 1:
                parameter.copy_(1 + 0.2 * noise)
            elif "embed" in name:
                parameter.copy_(scale * noise)
            else:
                parameter.copy_(noise / parameter.shape[1] ** 0.5)
    return model.eval()


def _labels(names: tuple[str, ...]) -> dict[str, Any]:
    return {"id2label": dict(enumerate(names)), "label2id": {name: number for number, name in enumerate(names)}}


def bert(
    seed: int = 0, *, labels: tuple[str, ...] = ("toxic", "obscene", "insult"), scale: float = 1.0, **config: Any
) -> Any:
    """A `BertForSequenceClassification` with multi-label heads; 64 positions."""
    from transformers import BertConfig, BertForSequenceClassification

    settings = {"vocab_size": BERT_VOCAB, "max_position_embeddings": 64, "problem_type": "multi_label_classification"}
    model = BertForSequenceClassification(BertConfig(**SIZES | settings | _labels(labels) | config))
    return randomise(model.float(), seed, scale)


def roberta(
    seed: int = 0, *, labels: tuple[str, ...] = ("toxicity", "insult"), scale: float = 1.0, **config: Any
) -> Any:
    """A `RobertaForSequenceClassification` with multi-label heads; 66 positions, so texts of up to 64 tokens."""
    from transformers import RobertaConfig, RobertaForSequenceClassification

    settings = {"vocab_size": ROBERTA_VOCAB, "max_position_embeddings": 66, "type_vocab_size": 1}
    settings |= {"layer_norm_eps": 1e-5, "problem_type": "multi_label_classification"}
    model = RobertaForSequenceClassification(RobertaConfig(**SIZES | settings | _labels(labels) | config))
    return randomise(model.float(), seed, scale)


def deberta(seed: int = 0, *, scale: float = 1.0, **config: Any) -> Any:
    """A `DebertaV2ForSequenceClassification` with one label, set up as v3: 8 buckets each way, 64 positions."""
    from transformers import DebertaV2Config, DebertaV2ForSequenceClassification

    settings = {"vocab_size": DEBERTA_VOCAB, "max_position_embeddings": 64, "position_buckets": 8, "num_labels": 1}
    settings |= {"relative_attention": True, "position_biased_input": False, "share_att_key": True}
    settings |= {"norm_rel_ebd": "layer_norm", "pos_att_type": ["p2c", "c2p"], "max_relative_positions": -1}
    hf_config = DebertaV2Config(**SIZES | settings | config)
    hf_config.pooler_hidden_size = hf_config.hidden_size
    return randomise(DebertaV2ForSequenceClassification(hf_config).float(), seed, scale)


def _decoder(kind: str, head: str, config: dict[str, Any]) -> Any:
    import transformers

    settings = {"vocab_size": tiny.VOCAB, "max_position_embeddings": 512, "rms_norm_eps": 1e-5}
    settings |= {"bos_token_id": tiny.BOS, "eos_token_id": tiny.EOS, "pad_token_id": tiny.PAD}
    hf_config = getattr(transformers, f"{kind}Config")(**LLAMA_SIZES | settings | config)
    return getattr(transformers, f"{kind}For{head}")(hf_config).float()


def llama_lm(seed: int = 0, *, kind: str = "Llama", scale: float = 1.0, **config: Any) -> Any:
    """A `...ForCausalLM` with grouped-query attention; `rope_parameters=LLAMA3_ROPE` scales its frequencies.

    `kind` is Llama, Mistral, Qwen2 or Qwen3.
    """
    return randomise(_decoder(kind, "CausalLM", config), seed, scale)


def llama_reward(seed: int = 0, *, kind: str = "Llama", scale: float = 1.0, **config: Any) -> Any:
    """A `...ForSequenceClassification` with one label; `kind` as in `llama_lm`."""
    return randomise(_decoder(kind, "SequenceClassification", {"num_labels": 1} | config), seed, scale)


def tokenizer(model_type: str) -> Any:
    """A tokenizer of the family's own kind, over single characters or bytes, that fits the builders' vocabularies."""
    return _TOKENIZERS[model_type]()


def _bert_tokenizer() -> Any:
    from transformers import BertTokenizerFast

    pieces = [*BERT_SPECIALS, *LETTERS, *("##" + letter for letter in LETTERS)]
    return BertTokenizerFast(vocab={piece: number for number, piece in enumerate(pieces)}, model_max_length=64)


def _roberta_tokenizer() -> Any:
    from tokenizers import pre_tokenizers
    from transformers import RobertaTokenizerFast

    pieces = ["<s>", "<pad>", "</s>", "<unk>", *sorted(pre_tokenizers.ByteLevel.alphabet()), "<mask>"]
    vocab = {piece: number for number, piece in enumerate(pieces)}
    return RobertaTokenizerFast(vocab=vocab, merges=[], model_max_length=64)


def _deberta_tokenizer() -> Any:
    from transformers import DebertaV2TokenizerFast

    specials = ["[PAD]", "[CLS]", "[SEP]", "[UNK]"]
    letters = [chr(code) for code in range(33, 127)]
    pieces = [(piece, 0.0) for piece in specials] + [(letter, -3.0) for letter in ["\u2581", *letters]]
    return DebertaV2TokenizerFast(vocab=[*pieces, ("[MASK]", 0.0)], model_max_length=64)


def _llama_tokenizer() -> Any:
    fast = tiny.tokenizer()
    fast.chat_template = LLAMA_TEMPLATE
    return fast


_TOKENIZERS = {
    "bert": _bert_tokenizer,
    "roberta": _roberta_tokenizer,
    "deberta-v2": _deberta_tokenizer,
    **dict.fromkeys(("llama", "mistral", "qwen2", "qwen3"), _llama_tokenizer),
}


def old_config(model: Any) -> dict[str, Any]:
    """config.json as the hub has it, with the keys from before transformers 5."""
    config = model.config
    config.architectures = [type(model).__name__]
    values = config.to_diff_dict() | {"torch_dtype": "float32", "model_type": config.model_type}
    values.pop("dtype", None)
    if "SequenceClassification" in type(model).__name__:
        values["id2label"] = {str(number): name for number, name in config.id2label.items()}
        values["label2id"] = config.label2id
    rope = dict(values.pop("rope_parameters", None) or {})
    if rope:
        values["rope_theta"] = rope.pop("rope_theta")
        values["rope_scaling"] = None if rope.get("rope_type", "default") == "default" else rope
    return values


def save(
    directory: str | Path, model: Any, *, state: dict[str, Any] | None = None, config: dict[str, Any] | None = None,
    shards: int = 1,
) -> Path:  # fmt: skip
    """Writes weights, config.json (old keys) and tokenizer of a model, and returns the directory.

    Args:
      directory: made if missing.
      model: from one of the builders.
      state: tensors to write instead of the model's own.
      config: fields of config.json to replace; None drops one.
      shards: number of safetensors files.
    """
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    tensors = dict(model.state_dict()) if state is None else dict(state)
    if model.config.tie_word_embeddings:
        tensors.pop("lm_head.weight", None)
    tiny.save_state(directory, {key: tensor.contiguous() for key, tensor in tensors.items()}, shards)
    values = old_config(model) | (config or {})
    values = {key: value for key, value in values.items() if value is not None}
    (directory / "config.json").write_text(json.dumps(values, indent=2))
    tokenizer(model.config.model_type).save_pretrained(directory)
    return directory


def rows(
    lengths: list[int], *, pad: str = "right", pad_id: int = 0, first: int = 5, vocab: int = 100, seed: int = 0
) -> tuple[np.ndarray, np.ndarray]:
    """Random token ids in `first..vocab-1`, one row per length, padded on side `pad`.

    Returns:
      ids int64 `[B, T]` and mask bool `[B, T]`.
    """
    generator = np.random.default_rng(seed)
    width = max(lengths)
    ids = np.full((len(lengths), width), pad_id)
    mask = np.zeros((len(lengths), width), bool)
    for row, length in enumerate(lengths):
        where = slice(width - length, width) if pad == "left" else slice(0, length)
        ids[row, where], mask[row, where] = generator.integers(first, vocab, length), True
    return ids, mask
