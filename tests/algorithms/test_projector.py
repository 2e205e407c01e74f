"""L-SFT of the projector: its gradients against transformers in float64, and what it leaves as it was."""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from icet_jax.algorithms import lsft
from icet_jax.algorithms.forward import with_policy
from icet_jax.algorithms.metrics import host_metrics
from icet_jax.algorithms.phases import encode_projector_inputs
from icet_jax.algorithms.state import init_state, pure_dict
from icet_jax.algorithms.updates import take_rows
from icet_jax.generation.sampling import Sampling
from icet_jax.models.loading import load_vlm
from icet_jax.models.saving import save_vlm
from icet_jax.nn.protocols import one_image_per_row
from tests import tiny, tiny_families
from tests.algorithms import toy
from tests.algorithms.test_update_program import equations
from tests.devices import assert_agreed
from tests.models import families

torch = pytest.importorskip("torch")

RUN_KEY = jax.random.key(0)
EXITS = np.array([1, 2, 3, 4, 1, 2, 3, 4], np.int32)
TARGETS = np.array([[5, 6, 7, 2], [8, 2, 0, 0], [9, 4, 2, 0], [5, 2, 0, 0]], np.int32)
TARGET_MASK = np.arange(4) < np.array([4, 2, 3, 2])[:, None]


class Case(NamedTuple):
    """A family's tiny checkpoint, a batch of four rows with our inputs, and each row's inputs in transformers."""

    checkpoint: Any
    torch_model: Any
    batch: families.Batch
    rows: list[dict[str, np.ndarray]]
    exits: tuple[int, ...]


def own_rows(inputs, count_images):
    """Each row of a batch alone, without padding."""
    rows, first = [], 0
    for number, images in enumerate(count_images):
        real = inputs["attention_mask"][number] == 1
        row = {"input_ids": inputs["input_ids"][number : number + 1, real]}
        for name in ("pixel_values", "image_sizes") if images else ():
            if name in inputs:
                row[name] = inputs[name][first : first + images]
        rows.append(row)
        first += images
    return rows


def llava_case(folder):
    model = tiny.llava()
    checkpoint = load_vlm(tiny.save_llava(folder, model))
    counts = [1, 0, 2, 1]
    inputs = tiny.batch(model.config, counts)
    images = one_image_per_row(jnp.asarray(inputs["pixel_values"])).replace(
        rows=jnp.asarray(np.repeat(np.arange(4), counts), jnp.int32), num_rows=4, per_row=2
    )
    batch = families.Batch(jnp.asarray(inputs["input_ids"]), jnp.asarray(inputs["attention_mask"], bool), images)
    return Case(checkpoint, model, batch, own_rows(inputs, counts), (1, 2, 3, 4))


def next_case(folder):
    model = tiny_families.llava_next()
    checkpoint = families.load_next(folder, model)
    sizes = [[(30, 50)], [], [(20, 200), (57, 57)], [(60, 20)]]
    inputs = tiny_families.next_batch(model.config, sizes)
    batch = families.next_batch(inputs, checkpoint.config)
    return Case(checkpoint, model, batch, own_rows(inputs, [len(row) for row in sizes]), (4, 2, 1, 3))


def mllama_case(folder):
    """At the default exit, the one that transformers has."""
    model = tiny_families.mllama_as_trained(tiny_families.mllama())
    checkpoint = families.load_mllama(folder, model)
    rows = tiny_families.mllama_rows(model.config, [[(30, 50)], [], [(20, 60), (57, 57)], [(60, 20)]])
    default = checkpoint.model.default_exit
    return Case(checkpoint, model, families.mllama_batch(rows), rows, (default,) * 4)


CASES = {"llava": llava_case, "llava_next": next_case, "mllama": mllama_case}


@pytest.fixture(scope="module", params=CASES)
def case(request, tmp_path_factory):
    return CASES[request.param](tmp_path_factory.mktemp(request.param))


def settings_for(**changes):
    """For a model of another vocabulary than the toy's."""
    sampling = Sampling(4, temperature=1.0, eos_ids=(2,), suppress_ids=(), pad_id=0)
    return toy.settings(sampling=sampling, trained=("projector",), lora_scale=None, **changes)


def float64_gradients(case):
    """(loss, gradients by name) of transformers in float64: the mean over all target tokens, row by row."""
    model = case.torch_model.double()
    parts = {name: p for name, p in model.named_parameters() if "multi_modal_projector" in name}
    losses = []
    for number, row in enumerate(case.rows):
        target = TARGETS[number][TARGET_MASK[number]][None]
        inputs = dict(row, input_ids=np.concatenate([row["input_ids"], target], axis=1))
        inputs.pop("attention_mask", None)
        if "cross_attention_mask" in inputs:  # the answer sees the images that the last token of the prompt sees
            seen = inputs["cross_attention_mask"]
            inputs["cross_attention_mask"] = np.concatenate([seen, *[seen[:, -1:]] * target.shape[1]], axis=1)
        tensors = {name: torch.from_numpy(np.ascontiguousarray(array)) for name, array in inputs.items()}
        tensors = {name: t.double() if t.is_floating_point() else t for name, t in tensors.items()}
        options = {} if "aspect_ratio_ids" in row or len(row) == 1 else {"vision_feature_layer": case.exits[number]}
        logits = model(**tensors, **options).logits[0, -target.shape[1] - 1 : -1]
        log_probs = torch.log_softmax(logits, dim=-1)
        losses.append(-log_probs[torch.arange(target.shape[1]), torch.from_numpy(target[0]).long()].sum())
    loss = torch.stack(losses).sum() / int(TARGET_MASK.sum())
    grads = torch.autograd.grad(loss, list(parts.values()))
    model.float()
    suffixes = [name.split("multi_modal_projector.")[1] for name in parts]
    return loss.item(), {name: grad.numpy() for name, grad in zip(suffixes, grads, strict=True)}


def test_gradients_of_the_projector_are_those_of_transformers_in_float64(case):
    graphdef, params, settings = case.checkpoint.graphdef, case.checkpoint.params, settings_for()
    trainable = {"projector": jax.tree.map(lambda leaf: jnp.array(leaf, jnp.float32), pure_dict(params["projector"]))}

    @jax.jit
    def gradients(params, trainable, batch, exits, targets, mask):
        inputs = encode_projector_inputs(nnx.merge(graphdef, params), batch.images, exits)
        rows = lsft.TargetBatch(batch.tokens, batch.mask, inputs, targets, mask)
        loss = lambda trainable: lsft.lsft_loss(graphdef, settings, params, trainable, rows)[0]  # noqa: E731
        return jax.value_and_grad(loss)(trainable)

    loss, grads = gradients(params, trainable, case.batch, jnp.asarray(case.exits), TARGETS, TARGET_MASK)
    their_loss, theirs = float64_gradients(case)
    assert float(loss) == pytest.approx(their_loss, rel=1e-5)
    ours = {
        name.removesuffix("kernel") + "weight" if name.endswith("kernel") else name: np.asarray(leaf).T
        for name, leaf in flat(grads["projector"]).items()
    }
    assert ours.keys() == theirs.keys()
    for name, theirs_of in theirs.items():
        scale = np.abs(theirs_of).max()
        assert scale > 1e-4, "the gradient must not vanish"
        np.testing.assert_allclose(ours[name], theirs_of, rtol=0, atol=2e-5 * scale + 1e-7, err_msg=name)


def flat(tree):
    """{name with dots: leaf}."""
    return {".".join(key.key for key in path): leaf for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]}


def test_projecting_the_inputs_of_any_rows_gives_their_image_features(case):
    @jax.jit
    def both(params, images, exits, picked):
        model = nnx.merge(case.checkpoint.graphdef, params)
        encoded = model.encode(images)
        inputs = model.projector_inputs(encoded, exits)
        return model.visual(encoded, exits), model.project(inputs), model.project(take_rows(inputs, picked))

    exits, picked = jnp.asarray([1, 3, 2, 4]), jnp.asarray([2, 0])  # rows 2 of 4 in two parts of two: 2 + 0 and 0 + 2
    visual, projected, of_rows = both(case.checkpoint.params, case.batch.images, exits, picked % 2)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=1e-6), projected, visual)
    rows = np.array([picked[0] % 2, 2 + picked[1] % 2])
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b[rows], rtol=0, atol=1e-6), of_rows, visual)


def test_the_export_holds_the_trained_projector_and_every_other_tensor_of_the_source(case, tmp_path):
    loaded, source = case.checkpoint, case.checkpoint.directory
    noise = jax.tree.map(lambda leaf: leaf + 0.1, pure_dict(loaded.params["projector"]))
    params, lora = with_policy(loaded.params, {"projector": noise}, None)
    assert lora is None
    save_vlm(tmp_path / "out", loaded.config, params, source_dir=source, trained=("projector",))
    again = load_vlm(tmp_path / "out")
    jax.tree.map(np.testing.assert_array_equal, pure_dict(again.params["projector"]), noise)
    for part in set(loaded.params) - {"projector"}:
        jax.tree.map(np.testing.assert_array_equal, again.params[part], loaded.params[part])


def toy_state(settings):
    """A train state of the toy model for these settings."""
    params = toy.model()[1]
    adapters = toy.state(params, settings).trainable["policy"] if settings.lora_scale is not None else None
    lora = None if adapters is None else with_policy(params, {"policy": adapters}, settings.lora_scale)[1]
    return init_state(
        params, lora, hidden_size=toy.TEXT.hidden_size, optimizer=settings.optimizer, kl_coef=0.0, value_head=False,
        trained=settings.trained,
    )  # fmt: skip


VARIANTS = {
    "projector": {"trained": ("projector",), "lora_scale": None},
    "both, LoRA": {"trained": ("policy", "projector")},
    "both, full": {"trained": ("policy", "projector"), "lora_scale": None},
}


def learnt(changes, steps):
    """(parameters before, parameters and adapters after, losses) of some iterations of the toy model."""
    graphdef, params = toy.model()
    settings = toy.settings(**changes)
    update, state = lsft.build(graphdef, settings), toy_state(settings)
    assert set(state.trainable) == set(settings.trained)
    ids = [[5, 6, 7], [8], None, [5, 6, 7], [5, 6, 7, 9], [8], [9], [4]]
    targets, mask = lsft.pad_targets(ids, eos_id=toy.EOS, length=toy.NEW_TOKENS, pad_id=toy.PAD)
    losses = []
    for _ in range(steps):
        state, metrics = update(params, state, *toy.inputs(), EXITS, targets, mask, RUN_KEY)
        losses.append(host_metrics(metrics)["loss/policy_avg"])
    return params, with_policy(params, state.trainable, settings.lora_scale), losses


@pytest.mark.parametrize("name", VARIANTS)
def test_the_named_parts_learn_and_the_others_stay_bit_for_bit(name):
    changes = VARIANTS[name]
    before, (after, lora), losses = learnt(changes, 8)
    assert losses[-1] < 0.8 * losses[0]
    moved = {"projector"} | ({"language_model"} if name == "both, full" else set())
    for part in before:
        pairs = zip(jax.tree.leaves(before[part]), jax.tree.leaves(after[part]), strict=True)
        same = [np.array_equal(a, b) for a, b in pairs]
        assert not any(same) if part == "projector" else any(not s for s in same) == (part in moved), part
    assert (lora is not None) == (name == "both, LoRA")
    if lora is not None:
        assert max(float(np.abs(leaf["b"]).max()) for leaf in lora.weights.values()) > 0


@pytest.mark.parametrize(("trained", "has_gradients"), [(("policy",), False), (("projector",), True)])
def test_only_the_projector_gets_gradients_and_the_tower_none(trained, has_gradients):
    graphdef, params = toy.model()
    settings = toy.settings(trained=trained, lora_scale=2.0 if trained == ("policy",) else None)
    update, state = lsft.build(graphdef, settings), toy_state(settings)
    targets = np.full((toy.ROWS, toy.NEW_TOKENS), 5, np.int32)
    arguments = (*toy.inputs(), EXITS, targets, np.ones_like(targets, bool), RUN_KEY)
    jaxpr = jax.make_jaxpr(update)(params, state, *arguments).jaxpr
    shapes = {v.aval.shape for e in equations(jaxpr) if e.primitive.name == "dot_general" for v in e.outvars}
    width, vision = toy.TEXT.hidden_size, toy.VISION
    assert bool(shapes & {(vision.hidden_size, width), (width, vision.hidden_size)}) == has_gradients
    assert (vision.hidden_size, vision.hidden_size) not in shapes  # as the tower's attention has them
    assert not shapes & {(width, toy.TEXT.intermediate_size), (toy.TEXT.intermediate_size, width)}  # a frozen decoder


def test_a_batch_without_images_trains_no_projector_and_ends_in_no_error():
    graphdef, params = toy.model()
    settings = toy.settings(**VARIANTS["projector"])
    _, tokens, mask = toy.inputs()
    tokens = np.where(tokens == toy.IMAGE, 3, tokens)
    targets = np.full((toy.ROWS, toy.NEW_TOKENS), 5, np.int32)
    state, metrics = lsft.build(graphdef, settings)(
        params, toy_state(settings), None, tokens, mask, EXITS, targets, np.ones_like(targets, bool), RUN_KEY
    )
    assert np.isfinite(host_metrics(metrics)["loss/policy_avg"])
    jax.tree.map(np.testing.assert_array_equal, state.trainable["projector"], pure_dict(params["projector"]))


def test_settings_of_a_separate_value_head_leave_the_projector_with_the_policy():
    settings = toy.settings(**VARIANTS["both, LoRA"])
    optimizer = dataclasses.replace(settings.optimizer, value_learning_rate=1.0)
    state = toy_state(dataclasses.replace(settings, optimizer=optimizer))
    assert set(state.trainable) == {"policy", "projector"}


MESH_PROGRAM = """
import jax, numpy as np
from icet_jax.algorithms import lsft
from icet_jax.parallel.mesh import make_mesh
from icet_jax.parallel.sharding import flatten_with_names, place_rows, shardings
from tests.algorithms import toy
from tests.algorithms.test_projector import EXITS, RUN_KEY, VARIANTS, toy_state

assert jax.device_count() == 4
graphdef, params = toy.model()
settings = toy.settings(accumulation=1, **VARIANTS["both, LoRA"])
targets = np.full((toy.ROWS, toy.NEW_TOKENS), 5, np.int32)

def run(mesh):
    update, state = lsft.build(graphdef, settings, mesh), toy_state(settings)
    weights = params if mesh is None else jax.device_put(params, shardings(params, mesh))
    state = state if mesh is None else jax.device_put(state, shardings(state, mesh))
    start = jax.tree.map(lambda leaf: leaf.sharding, state)
    images, tokens, mask = toy.inputs()
    arrays = place_rows((tokens, mask, EXITS, targets, np.ones_like(targets, bool)), mesh)
    for _ in range(2):
        state, _ = update(weights, state, images, *arrays, RUN_KEY)
    kept = [a.is_equivalent_to(leaf.sharding, leaf.ndim) for a, leaf in zip(*map(jax.tree.leaves, (start, state)))]
    return flatten_with_names(jax.device_get(state.trainable)), kept, state

alone, _, _ = run(None)
spread, kept, state = run(make_mesh(data=2, fsdp=2))
assert all(kept)
assert not state.trainable["projector"]["linear_1"]["kernel"].sharding.is_fully_replicated
for name, leaf in alone.items():
    np.testing.assert_allclose(spread[name], leaf, rtol=2e-3, atol=2e-4, err_msg=name)
print("agreed")
"""


def test_a_mesh_of_four_trains_the_projector_as_one_device_does():
    assert_agreed(MESH_PROGRAM, 4, timeout=900)
