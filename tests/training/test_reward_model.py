"""Reward-model training: torch's gradients, an order that is a pure function of the step, the same on any devices."""

import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from icet_jax.data.padding import pad_rows
from icet_jax.errors import UserError
from icet_jax.scorers.networks import load_scorer_network
from icet_jax.scorers.reward_base import load_reward_base
from icet_jax.training.reward_model import PairOrder, RewardTrainer, preference_loss
from tests import tiny
from tests.devices import emulating

LENGTHS = [int(n) for n in np.random.default_rng(0).integers(3, 60, 50)]


def token_pairs(count, seed=0):
    """Pairs of token rows of 2 to 40 tokens that begin alike."""
    draw = np.random.default_rng(seed)
    pairs = []
    for _ in range(count):
        start = draw.integers(0, 256, draw.integers(1, 20)).tolist()
        pairs.append(tuple(start + draw.integers(0, 256, draw.integers(1, 20)).tolist() for _ in range(2)))
    return pairs


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return load_scorer_network(tiny.save_reward_model(tmp_path_factory.mktemp("base"), tiny.reward_model(seed=3)))


def trainer(checkpoint, pairs, optimizer=None, **settings):
    settings = {"longest": 64, "batch_size": 6, "seed": 0} | settings
    return RewardTrainer(checkpoint.graphdef, pairs, optimizer or optax.sgd(0.1), **settings)


def after(trainer, checkpoint, steps):
    state = trainer.start(jax.tree.map(jnp.copy, checkpoint.params))
    for _ in range(steps):
        state, numbers = trainer.step(state)
    return state, numbers


def test_preference_loss_is_bradley_terrys():
    chosen, rejected = jnp.array([2.0, -1.0, 0.0]), jnp.array([0.5, 1.0, 0.0])
    shares = 1 / (1 + np.exp(-(np.asarray(chosen) - np.asarray(rejected))))
    np.testing.assert_allclose(preference_loss(chosen, rejected), -np.log(shares).mean(), rtol=1e-6)


@pytest.fixture(scope="module")
def one_step(checkpoint):
    """State and numbers of one step of plain gradient descent in float32."""
    return after(trainer(checkpoint, token_pairs(6)), checkpoint, 1)


@pytest.mark.parametrize("accumulation", [1, 3])
def test_a_step_is_torchs(checkpoint, one_step, tmp_path, accumulation):
    torch = pytest.importorskip("torch")
    pairs = token_pairs(6)
    state, numbers = one_step
    if accumulation > 1:
        state, numbers = after(trainer(checkpoint, pairs, accumulation=accumulation), checkpoint, 1)

    model = tiny.reward_model(seed=3)
    rewards = torch.stack([torch.stack([model(torch.tensor([ids])).logits[0, 0] for ids in pair]) for pair in pairs])
    margins = rewards[:, 0] - rewards[:, 1]
    loss = -torch.nn.functional.logsigmoid(margins).mean()
    loss.backward()
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1e9).item()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter -= 0.1 * parameter.grad
    expected = load_scorer_network(tiny.save_reward_model(tmp_path, model)).params
    moved = 0
    for mine, theirs, start in zip(*map(jax.tree.leaves, (state.params, expected, checkpoint.params)), strict=True):
        np.testing.assert_allclose(mine, theirs, atol=2e-5)
        moved += not np.array_equal(mine, start)
    assert moved == len(jax.tree.leaves(expected)) - 1  # the last norm's bias is the same in both rewards of a pair
    assert numbers["loss"] == pytest.approx(loss.item(), abs=1e-5)
    assert numbers["accuracy"] == pytest.approx((margins > 0).float().mean().item())
    assert numbers["margin"] == pytest.approx(margins.mean().item(), abs=1e-4)
    assert numbers["reward"] == pytest.approx(rewards.mean().item(), abs=1e-4)
    assert numbers["grad_norm"] == pytest.approx(norm, rel=1e-4)


def test_margins_are_of_pairs_in_their_order(checkpoint):
    pairs = token_pairs(9, seed=1)
    found = trainer(checkpoint, pairs).margins(checkpoint.params, pairs)
    tokens, mask = pad_rows([ids for pair in pairs for ids in pair], 40, 18)
    rewards = np.asarray(jax.jit(lambda *rows: checkpoint.model(*rows))(tokens, mask))
    np.testing.assert_allclose(found, rewards[::2] - rewards[1::2], atol=2e-5)
    assert found.shape == (9,) and np.abs(found).min() > 1e-3


def test_a_tie_is_not_right_and_no_number_is_an_error(checkpoint):
    same = [([1, 2, 3], [1, 2, 3])]
    ties = trainer(checkpoint, same, batch_size=1)
    assert after(ties, checkpoint, 1)[1]["accuracy"] == 0
    broken = jax.tree.map(lambda leaf: leaf * jnp.nan, checkpoint.params)
    with pytest.raises(UserError, match="2 held-out scores"):
        ties.margins(broken, same)
    with pytest.raises(UserError, match="at step 0; lower the learning rate"):
        ties.step(ties.start(broken))


@pytest.mark.parametrize("window", [1, 4])
def test_the_order_is_a_pure_function_of_the_step(window):
    forward = [PairOrder(LENGTHS, 5, seed=7, window=window).batch(n).tolist() for n in range(24)]
    order = PairOrder(LENGTHS, 5, seed=7, window=window)
    assert [order.batch(n).tolist() for n in reversed(range(24))] == forward[::-1]
    # 20 batches of 5 are two passes, each in an order of its own: every pair comes twice.
    assert sorted(sum(forward[:20], [])) == sorted([*range(50), *range(50)])
    assert forward[:10] != forward[10:20]
    assert PairOrder(LENGTHS, 5, seed=8, window=window).batch(0).tolist() != forward[0]


def test_windows_save_padding():
    def padded(window):
        order = PairOrder(LENGTHS, 5, seed=7, window=window)
        return sum(max(LENGTHS[index] for index in order.batch(n)) for n in range(10))

    assert padded(10) < 0.75 * padded(1)


def test_bfloat16_computes_and_float32_learns(checkpoint, one_step):
    base = load_reward_base(checkpoint.directory, dtype="bfloat16", remat="full")
    state, numbers = after(trainer(base, token_pairs(6)), base, 1)
    exact, expected = one_step
    assert {leaf.dtype for leaf in jax.tree.leaves(state.params)} == {jnp.dtype("float32")}
    assert numbers["loss"] != expected["loss"] and numbers["loss"] == pytest.approx(expected["loss"], rel=0.1)
    moves = [
        np.concatenate([(new - old).ravel() for new, old in zip(*map(jax.tree.leaves, pair), strict=True)])
        for pair in ((state.params, checkpoint.params), (exact.params, checkpoint.params))
    ]
    assert np.dot(*moves) / np.linalg.norm(moves[0]) / np.linalg.norm(moves[1]) > 0.98


PROGRAM = """
import sys
import jax, numpy as np, optax
from icet_jax.scorers.reward_base import load_reward_base
from icet_jax.training.reward_model import RewardTrainer
from icet_jax.parallel.mesh import make_mesh
from tests.training.test_reward_model import token_pairs
assert jax.device_count() == 8
pairs = [pair for pair in token_pairs(40) if max(map(len, pair)) <= 32][:16]
def train(mesh):
    base = load_reward_base(sys.argv[1], mesh=mesh)
    trainer = RewardTrainer(base.graphdef, pairs, optax.sgd(0.05), longest=64, batch_size=8, seed=0,
                            accumulation=2, mesh=mesh)
    state = trainer.start(base.params)
    for _ in range(2):
        state, numbers = trainer.step(state)
    assert trainer._jitted_step._cache_size() == 1
    return jax.tree.leaves(state.params), numbers["loss"], trainer.margins(state.params, pairs[:5])
alone = train(None)
spread = train(make_mesh(data=2, fsdp=2, tensor=2))
for one, other in zip(jax.tree.leaves(alone), jax.tree.leaves(spread)):
    np.testing.assert_allclose(np.asarray(one), np.asarray(other), atol=3e-5)
print("agreed")
"""


def test_spread_weights_learn_the_same(tmp_path):
    directory = tiny.save_reward_model(tmp_path, tiny.reward_model(seed=3))
    environment = emulating(8)
    environment["PYTHONPATH"] = str(Path(__file__).parents[2])
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(directory)], env=environment, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert "agreed" in done.stdout
