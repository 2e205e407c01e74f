"""A setting has one default, the config's, and the names it may have are those that the code knows."""

import dataclasses

import jax.numpy as jnp
import pytest

from icet_jax.algorithms.rewards import kl_penalty
from icet_jax.algorithms.settings import Settings, from_config
from icet_jax.algorithms.state import OptimizerSettings, learning_rate
from icet_jax.config import default, names
from icet_jax.generation.sampling import Sampling
from icet_jax.media.templates import NAMED_TEMPLATES
from icet_jax.nn.layers import REMAT_POLICIES

SAMPLING = Sampling(max_new_tokens=7, temperature=0.5, eos_ids=(3,), suppress_ids=(4,), pad_id=5)


def test_only_the_config_has_defaults():
    own = [field.name for field in dataclasses.fields(Settings) if field.default is not dataclasses.MISSING]
    assert own == []
    of_the_config = set(default().optimizer) | {"total_steps"}
    for field in dataclasses.fields(OptimizerSettings):
        assert field.name not in of_the_config or field.default is dataclasses.MISSING, field.name


def test_settings_hold_what_the_config_says():
    config = default()
    settings = from_config(config, SAMPLING)
    assert settings.sampling is SAMPLING
    for field in dataclasses.fields(Settings):
        if field.name not in ("sampling", "optimizer", "trained", "lora_scale", "kl_factors"):
            section = config.lppo if field.name in config.lppo else config.reward
            assert getattr(settings, field.name) == section[field.name], field.name
    for name, value in config.optimizer.items():
        assert getattr(settings.optimizer, name) == value, name
    assert settings.kl_factors == (1.0, 1.0, 1.0)
    assert settings.lora_scale == config.lora.alpha / config.lora.rank
    assert settings.optimizer.total_steps == config.lppo.iterations * config.lppo.epochs * config.lppo.minibatches
    own = config.copy_and_resolve_references().unlock()
    own.algorithm, own.lsft.iterations, own.lsft.exits = "lsft", 3, "stratified"
    settings = from_config(own, SAMPLING)
    assert (settings.optimizer.total_steps, settings.exits) == (3 * 4, "stratified")
    assert settings.trained == ("policy",)
    for train, trained, has_adapters in (("projector", ("projector",), False), ("both", ("policy", "projector"), True)):
        own.lsft.train = train
        settings = from_config(own, SAMPLING)
        assert settings.trained == trained and (settings.lora_scale is not None) == has_adapters
    own.lppo.kl_coef_by_kind = {"benign": 5.0}
    assert from_config(own, SAMPLING).kl_factors == (1.0, 5.0, 1.0)


def test_tables_of_the_code_have_the_names_that_a_config_may_contain():
    assert tuple(REMAT_POLICIES) == names.REMATS
    assert tuple(NAMED_TEMPLATES) == names.TEMPLATES


@pytest.mark.parametrize("kind", names.KL_KINDS)
def test_every_kl_estimator_is_known(kind):
    assert kl_penalty(jnp.zeros(2), jnp.zeros(2), kind).shape == (2,)


@pytest.mark.parametrize("schedule", names.LEARNING_RATE_SCHEDULES)
def test_every_learning_rate_schedule_is_known(schedule):
    optimizer = from_config(default(), SAMPLING).optimizer
    start = learning_rate(dataclasses.replace(optimizer, schedule=schedule))(0)
    assert float(start) == pytest.approx(optimizer.learning_rate)
