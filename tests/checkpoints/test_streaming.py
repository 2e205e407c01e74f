"""Parameters are filled where they live, block by block, and the host never holds much of them."""

import tracemalloc

import jax
import jax.numpy as jnp
import numpy as np
import pytest

torch = pytest.importorskip("torch")

from icet_jax.checkpoints import progress, streaming, tables  # noqa: E402
from icet_jax.models.loading import load_vlm  # noqa: E402
from icet_jax.models.saving import save_vlm  # noqa: E402
from icet_jax.parallel.sharding import flatten_with_names  # noqa: E402
from tests import tiny  # noqa: E402


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return tiny.save_llava(tmp_path_factory.mktemp("source"), tiny.llava(seed=4), dtype="float16", processor=False)


def arrays(checkpoint):
    return {name: np.asarray(leaf) for name, leaf in flatten_with_names(checkpoint.params).items()}


@pytest.mark.parametrize("block", [1, 9000])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_blocks_of_any_size_give_the_same_parameters(source, monkeypatch, block, dtype):
    whole = arrays(load_vlm(source, dtype=dtype))
    monkeypatch.setattr(streaming, "BLOCK_BYTES", block)
    in_blocks = arrays(load_vlm(source, dtype=dtype))
    assert whole.keys() == in_blocks.keys()
    for name in whole:
        assert whole[name].dtype == dtype
        np.testing.assert_array_equal(whole[name], in_blocks[name])


def test_the_parameters_are_the_file_converted(source):
    """Against safetensors' own reader: every dtype conversion is numpy's."""
    from safetensors.numpy import load_file

    state = load_file(source / "model.safetensors")
    loaded = arrays(load_vlm(source, dtype="bfloat16"))
    kernel = state["language_model.model.layers.2.mlp.down_proj.weight"].T.astype(jnp.bfloat16)
    np.testing.assert_array_equal(loaded["language_model/layers/down_proj/kernel"][2], kernel)
    patches = state["vision_tower.vision_model.embeddings.patch_embedding.weight"]
    np.testing.assert_array_equal(
        loaded["vision_tower/patch_embedding/kernel"], patches.reshape(24, -1).T.astype(jnp.bfloat16)
    )


def test_a_block_is_written_into_the_array_s_own_memory():
    array = streaming._zeros((4, 64, 64), np.dtype(np.float32), None)()
    place = array.unsafe_buffer_pointer()
    array = streaming._update(None)(array, jnp.ones((1, 64, 64)), jnp.int32(2))
    assert array.unsafe_buffer_pointer() == place
    assert np.asarray(array).sum(axis=(1, 2)).tolist() == [0, 0, 64 * 64, 0]


def test_the_parameters_do_not_live_in_the_file(tmp_path):
    directory = tiny.save_llava(tmp_path, tiny.llava(seed=4), processor=False)
    loaded = load_vlm(directory)
    before = {name: array.copy() for name, array in arrays(loaded).items()}
    with open(directory / "model.safetensors", "r+b") as file:
        size = file.seek(0, 2)
        file.seek(0)
        file.write(b"\0" * size)
    for name, array in arrays(loaded).items():
        np.testing.assert_array_equal(array, before[name])


def test_the_host_holds_a_few_tensors_whatever_the_size(tmp_path, monkeypatch):
    """numpy's memory (the devices' is the runtime's) stays near one tensor while 60 of them come in and go out."""
    wide = {"hidden_size": 128, "intermediate_size": 509, "num_hidden_layers": 12}
    model = tiny.llava(seed=1, **wide)
    source = tiny.save_llava(tmp_path / "in", model, dtype="float16", processor=False)
    total = sum(path.stat().st_size for path in source.glob("*.safetensors"))
    largest = 128 * 509 * 4
    monkeypatch.setattr(streaming, "BLOCK_BYTES", 1)
    load_vlm(source)  # compiles, imports
    tracemalloc.start()
    loaded = load_vlm(source)
    # Parameters in one piece stay on the CPU as the numpy memory they were read into.
    kept = sum(leaf.nbytes for name, leaf in flatten_with_names(loaded.params).items() if "/layers/" not in name)
    imported = tracemalloc.get_traced_memory()[1] - kept
    tracemalloc.reset_peak()
    before = tracemalloc.get_traced_memory()[0]
    save_vlm(tmp_path / "out", loaded.config, loaded.params, source_dir=source)
    exported = tracemalloc.get_traced_memory()[1] - before
    tracemalloc.stop()
    overhead = 1_000_000  # Python objects: tables, headers, configs
    assert total > 4_500_000 and max(imported, exported) < 3 * largest + overhead, (imported, exported, total)


def test_a_table_without_a_layer_is_a_mistake_of_ours():
    entries = [streaming.TableEntry(f"x.{layer}", "x", layer, tables.SAME) for layer in (0, 2)]
    with pytest.raises(ValueError, match="one entry for each of its 3 layers"):
        streaming._parameter((3, 2), np.float32, None, entries, lambda block: [])


def test_progress_is_silent_at_first_and_then_tells_the_time_left(monkeypatch, capsys):
    clock = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: clock[0])
    shown = progress.ByteProgress("loading weights", 8_000_000_000)
    shown.advance(1_000_000_000)
    assert capsys.readouterr().err == ""
    clock[0] = 20.0
    shown.advance(1_000_000_000)
    assert capsys.readouterr().err == "loading weights: 2.00 of 8.00 GB, 60 s left\n"
    clock[0] = 21.0
    shown.advance(1_000_000_000)
    assert capsys.readouterr().err == ""
    shown.advance(5_000_000_000)
    assert capsys.readouterr().err == "loading weights: 8.00 of 8.00 GB, 0 s left\n"


def test_to_host_gives_one_layer_or_all(source):
    params = flatten_with_names(load_vlm(source).params)
    kernel = params["language_model/layers/q_proj/kernel"]
    np.testing.assert_array_equal(streaming.to_host(kernel, 1), np.asarray(kernel)[1])
    norm = params["language_model/norm/scale"]
    np.testing.assert_array_equal(streaming.to_host(norm, None), np.asarray(norm))
    assert jax.device_count() == 1
