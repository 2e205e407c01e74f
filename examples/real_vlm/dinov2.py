"""Converts a DINOv2 vision transformer from ONNX to the exact form of Hugging Face's `CLIPVisionModel`.

CLIP has a norm before its first block and no LayerScale; DINOv2 has it the other way round. The conversion is exact
up to rounding all the same:

- The bias of the patches goes into the position embeddings, LayerScale into `out_proj` and `fc2`.
- Every tensor that writes to the residual stream is made mean-free over the channels, which no LayerNorm can see. Then
  a LayerNorm over D channels plus E channels of zeros is the LayerNorm over D channels, up to the factor
  sqrt(D / (D + E)), which goes into its weight and into epsilon.
- E is one more attention head, all of whose weights are zero. Two of its channels hold +C and -C before CLIP's first
  norm, and nothing after it. They make the standard deviation there a constant (up to |x|^2 / (4 C^2)), which the
  norm's weight undoes.

So the width grows by one head: 448 channels for ViT-S. With C = 4096 the embeddings and the first norm need float32.

Needs the package `onnx` (`pip install "icet-jax[real]"`).
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from icet_jax.errors import UserError
from icet_jax.files import JsonObject

PIXEL_MEAN, PIXEL_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
"""Normalisation of the pixels that DINOv2 was trained with."""

_OFFSET = 4096.0  # C
_EPSILON = 1e-6  # of DINOv2's norms
_HEAD = 64  # channels of an attention head in every published DINOv2
_PROJECTIONS = {
    "attention.attention.query": "self_attn.q_proj",
    "attention.attention.key": "self_attn.k_proj",
    "attention.attention.value": "self_attn.v_proj",
    "attention.output.dense": "self_attn.out_proj",
    "mlp.fc1": "mlp.fc1",
    "mlp.fc2": "mlp.fc2",
}  # fmt: skip


@dataclass(frozen=True)
class Tower:
    """Holds an image encoder in the form of `CLIPVisionModel`.

    Attributes:
      tensors: {key of `CLIPVisionModel` without its prefix: float32 array}.
      config: content of the `vision_config`.
    """

    tensors: dict[str, np.ndarray]
    config: JsonObject


def read_dinov2(path: Path) -> dict[str, np.ndarray]:
    """Returns the weights in an ONNX file under the names that `Dinov2Model` was published with.

    The file is an export of a module whose attribute `backbone` is a `Dinov2Model`. The exporter keeps the names of
    vectors. Matrices have lost theirs; the names of the nodes that multiply with them say which they are.

    Raises:
      UserError: the package `onnx` is not installed, or the file holds something else.
    """
    try:
        import onnx
    except ImportError as error:
        raise UserError('the package onnx is not installed; pip install "icet-jax[real]"') from error
    graph = onnx.load(str(path)).graph
    arrays = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in graph.initializer}
    weights = {name.removeprefix("backbone."): array for name, array in arrays.items() if name.startswith("backbone.")}
    for node in graph.node:
        if node.op_type == "MatMul" and node.input[1] in arrays and "/layer." in node.name:
            module = node.name.removeprefix("/backbone/").removesuffix("/MatMul").replace("/", ".")
            weights[f"{module}.weight"] = arrays[node.input[1]].T  # (output, input), as torch has it
    weights["embeddings.position_embeddings"] = _position_embeddings(arrays, weights, path)
    return {name: np.ascontiguousarray(array, np.float32) for name, array in weights.items()}


def _position_embeddings(arrays: dict[str, Any], weights: dict[str, Any], path: Path) -> np.ndarray:
    """Returns the position embeddings [1, 1 + patches, D]: the exporter stores class token and patches apart."""
    if "embeddings.cls_token" not in weights:
        raise UserError(f"{path}: has no backbone.embeddings.cls_token; this converter is for DINOv2")
    width = weights["embeddings.cls_token"].shape[-1]
    anonymous = [array for name, array in arrays.items() if name.startswith("onnx::") and array.ndim == 3]
    of_class = [array for array in anonymous if array.shape == (1, 1, width)]
    of_patches = [array for array in arrays.values() if array.ndim == 3 and _is_square_grid(array.shape, width)]
    if len(of_class) != 1 or len(of_patches) != 1:
        raise UserError(f"{path}: its position embeddings were not found; this converter is for DINOv2 of fixed size")
    return np.concatenate([of_class[0], of_patches[0]], axis=1)


def _is_square_grid(shape: tuple[int, ...], width: int) -> bool:
    """Returns whether an array of this shape may hold an embedding of each patch of a square image."""
    batch, count, channels = shape
    return batch == 1 and channels == width and count > 1 and round(count**0.5) ** 2 == count


def to_clip(weights: dict[str, np.ndarray], image_size: int) -> Tower:
    """Returns the encoder as a `CLIPVisionModel` for square images of `image_size` pixels.

    Args:
      weights: weights under the names of `Dinov2Model`, see `read_dinov2`.
      image_size: height and width of the images; a multiple of the size of a patch.
    """
    source = {name: array.astype(np.float64) for name, array in weights.items()}
    width, patch = source["embeddings.cls_token"].shape[-1], source[f"{_PATCHES}.weight"].shape[-1]
    if image_size % patch:
        raise UserError(f"--image-size={image_size}: is not a multiple of the size of a patch, {patch}")
    depth = 1 + max(int(name.split(".")[2]) for name in source if name.startswith("encoder.layer."))
    wide = width + _HEAD
    tensors = _embeddings(source, image_size // patch)
    for layer in range(depth):
        tensors |= _block(source, layer)
    tensors |= _norm(source, "layernorm", "post_layernorm")
    config = {
        "model_type": "clip_vision_model",
        "hidden_size": wide,
        "intermediate_size": source["encoder.layer.0.mlp.fc1.weight"].shape[0],
        "num_hidden_layers": depth,
        "num_attention_heads": wide // _HEAD,
        "num_channels": 3,
        "image_size": image_size,
        "patch_size": patch,
        "hidden_act": "gelu",
        "layer_norm_eps": _EPSILON * width / wide,
        "projection_dim": wide,
    }
    return Tower({name: np.ascontiguousarray(array, np.float32) for name, array in tensors.items()}, config)


_PATCHES = "embeddings.patch_embeddings.projection"


def _embeddings(source: dict[str, np.ndarray], grid: int) -> dict[str, np.ndarray]:
    """Returns CLIP's embeddings and its first norm; `grid` is the number of patches along a side of the image."""
    patches = source[f"{_PATCHES}.weight"]
    width = patches.shape[0]
    wide = width + _HEAD
    positions = interpolate_positions(source["embeddings.position_embeddings"][0], grid)
    positions[1:] += source[f"{_PATCHES}.bias"]
    positions = np.pad(_mean_free(positions, axis=1), ((0, 0), (0, _HEAD)))
    positions[:, width : width + 2] = _OFFSET, -_OFFSET
    first_norm = np.zeros(wide)
    first_norm[:width] = _OFFSET * (2 / wide) ** 0.5  # the standard deviation there
    return {
        "embeddings.patch_embedding.weight": _writer(patches.reshape(width, -1)).reshape(wide, *patches.shape[1:]),
        "embeddings.class_embedding": _writer(source["embeddings.cls_token"][0, 0]),
        "embeddings.position_embedding.weight": positions,
        "pre_layrnorm.weight": first_norm,
        "pre_layrnorm.bias": np.zeros(wide),
    }


def _block(source: dict[str, np.ndarray], layer: int) -> dict[str, np.ndarray]:
    """Returns the tensors of one block."""
    block = {
        name.removeprefix(f"encoder.layer.{layer}."): array
        for name, array in source.items()
        if name.startswith(f"encoder.layer.{layer}.")
    }
    scales = {"attention.output.dense": block["layer_scale1.lambda1"], "mlp.fc2": block["layer_scale2.lambda1"]}
    tensors = _norm(block, "norm1", "layer_norm1") | _norm(block, "norm2", "layer_norm2")
    for name, clip_name in _PROJECTIONS.items():
        weight, bias = block[f"{name}.weight"], block[f"{name}.bias"]
        if name in scales:  # writes to the residual stream
            weight, bias = _writer(scales[name][:, None] * weight), _writer(scales[name] * bias)
        if name != "mlp.fc2":  # its inputs are residual channels, or those of attention heads
            weight = np.pad(weight, ((0, 0), (0, _HEAD)))
        if "attention.attention" in name:  # its outputs are those of attention heads
            weight, bias = np.pad(weight, ((0, _HEAD), (0, 0))), np.pad(bias, (0, _HEAD))
        tensors |= {f"{clip_name}.weight": weight, f"{clip_name}.bias": bias}
    return {f"encoder.layers.{layer}.{name}": array for name, array in tensors.items()}


def _norm(source: dict[str, np.ndarray], name: str, clip_name: str) -> dict[str, np.ndarray]:
    """Returns a LayerNorm over all channels that equals the source's over its own channels."""
    weight, bias = source[f"{name}.weight"], source[f"{name}.bias"]
    factor = (len(weight) / (len(weight) + _HEAD)) ** 0.5
    return {f"{clip_name}.weight": np.pad(weight * factor, (0, _HEAD)), f"{clip_name}.bias": np.pad(bias, (0, _HEAD))}


def _writer(array: np.ndarray) -> np.ndarray:
    """Returns a tensor whose first axis is the residual channels: mean-free, and padded with channels of zeros."""
    return np.pad(_mean_free(array, axis=0), [(0, _HEAD), *[(0, 0)] * (array.ndim - 1)])


def _mean_free(array: np.ndarray, axis: int) -> np.ndarray:
    """Returns an array whose mean along `axis` is subtracted."""
    return array - array.mean(axis=axis, keepdims=True)


def interpolate_positions(positions: np.ndarray, grid: int) -> np.ndarray:
    """Returns position embeddings for `grid` x `grid` patches, interpolated as `Dinov2Model` does.

    Args:
      positions: [1 + patches, D], that of the class token first.
      grid: number of patches along a side of the image.

    Source: HF `Dinov2Embeddings.interpolate_pos_encoding`, which is torch's bicubic interpolation without
    `align_corners`.
    """
    size = round((len(positions) - 1) ** 0.5)
    table = positions[1:].reshape(size, size, -1)
    weights = _bicubic(size, grid)
    resized = np.einsum("ai,bj,ijd->abd", weights, weights, table)
    return np.concatenate([positions[:1], resized.reshape(grid * grid, -1)])


def _bicubic(size: int, new_size: int) -> np.ndarray:
    """Returns the matrix [new_size, size] of torch's bicubic interpolation along one axis (Keys' kernel, a = -0.75)."""
    matrix = np.zeros((new_size, size))
    for row in range(new_size):
        centre = (row + 0.5) * size / new_size - 0.5
        first = int(np.floor(centre)) - 1
        for column in range(first, first + 4):
            distance = abs(centre - column)
            near = (1.25 * distance - 2.25) * distance**2 + 1
            far = -0.75 * (((distance - 5) * distance + 8) * distance - 4)
            matrix[row, min(max(column, 0), size - 1)] += near if distance <= 1 else far if distance < 2 else 0.0
    return matrix
