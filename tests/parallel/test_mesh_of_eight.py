"""A checkpoint loaded onto eight (emulated) devices computes what it computes on one, whatever its family."""

import subprocess
import sys

import numpy as np
import pytest

from tests import tiny, tiny_families, tiny_qwen, tiny_smolvlm
from tests.devices import emulating

pytest.importorskip("torch")

from icet_jax.models.base.image_batches import batch_images  # noqa: E402
from icet_jax.models.loading import load_vlm  # noqa: E402
from tests.models import families, parity  # noqa: E402

PROGRAM = """
import sys
import jax, jax.numpy as jnp, numpy as np
from flax import nnx
from icet_jax.models.loading import load_vlm
from icet_jax.models.smolvlm.network import TileLayout
from icet_jax.nn.protocols import Images, init_lora
from icet_jax.parallel.mesh import make_mesh
from icet_jax.parallel.sharding import place_rows, shardings
assert jax.device_count() == 8
saved = dict(np.load(sys.argv[2]))
per_row = int(saved.pop("per_row"))
if "num_tiles" in saved:
    saved["layout"] = TileLayout(num_tiles=saved.pop("num_tiles"))
tokens, mask = saved.pop("tokens"), saved.pop("mask")
batch = tokens, mask, Images(num_rows=8, per_row=per_row, **saved)
alone = load_vlm(sys.argv[1])
targets = ("q_proj", "v_proj", "down_proj")
lora = init_lora(alone.config.lora_shapes(), rank=4, alpha=8.0, targets=targets, key=jax.random.key(0))
lora = jax.tree.map(lambda x: 0.1 * jax.random.normal(jax.random.key(x.size), x.shape), lora)
def logits(checkpoint, lora, mesh):
    @jax.jit
    def run(params, lora, tokens, mask, images):
        model = nnx.merge(checkpoint.graphdef, params)
        visual = model.visual(model.encode(images), jnp.int32(2))
        positions = model.positions(tokens, mask, visual)
        return model.logits(model.decode(tokens, positions, mask, visual, lora=lora))
    return np.asarray(run(checkpoint.params, lora, *place_rows(batch, mesh)))[mask]
single = logits(alone, lora, None)
assert np.abs(single - logits(alone, None, None)).max() > 0.1
for sizes in ({}, {"data": 2, "fsdp": 2, "tensor": 2}):
    mesh = make_mesh(**sizes)
    spread = load_vlm(sys.argv[1], mesh=mesh)
    kernel = spread.params["language_model"]["layers"]["q_proj"]["kernel"].get_value()
    assert len(kernel.sharding.device_set) == 8
    assert not sizes or kernel.addressable_shards[0].data.size * 4 == kernel.size
    placed = lora.replace(weights=jax.device_put(lora.weights, shardings(lora.weights, mesh)))
    np.testing.assert_allclose(logits(spread, placed, mesh), single, atol=2e-5)
print("agreed")
"""
SIZES = [[(30, 50)], [], [(20, 60), (57, 57)], [(28, 28)], [], [(60, 20)], [], [(56, 56)]]


def llava(folder):
    model = tiny.llava()
    inputs = tiny.batch(model.config, [len(row) for row in SIZES])
    config = load_vlm(tiny.save_llava(folder, model, processor=False)).config
    return families.Batch(inputs["input_ids"], inputs["attention_mask"] == 1, parity.images_of(inputs, config))


def llava_next(folder):
    model = tiny_families.llava_next()
    config = families.load_next(folder, model).config
    return families.next_batch(tiny_families.next_batch(model.config, SIZES), config)


def mllama(folder):
    model = tiny_families.mllama()
    tiny_families.save_mllama(folder, model, processor=False)
    return families.mllama_batch(tiny_families.mllama_rows(model.config, SIZES))


def smolvlm(folder):
    """Images of five tiles each."""
    model = tiny_smolvlm.model(num_hidden_layers=2, vision={"num_hidden_layers": 2})
    config = load_vlm(tiny_smolvlm.save(folder, model, processor=False)).config
    inputs = tiny_smolvlm.batch(model.config, [[(20, 112)] * len(row) for row in SIZES])
    images = batch_images(config, inputs, num_rows=8, per_row=2)
    return families.Batch(inputs["input_ids"], inputs["attention_mask"] == 1, images)


def qwen(folder):
    """Images of different sizes, padded to one number of patches."""
    model = tiny_qwen.model(num_hidden_layers=2, vision={"depth": 2})
    config = load_vlm(tiny_qwen.save(folder, model)).config
    inputs = tiny_qwen.batch(model.config, SIZES)
    images = batch_images(config, inputs, num_rows=8, per_row=2)
    return families.Batch(inputs["input_ids"], inputs["attention_mask"] == 1, images)


@pytest.mark.parametrize("family", [llava, llava_next, mllama, smolvlm, qwen], ids=lambda family: family.__name__)
def test_spread_weights_give_the_same_logits(tmp_path, family):
    batch = family(tmp_path)
    arrays = {"tokens": batch.tokens, "mask": batch.mask, "pixels": batch.images.pixels, "rows": batch.images.rows}
    if family is smolvlm:
        arrays["num_tiles"] = batch.images.layout.num_tiles
    elif batch.images.layout is not None:
        arrays["layout"] = batch.images.layout
    np.savez(tmp_path / "batch.npz", per_row=batch.images.per_row, **{k: np.asarray(x) for k, x in arrays.items()})
    environment = emulating(8)
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(tmp_path), str(tmp_path / "batch.npz")],
        env=environment, capture_output=True, text=True, timeout=600,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    assert "agreed" in done.stdout
