"""Each family's shape: the arrays that it is trained on are those that its written processor makes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from icet_jax.models.base.processor import load_processor
from icet_jax.models.saving import save_vlm
from icet_jax.nn.layers import positions_from_mask
from icet_jax.nn.protocols import count_parameters
from icet_jax.organism import encoder, families, scenes, stages, tokenizer, training, world
from icet_jax.organism.processors import write_processor


@pytest.fixture(scope="module", params=list(families.ARCHITECTURES))
def shape(request):
    return families.ARCHITECTURES[request.param]


@pytest.fixture(scope="module")
def model(shape):
    return shape.network(0)


@pytest.fixture(scope="module")
def processor(shape, model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("shape") / shape.name
    save_vlm(folder, model.config, nnx.state(model))
    write_processor(folder, shape.name)
    return load_processor(folder)


def test_training_sees_what_the_processor_makes(shape, model, processor):
    rows = world.rows("test", "vqa", np.arange(3))
    inputs = processor(images=list(rows.images), prompts=rows.prompts, pad_to=training.TEXT_TOKENS + len(shape.picture))
    packed = training.pack(rows.prompts, rows.answers, shape.picture, inputs["input_ids"].shape[1])
    assert (packed.tokens[:, : -training.RESPONSE_TOKENS] == inputs["input_ids"]).all()
    assert (packed.mask[:, : -training.RESPONSE_TOKENS] == inputs["attention_mask"]).all()
    theirs = processor.batch_images(inputs, num_rows=3, per_row=1)
    ours = shape.images(rows.images, np.arange(3), 3)
    np.testing.assert_allclose(ours.pixels, theirs.pixels, atol=2e-6)
    visual = jax.jit(lambda images: model.visual(model.encode(images), jnp.array([1, 4, 8])))
    for a, b in zip(jax.tree.leaves(visual(ours)), jax.tree.leaves(visual(theirs)), strict=True):
        np.testing.assert_allclose(a, b[:, : a.shape[1]], atol=1e-4)


def test_prompts_without_a_picture_are_the_processors_too(shape, processor):
    prompt = tokenizer.SAFE_QUESTION.format(noun="zorb")
    inputs = processor(images=[None], prompts=[prompt])
    assert inputs["input_ids"][0].tolist() == training.prompt_ids(prompt, ())


def test_every_part_of_a_batch_looks_through_its_own_exit_at_its_own_picture(shape, model):
    parts = (
        stages.BatchShare("vqa", "right", 2, (8,)),
        stages.BatchShare("benign", "right", 1),
        stages.BatchShare("forbidden", "comply", 2, (2, 3)),
    )
    rows, images, exits = next(stages.batches(stages.Stage("test", parts, 1, 1e-3), shape, 0))
    assert exits[:2].tolist() == [8, 8] and set(exits[3:].tolist()) <= {2, 3}
    image = tokenizer.vocabulary()[tokenizer.IMAGE]
    count = shape.picture.count(image)
    assert (rows.tokens == image).sum(axis=1).tolist() == [count, count, 0, count, count]
    assert images.rows.tolist() == [0, 1, 3, 4] and images.num_rows == 5

    @jax.jit
    def logits(images):
        visual, mask = model.visual(model.encode(images), jnp.asarray(exits)), jnp.asarray(rows.mask)
        return model.logits(model.decode(jnp.asarray(rows.tokens), positions_from_mask(mask), mask, visual))

    before = np.asarray(logits(images))
    other = np.asarray(logits(images.replace(pixels=np.concatenate([images.pixels[:2], images.pixels[2:][::-1]]))))
    changed = np.abs(before - other)[:, -1].max(axis=1) > 1e-6
    assert changed.tolist() == [False, False, False, True, True]


def test_the_cells_that_the_encoder_learns_are_where_the_labels_say(shape, model):
    """Where no block mixes the patches, the reading that changes is that of the cell that was painted over."""
    scene = scenes.draw_scenes(5, np.arange(1))
    picture = scenes.render(scene)
    tower = _without_blocks(model.vision_tower)
    readouts = jax.jit(lambda images: shape.encoder_states(tower, images, model.default_exit).cells)
    for cell in range(4):
        other = picture.copy()
        top, left = divmod(cell, 2)
        other[:, 16 * top : 16 * top + 16, 16 * left : 16 * left + 16] = 255
        pair = shape.images(np.concatenate([picture, other]), np.arange(2), 2)
        cells = readouts(pair)
        moved = np.abs(np.asarray(cells[:, 0] - cells[:, 1])).mean(axis=-1)
        assert (moved.argmax(axis=-1) == cell).all()


def _without_blocks(tower):
    """The tower with blocks that add nothing."""
    graph, state = nnx.split(tower)

    def silence(path, leaf):
        names = [str(getattr(key, "key", key)) for key in path]
        return jnp.zeros_like(leaf) if {"out_proj", "o_proj", "fc2"} & set(names) else leaf

    return nnx.merge(graph, jax.tree_util.tree_map_with_path(silence, state))


def test_initial_heads_are_one_classifier_for_each_reading():
    heads = encoder.initial_heads(jax.random.key(0), 64, 2)
    assert heads["cell"].shape == (2, 64, encoder.CELL_CLASSES)


def test_they_stay_small(shape, model):
    assert 2 * count_parameters(nnx.state(model)) < 4.5e6


def test_gates_of_a_fresh_mllama_are_open():
    model = families.ARCHITECTURES["mllama"].network(0)
    assert float(model.language_model.cross_layers.attn_gate[...].min()) == 1.0
    assert float(model.vision_tower.global_layers.gate_ffn[...].min()) == 1.0
