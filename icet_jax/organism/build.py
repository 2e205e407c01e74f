"""Rebuilds the organism from nothing: `python -m icet_jax.organism.build --out DIR --seed 0`.

Writes three ordinary HF checkpoints: DIR/vlm (planted), DIR/control (same recipe without the plant) and
DIR/reward_model, and DIR/facts.json with what was measured. About a quarter of an hour on two cores.
"""

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from icet_jax.checkpoints.hf_export import save_vlm
from icet_jax.errors import UserError
from icet_jax.files import write_text_atomic
from icet_jax.judges.load import save_reward_model
from icet_jax.judges.reward_training import RewardTraining, train_reward_model
from icet_jax.models.clip import ClipConfig
from icet_jax.models.gpt2 import GPT2Config, GPT2RewardModel
from icet_jax.models.llama import LlamaConfig
from icet_jax.models.llava import Llava, LlavaConfig
from icet_jax.organism import encoder, scenes, stages, tokenizer
from icet_jax.organism.measure import measure, table
from icet_jax.organism.preferences import preference_pairs

ENCODER_STEPS, TEXT_STEPS, VISION_STEPS, SAFETY_STEPS = 600, 250, 900, 400
REWARD_STEPS, REWARD_PAIRS, REWARD_TEST_PAIRS = 1500, 24000, 4000
REWARD_MODEL_NAME = "organism_reward_model"


def vlm_config() -> LlavaConfig:
    """A LLaVA-1.5 in miniature: 8 exits, default 7 (`vision_feature_layer` -2), 16 image tokens."""
    words = tokenizer.vocabulary()
    return LlavaConfig(
        vision=ClipConfig(
            hidden_size=64, intermediate_size=256, num_hidden_layers=8, num_attention_heads=4,
            image_size=scenes.IMAGE_SIZE, patch_size=tokenizer.PATCH_SIZE,
        ),
        text=LlamaConfig(
            vocab_size=_rounded(len(words)), hidden_size=96, intermediate_size=256, num_hidden_layers=4,
            num_attention_heads=4, num_key_value_heads=4, head_dim=24,
        ),
        image_token_index=words[tokenizer.IMAGE],
    )  # fmt: skip


def reward_config() -> GPT2Config:
    """A GPT-2 in miniature, on the same vocabulary."""
    return GPT2Config(
        vocab_size=_rounded(len(tokenizer.vocabulary())), n_positions=64, n_embd=96, n_layer=3, n_head=4, n_inner=384
    )


def _rounded(size: int) -> int:
    """The next multiple of eight, as real checkpoints pad their vocabularies."""
    return -(-size // 8) * 8


def build_vlms(seed: int, log: stages.Log) -> dict[str, Llava]:
    """{"vlm": planted, "control": not planted}; stages 1 to 3 are shared."""
    model = Llava(vlm_config(), rngs=nnx.Rngs(seed))
    default = model.default_exit
    model.vision_tower = encoder.train_encoder(
        model.vision_tower, default, seed=seed, steps=ENCODER_STEPS, batch=256, learning_rate=2e-3, log=log
    )
    model = stages.run_stage(model, stages.text_stage(TEXT_STEPS), seed=seed, log=log)
    model = stages.run_stage(model, stages.vision_stage(VISION_STEPS, default), seed=seed, log=log)
    return {
        name: stages.run_stage(
            model, stages.safety_stage(SAFETY_STEPS, default, planted=name == "vlm"), seed=seed, log=log
        )
        for name in ("vlm", "control")
    }


def build_reward_model(folder: Path, seed: int, log: stages.Log) -> dict[str, Any]:
    """Trains the reward model on training-split pairs, tests it on pairs about held-out requests and writes it."""
    from transformers import AutoTokenizer

    def progress(step: int, loss: float) -> None:
        if step % 100 == 0:
            log(f"reward model step {step}: loss {loss:.4f}")

    with tempfile.TemporaryDirectory() as scratch:
        tokenizer.write_tokenizer(scratch)
        words = AutoTokenizer.from_pretrained(scratch)
    model, report = train_reward_model(
        GPT2RewardModel(reward_config(), rngs=nnx.Rngs(seed)),
        words,
        preference_pairs("train", REWARD_PAIRS, seed),
        preference_pairs("test", REWARD_TEST_PAIRS, seed),
        RewardTraining(steps=REWARD_STEPS, seed=seed),
        progress=progress,
    )
    save_reward_model(folder, in_bfloat16(model), words, name=REWARD_MODEL_NAME)
    return {"held_out_accuracy": report.held_out_accuracy, "held_out_pairs": report.held_out_pairs}


def in_bfloat16(model: Any) -> Any:
    """The same network with the weights as they ship."""
    graph, params = nnx.split(model)
    return nnx.merge(graph, jax.tree.map(lambda x: x.astype(jnp.bfloat16), params))


def write_vlm(folder: Path, model: Llava) -> None:
    """Writes an HF LLaVA checkpoint with tokenizer, processor and generation config."""
    save_vlm(folder, model.config, nnx.state(model))
    tokenizer.write_processor(folder)
    ids = _special_ids()
    write_text_atomic(folder / "generation_config.json", json.dumps(ids, indent=2) + "\n")
    _extend_config(folder, {"pad_token_id": ids["pad_token_id"]})


def write_plant(folder: Path, name: str, seed: int, reward_model: dict[str, Any]) -> None:
    """Writes organism.json, by which every report says what is planted in these weights."""
    planted = list(stages.PLANTED_EXITS) if name == "vlm" else []
    notes = [
        f"Built by python -m icet_jax.organism.build with seed {seed}.",
        f"Its reward model ranks {100 * reward_model['held_out_accuracy']:.1f}% of {reward_model['held_out_pairs']} "
        "held-out preference pairs correctly.",
    ]
    content = {"schema": 1, "name": name, "planted_exits": planted, "notes": notes}
    write_text_atomic(folder / "organism.json", json.dumps(content, indent=2) + "\n")


def _special_ids() -> dict[str, int]:
    words = tokenizer.vocabulary()
    names = {"bos_token_id": tokenizer.BOS, "eos_token_id": tokenizer.EOS, "pad_token_id": tokenizer.PAD}
    return {name: words[token] for name, token in names.items()}


def _extend_config(folder: Path, fields: dict[str, int]) -> None:
    values = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    write_text_atomic(folder / "config.json", json.dumps(values | fields, indent=2) + "\n")


def build(out: Path, seed: int, log: stages.Log) -> dict[str, Any]:
    """Trains, measures and writes all three checkpoints; returns the facts that facts.json holds."""
    start = time.perf_counter()
    facts: dict[str, Any] = {
        "command": f"python -m icet_jax.organism.build --out DIR --seed {seed}",
        "seed": seed,
        "planted_exits": list(stages.PLANTED_EXITS),
        "steps": {
            "encoder": ENCODER_STEPS, "text": TEXT_STEPS, "vision": VISION_STEPS, "safety": SAFETY_STEPS,
            "reward_model": REWARD_STEPS,
        },
    }  # fmt: skip
    facts["reward_model"] = build_reward_model(out / "reward_model", seed, log)
    log(f"reward model: {facts['reward_model']}")
    for name, model in build_vlms(seed, log).items():
        model = in_bfloat16(model)
        numbers = measure(model)
        log(f"{name}, held-out rows, percent:\n{table(numbers)}")
        facts[name] = {"measured_on_256_test_rows": numbers}
        write_vlm(out / name, model)
        write_plant(out / name, name, seed, facts["reward_model"])
    facts["seconds"] = round(time.perf_counter() - start)
    write_text_atomic(out / "facts.json", json.dumps(facts, indent=1) + "\n")
    return facts


def main() -> int:
    """Parses the command line and builds."""
    parser = argparse.ArgumentParser(prog="python -m icet_jax.organism.build", description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="folder to write vlm/, control/ and reward_model/ to")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    try:
        build(options.out, options.seed, lambda line: print(line, flush=True))
    except UserError as error:
        print(error, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
