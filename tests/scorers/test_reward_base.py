"""What a reward model starts from: transformers' hidden states under a new head, or a reward model as it is."""

import jax.numpy as jnp
import numpy as np
import pytest

from icet_jax.errors import UserError
from icet_jax.scorers.reward_base import load_reward_base
from tests import tiny

torch = pytest.importorskip("torch")


def base(kind, **config):
    import transformers

    settings = {"vocab_size": tiny.GPT2_VOCAB, "n_positions": 64, "n_embd": 24, "n_layer": 2, "n_head": 3} | config
    torch.manual_seed(0)
    return tiny.randomise(getattr(transformers, kind)(transformers.GPT2Config(**settings)).float(), 0)


def arrays(ids):
    return jnp.asarray(ids, jnp.int32), jnp.ones(ids.shape, bool)


def save(directory, model, *, bare_keys=False):
    directory.mkdir()
    state = {key: tensor.contiguous() for key, tensor in model.state_dict().items() if key != "lm_head.weight"}
    if bare_keys:  # as the hub's gpt2 has them, with the causal mask of every layer
        state = {key.removeprefix("transformer."): tensor for key, tensor in state.items()}
        state["h.0.attn.bias"] = torch.ones(1, 1, 64, 64, dtype=torch.uint8)
    tiny.save_state(directory, state)
    model.config.architectures = [type(model).__name__]
    model.config.save_pretrained(directory)
    return directory


@pytest.mark.parametrize(
    ("kind", "bare_keys"), [("GPT2LMHeadModel", True), ("GPT2LMHeadModel", False), ("GPT2Model", False)]
)
def test_a_language_model_gets_a_new_head(tmp_path, kind, bare_keys):
    model = base(kind)
    checkpoint = load_reward_base(save(tmp_path / "base", model, bare_keys=bare_keys), seed=5)
    ids = np.random.default_rng(0).integers(0, 256, (2, 9))
    with torch.no_grad():
        backbone = getattr(model, "transformer", model)
        expected = backbone(torch.from_numpy(ids)).last_hidden_state.numpy()
    network = checkpoint.model
    np.testing.assert_allclose(network.hidden(*arrays(ids)), expected, atol=2e-5)

    head = np.asarray(network.score.kernel[...])
    assert head.shape == (24, 1) and 0.01 < head.std() < 0.03
    scores = network(*arrays(ids))
    np.testing.assert_allclose(scores, (expected[:, -1] @ head)[:, 0], atol=1e-5)
    again, other = (load_reward_base(tmp_path / "base", seed=seed).model.score.kernel[...] for seed in (5, 6))
    np.testing.assert_array_equal(again, head)
    assert not np.array_equal(other, head)


def test_a_reward_model_keeps_its_head(tmp_path):
    model = tiny.reward_model()
    checkpoint = load_reward_base(tiny.save_reward_model(tmp_path, model), dtype="bfloat16", remat="full")
    head = checkpoint.model.score
    np.testing.assert_array_equal(head.kernel[...], model.score.weight.detach().numpy().T)
    ids = np.random.default_rng(0).integers(0, 256, (2, 9))
    with torch.no_grad():
        expected = model(torch.from_numpy(ids)).logits[:, 0].numpy()
    found = checkpoint.model(*arrays(ids))
    assert found.dtype == np.float32 and np.abs(np.asarray(found) - expected).max() < 0.1 * max(1, expected.std())


def test_a_broken_base_is_one_line(tmp_path):
    with pytest.raises(UserError, match="model_type 'llava' cannot become a reward model"):
        load_reward_base(tiny.save_llava(tmp_path / "llava", processor=False))
    broken = save(tmp_path / "broken", base("GPT2Model"))
    tiny.save_state(broken, {"wte.weight": torch.zeros(tiny.GPT2_VOCAB, 24)})
    with pytest.raises(UserError, match="missing"):
        load_reward_base(broken)
    several = save(tmp_path / "several", base("GPT2Model", num_labels=3))
    with pytest.raises(UserError, match="one label"):
        load_reward_base(several)
