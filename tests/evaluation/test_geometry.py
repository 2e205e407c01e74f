"""Distances between exits: known cases, and the tiny model against plain numpy."""

import json

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from icet_jax.data.records import Example
from icet_jax.errors import UserError
from icet_jax.evaluation import geometry as geometry_module
from icet_jax.evaluation.geometry import geometry, linear_cka
from icet_jax.runs.loading import load
from tests import tiny_families, tiny_qwen, tiny_smolvlm
from tests.evaluation import bundle


def cka(x, y):
    return float(linear_cka(jnp.asarray(x, jnp.float32), jnp.asarray(y, jnp.float32)))


def test_cka_knows_rotation_scale_and_shift():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(40, 12)) * np.linspace(0.1, 3, 12)
    rotation = np.linalg.qr(rng.normal(size=(12, 12)))[0]
    assert cka(x, x) == pytest.approx(1, abs=1e-5)
    assert cka(x, 1e4 * x @ rotation + 50) == pytest.approx(1, abs=1e-4)


def test_cka_of_unrelated_features_is_near_zero_in_many_dimensions():
    rng = np.random.default_rng(0)
    assert cka(rng.normal(size=(60, 400)), rng.normal(size=(60, 400))) < 0.05


def hsic(a, b):
    """Song et al. 2012, equation 5."""
    n = len(a)
    a, b = a - np.diag(np.diag(a)), b - np.diag(np.diag(b))
    one = np.ones(n)
    trace, middle = np.trace(a @ b), (one @ a @ one) * (one @ b @ one) / ((n - 1) * (n - 2))
    return (trace + middle - 2 / (n - 2) * (one @ a @ b @ one)) / (n * (n - 3))


def test_cka_is_the_published_estimator():
    rng = np.random.default_rng(1)
    x = rng.normal(size=(9, 5)) + 1
    y = x[:, :3] @ rng.normal(size=(3, 5)) + 0.5 * rng.normal(size=(9, 5))
    a, b = x @ x.T, y @ y.T
    assert cka(x, y) == pytest.approx(hsic(a, b) / np.sqrt(hsic(a, a) * hsic(b, b)), abs=1e-5)


def test_geometry_of_a_model(tmp_path):
    vlm = bundle.tiny_vlm(tmp_path)
    rows = [Example(str(i), "p", (bundle.picture(i),)) for i in range(3)] + [Example("none", "p")]
    table = geometry(vlm, rows)
    assert table["n_images"] == 3 and [layer["layer"] for layer in table["layers"]] == [1, 2, 3, 4]
    default = table["layers"][vlm.default_exit - 1]
    assert all(default[name] == pytest.approx(1, abs=1e-5) for name in ("norm_ratio", "cosine", "cka"))

    inputs = vlm.processor(images=[row.images[0] for row in rows[:3]], prompts=["p"] * 3)
    states = np.asarray(vlm.hidden_states(inputs))[:, :, 1:]
    projector = nnx.merge(vlm.graphdef, vlm.params).projector
    x, y = (np.asarray(projector(jnp.asarray(states[layer]))).reshape(48, -1) for layer in (1, 3))
    norms = np.linalg.norm(x, axis=1), np.linalg.norm(y, axis=1)
    assert table["layers"][0]["norm_ratio"] == pytest.approx(norms[0].mean() / norms[1].mean(), rel=1e-4)
    assert table["layers"][0]["cosine"] == pytest.approx(np.mean((x * y).sum(1) / norms[0] / norms[1]), abs=1e-4)
    assert table["layers"][0]["cka"] == pytest.approx(cka(x, y), abs=1e-3)
    json.dumps(table, allow_nan=False)


TILED = [tiny_families.save_llava_next, tiny_families.save_mllama, tiny_smolvlm.save, tiny_qwen.save]


@pytest.mark.parametrize("family", TILED)
def test_geometry_of_tiled_images(tmp_path, family, monkeypatch):
    """Only tokens that are there count, however many images are encoded together."""
    vlm, sizes = load(family(tmp_path)), [(30, 50), (5, 400), (200, 30)]
    rows = [Example(str(i), "p", (tiny_families.pictures([size])[0],)) for i, size in enumerate(sizes)]
    table = geometry(vlm, rows)
    model = nnx.merge(vlm.graphdef, vlm.params)
    found = []
    for layer in (1, vlm.default_exit):
        tokens = []
        for row in rows:
            inputs = vlm.processor(images=[row.images[0]], prompts=["p"])
            encoded = vlm.encode(inputs).images
            features, there = map(np.asarray, model.image_features(encoded, jnp.int32(layer)))
            tokens.append(features[there])
        found.append(np.concatenate(tokens))
    x, y = found
    norms = np.linalg.norm(x, axis=1), np.linalg.norm(y, axis=1)
    first = table["layers"][0]
    assert first["norm_ratio"] == pytest.approx(norms[0].mean() / norms[1].mean(), rel=1e-4)
    assert first["cosine"] == pytest.approx(np.mean((x * y).sum(1) / norms[0] / norms[1]), abs=1e-4)
    assert first["cka"] == pytest.approx(cka(x, y), abs=1e-3)
    default = table["layers"][vlm.default_exit - 1]
    assert all(default[name] == pytest.approx(1, abs=1e-5) for name in ("norm_ratio", "cosine", "cka"))
    monkeypatch.setattr(geometry_module, "_BATCH_SIZE", 1)
    one_by_one = geometry(vlm, rows)["layers"][0]
    assert one_by_one == {name: pytest.approx(value, abs=1e-4) for name, value in first.items()}


def test_cka_takes_some_tokens_of_many(tmp_path, monkeypatch):
    vlm = bundle.tiny_vlm(tmp_path)
    rows = [Example(str(i), "p", (bundle.picture(i),)) for i in range(6)]
    every = geometry(vlm, rows)["layers"]
    monkeypatch.setattr(geometry_module, "_CKA_TOKENS", 24)
    some = geometry(vlm, rows)["layers"]
    for all_tokens, few in zip(every, some, strict=True):
        assert few["cosine"] == all_tokens["cosine"] and few["norm_ratio"] == all_tokens["norm_ratio"]
    assert [layer["cka"] for layer in some] != [layer["cka"] for layer in every]
    assert some[vlm.default_exit - 1]["cka"] == pytest.approx(1, abs=1e-5)


def test_no_images(tmp_path):
    with pytest.raises(UserError, match="no row has an image"):
        geometry(bundle.tiny_vlm(tmp_path), [Example("a", "p")])
