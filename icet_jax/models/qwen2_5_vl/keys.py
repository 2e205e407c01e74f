"""Key table of Qwen2.5-VL (HF `Qwen2_5_VLForConditionalGeneration`).

The old layout, that of the published files, has the keys `visual.*` and `model.*`. transformers 4.52 and later name
them `model.visual.*` and `model.language_model.*`; a `Qwen2_5_VLModel` alone has `visual.*` and `language_model.*`.
"""

from icet_jax.checkpoints.tables import (
    LINEAR,
    NORM_SCALE,
    Leaf,
    Table,
    TableEntry,
    Transform,
    llama_entries,
    patches,
    renaming,
    single,
    stacked,
)  # fmt: skip
from icet_jax.models.qwen2_5_vl.network import Qwen25VLConfig

DECODER_PATHS = ("model", "model.language_model")
"""Paths of the decoder in transformers' module: in the old layout, and since transformers 4.52."""

# HF's tensors have queries, keys and values one after another on their first axis, here an axis of its own.
_QKV_KERNEL = Transform(
    lambda x: x.reshape(3, -1, x.shape[1]).transpose(0, 2, 1),
    lambda x: x.transpose(0, 2, 1).reshape(-1, x.shape[1]),
    lambda shape: (3 * shape[2], shape[1]),
)
_QKV_BIAS = Transform(lambda x: x.reshape(3, -1), lambda x: x.reshape(-1), lambda shape: (3 * shape[1],))
_QKV: tuple[Leaf, ...] = (("weight", "kernel", _QKV_KERNEL), ("bias", "bias", _QKV_BIAS))


def qwen_table(config: Qwen25VLConfig) -> Table:
    """Returns the key table, 729 tensors at 7B."""
    vision, blocks, paths = config.vision, "visual.blocks", "vision_tower/layers"
    depth = vision.num_hidden_layers
    linears = (("attn.proj", "out_proj"), *((f"mlp.{name}", name) for name in ("gate_proj", "up_proj", "down_proj")))
    embedding = patches(*vision.patch_shape)
    merger = (("visual.merger.mlp.0", "projector/linear_1"), ("visual.merger.mlp.2", "projector/linear_2"))
    return Table(
        (
            TableEntry("visual.patch_embed.proj.weight", "vision_tower/patch_embedding/kernel", None, embedding),
            *stacked(blocks, paths, (("norm1", "norm1"), ("norm2", "norm2")), NORM_SCALE, depth),
            *stacked(blocks, paths, (("attn.qkv", "qkv"),), _QKV, depth),
            *stacked(blocks, paths, linears, LINEAR, depth),
            *single((("visual.merger.ln_q", "projector/norm"),), NORM_SCALE),
            *single(merger, LINEAR),
            *llama_entries(config.text, DECODER_PATHS[0], "language_model", "lm_head.weight"),
        ),
        renaming((r"model\.visual\.", "visual."), (r"(model\.)?language_model\.", "model.")),
    )
