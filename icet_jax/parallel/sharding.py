"""Decides how every array is split over the mesh: one table from parameter paths to `PartitionSpec`.

Weight matrices ("kernels") are split over `tensor` as in Megatron: of two consecutive matrices, the first is split
along its columns and the second along its rows. The other axis of each matrix is split over `fsdp`. Rows of a batch are
split over `data` and `fsdp`. Patterns match the end of a path. The optimizer's moments are therefore split in the same
way as the parameters, because their paths end in the same way.
"""

import math
import re
from typing import Any

import jax
import numpy as np
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec

from icet_jax.typing import PyTree

P = PartitionSpec
ROWS = ("data", "fsdp")
"""Mesh axes over which the rows of a batch are split."""

_FIRST = "(q_proj|k_proj|v_proj|gate_proj|up_proj|fc1|c_fc)"  # split along columns over `tensor`
_SECOND = "(o_proj|out_proj|down_proj|fc2|mlp_proj)"  # split along rows over `tensor`

RULES: tuple[tuple[str, PartitionSpec], ...] = (
    # LoRA: a [L, in, r], b [L, r, out], split as the kernel that they adapt.
    (rf"{_FIRST}/a", P(None, "fsdp", None)),
    (rf"{_FIRST}/b", P(None, None, "tensor")),
    (rf"{_SECOND}/a", P(None, "tensor", None)),
    (rf"{_SECOND}/b", P(None, None, "fsdp")),
    # Stacks of layers, `layers`, `cross_layers` and `global_layers`: kernels [L, in, out], biases [L, out].
    (rf"\w*layers/{_FIRST}/kernel", P(None, "fsdp", "tensor")),
    (rf"\w*layers/{_FIRST}/bias", P(None, "tensor")),
    (rf"\w*layers/{_SECOND}/kernel", P(None, "tensor", "fsdp")),
    (rf"\w*layers/{_SECOND}/bias", P()),
    # Qwen2.5-VL's fused q, k, v, each with an axis of its own: kernel [L, 3, in, out], bias [L, 3, out].
    (r"layers/qkv/kernel", P(None, None, "fsdp", "tensor")),
    (r"layers/qkv/bias", P(None, None, "tensor")),
    # Layers for decoding steps with joined projections, which are not used if a mesh splits weights.
    (r"layers/((attention_in|attention_out|gate_up|down)/(kernel|a|bias)|(head_)?norms)", P()),
    # GPT-2's fused q, k, v cannot be split by heads, so its attention is not split over `tensor`.
    (r"layers/c_attn/kernel", P(None, "fsdp", None)),
    (r"layers/c_proj/kernel", P(None, None, "fsdp")),
    (r"layers/(c_attn|c_proj)/bias", P()),
    (r"((cross_)?layers/(attn|mlp)_gate|global_layers/gate_(attn|ffn))", P()),
    (r"projector/kernel", P("fsdp", "tensor")),
    (r"projector/bias", P("tensor")),
    (r"projector/linear_1/kernel", P("fsdp", "tensor")),
    (r"projector/linear_1/bias", P("tensor")),
    (r"projector/linear_2/kernel", P("tensor", "fsdp")),
    (r"projector/linear_2/bias", P()),
    (r"embed_tokens", P("tensor", "fsdp")),
    (r"lm_head/kernel", P("fsdp", "tensor")),
    # Embeddings of GPT-2, BERT, RoBERTa and DeBERTa, whose number of rows is odd or prime.
    (r"wte|wpe", P(None, "fsdp")),
    (r"(word|position|token_type|rel)_embeddings", P(None, "fsdp")),
    (r"patch_embedding/kernel", P(None, "fsdp")),
    (r"patch_embedding/bias", P()),
    (r"class_embedding|position_embedding|image_newline", P()),
    # Llama 3.2 Vision's position embeddings: within a tile [P, D], of the tiles of each aspect ratio [ids, M * P * D],
    # and their gates.
    (r"gated_positional_embedding/embedding", P(None, "fsdp")),
    (r"gated_positional_embedding/tile_embedding", P(None, ("fsdp", "tensor"))),
    (r"(pre|post)_tile_positional_embedding/embedding", P(None, "fsdp")),
    (r"(gated|pre_tile|post_tile)_positional_embedding/gate", P()),
    (r"\w*(norm|norm1|norm2|norm_pre|norm_post|layrnorm|ln_1|ln_2|ln_f)/(scale|bias)", P()),
    (r"pooler/kernel", P("fsdp", "tensor")),
    (r"pooler/bias", P("tensor")),
    (r"classifier/(kernel|bias)", P()),
    (r"score/kernel", P()),
    (r"value_head/(kernel|bias)", P()),
    # KV cache: k, v [B, K, S, D] of each layer; length, next_position [B]. Llama 3.2 Vision has one for the text and,
    # for the images, k, v [B, K, N, D] of each layer and two masks of what rows attend to, allowed and real [B, N].
    (r"cache/(text/)?(k|v)/\d+", P(ROWS, "tensor", None, None)),
    (r"cache/(text/)?(length|next_position|allowed|real)", P(ROWS)),
)
_COMPILED = tuple((re.compile(rf"(.*/)?({pattern})"), spec) for pattern, spec in RULES)


def path_name(path: tuple[Any, ...]) -> str:
    """Returns a `jax.tree_util` key path as text: `language_model/layers/q_proj/kernel`.

    The last part of an nnx parameter's path, `.value`, is left out.
    """
    names = [str(getattr(key, "key", getattr(key, "name", getattr(key, "idx", key)))) for key in path]
    if names and names[-1] == "value" and isinstance(path[-1], jax.tree_util.GetAttrKey):
        names.pop()
    return "/".join(names)


def flatten_with_names(tree: PyTree) -> dict[str, Any]:
    """Returns {path as in `path_name`: leaf} of a pytree, in tree order."""
    return {path_name(path): leaf for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]}


def partition_spec(name: str) -> PartitionSpec:
    """Returns how `RULES` split the array at path `name`.

    Raises:
      ValueError: no rule matches; a new parameter needs a line in `RULES`.
    """
    for pattern, spec in _COMPILED:
        if pattern.fullmatch(name):
            return spec
    raise ValueError(f"no sharding rule for '{name}'; add one to icet_jax.parallel.sharding.RULES")


def fit(spec: PartitionSpec, shape: tuple[int, ...], mesh: Mesh | AbstractMesh) -> PartitionSpec:
    """Returns `spec` without the mesh axes that do not divide the array's axis, as in toy models with odd widths.

    Args:
      spec: how the array should be split.
      shape: shape of the array.
      mesh: the mesh.
    """
    axes = []
    for axis, size in zip(spec, shape, strict=False):
        names = () if axis is None else (axis,) if isinstance(axis, str) else tuple(axis)
        axes.append(axis if size % math.prod(mesh.shape[name] for name in names) == 0 else None)
    return P(*axes)


def shardings(tree: PyTree, mesh: Mesh | AbstractMesh, prefix: str = "") -> PyTree:
    """Returns a pytree of the same structure with a `NamedSharding` for every leaf; scalars are replicated.

    Args:
      tree: arrays or abstract arrays: parameters, adapters, a value head, a KV cache, or an optimizer state.
      mesh: result of `mesh.make_mesh`, or an abstract one for devices that are not present.
      prefix: first part of the paths in `RULES` if the paths in `tree` lack it: "value_head" or "cache".

    Raises:
      ValueError: no rule matches a leaf.
    """

    def sharding(path: tuple[Any, ...], leaf: Any) -> NamedSharding:
        if not leaf.shape:
            return NamedSharding(mesh, P())
        name = "/".join(filter(None, (prefix, path_name(path))))
        return NamedSharding(mesh, fit(partition_spec(name), leaf.shape, mesh))

    return jax.tree_util.tree_map_with_path(sharding, tree)


def placed(tree: PyTree, shardings: PyTree) -> PyTree:
    """Returns abstract arrays with the shapes and dtypes of `tree` and the given shardings (same tree structure)."""

    def abstract(leaf: Any, sharding: jax.sharding.Sharding) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

    return jax.tree.map(abstract, tree, shardings)


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Returns the sharding of arrays whose first axis is the rows of a batch, such as tokens, masks and scores."""
    return NamedSharding(mesh, P(ROWS))


def replicated(mesh: Mesh | AbstractMesh) -> NamedSharding:
    """Returns the sharding of arrays that every device holds completely."""
    return NamedSharding(mesh, P())


def row_shards(mesh: Mesh | AbstractMesh) -> int:
    """Returns the number of parts into which the rows of a batch are split."""
    return math.prod(mesh.shape[axis] for axis in ROWS)


def split_rows(tree: PyTree, mesh: Mesh) -> PyTree:
    """Returns traced arrays with their first axis split over `ROWS` where it is divisible, else unchanged."""
    split = batch_sharding(mesh)
    return jax.tree.map(
        lambda leaf: leaf if leaf.shape[0] % row_shards(mesh) else jax.lax.with_sharding_constraint(leaf, split), tree
    )


def row_slices(tree: PyTree, count: int) -> PyTree:
    """Returns arrays [B, ...] as `count` equal slices of rows, [count, B / count, ...], for `lax.map` and `scan`.

    Slice i has rows i, i + count, ..., so that every slice is split over the devices if the rows are.
    """
    return jax.tree.map(lambda leaf: leaf.reshape(-1, count, *leaf.shape[1:]).swapaxes(0, 1), tree)


def joined_slices(tree: PyTree) -> PyTree:
    """Inverts `row_slices`: returns arrays [count, B / count, ...] as [B, ...], with rows in their original order."""
    return jax.tree.map(lambda leaf: leaf.swapaxes(0, 1).reshape(-1, *leaf.shape[2:]), tree)


def place_rows(tree: PyTree, mesh: Mesh | None, parts: int = 1) -> PyTree:
    """Puts host arrays on the devices, with the first axis split over `ROWS` if it is divisible, else replicated.

    Args:
      tree: pytree of host arrays.
      mesh: the mesh; None for the default device.
      parts: 1 if every process has all rows. Otherwise each process has one of `parts` equal parts of the rows (its
        `distributed.row_share`), and the first axis of the results is `parts` times as long as that of `tree`.
    """
    if mesh is None:
        return jax.device_put(tree)
    by_rows, on_every_device = batch_sharding(mesh), replicated(mesh)

    def place(leaf: np.ndarray) -> jax.Array:
        """Puts one array on the devices."""
        sharding = by_rows if parts * leaf.shape[0] % row_shards(mesh) == 0 else on_every_device
        if sharding.is_fully_addressable:
            return jax.device_put(leaf, sharding)
        if parts > 1:
            return jax.make_array_from_process_local_data(sharding, leaf, (parts * leaf.shape[0], *leaf.shape[1:]))
        # Not device_put, which would first compare the rows of all processes.
        return jax.make_array_from_callback(leaf.shape, sharding, lambda index: leaf[index])

    return jax.tree.map(place, tree)
