"""Checks of a family's checkpoint against transformers and peft, for the tests of several families."""

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from safetensors.numpy import load_file  # noqa: E402
from transformers import AutoModelForImageTextToText  # noqa: E402

import icet_jax  # noqa: E402
from icet_jax.models.adapter_export import save_adapter  # noqa: E402
from icet_jax.models.loading import load_vlm  # noqa: E402
from icet_jax.models.saving import save_vlm  # noqa: E402
from tests.checkpoints.test_round_trip import tensors  # noqa: E402
from tests.models import families  # noqa: E402
from tests.models.test_adapters import random_lora  # noqa: E402


def hf_load(directory):
    """transformers' model; nothing may be missing, unexpected or mis-shaped."""
    model, info = AutoModelForImageTextToText.from_pretrained(
        directory, dtype=torch.float32, output_loading_info=True, attn_implementation="eager"
    )
    assert not any(info.values()), info
    return model.eval()


def hf_logits(model, inputs):
    return families.hf_logits(model, inputs)[inputs["attention_mask"] == 1]


def our_logits(vlm, inputs, layer=None):
    return np.asarray(vlm.logits(inputs, layer))[inputs["attention_mask"] == 1]


def assert_trained_adapters_reach_transformers(folder, source, inputs, keys, path, copies=1):
    """Merged and as peft's adapter, adapters of a decoder of two layers give transformers our logits.

    `keys` begin the keys of the decoder's layers in the checkpoint, `path` is theirs in peft's model, and peft's file
    has each adapter `copies` times.
    """
    peft = pytest.importorskip("peft")
    vlm = icet_jax.load(source)
    lora = random_lora(vlm.config)
    ours = our_logits(vlm.with_weights(vlm.params, lora), inputs)
    assert np.abs(ours - our_logits(vlm, inputs)).max() > 0.1
    merged = save_vlm(folder / "m", vlm.config, vlm.params, source_dir=source, lora=lora, trained=())
    families.assert_agree(ours, hf_logits(hf_load(merged), inputs), 2e-5)
    touched = {key for key, tensor in tensors(merged).items() if tensor != tensors(source)[key]}
    assert len(touched) == 3 * 2 and all(key.startswith(f"{keys}.") for key in touched)
    adapter = save_adapter(folder / "a", lora, vlm.config, base=str(source))
    adapted = peft.PeftModel.from_pretrained(hf_load(source), adapter).eval()
    injected = {key.rpartition(".lora_A")[0] for key in adapted.state_dict() if ".lora_A." in key}
    modules = ("self_attn.q_proj", "self_attn.v_proj", "mlp.down_proj")
    assert injected == {f"base_model.model.{path}.{layer}.{module}" for layer in range(2) for module in modules}
    assert len(load_file(adapter / "adapter_model.safetensors")) == 2 * copies * len(injected)
    families.assert_agree(ours, hf_logits(adapted, inputs), 2e-5)
    families.assert_agree(ours, our_logits(icet_jax.load(source, adapter=adapter), inputs), 2e-5)


def saved_random_adapter(folder, model, modules):
    """transformers' model with a random adapter of peft at `modules`, a pattern of names; `folder` gets the adapter."""
    peft = pytest.importorskip("peft")
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=3, lora_alpha=5, target_modules=modules)).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for key, parameter in adapted.named_parameters():
            if "lora_" in key:
                parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
    adapted.save_pretrained(folder)
    return adapted


def assert_an_adapter_of_peft_is_the_start_of_an_export(folder, source, inputs, decoder):
    """What training adds to peft's adapter is exported with it; `decoder` is the name of the decoder's module."""
    peft = pytest.importorskip("peft")
    modules = rf".*{decoder}\.layers\.\d+\.(self_attn\.(k_proj|o_proj)|mlp\.up_proj)"
    theirs = saved_random_adapter(folder / "start", hf_load(source), modules)
    begun = load_vlm(source, adapter=folder / "start")
    lora = random_lora(begun.config)
    common = {"start": begun.adapter, "lora": lora}
    both = save_adapter(folder / "a", lora, begun.config, base=str(source), start=begun.adapter)
    merged = save_vlm(folder / "m", begun.config, begun.params, source_dir=source, trained=(), **common)
    ours = hf_logits(hf_load(merged), inputs)
    families.assert_agree(ours, hf_logits(peft.PeftModel.from_pretrained(hf_load(source), both).eval(), inputs), 2e-5)
    families.assert_agree(ours, our_logits(icet_jax.load(source, adapter=both), inputs), 2e-5)
    assert np.abs(ours - hf_logits(theirs, inputs)).max() > 0.1
