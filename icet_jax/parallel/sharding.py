"""The placement of every array: one table from parameter paths to `PartitionSpec`.

Kernels are split as in Megatron (columns, then rows, over `tensor`) and over `fsdp` along their other axis; rows of a
batch are split over `data` and `fsdp`. Patterns match the end of a path, so the moments of an optimizer, whose paths
end like those of their parameters, are placed with them.
"""

import math
import re
from typing import Any

import jax
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec

P = PartitionSpec
ROWS = ("data", "fsdp")
"""Mesh axes over which the rows of a batch are split."""

_COLUMNS = "(q_proj|k_proj|v_proj|gate_proj|up_proj|fc1|c_fc)"
_BACK = "(o_proj|out_proj|down_proj|fc2|mlp_proj)"

RULES: tuple[tuple[str, PartitionSpec], ...] = (
    # LoRA: a [L, in, r], b [L, r, out], split as the kernel they adapt.
    (rf"{_COLUMNS}/a", P(None, "fsdp", None)),
    (rf"{_COLUMNS}/b", P(None, None, "tensor")),
    (rf"{_BACK}/a", P(None, "tensor", None)),
    (rf"{_BACK}/b", P(None, None, "fsdp")),
    # Stacks of layers, `layers`, `cross_layers` and `global_layers`: kernels [L, in, out], biases [L, out].
    (rf"\w*layers/{_COLUMNS}/kernel", P(None, "fsdp", "tensor")),
    (rf"\w*layers/{_COLUMNS}/bias", P(None, "tensor")),
    (rf"\w*layers/{_BACK}/kernel", P(None, "tensor", "fsdp")),
    (rf"\w*layers/{_BACK}/bias", P()),
    # GPT-2's fused q, k, v cannot be cut by heads, so its attention stays whole over `tensor`.
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
    # Tables whose number of rows no mesh divides: GPT-2's, BERT's, RoBERTa's and DeBERTa's.
    (r"wte|wpe", P(None, "fsdp")),
    (r"(word|position|token_type|rel)_embeddings", P(None, "fsdp")),
    (r"patch_embedding/kernel", P(None, "fsdp")),
    (r"class_embedding|position_embedding|image_newline", P()),
    # Llama 3.2 Vision's positions: of a tile [P, D] and of each aspect ratio's tiles [ids, M * P * D], and their gates.
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
    # KV cache: for each layer k, v [B, K, S, D]; length [B]. Llama 3.2 Vision has one of the text and, of the images,
    # for each layer k, v [B, K, N, D] and what rows see of them, allowed and real [B, N].
    (r"cache/(text/)?(k|v)/\d+", P(ROWS, "tensor", None, None)),
    (r"cache/(text/)?(length|allowed|real)", P(ROWS)),
)
_COMPILED = tuple((re.compile(rf"(.*/)?({pattern})"), spec) for pattern, spec in RULES)


def path_name(path: tuple[Any, ...]) -> str:
    """Returns a `jax.tree_util` key path as `language_model/layers/q_proj/kernel`, without an nnx parameter's
    `.value`."""
    names = [str(getattr(key, "key", getattr(key, "name", getattr(key, "idx", key)))) for key in path]
    if names and names[-1] == "value" and isinstance(path[-1], jax.tree_util.GetAttrKey):
        names.pop()
    return "/".join(names)


def flatten_with_names(tree: Any) -> dict[str, Any]:
    """Returns the leaves of a pytree by `path_name`, in tree order."""
    return {path_name(path): leaf for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]}


def partition_spec(name: str) -> PartitionSpec:
    """Returns the rule for the array at path `name`.

    Raises:
      ValueError: no rule matches; a new parameter needs a line in `RULES`.
    """
    for pattern, spec in _COMPILED:
        if pattern.fullmatch(name):
            return spec
    raise ValueError(f"no sharding rule for '{name}'; add one to icet_jax.parallel.sharding.RULES")


def fit(spec: PartitionSpec, shape: tuple[int, ...], mesh: Mesh | AbstractMesh) -> PartitionSpec:
    """Returns `spec` without mesh axes that do not divide their array axis, as in toy models with odd widths."""
    axes = []
    for axis, size in zip(spec, shape, strict=False):
        names = () if axis is None else (axis,) if isinstance(axis, str) else tuple(axis)
        axes.append(axis if size % math.prod(mesh.shape[name] for name in names) == 0 else None)
    return P(*axes)


def shardings(tree: Any, mesh: Mesh | AbstractMesh, prefix: str = "") -> Any:
    """Returns a `NamedSharding` for every leaf of a pytree of arrays or abstract shapes; scalars are replicated.

    Args:
      tree: parameters, adapters, a value head, a KV cache, or an optimizer state over them.
      mesh: result of `mesh.make_mesh`; an abstract one is for planning with devices that are not present.
      prefix: put before the paths if the tree has no root of its own: "value_head", "cache".

    Raises:
      ValueError: no rule matches a leaf.
    """

    def place(path: tuple[Any, ...], leaf: Any) -> NamedSharding:
        if not leaf.shape:
            return NamedSharding(mesh, P())
        name = "/".join(filter(None, (prefix, path_name(path))))
        return NamedSharding(mesh, fit(partition_spec(name), leaf.shape, mesh))

    return jax.tree_util.tree_map_with_path(place, tree)


def placed(tree: Any, places: Any) -> Any:
    """Returns abstract arrays with the shardings `places`, which have the same structure."""
    return jax.tree.map(lambda leaf, place: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place), tree, places)


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Returns the sharding of arrays whose first axis is the rows of a batch (tokens, masks, visual features,
    scores)."""
    return NamedSharding(mesh, P(ROWS))


def replicated(mesh: Mesh | AbstractMesh) -> NamedSharding:
    """Returns the sharding of arrays that every device holds completely."""
    return NamedSharding(mesh, P())


def row_shards(mesh: Mesh | AbstractMesh) -> int:
    """Returns the number of parts into which the rows of a batch are split."""
    return math.prod(mesh.shape[axis] for axis in ROWS)


def split_rows(tree: Any, mesh: Mesh) -> Any:
    """Splits the first axis of arrays over the mesh's row axes if it is divisible; for use inside compiled
    functions."""
    split = batch_sharding(mesh)
    return jax.tree.map(
        lambda leaf: leaf if leaf.shape[0] % row_shards(mesh) else jax.lax.with_sharding_constraint(leaf, split), tree
    )


def row_slices(tree: Any, count: int) -> Any:
    """Returns the rows of every array in `count` equal slices, [B, ...] to [count, B / count, ...], for `lax.map` and
    `scan`.

    Slice i has rows i, i + count, ..., so that rows that are split over devices stay split in every slice.
    """
    return jax.tree.map(lambda leaf: leaf.reshape(-1, count, *leaf.shape[1:]).swapaxes(0, 1), tree)


def joined_slices(tree: Any) -> Any:
    """Returns the rows of `row_slices` in their original order, [count, B / count, ...] to [B, ...]."""
    return jax.tree.map(lambda leaf: leaf.swapaxes(0, 1).reshape(-1, *leaf.shape[2:]), tree)


def place_rows(tree: Any, mesh: Mesh | None, parts: int = 1) -> Any:
    """Puts arrays on the devices, with the first axis split over the mesh's row axes if it is divisible, else
    replicated.

    Args:
      tree: pytree of host arrays.
      mesh: None for the default device.
      parts: 1 if this process has all rows, like every other one. Otherwise it has one of this many equal parts, that
        of its `distributed.row_share`, and the resulting arrays are longer by this factor.
    """
    if mesh is None:
        return jax.device_put(tree)
    split, whole = batch_sharding(mesh), replicated(mesh)

    def place(leaf: Any) -> jax.Array:
        where = split if parts * leaf.shape[0] % row_shards(mesh) == 0 else whole
        if where.is_fully_addressable:
            return jax.device_put(leaf, where)
        if parts > 1:
            return jax.make_array_from_process_local_data(where, leaf, (parts * leaf.shape[0], *leaf.shape[1:]))
        # Not device_put, which would compare the rows of all processes first.
        return jax.make_array_from_callback(leaf.shape, where, lambda index: leaf[index])

    return jax.tree.map(place, tree)
