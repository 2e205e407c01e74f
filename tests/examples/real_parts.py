"""Stand-ins for the parts of examples/real_vlm: the same file formats, with tiny networks of random weights."""

import hashlib
import json
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from examples.real_vlm.parts import Part
from tests.tiny import randomise

SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
MERGES = ("t h", "th e", "a n", "i n")
HEADS, KV_HEADS = 4, 2


def llama() -> Any:
    """A `LlamaForCausalLM` with tied embeddings, whose matrices Q4_1 keeps exactly."""
    import torch
    from gguf import GGMLQuantizationType
    from gguf.quants import dequantize, quantize
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=len(_tokens()),
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=HEADS,
        num_key_value_heads=KV_HEADS,
        max_position_embeddings=512,
        rms_norm_eps=1e-5,
        rope_theta=100000.0,
        tie_word_embeddings=True,
    )
    model = randomise(LlamaForCausalLM(config).float(), seed=3)
    q4 = GGMLQuantizationType.Q4_1
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.copy_(torch.from_numpy(dequantize(quantize(parameter.numpy(), q4), q4)))
    return model


def write_gguf(path: Path, model: Any) -> None:
    """Writes a Llama as llama.cpp's converter does: Q4_1 matrices, rows of queries and keys in its order."""
    from gguf import GGMLQuantizationType, GGUFWriter
    from gguf.quants import quantize

    config, state = model.config, {key: value.numpy() for key, value in model.state_dict().items()}
    writer = GGUFWriter(path, "llama")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(100000.0)
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(_tokens())
    writer.add_token_types([3] * len(SPECIAL) + [1] * (len(_tokens()) - len(SPECIAL)))
    writer.add_token_merges(list(MERGES))
    writer.add_unk_token_id(0)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_pad_token_id(2)
    names = {
        "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
        "self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up",
        "mlp.down_proj": "ffn_down", "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm",
    }  # fmt: skip
    top = {"model.embed_tokens.weight": "token_embd.weight", "model.norm.weight": "output_norm.weight"}
    for key, value in state.items():
        if key == "lm_head.weight":
            continue  # tied
        name = top.get(key)
        if name is None:
            _, _, layer, rest = key.split(".", 3)
            module = rest.removesuffix(".weight")
            name = f"blk.{layer}.{names[module]}.weight"
            heads = {"attn_q": HEADS, "attn_k": KV_HEADS}.get(names[module])
            if heads:
                rows, columns = value.shape
                value = value.reshape(heads, 2, rows // heads // 2, columns).swapaxes(1, 2).reshape(rows, columns)
        if value.ndim == 2:
            q4 = GGMLQuantizationType.Q4_1
            writer.add_tensor(name, quantize(np.ascontiguousarray(value), q4), raw_dtype=q4)
        else:
            writer.add_tensor(name, value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _tokens() -> list[str]:
    from tokenizers.pre_tokenizers import ByteLevel

    return [*SPECIAL, *sorted(ByteLevel.alphabet()), *(merge.replace(" ", "") for merge in MERGES)]


def dinov2() -> Any:
    """A `Dinov2Model` of three blocks, two heads of 64 channels and 5 x 5 patches."""
    from transformers import Dinov2Config, Dinov2Model

    config = Dinov2Config(
        hidden_size=128, num_hidden_layers=3, num_attention_heads=2, mlp_ratio=2, image_size=70, patch_size=14
    )
    return randomise(Dinov2Model(config).float(), seed=4)


# Names in recent versions of transformers, and in earlier ones, which published files have.
_PROJECTIONS = {
    "q_proj": "attention.query", "k_proj": "attention.key", "v_proj": "attention.value", "o_proj": "output.dense",
}  # fmt: skip


def write_onnx(path: Path, model: Any) -> None:
    """Writes the weights of a `Dinov2Model` as torch's exporter names them: matrices by the nodes that use them."""
    import onnx
    from onnx import helper, numpy_helper

    initializers, nodes = [], []
    for key, tensor in model.state_dict().items():
        value = tensor.numpy()
        for new, published in _PROJECTIONS.items():
            key = key.replace(f".attention.{new}.", f".attention.{published}.")
        if key == "embeddings.position_embeddings":
            for name, part in (("onnx::Concat_1", value[:, :1]), ("onnx::Reshape_2", value[:, 1:])):
                initializers.append(numpy_helper.from_array(np.ascontiguousarray(part), name))
        elif value.ndim == 2 and ".layer." in key:
            anonymous = f"onnx::MatMul_{len(nodes)}"
            initializers.append(numpy_helper.from_array(np.ascontiguousarray(value.T), anonymous))
            module = key.removesuffix(".weight").replace("encoder.layer.", "encoder/layer.")
            head, rest = module.split("/layer.")
            layer, *parts = rest.split(".")
            node = f"/backbone/{head}/layer.{layer}/{'/'.join(parts)}/MatMul"
            nodes.append(helper.make_node("MatMul", ["x", anonymous], [f"y{len(nodes)}"], name=node))
        else:
            initializers.append(numpy_helper.from_array(value, f"backbone.{key}"))
    graph = helper.make_graph(nodes, "tower", [], [], initializers)
    onnx.save(helper.make_model(graph), str(path))


def wheel(folder: Path, package: str, member: str, content: bytes) -> Part:
    """Writes a wheel with one file into `folder`, and returns its description."""
    folder.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(folder / f"{package.replace('-', '_')}-1.0-py3-none-any.whl", "w") as archive:
        archive.writestr(member, content)
    return Part(package, "1.0", member, hashlib.sha256(content).hexdigest(), package, "none")


COLOURS = {"red": (200, 30, 30), "green": (30, 180, 40), "blue": (30, 40, 200), "white": (240, 240, 240)}


def photographs(folder: Path, count: int = 64) -> tuple[Path, Path]:
    """Draws pictures of one colour; returns (captions file in MS-COCO's layout, folder of the pictures)."""
    images = folder / "photographs"
    images.mkdir(parents=True)
    coco: dict[str, list[Any]] = {"images": [], "annotations": []}
    for number in range(count):
        colour, animal = list(COLOURS)[number % 4], ("dog", "horse")[number // 4 % 2]
        name = f"p{number:02}.png"
        pixels = np.full((40, 50, 3), COLOURS[colour], np.uint8)
        pixels[: number % 30, :20] = 0
        Image.fromarray(pixels).save(images / name)
        coco["images"].append({"id": number, "file_name": name})
        captions = (f"a {colour} {animal} runs .", f"{animal} on {colour}")
        coco["annotations"] += [{"image_id": number, "caption": caption} for caption in captions]
    path = folder / "captions.json"
    path.write_text(json.dumps(coco))
    return path, images
