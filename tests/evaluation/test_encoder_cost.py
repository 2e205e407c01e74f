"""What the encoder costs at an exit: operations and bytes by hand, and a time that compiles nothing new."""

import dataclasses

import jax
import numpy as np
import pytest
from flax import nnx
from PIL import Image

import icet_jax
from icet_jax.data.records import Example
from icet_jax.evaluation import queue
from icet_jax.evaluation.encoder_cost import encoder_cost
from icet_jax.evaluation.geometry import geometry
from icet_jax.models import family_of
from icet_jax.models.base.encoder_work import encoder_bytes
from icet_jax.parallel.sharding import flatten_with_names
from tests import tiny, tiny_families


@pytest.fixture(scope="module")
def llava(tmp_path_factory):
    return icet_jax.load(tiny.save_llava(tmp_path_factory.mktemp("llava")))


def tower_bytes(vlm):
    """Bytes of all weights of a model's image encoder."""
    return sum(leaf.nbytes for path, leaf in flatten_with_names(vlm.params).items() if path.startswith("vision_tower/"))


def test_operations_of_clip_by_hand(llava):
    width, ffn, positions, patches = 24, 37, 17, 16
    embedding = 2 * patches * 3 * 7 * 7 * width
    block = 2 * positions * (4 * width * width + 2 * width * ffn) + 4 * positions**2 * width
    layers = encoder_cost(llava, [])["layers"]
    assert [layer["flops"] for layer in layers] == [embedding + exit_ * block for exit_ in range(1, 5)]
    assert [(layer["layer"], layer["blocks"]) for layer in layers] == [(exit_, exit_) for exit_ in range(1, 5)]


def test_bytes_are_those_of_a_model_with_that_exit_alone(tmp_path, llava):
    layers = encoder_cost(llava, [])["layers"]
    for layer in layers[:-1]:
        cut = icet_jax.load(llava.save(tmp_path / str(layer["layer"]), exit_layer=layer["layer"]))
        assert layer["weight_bytes"] == tower_bytes(cut)
    assert layers[-1]["weight_bytes"] == tower_bytes(llava)
    assert layers[1]["weight_bytes"] < layers[2]["weight_bytes"]


def test_a_tile_of_llava_next_costs_as_much_as_an_image_of_llava(tmp_path, llava):
    vlm = icet_jax.load(tiny_families.save_llava_next(tmp_path, processor=False))
    work = family_of(vlm.config).encoder_work
    assert (
        work(vlm.config, 2).operations
        == vlm.config.max_tiles * family_of(llava.config).encoder_work(llava.config, 2).operations
    )
    model = nnx.merge(vlm.graphdef, vlm.params)
    assert work(vlm.config, vlm.num_exits).operations == model.operations(1, 1, 1).encode


def test_llama_32_vision_runs_its_global_blocks_and_the_blocks_it_captures(tmp_path):
    vlm = icet_jax.load(tiny_families.save_mllama(tmp_path, processor=False))
    work, config = family_of(vlm.config).encoder_work, vlm.config
    model = nnx.merge(vlm.graphdef, vlm.params)
    total = model.operations(1, 1, 1)
    vision = config.vision
    projector = 2 * vision.max_num_tiles * vision.tokens_per_tile * vision.output_dim * config.text.llama.hidden_size
    assert work(config, vlm.num_exits).operations == total.encode + total.visual - projector
    assert [work(config, exit_).blocks for exit_ in range(1, vlm.num_exits + 1)] == list(range(1, vlm.num_exits + 1))
    captured = max(vision.intermediate_layers_indices)
    late = dataclasses.replace(config, exit_rule="E2")
    assert work(late, 1).blocks == captured and work(late, vlm.num_exits).blocks == vlm.num_exits
    without = dataclasses.replace(config, exit_rule="E5")
    assert work(without, vlm.num_exits).operations == total.encode
    one_less = encoder_bytes(vlm.params, vlm.num_exits) - encoder_bytes(vlm.params, vlm.num_exits - 1)
    blocks = [leaf for path, leaf in flatten_with_names(vlm.params).items() if path.startswith("vision_tower/layers/")]
    assert one_less == sum(leaf.nbytes // leaf.shape[0] for leaf in blocks)
    assert encoder_bytes(vlm.params, vlm.num_exits) == tower_bytes(vlm)


def test_the_time_is_measured_with_the_program_of_the_geometry(llava):
    noise = np.random.default_rng(0)
    images = [Image.fromarray(noise.integers(0, 256, (28, 28, 3), dtype=np.uint8)) for _ in range(6)]
    rows = [Example(str(number), "what is it", (image,)) for number, image in enumerate(images)]
    geometry(llava, rows)
    compiled = queue.encode._cache_size()
    content = encoder_cost(llava, rows)
    assert queue.encode._cache_size() == compiled
    assert 0 < content["milliseconds"] < 1e5 and content["batch"] == 4
    assert content["measured_flops"] == content["layers"][-1]["flops"]
    assert content["device"] == jax.devices()[0].device_kind
    assert "milliseconds" not in encoder_cost(llava, [Example("text", "hello", ())])
