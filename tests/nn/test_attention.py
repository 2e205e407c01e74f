"""The choice of attention kernels: XLA against the formula, the kernels against XLA, and which one is used where."""

import dataclasses
import importlib.util
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AbstractDevice, AbstractMesh, AxisType, NamedSharding, PartitionSpec

from icet_jax.algorithms.forward import evaluate_responses
from icet_jax.models.llava.network import Llava, LlavaConfig
from icet_jax.nn import attention, layers
from icet_jax.nn.layers import Lora
from icet_jax.nn.llama import lora_shapes
from icet_jax.nn.protocols import init_lora
from icet_jax.parallel import topology
from icet_jax.parallel.collectives import moved_bytes
from icet_jax.parallel.mesh import AXES, make_mesh
from icet_jax.parallel.sharding import batch_sharding, shardings
from tests.algorithms import toy
from tests.devices import assert_agreed

SHAPES = [(5, 7, 4, 4, 8), (5, 13, 6, 2, 5)]  # rows, queries, heads, key-value heads, head size


def drawn(rows, length, heads, kv_heads, size, dtype=jnp.float32):
    keys = jax.random.split(jax.random.key(length), 4)
    shapes = (rows, length, heads, size), *2 * [(rows, length, kv_heads, size)], (rows, length, heads, size)
    return [jax.random.normal(key, shape).astype(dtype) for key, shape in zip(keys, shapes, strict=True)]


def padding(rows, length):
    """Left, right, on both sides, none, and a row of padding alone."""
    runs = [(length // 3, length), (0, length - length // 4), (2, length - 2), (0, length), (0, 0)]
    columns = np.arange(length)
    return np.stack([(columns >= first) & (columns < last) for first, last in (runs * rows)[:rows]])


def formula(q, k, v, allowed):
    """Attention in float64, one query at a time; None where a query may see nothing."""
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    rows, length, heads, size = q.shape
    out = np.zeros(q.shape)
    for b, t, h in np.ndindex(rows, length, heads):
        kv = h * k.shape[2] // heads
        seen = allowed[b, t]
        if not seen.any():
            seen, scores = np.ones_like(seen), np.zeros(length)
        else:
            scores = k[b, :, kv] @ q[b, t, h] / np.sqrt(size)
        weights = np.where(seen, np.exp(scores - scores[seen].max()), 0)
        out[b, t, h] = weights / weights.sum() @ v[b, :, kv]
    return out.reshape(rows, length, -1)


def allowed(real, causal):
    length = real.shape[1]
    below = np.tril(np.ones((length, length), bool)) if causal else np.ones((length, length), bool)
    return below[None] & real[:, None, :]


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("shape", SHAPES)
def test_xla_computes_the_formula(shape, causal):
    q, k, v, _ = drawn(*shape)
    real = padding(*q.shape[:2])
    out = layers.attention(q, k, v, real=jnp.asarray(real), causal=causal)
    np.testing.assert_allclose(out, formula(q, k, v, allowed(real, causal)), atol=2e-6)
    np.testing.assert_array_equal(out, layers.attention(q, k, v, jnp.asarray(allowed(real, causal))[:, None]))


@pytest.mark.parametrize(("limit", "parts"), [(1, 12), (4 * 8 * 12 * 3, 4), (4 * 8 * 12 * 7, 2), (1 << 28, 1)])
def test_a_large_image_is_computed_in_parts(monkeypatch, limit, parts):
    """As few parts of equal size as the limit allows."""
    q, k, v, _ = drawn(2, 12, 8, 4, 6)
    real = jnp.asarray(padding(2, 12))
    expected = attention.xla_attention(q, k, v, real=real).reshape(2, 12, -1)
    monkeypatch.setattr(attention, "_SCORE_BYTES", limit)
    traced = jax.make_jaxpr(lambda *qkv: layers.attention(*qkv, real=real))(q, k, v)
    assert [equation.params["length"] for equation in traced.eqns if equation.primitive.name == "scan"] == (
        [parts] if parts > 1 else []
    )
    np.testing.assert_allclose(layers.attention(q, k, v, real=real), expected, atol=1e-6)


def compared(kernel, arrays, real, causal, atol):
    """A kernel's outputs and gradients at real queries against XLA's, where nothing is made of the other outputs."""
    *qkv, weights = arrays
    kept = np.ones(weights.shape[:2], bool) if real is None else real

    def total(attend, *qkv):
        out = attend(*qkv).reshape(weights.shape)
        return jnp.sum(jnp.where(kept[:, :, None, None], out * weights, 0))

    def both(attend):
        return jax.jit(lambda *x: (attend(*x).reshape(weights.shape), jax.grad(total, (1, 2, 3))(attend, *x)))(*qkv)

    given = None if real is None else jnp.asarray(real)
    out, gradients = both(lambda q, k, v: kernel(q, k, v, given, causal=causal))
    expected, expected_gradients = both(lambda q, k, v: attention.xla_attention(q, k, v, real=given, causal=causal))
    assert np.isfinite(out).all()
    np.testing.assert_allclose(out[kept], expected[kept], atol=atol)
    for name, got, wanted in zip("qkv", gradients, expected_gradients, strict=True):
        scale = np.abs(wanted).max()
        np.testing.assert_allclose(got, wanted, atol=atol * scale, err_msg=name)


def interpreted(*arguments, **options):
    return attention.splash(*arguments, **options, interpret=True)


@pytest.mark.parametrize(
    ("shape", "padded"), [((3, 131, 2, 1, 64), True), ((1, 521, 2, 2, 64), True), ((1, 128, 1, 1, 64), False)]
)
def test_splash_attention_is_xlas(shape, padded):
    arrays = drawn(*shape)
    compared(interpreted, arrays, padding(*shape[:2]) if padded else None, True, 2e-5)


XLA = jax.nn.dot_product_attention


def without_cudnn(q, k, v, *, implementation, **options):
    """What cuDNN is asked for, from XLA; what it leaves in the places of padding is not for us to know."""
    assert implementation == "cudnn"
    out = XLA(q, k, v, **options)
    if "query_seq_lengths" not in options:
        return out
    behind = jnp.arange(q.shape[1]) >= options["query_seq_lengths"][:, None]
    return jnp.where(behind[:, :, None, None], 1e4, out)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("padded", ["no", "anywhere", "right"])
def test_cudnn_is_asked_for_xlas(monkeypatch, padded, causal):
    arrays = drawn(5, 13, 4, 2, 8)
    real = None if padded == "no" else padding(5, 13)
    if padded == "right":
        real = np.arange(13) < real.sum(axis=1, keepdims=True)

    def kernel(*arguments, **options):
        with monkeypatch.context() as patch:
            patch.setattr(jax.nn, "dot_product_attention", without_cudnn)
            return attention.cudnn(*arguments, **options, right_padded=padded == "right")

    compared(kernel, arrays, real, causal, 2e-6)


def test_cudnn_is_called_forward_and_backward(monkeypatch):
    from jax._src.cudnn import fused_attention_stablehlo

    monkeypatch.setattr(fused_attention_stablehlo, "check_cudnn_version", lambda: 91000)  # of a machine that has it

    def loss(q, k, v, real):
        return attention.cudnn(q, k, v, real, causal=True).astype(jnp.float32).sum()

    q, k, v, _ = drawn(2, 129, 8, 2, 64, jnp.bfloat16)
    names = ("__cudnn$fmhaSoftmax", "__cudnn$fmhaSoftmaxBackward")
    program = jax.export.export(
        jax.jit(jax.grad(loss, (0, 1, 2))), platforms=["cuda"],
        disabled_checks=[jax.export.DisabledSafetyCheck.custom_call(name) for name in names],
    )(q, k, v, jnp.asarray(padding(2, 129))).mlir_module()  # fmt: skip
    assert all(f"@{name}(" in program for name in names) and "PADDING_CAUSAL" in program


@pytest.mark.parametrize(
    ("platform", "capability", "changes", "expected"),
    [
        ("tpu", "", {}, attention.splash),
        ("tpu", "", {"causal": False}, None),
        ("tpu", "", {"size": 32}, None),
        ("gpu", "9.0", {}, attention.cudnn),
        ("gpu", "9.0", {"causal": False}, attention.cudnn),
        ("gpu", "9.0", {"size": 136}, attention.cudnn),
        ("gpu", "8.0", {"size": 136}, None),
        ("gpu", "7.5", {}, None),
        ("gpu", "gfx90a", {}, None),
        ("gpu", "9.0", {"dtype": jnp.float32}, None),
        ("tpu", "", {"dtype": jnp.float32}, None),
        ("tpu", "", {"length": 1}, None),
        ("tpu", "", {"keys": 512}, None),
        ("tpu", "", {"rows": 3}, None),
        ("tpu", "", {"precision": "highest"}, None),
        ("tpu", "", {"heads": 3, "kv_heads": 3}, None),
        ("tpu", "", {"kv_heads": 1}, None),
        ("cpu", "", {}, None),
    ],
)
def test_which_kernel_runs(monkeypatch, platform, capability, changes, expected):
    device = AbstractDevice(device_kind="any", num_cores=None, platform=platform)
    local = types.SimpleNamespace(device_kind="any", compute_capability=capability)
    mesh = AbstractMesh((2, 1, 2), AXES, axis_types=(AxisType.Auto,) * 3, abstract_device=device)
    monkeypatch.setattr(jax, "devices", lambda: [local])
    sizes = {"rows": 4, "length": 256, "keys": None, "heads": 8, "kv_heads": 4, "size": 128, "causal": True}
    sizes |= {"dtype": jnp.bfloat16, "precision": "default"} | changes
    q = jnp.zeros((sizes["rows"], sizes["length"], sizes["heads"], sizes["size"]), sizes["dtype"])
    k = jnp.zeros((sizes["rows"], sizes["keys"] or sizes["length"], sizes["kv_heads"], sizes["size"]), sizes["dtype"])
    with jax.default_matmul_precision(sizes["precision"]):
        assert attention.kernel_for(q, k, sizes["causal"], mesh, device) is expected


@pytest.mark.parametrize(
    ("platform", "kind", "expected"),
    [
        ("tpu", "TPU v5 lite", attention.splash),
        ("gpu", "NVIDIA H200", attention.cudnn),
        ("gpu", "NVIDIA Tesla T4", None),
        ("cpu", "cpu", None),
    ],
)
def test_the_kernel_is_that_of_the_device_that_a_program_is_for(monkeypatch, platform, kind, expected):
    """A mesh of one device names it too, and the device need not be here."""
    chosen = []

    def remember(*arguments):
        chosen.append((kernel_for(*arguments), arguments[3]))

    kernel_for = attention.kernel_for
    monkeypatch.setattr(attention, "kernel_for", remember)
    device = AbstractDevice(device_kind=kind, num_cores=None, platform=platform)
    for sizes in ((1, 1, 1), (2, 1, 1)):
        mesh = AbstractMesh(sizes, AXES, axis_types=(AxisType.Auto,) * 3, abstract_device=device)
        q = jax.ShapeDtypeStruct((2, 256, 4, 64), jnp.bfloat16, sharding=NamedSharding(mesh, PartitionSpec("data")))
        with jax.default_matmul_precision("default"):
            jax.eval_shape(lambda q: attention.attention(q, q, q, causal=True), q)
    assert [kernel for kernel, _ in chosen] == [expected, expected]
    assert [mesh is None for _, mesh in chosen] == [True, False]


PROGRAM = """
import functools
import jax, numpy as np
from icet_jax.nn import attention, layers
from icet_jax.parallel.mesh import make_mesh
from icet_jax.parallel.sharding import place_rows
from tests.nn.test_attention import drawn, interpreted, padding
arrays, real = drawn(4, 131, 2, 2, 64), padding(4, 131)
def gradients(arrays, real):
    def total(q, k, v):
        out = layers.attention(q, k, v, real=real, causal=True).reshape(q.shape)
        return (out * arrays[3] * real[:, :, None, None]).sum()
    return jax.value_and_grad(total, (0, 1, 2))(*arrays[:3])
expected = jax.jit(gradients)(arrays, real)
attention.kernel_for = lambda *_: interpreted
placed = place_rows((arrays, real), make_mesh(data=2, fsdp=2, tensor=2))
program = jax.jit(gradients).lower(*placed).compile()
assert program.input_shardings[0][0][0].shard_shape((4, 131, 2, 64)) == (1, 131, 2, 64)
for got, wanted in zip(jax.tree.leaves(program(*placed)), jax.tree.leaves(expected), strict=True):
    np.testing.assert_allclose(got, wanted, rtol=1e-4, atol=2e-5 * np.abs(wanted).max())
assert "shard_map" in program.as_text()
print("agreed")
"""


def test_each_device_runs_a_kernel_on_its_rows_and_heads():
    assert_agreed(PROGRAM, 8, timeout=300)


@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="needs libtpu (the tpu extra)")
def test_a_sharded_update_compiles_for_tpus_with_the_kernel():
    text = dataclasses.replace(toy.TEXT, hidden_size=128, num_key_value_heads=2, head_dim=64)
    config = LlavaConfig(vision=toy.VISION, text=text, image_token_index=toy.IMAGE)
    mesh = make_mesh(data=1, fsdp=2, tensor=2, devices=topology.parse("v5e:2x2").devices())

    def placed(tree):
        def place(leaf, where):
            return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=where)

        return jax.tree.map(place, tree, shardings(tree, mesh))

    half = {"dtype": jnp.bfloat16, "param_dtype": jnp.bfloat16, "remat": "full"}
    graphdef, params = nnx.split(nnx.eval_shape(lambda: Llava(config, rngs=nnx.Rngs(0), **half)))
    adapters = jax.eval_shape(
        lambda: init_lora(lora_shapes(text), rank=4, alpha=8.0, targets=("q_proj", "v_proj"), key=jax.random.key(0))
    ).weights
    rows = {"prompts": ((8, 120), jnp.int32), "prompt_mask": ((8, 120), jnp.bool_), "responses": ((8, 12), jnp.int32)}
    rows |= {"mask": ((8, 12), jnp.bool_), "visual": ((8, 4, 128), jnp.bfloat16)}
    batch = {name: jax.ShapeDtypeStruct(*of, sharding=batch_sharding(mesh)) for name, of in rows.items()}

    def loss(adapters, params, batch):
        model, lora = nnx.merge(graphdef, params), Lora(weights=adapters, scale=2.0)
        fixed = {"temperature": 1.0, "suppress_ids": (), "chunk": 4}
        return evaluate_responses(model, lora, None, **batch, **fixed).log_probs.sum()

    with jax.default_matmul_precision("default"):
        program = jax.jit(jax.grad(loss)).lower(placed(adapters), placed(params), batch).compile().as_text()
    assert program.count('custom_call_target="tpu_custom_call"') >= 3  # forward, and backward to q and to k and v
    assert moved_bytes(program) > 0
