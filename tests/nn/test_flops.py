"""Operations of parts, by hand."""

import pytest

from icet_jax.nn import flops
from icet_jax.nn.llama import LlamaConfig, lora_shapes

CONFIG = LlamaConfig(
    vocab_size=11, hidden_size=8, intermediate_size=20, num_hidden_layers=3, num_attention_heads=2,
    num_key_value_heads=1, head_dim=4,
)  # fmt: skip
WEIGHTS = 8 * 8 + 8 * 4 + 8 * 4 + 8 * 8 + 3 * 8 * 20  # of a layer: queries, keys, values, output, feed-forward


def test_layers_are_their_weights_and_attention():
    assert sum(a * b for _, a, b in lora_shapes(CONFIG).values()) == WEIGHTS
    assert flops.llama_layers(CONFIG, 5, 7) == 3 * (2 * 5 * WEIGHTS + 2 * 2 * 5 * 7 * 8)
    assert flops.logits(8, 11) == 2 * 8 * 11


def test_the_last_layer_of_a_prefill_makes_keys_and_values_of_all_and_the_rest_of_one_position():
    last = 2 * WEIGHTS + 2 * 4 * (8 * 4 + 8 * 4) + 2 * 2 * 5 * 8
    assert flops.llama_prefill(CONFIG, 5) == 2 * (2 * 5 * WEIGHTS + 2 * 2 * 5 * 5 * 8) + last


@pytest.mark.parametrize("places", [0, 6])
def test_cross_attention_without_images_is_skipped(places):
    keys = 3 * 2 * (8 * 4 + 8 * 4)
    assert flops.keys_and_values(CONFIG, places) == places * keys
    whole = 3 * (2 * 5 * WEIGHTS + 2 * 2 * 5 * places * 8) - 5 * keys
    assert flops.cross_layers(CONFIG, 5, places) == (whole if places else 0)


def test_an_encoder_block_has_four_square_and_two_wide_matrices():
    assert flops.encoder_blocks(2, 5, 8, 20) == 2 * (2 * 5 * (4 * 64 + 2 * 160) + 2 * 2 * 5 * 5 * 8)


def test_adapters_are_two_thin_matrices_for_each_layer():
    assert flops.adapters([(3, 8, 20), (2, 8, 4)], rank=5) == 2 * 5 * (3 * 28 + 2 * 12)
