"""Builds an organism, a small test VLM: `python -m icet_jax.organism.build --family llava --out DIR --seed 0`.

It writes HF checkpoints, DIR/vlm (with the planted hole) and DIR/control (the same recipe without it), and
DIR/facts.json with measurements. For LLaVA-1.5 it also writes DIR/reward_model, which serves all families because they
share one vocabulary. It takes about a quarter of an hour on two cores.
"""

import argparse
import dataclasses
import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from flax import nnx

from icet_jax.errors import UserError
from icet_jax.files import write_text_atomic
from icet_jax.media.tokenizer import load_tokenizer
from icet_jax.models.saving import save_vlm
from icet_jax.nn.gpt2 import GPT2Config, GPT2RewardModel
from icet_jax.organism import encoder, families, stages, tokenizer
from icet_jax.organism.measure import measure, table
from icet_jax.organism.preferences import preference_pairs
from icet_jax.organism.processors import write_processor
from icet_jax.scorers.load import save_reward_model
from icet_jax.training.reward_model import RewardTraining, train_reward_model

_Network = TypeVar("_Network", bound=nnx.Module)

REWARD_STEPS, REWARD_PAIRS, REWARD_TEST_PAIRS = 1500, 24000, 4000
REWARD_MODEL_NAME = "organism_reward_model"


@dataclasses.dataclass(frozen=True)
class Recipe:
    """Holds the number of steps of each of the four stages, and the number of images in a step of the first stage."""

    encoder: int
    encoder_batch: int
    text: int
    vision: int
    safety: int


RECIPES = {
    "llava": Recipe(encoder=600, encoder_batch=256, text=250, vision=900, safety=400),
    "llava_next": Recipe(encoder=450, encoder_batch=128, text=120, vision=1600, safety=300),
    "mllama": Recipe(encoder=500, encoder_batch=128, text=120, vision=900, safety=300),
}
"""Recipes by family; image encoders that see tiles learn the content of the grid's cells from fewer images."""


def reward_config() -> GPT2Config:
    """Returns the config of a small GPT-2 with the organism's vocabulary."""
    return GPT2Config(
        vocab_size=families.vocabulary_size(), n_positions=64, n_embd=96, n_layer=3, n_head=4, n_inner=384
    )


def build_vlms(architecture: families.Architecture, seed: int, log: stages.Log) -> dict[str, nnx.Module]:
    """Returns trained networks: "vlm" with the planted hole, "control" without; only their last stage differs."""
    model, recipe = architecture.network(seed), RECIPES[architecture.name]
    default = model.default_exit
    model.vision_tower = encoder.train_encoder(
        model.vision_tower, architecture, default, seed=seed, steps=recipe.encoder, batch=recipe.encoder_batch,
        learning_rate=2e-3, log=log,
    )  # fmt: skip
    for stage in (stages.text_stage(recipe.text), stages.vision_stage(recipe.vision, default)):
        model = stages.run_stage(model, architecture, stage, seed=seed, log=log)
    return {
        name: stages.run_stage(
            model, architecture, stages.safety_stage(recipe.safety, default, planted=name == "vlm"), seed=seed, log=log
        )
        for name in ("vlm", "control")
    }


def build_reward_model(folder: Path, seed: int, log: stages.Log) -> dict[str, Any]:
    """Trains and writes the reward model, and returns its accuracy on pairs about held-out requests."""

    def progress(step: int, loss: float) -> None:
        if step % 100 == 0:
            log(f"reward model step {step}: loss {loss:.4f}")

    with tempfile.TemporaryDirectory() as scratch:
        tokenizer.write_tokenizer(scratch)
        words = load_tokenizer(scratch)
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


def in_bfloat16(model: _Network) -> _Network:
    """Returns the network with its weights in bfloat16, as they are distributed."""
    graph, params = nnx.split(model)
    return nnx.merge(graph, jax.tree.map(lambda x: x.astype(jnp.bfloat16), params))


def write_vlm(folder: Path, model: Any) -> None:
    """Writes a network as an HF checkpoint with tokenizer, processor and generation config."""
    save_vlm(folder, model.config, nnx.state(model))
    write_processor(folder, families.architecture_of(model).name)
    ids = _special_ids()
    tokenizer.write_json(folder / "generation_config.json", ids)
    _add_special_ids(folder, ids)


def write_plant(folder: Path, name: str, notes: list[str]) -> None:
    """Writes organism.json with `notes` and the exits of the planted hole (none unless `name` is "vlm").

    Reports read it.
    """
    planted = list(stages.PLANTED_EXITS) if name == "vlm" else []
    content = {"schema": 1, "name": name, "planted_exits": planted, "notes": notes}
    tokenizer.write_json(folder / "organism.json", content)


def _special_ids() -> dict[str, int]:
    """Returns the ids of the special tokens under their names in config.json."""
    words = tokenizer.vocabulary()
    names = {"bos_token_id": tokenizer.BOS, "eos_token_id": tokenizer.EOS, "pad_token_id": tokenizer.PAD}
    return {name: words[token] for name, token in names.items()}


def _add_special_ids(folder: Path, ids: dict[str, int]) -> None:
    """Adds the ids of special tokens to config.json; without them transformers uses those of a published vocabulary."""
    values = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    values["text_config"] |= ids
    tokenizer.write_json(folder / "config.json", values | {"pad_token_id": ids["pad_token_id"]})


def build(out: Path, family: str, seed: int, log: stages.Log) -> dict[str, Any]:
    """Trains, measures and writes the checkpoints of one family, and returns the content of facts.json."""
    start, option = time.perf_counter(), "" if family == "llava" else f"--family {family} "
    steps = dataclasses.asdict(RECIPES[family])
    facts: dict[str, Any] = {
        "command": f"python -m icet_jax.organism.build {option}--out DIR --seed {seed}",
        "seed": seed,
        "planted_exits": list(stages.PLANTED_EXITS),
        "steps": steps,
    }
    notes = [f"Built by python -m icet_jax.organism.build {option}with seed {seed}."]
    if family == "llava":
        steps["reward_model"] = REWARD_STEPS
        facts["reward_model"] = reward = build_reward_model(out / "reward_model", seed, log)
        log(f"reward model: {reward}")
        notes.append(
            f"Its reward model ranks {100 * reward['held_out_accuracy']:.1f}% of {reward['held_out_pairs']} "
            "held-out preference pairs correctly."
        )
    for name, model in build_vlms(families.ARCHITECTURES[family], seed, log).items():
        model = in_bfloat16(model)
        shares = measure(model)
        log(f"{name}, held-out rows, percent:\n{table(shares)}")
        facts[name] = {"measured_on_256_test_rows": shares}
        write_vlm(out / name, model)
        write_plant(out / name, name, notes)
    facts["seconds"] = round(time.perf_counter() - start)
    write_text_atomic(out / "facts.json", json.dumps(facts, indent=1) + "\n")
    return facts


def main() -> int:
    """Builds the organism that the command line names, and returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m icet_jax.organism.build", description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="folder for vlm/ and control/")
    parser.add_argument(
        "--family", choices=tuple(families.ARCHITECTURES), default="llava", help="model family of the organism"
    )
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    try:
        build(options.out, options.family, options.seed, lambda line: print(line, flush=True))
    except UserError as error:
        print(error, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
