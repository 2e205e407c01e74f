"""What is measured after training has the bits that the export has once it is loaded."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import icet_jax
from icet_jax.algorithms.state import pure_dict
from icet_jax.checkpoints.folder import ADAPTER
from icet_jax.commands import export
from icet_jax.config import defaults
from icet_jax.models.adapter_export import save_adapter
from icet_jax.models.saving import save_vlm
from icet_jax.nn.protocols import POLICY_ROOT, init_lora
from icet_jax.parallel.sharding import flatten_with_names
from icet_jax.runs import common
from tests import tiny


@pytest.fixture(scope="module")
def directories(tmp_path_factory):
    """The tiny model in bfloat16 files and in float32 files."""
    folder = tmp_path_factory.mktemp("checkpoints")
    whole = tiny.save_llava(folder / "float32")
    vlm = icet_jax.load(whole)
    rounded = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), vlm.params)
    save_vlm(folder / "bfloat16", vlm.config, rounded)
    return {"float32": whole, "bfloat16": folder / "bfloat16"}


def noisy(tree, seed=0):
    noise = np.random.default_rng(seed)
    return jax.tree.map(lambda leaf: leaf + jnp.asarray(noise.normal(size=leaf.shape) * 0.05, leaf.dtype), tree)


def some_lora(vlm, targets=("q_proj", "down_proj"), seed=1):
    fresh = init_lora(vlm.config.lora_shapes(), rank=2, alpha=3.0, targets=targets, key=jax.random.key(seed))
    return fresh.replace(weights=noisy(fresh.weights, seed))


@pytest.mark.parametrize(
    ("files", "dtype", "trains", "form", "start"),
    [
        ("bfloat16", "float32", "lora", "full", False),
        ("bfloat16", "float32", "full", "full", False),
        ("float32", "bfloat16", "lora", "both", True),
        ("bfloat16", "float32", "lora", "full", True),
        ("bfloat16", "float32", "lora", "adapter", True),
    ],
)
def test_every_measured_weight_is_the_written_one_bit_for_bit(
    directories, tmp_path, files, dtype, trains, form, start
):  # fmt: skip
    directory, adapter = directories[files], None
    if start:
        vlm = icet_jax.load(directory)
        first = some_lora(vlm, targets=("k_proj", "q_proj"), seed=7)
        adapter = save_adapter(tmp_path / "start", first, vlm.config, base=str(directory))
    config = defaults.default().unlock()
    config.model.checkpoint, config.model.dtype, config.export.form = str(directory), dtype, form
    vlm = icet_jax.load(directory, dtype=dtype, adapter=adapter)
    before = {name: np.asarray(leaf) for name, leaf in flatten_with_names(vlm.params).items()}
    lora = some_lora(vlm) if trains == "lora" else None
    if lora is None:
        masters = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), pure_dict(vlm.params[POLICY_ROOT]))
        policy = noisy(masters)
    else:
        policy = lora.weights
    trainable = {"policy": policy, "value_head": {"kernel": jnp.ones((vlm.hidden_size, 1)), "bias": jnp.ones(1)}}
    scale = None if lora is None else lora.scale

    measured = export.as_exported(config, vlm, trainable, scale)
    folder = export.write_exports(config, vlm, trainable, scale, tmp_path, tmp_path / "hf", again=False)[0]
    written = common.load_exported(config, vlm, folder, is_adapter=folder.name == ADAPTER)

    assert measured.lora is None
    leaves = {name: np.asarray(leaf) for name, leaf in flatten_with_names(measured.params).items()}
    changed = 0
    for name, leaf in flatten_with_names(written.params).items():
        leaf = np.asarray(leaf)
        assert leaf.dtype == leaves[name].dtype and leaf.tobytes() == leaves[name].tobytes(), name
        changed += leaf.tobytes() != before[name].tobytes()
    assert changed >= 2, "training must have changed something"
    # A model is not in memory twice: what has a successor is gone.
    old = flatten_with_names(vlm.params)
    assert all(
        leaf.is_deleted() == (leaf is not new)
        for leaf, new in zip(old.values(), flatten_with_names(measured.params).values(), strict=True)
    )
