"""The mesh's errors, and a place for every array: checked on abstract 7B and 13B models over 8 devices."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import AbstractMesh, PartitionSpec

from icet_jax.checkpoints.hf_import import abstract_params
from icet_jax.config.names import PROJECTIONS
from icet_jax.errors import UserError
from icet_jax.models.llava.network import Llava, LlavaConfig
from icet_jax.models.llava_next.network import LlavaNext, LlavaNextConfig
from icet_jax.models.mllama.network import Mllama, MllamaConfig
from icet_jax.models.mllama.text import CrossStates, MllamaCache, MllamaTextConfig
from icet_jax.models.mllama.vision import MllamaVisionConfig
from icet_jax.models.qwen2_5_vl.network import Qwen25VL, Qwen25VLConfig
from icet_jax.models.qwen2_5_vl.vision import QwenVisionConfig
from icet_jax.models.smolvlm.network import SmolVLM, SmolVLMConfig
from icet_jax.nn.clip import ClipConfig
from icet_jax.nn.gpt2 import GPT2Config, GPT2RewardModel
from icet_jax.nn.heads import init_value_head
from icet_jax.nn.llama import LlamaConfig, lora_shapes
from icet_jax.nn.protocols import count_parameters, init_lora, lora_key
from icet_jax.parallel import sharding
from icet_jax.parallel.mesh import AXES, make_mesh, mesh_shape, visible_mesh

CLIP_LARGE = ClipConfig(1024, 4096, 24, 16, image_size=336, patch_size=14)
VICUNA_7B = LlamaConfig(32064, 4096, 11008, 32, 32, 32, 128)
VICUNA_13B = LlamaConfig(32064, 5120, 13824, 40, 40, 40, 128)
LLAVA_7B = LlavaConfig(vision=CLIP_LARGE, text=VICUNA_7B, image_token_index=32000)
LLAVA_13B = dataclasses.replace(LLAVA_7B, text=VICUNA_13B)
GPT2_LARGE = GPT2Config(50257, 1024, 1280, 36, 20, 5120)

PINPOINTS = ((336, 672), (672, 336), (672, 672), (1008, 336), (336, 1008))
NEXT_7B = LlavaNextConfig(CLIP_LARGE, VICUNA_7B, 32000, image_grid_pinpoints=PINPOINTS)
MISTRAL_7B = LlamaConfig(32064, 4096, 14336, 32, 32, 8, 128, rope_theta=1e6)
NEXT_MISTRAL = dataclasses.replace(NEXT_7B, text=MISTRAL_7B)
RATIOS = ((1, 1), (1, 2), (1, 3), (1, 4), (2, 1), (2, 2), (3, 1), (4, 1))
MLLAMA_11B = MllamaConfig(
    MllamaVisionConfig(1280, 5120, 32, 8, 16, 560, 14, (3, 7, 15, 23, 30), RATIOS),
    MllamaTextConfig(LlamaConfig(128256, 4096, 14336, 40, 32, 8, 128), (3, 8, 13, 18, 23, 28, 33, 38)),
    image_token_index=128256,
)
SIGLIP = ClipConfig(
    768, 3072, 12, 12, image_size=512, patch_size=16, layer_norm_eps=1e-6, hidden_act="gelu_pytorch_tanh"
)
SMOLVLM_500M = SmolVLMConfig(SIGLIP, LlamaConfig(49280, 960, 2560, 32, 15, 5, 64), 49190, scale_factor=4)
# The image encoder's MLPs of 3B and 7B are 3420 wide, which 8 does not divide.
QWEN_32B = Qwen25VLConfig(
    QwenVisionConfig(1280, 3456, 32, 16, 14, 2, 2, 112, (7, 15, 23, 31)),
    LlamaConfig(152064, 5120, 27648, 64, 40, 8, 128, biased=("q_proj", "k_proj", "v_proj")),
    image_token_index=151655,
)
MODELS = {
    "llava-7b": (Llava, LLAVA_7B, 39, 7_063_427_072),
    "llava-13b": (Llava, LLAVA_13B, 39, 13_351_494_656),
    "next-vicuna-7b": (LlavaNext, NEXT_7B, 40, 7_063_431_168),
    "next-mistral-7b": (LlavaNext, NEXT_MISTRAL, 40, 7_566_747_648),
    "mllama-11b": (Mllama, MLLAMA_11B, 66, 10_670_220_835),
    "smolvlm-500m": (SmolVLM, SMOLVLM_500M, 34, 507_482_304),
    "qwen2.5-vl-32b": (Qwen25VL, QWEN_32B, 33, 33_452_718_336),
    "gpt2-large": (GPT2RewardModel, GPT2_LARGE, 17, 774_031_360),
}
LARGE = [pytest.param(*model, id=name) for name, model in MODELS.items()]

MESHES = [(8, 1, 1), (1, 8, 1), (1, 1, 8), (2, 2, 2), (1, 4, 2)]


def abstract(module, config):
    return abstract_params(functools.partial(module, config), "bfloat16", "bfloat16")[1]


@pytest.mark.parametrize(("module", "config", "count", "published"), LARGE)
def test_parameter_counts_are_the_published_ones(module, config, count, published):
    params = abstract(module, config)
    assert len(jax.tree.leaves(params)) == count
    assert count_parameters(params) == published


@pytest.mark.parametrize(("module", "config", "count", "published"), LARGE)
def test_every_parameter_has_a_rule_that_divides(module, config, count, published):
    for name, leaf in sharding.flatten_with_names(abstract(module, config)).items():
        spec = sharding.partition_spec(name)
        for shape in MESHES:
            assert sharding.fit(spec, leaf.shape, AbstractMesh(shape, AXES)) == spec, (name, shape)


@pytest.mark.parametrize(("module", "config"), [(Llava, LLAVA_7B), (LlavaNext, NEXT_MISTRAL), (Mllama, MLLAMA_11B)])
def test_large_parameters_are_spread_over_all_fsdp_and_tensor_devices(module, config):
    mesh = AbstractMesh((1, 4, 2), AXES)
    for name, leaf in sharding.flatten_with_names(abstract(module, config)).items():
        axes = [axis for axis in sharding.partition_spec(name) if axis]
        used = [name for axis in axes for name in ((axis,) if isinstance(axis, str) else axis)]
        parts = math.prod(mesh.shape[axis] for axis in used)
        assert parts == 8 or leaf.size < 2**21, f"{name} {leaf.shape} is split over {parts} devices only"


def trainable(shapes=None):
    shapes = lora_shapes(VICUNA_7B) if shapes is None else shapes
    policy = jax.eval_shape(
        lambda key: init_lora(shapes, rank=16, alpha=32.0, targets=PROJECTIONS, key=key).weights, jax.random.key(0)
    )
    return {"policy": policy, "value_head": jax.eval_shape(lambda: init_value_head(4096))}


def test_adapters_value_head_and_their_optimizer_state_have_rules():
    mesh = AbstractMesh((1, 4, 2), AXES)
    params = trainable()
    placed = sharding.flatten_with_names(sharding.shardings(params, mesh))
    assert placed["policy/q_proj/a"].spec == PartitionSpec(None, "fsdp", None)
    assert placed["policy/down_proj/a"].spec == PartitionSpec(None, "tensor", None)
    moments = jax.eval_shape(optax.adamw(1e-3).init, params)
    for name, where in sharding.flatten_with_names(sharding.shardings(moments, mesh)).items():
        if "/mu/" in name or "/nu/" in name:
            assert where == placed[name.split("u/", 1)[1]]
        else:
            assert where.spec == PartitionSpec()


@pytest.mark.parametrize(("module", "config"), [(LlavaNext, NEXT_MISTRAL), (Mllama, MLLAMA_11B)])
def test_adapters_fit_the_kernels_of_every_stack(module, config):
    """Every target of the config is in every stack of layers that has it, and is split as the kernel it adapts."""
    kernels = {
        lora_key(name): (leaf.shape, sharding.partition_spec(name))
        for name, leaf in sharding.flatten_with_names(abstract(module, config)).items()
        if lora_key(name) is not None
    }
    mesh, params = AbstractMesh((1, 4, 2), AXES), trainable(config.lora_shapes())
    placed = sharding.flatten_with_names(sharding.shardings(params, mesh))
    assert set(params["policy"]) == set(kernels)
    assert {key.rpartition("/")[2] for key in kernels} == set(PROJECTIONS)
    for key, pair in params["policy"].items():
        (depth, size_in, size_out), spec = kernels[key]
        assert pair["a"].shape == (depth, size_in, 16) and pair["b"].shape == (depth, 16, size_out)
        assert placed[f"policy/{key}/a"].spec[1] == spec[1] and placed[f"policy/{key}/b"].spec[2] == spec[2]


def cache_specs(make, images):
    """Where the cache of 8 prompts of 640 tokens lies on a mesh of (2, 2, 2)."""
    graphdef, params = nnx.split(nnx.eval_shape(make))
    tokens, mask = jax.ShapeDtypeStruct((8, 640), jnp.int32), jax.ShapeDtypeStruct((8, 640), bool)

    def filled(params, *inputs):
        return nnx.merge(graphdef, params).prefill(*inputs)[1].with_room(128)

    cache = jax.eval_shape(filled, params, tokens, mask, images)
    placed = sharding.shardings(cache, AbstractMesh((2, 2, 2), AXES), prefix="cache")
    return cache, {name: where.spec for name, where in sharding.flatten_with_names(placed).items()}


BY_HEADS, BY_ROWS = PartitionSpec(sharding.ROWS, "tensor", None, None), PartitionSpec(sharding.ROWS)


def test_the_cache_of_text_and_images_is_split_by_rows_and_heads():
    states = jax.ShapeDtypeStruct((8, 6404, 4096), jnp.bfloat16)
    images = CrossStates(states, jax.ShapeDtypeStruct((8, 1, 4), bool))
    cache, specs = cache_specs(lambda: Mllama(MLLAMA_11B, rngs=nnx.Rngs(0), param_dtype=jnp.bfloat16), images)
    assert set(vars(cache)) == {field.name for field in dataclasses.fields(MllamaCache)}
    assert cache.k[7].shape == (8, 8, 6404, 128) and cache.text.k[31].shape == (8, 8, 768, 128)
    assert all(specs[name] == BY_HEADS for name in ("text/k/0", "text/v/31", "k/0", "v/7"))
    assert all(specs[name] == BY_ROWS for name in ("text/length", "allowed", "real"))


def test_the_cache_is_split_by_rows_and_heads():
    images = jax.ShapeDtypeStruct((8, 576, 4096), jnp.bfloat16)
    cache, specs = cache_specs(lambda: Llava(LLAVA_7B, rngs=nnx.Rngs(0), param_dtype=jnp.bfloat16), images)
    assert cache.k[0].shape == (8, 32, 768, 128)
    assert specs["k/0"] == specs["v/31"] == BY_HEADS and specs["length"] == BY_ROWS


def test_axes_that_do_not_divide_are_left_whole():
    mesh = AbstractMesh((1, 4, 2), AXES)
    assert sharding.fit(PartitionSpec("fsdp", "tensor"), (37, 32), mesh) == PartitionSpec(None, "tensor")
    assert sharding.fit(PartitionSpec(("data", "fsdp")), (6,), mesh) == PartitionSpec(None)


def test_an_unknown_parameter_is_an_error():
    with pytest.raises(ValueError, match="no sharding rule for 'mystery/kernel'"):
        sharding.partition_spec("mystery/kernel")


@pytest.mark.parametrize(
    ("sizes", "shape"),
    [({}, (8, 1, 1)), ({"tensor": 2}, (4, 1, 2)), ({"data": 1, "fsdp": -1}, (1, 8, 1)), ({"data": 8}, (8, 1, 1))],
)
def test_mesh_shape_infers_the_rest(sizes, shape):
    assert mesh_shape(8, **sizes) == shape


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"fsdp": 3}, r"^config\.mesh\.fsdp=3: mesh \(data=-1, fsdp=3, tensor=1\) does not fit 8 devices"),
        ({"data": 2, "fsdp": 2}, "does not fit 8 devices"),
        ({"fsdp": -1}, "only one axis may be -1"),
        ({"tensor": 0}, "mesh.tensor=0"),
        ({"data": -2}, "mesh.data=-2"),
    ],
)
def test_mesh_shapes_that_cannot_be_are_one_line(sizes, message):
    with pytest.raises(UserError, match=message):
        mesh_shape(8, **sizes)


@pytest.mark.parametrize("sizes", [{"data": 7}, {"fsdp": 2}, {"data": 1, "tensor": 2}])
def test_one_device_is_no_place_for_a_mesh_of_several(sizes):
    with pytest.raises(UserError, match=r"^config\.mesh\.\w+=\d: .* does not fit 1 device, .*jax sees \(cpu\)"):
        visible_mesh(**sizes)


@pytest.mark.parametrize("sizes", [{}, {"data": 1}, {"data": 1, "fsdp": -1}])
def test_one_device_needs_no_mesh(sizes):
    assert visible_mesh(**sizes) is None


def test_arrays_can_be_placed_on_a_real_mesh():
    mesh = make_mesh()
    x = jax.device_put(np.arange(4.0), sharding.batch_sharding(mesh))
    assert mesh.shape == {"data": 1, "fsdp": 1, "tensor": 1}
    np.testing.assert_array_equal(np.asarray(x), np.arange(4.0))


@pytest.mark.parametrize("count", [1, 2, 3, 6])
def test_slices_take_rows_at_a_stride_and_come_together_again(count):
    rows = {"a": np.arange(12).reshape(6, 2), "b": np.arange(6)}
    slices = sharding.row_slices(rows, count)
    for number in range(count):
        np.testing.assert_array_equal(slices["a"][number], rows["a"][number::count])
    np.testing.assert_array_equal(sharding.joined_slices(slices)["a"], rows["a"])
    np.testing.assert_array_equal(sharding.joined_slices(slices)["b"], rows["b"])
