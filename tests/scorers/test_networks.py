"""Scorers' checkpoints: every key style loads, what is not supported is one clear line, meshes change nothing."""

import subprocess
import sys

import numpy as np
import pytest

from icet_jax.errors import UserError
from icet_jax.scorers.networks import ARCHITECTURES, architecture, load_scorer_network
from tests import tiny, tiny_scorers
from tests.devices import emulating
from tests.nn.scorers import ours, theirs

torch = pytest.importorskip("torch")

BUILDERS = {
    "bert": tiny_scorers.bert,
    "roberta": tiny_scorers.roberta,
    "deberta": tiny_scorers.deberta,
    "llama": tiny_scorers.llama_reward,
}


def agrees(directory, model):
    ids, mask = tiny_scorers.rows([6, 13], pad_id=model.config.pad_token_id)
    expected = theirs(model, ids, mask)
    out = ours(load_scorer_network(directory), ids, mask)
    np.testing.assert_allclose(out, expected if out.ndim == 2 else expected[:, 0], atol=1e-5)


def legacy(name, state):
    """A state dict with keys of older files: no prefix, TensorFlow's norms, buffers and tensors that go unused."""
    prefix = {"bert": "bert.", "roberta": "roberta.", "deberta": "deberta.", "llama": "model."}[name]
    extra = {
        "bert": {"bert.embeddings.position_ids": torch.arange(64)[None]},
        "roberta": {
            "roberta.embeddings.position_ids": torch.arange(66)[None],
            "roberta.pooler.dense.weight": torch.zeros(24, 24),
            "roberta.pooler.dense.bias": torch.zeros(24),
        },
        "deberta": {
            "deberta.embeddings.position_embeddings.weight": torch.zeros(64, 24),
            "lm_predictions.lm_head.bias": torch.zeros(131),
            "mask_predictions.dense.weight": torch.zeros(24, 24),
        },
        "llama": {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.zeros(3), "lm_head.weight": torch.zeros(2, 24)},
    }[name]
    old = {}
    for key, tensor in (state | extra).items():
        key = key.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta")
        old[key.removeprefix(prefix)] = tensor
    return old


@pytest.mark.parametrize("name", BUILDERS)
def test_legacy_keys_load(tmp_path, name):
    model = BUILDERS[name](seed=1)
    agrees(tiny_scorers.save(tmp_path, model, state=legacy(name, model.state_dict())), model)


@pytest.mark.parametrize("name", BUILDERS)
def test_what_transformers_itself_saves_loads(tmp_path, name):
    model = BUILDERS[name](seed=2)
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    agrees(tmp_path, model)


def test_gpt2_reward_models_load_as_before(tmp_path):
    model = tiny.reward_model(seed=3)
    checkpoint = load_scorer_network(tiny.save_reward_model(tmp_path, model))
    assert architecture(checkpoint.hf_config) == "GPT2ForSequenceClassification"
    ids, mask = tiny_scorers.rows([6, 13], pad_id=tiny.GPT2_EOS)
    np.testing.assert_allclose(ours(checkpoint, ids, mask), theirs(model, ids, mask)[:, 0], atol=1e-5)


def test_labels_are_kept_and_two_are_the_default(tmp_path):
    model = tiny_scorers.bert(labels=("safe", "toxic"))
    checkpoint = load_scorer_network(tiny_scorers.save(tmp_path / "named", model))
    assert checkpoint.hf_config["id2label"] == {"0": "safe", "1": "toxic"}
    unnamed = load_scorer_network(tiny_scorers.save(tmp_path / "unnamed", model, config={"id2label": None}))
    assert unnamed.config.num_labels == 2


def test_missing_and_unexpected_tensors_are_listed_together(tmp_path):
    model = tiny_scorers.deberta()
    state = model.state_dict()
    state["deberta.extra.weight"] = state.pop("pooler.dense.weight")
    with pytest.raises(UserError, match=r"unexpected \(1\): deberta.extra.weight; missing \(1\): pooler.dense.weight"):
        load_scorer_network(tiny_scorers.save(tmp_path, model, state=state))


def test_a_headless_model_is_refused(tmp_path):
    model = tiny_scorers.llama_reward()
    state = {key: tensor for key, tensor in model.state_dict().items() if key != "score.weight"}
    with pytest.raises(UserError, match=r"missing \(1\): score.weight"):
        load_scorer_network(tiny_scorers.save(tmp_path, model, state=state))


@pytest.mark.parametrize(
    ("name", "field", "value"),
    [
        ("bert", "position_embedding_type", "relative_key"),
        ("bert", "is_decoder", True),
        ("bert", "hidden_act", "mish"),
        ("bert", "num_attention_heads", 5),
        ("roberta", "pad_token_id", "x"),
        ("roberta", "id2label", ["toxic"]),
        ("deberta", "norm_rel_ebd", None),
        ("deberta", "share_att_key", None),
        ("deberta", "relative_attention", False),
        ("deberta", "position_biased_input", None),
        ("deberta", "type_vocab_size", 2),
        ("deberta", "position_buckets", None),
        ("deberta", "pos_att_type", "c2p"),
        ("deberta", "pos_att_type", 3),
        ("deberta", "max_relative_positions", "x"),
        ("deberta", "conv_kernel_size", 3),
        ("deberta", "id2label", {"0": "a", "1": "b"}),
        ("llama", "id2label", {"0": "a", "1": "b"}),
        ("llama", "hidden_act", "gelu"),
        ("llama", "mlp_bias", "yes"),
    ],
)
def test_an_unsupported_value_is_one_line_that_names_it(tmp_path, name, field, value):
    directory = tiny_scorers.save(tmp_path, BUILDERS[name](), config={field: value})
    with pytest.raises(UserError, match=f"config.json: {field}=.* is not supported; needs ") as caught:
        load_scorer_network(directory)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("values", "complaint"),
    [
        (
            {"model_type": "t5", "architectures": ["T5ForConditionalGeneration"]},
            "T5ForConditionalGeneration.*supported",
        ),
        ({"model_type": "bert", "architectures": ["RobertaForSequenceClassification"]}, "does not fit"),
        ({"model_type": "llama"}, "without architectures.*LlamaForCausalLM, LlamaForSequenceClassification"),
        ({"model_type": "t5"}, "without architectures"),
        ({"model_type": "bert", "architectures": 7}, "architecture '7'"),
    ],
)
def test_what_is_no_scorer_is_refused(values, complaint):
    with pytest.raises(UserError, match=complaint):
        architecture(values)


@pytest.mark.parametrize("name", ["bert", "roberta", "deberta-v2", "gpt2"])
def test_a_file_without_architectures_is_known_by_its_model_type(name):
    assert architecture({"model_type": name}) in ARCHITECTURES


PROGRAM = """
import json, sys
import numpy as np
import jax
from icet_jax.scorers.networks import load_scorer_network
from icet_jax.parallel.mesh import make_mesh
from tests import tiny_scorers
from tests.nn.scorers import ours
ids, mask = tiny_scorers.rows([6, 13] * 4, pad_id=1)
for directory in sys.argv[1:]:
    alone = load_scorer_network(directory)
    spread = load_scorer_network(directory, mesh=make_mesh(data=2, fsdp=2, tensor=2))
    whole, parts = 0, 0
    for leaf in jax.tree.leaves(spread.params):
        assert len(leaf.sharding.device_set) == 8
        whole, parts = whole + leaf.size, parts + leaf.addressable_shards[0].data.size
    assert parts < whole / 2.5, (directory, parts, whole)
    np.testing.assert_allclose(ours(spread, ids, mask), ours(alone, ids, mask), atol=1e-5)
print("agreed")
"""


def test_spread_weights_give_the_same_scores(tmp_path):
    config = {"hidden_size": 32, "num_attention_heads": 4, "intermediate_size": 64}
    builds = {name: BUILDERS[name] for name in ("bert", "deberta", "llama")}
    biases = {"llama": {"attention_bias": True, "mlp_bias": True}}
    directories = [
        str(tiny_scorers.save(tmp_path / name, build(**config, **biases.get(name, {}))))
        for name, build in builds.items()
    ]
    environment = emulating(8)
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, *directories], env=environment, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert "agreed" in done.stdout
