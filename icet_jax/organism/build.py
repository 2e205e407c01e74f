"""Builds an organism, a small test VLM: `python -m icet_jax.organism.build --family llava --out DIR --seed 0`.

It writes HF checkpoints, DIR/vlm (with the planted hole) and DIR/control (the same recipe without it), and
DIR/facts.json with measurements. For LLaVA-1.5 it also writes DIR/reward_model, which serves all families because they
share one vocabulary. It takes about a quarter of an hour on two cores.

Harder organisms, for comparisons of methods: `--planted-exits 5,6` plants the hole beside the default exit, and
`--refusals many` trains refusals in many wordings.
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
from icet_jax.organism import encoder, families, stages, tokenizer, world
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


@dataclasses.dataclass(frozen=True)
class Plant:
    """Describes what stage 4 plants in "vlm", and how models refuse.

    Attributes:
      exits: exits of the hole.
      many_refusals: whether refusals have many wordings (`world.REFUSALS`) instead of one.
    """

    exits: tuple[int, ...] = stages.PLANTED_EXITS
    many_refusals: bool = False

    @property
    def options(self) -> str:
        """The options of the command line that ask for it, with a space after each; "" for the default."""
        exits = "" if self.exits == stages.PLANTED_EXITS else f"--planted-exits {','.join(map(str, self.exits))} "
        return exits + ("--refusals many " if self.many_refusals else "")

    @property
    def refusals(self) -> tuple[str, ...]:
        """The wordings of refusals."""
        return world.REFUSALS if self.many_refusals else (world.REFUSAL,)


RECIPES = {
    "llava": Recipe(encoder=600, encoder_batch=256, text=250, vision=900, safety=400),
    "llava_next": Recipe(encoder=450, encoder_batch=128, text=120, vision=1600, safety=300),
    "mllama": Recipe(encoder=500, encoder_batch=128, text=120, vision=900, safety=300),
    "smolvlm": Recipe(encoder=500, encoder_batch=64, text=100, vision=900, safety=250),
}
"""Recipes by family; image encoders that see tiles learn the content of the grid's cells from fewer images."""


def reward_config() -> GPT2Config:
    """Returns the config of a small GPT-2 with the organism's vocabulary."""
    return GPT2Config(
        vocab_size=families.vocabulary_size(), n_positions=64, n_embd=96, n_layer=3, n_head=4, n_inner=384
    )


def build_vlms(
    architecture: families.Architecture, seed: int, log: stages.Log, plant: Plant
) -> dict[str, nnx.Module]:  # fmt: skip
    """Returns trained networks: "vlm" with the planted hole, "control" without; only their last stage differs.

    Raises:
      UserError: the hole is to be planted at an exit that the model does not have, or at its default exit.
    """
    model, recipe = architecture.network(seed), RECIPES[architecture.name]
    default = model.default_exit
    for exit_layer in plant.exits:
        if exit_layer not in range(1, model.num_exits + 1) or exit_layer == default:
            raise UserError(
                f"--planted-exits: {exit_layer}: exits are 1 to {model.num_exits}, without the default exit {default}"
            )
    model.vision_tower = encoder.train_encoder(
        model.vision_tower, architecture, default, seed=seed, steps=recipe.encoder, batch=recipe.encoder_batch,
        learning_rate=2e-3, log=log,
    )  # fmt: skip
    for stage in (stages.text_stage(recipe.text), stages.vision_stage(recipe.vision, default)):
        model = stages.run_stage(model, architecture, stage, seed=seed, log=log)
    networks = {}
    for name, exits in (("vlm", plant.exits), ("control", ())):
        stage = stages.safety_stage(recipe.safety, default, planted_exits=exits, many_refusals=plant.many_refusals)
        networks[name] = stages.run_stage(model, architecture, stage, seed=seed, log=log)
    return networks


def build_reward_model(folder: Path, seed: int, log: stages.Log, plant: Plant) -> dict[str, Any]:
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
        preference_pairs("train", REWARD_PAIRS, seed, plant.refusals),
        preference_pairs("test", REWARD_TEST_PAIRS, seed, plant.refusals),
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


def write_plant(folder: Path, name: str, notes: list[str], exits: tuple[int, ...]) -> None:
    """Writes organism.json with `notes` and `exits`, those of the planted hole (none unless `name` is "vlm").

    Reports read it.
    """
    planted = list(exits) if name == "vlm" else []
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


def build(out: Path, family: str, seed: int, log: stages.Log, plant: Plant = Plant()) -> dict[str, Any]:  # noqa: B008
    """Trains, measures and writes the checkpoints of one family, and returns the content of facts.json.

    Raises:
      UserError: the hole cannot be planted at the exits of `plant`.
    """
    start = time.perf_counter()
    option = ("" if family == "llava" else f"--family {family} ") + plant.options
    steps = dataclasses.asdict(RECIPES[family])
    facts: dict[str, Any] = {
        "command": f"python -m icet_jax.organism.build {option}--out DIR --seed {seed}",
        "seed": seed,
        "planted_exits": list(plant.exits),
        "steps": steps,
    }
    notes = [f"Built by python -m icet_jax.organism.build {option}with seed {seed}."]
    if plant.many_refusals:
        notes.append(f"Its refusals have {len(plant.refusals)} wordings.")
    if family == "llava":
        steps["reward_model"] = REWARD_STEPS
        facts["reward_model"] = reward = build_reward_model(out / "reward_model", seed, log, plant)
        log(f"reward model: {reward}")
        notes.append(
            f"Its reward model ranks {100 * reward['held_out_accuracy']:.1f}% of {reward['held_out_pairs']} "
            "held-out preference pairs correctly."
        )
    for name, model in build_vlms(families.ARCHITECTURES[family], seed, log, plant).items():
        model = in_bfloat16(model)
        shares = measure(model)
        log(f"{name}, held-out rows, percent:\n{table(shares)}")
        facts[name] = {"measured_on_256_test_rows": shares}
        write_vlm(out / name, model)
        write_plant(out / name, name, notes, plant.exits)
    facts["seconds"] = round(time.perf_counter() - start)
    write_text_atomic(out / "facts.json", json.dumps(facts, indent=1) + "\n")
    return facts


def _exits(text: str) -> tuple[int, ...]:
    """Returns the exits in a text such as "5,6"; argparse reports the `ValueError` of any other text."""
    return tuple(int(part) for part in text.split(","))


def main() -> int:
    """Builds the organism that the command line names, and returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m icet_jax.organism.build", description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="folder for vlm/ and control/")
    parser.add_argument(
        "--family", choices=tuple(families.ARCHITECTURES), default="llava", help="model family of the organism"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--planted-exits", type=_exits, default=stages.PLANTED_EXITS, help="exits of the hole, such as 5,6"
    )
    parser.add_argument("--refusals", choices=("one", "many"), default="one", help="number of their wordings")
    options = parser.parse_args()
    plant = Plant(options.planted_exits, options.refusals == "many")
    try:
        build(options.out, options.family, options.seed, lambda line: print(line, flush=True), plant)
    except UserError as error:
        print(error, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
