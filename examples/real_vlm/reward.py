"""Makes a reward model for the real model, from the language model that it was built of.

    python examples/real_vlm/reward.py --workdir runs/real_vlm --preferences harmless-base/test.jsonl.gz

WORKDIR is that of build.py, which must have run with --forbidden. The result, WORKDIR/reward_model, is an ordinary
`LlamaForSequenceClassification`: SmolLM2-135M-Instruct with a scalar head, trained by the package's --mode=reward. The
same command goes on where an earlier one was stopped.

    decoder     the language model alone, as it was before any training: WORKDIR/reward/decoder
    pairs       (refusal, what the language model answers) for each forbidden request of the training side, and
                preferences of people: WORKDIR/reward/refusals.jsonl, WORKDIR/reward/preferences.jsonl
    training    WORKDIR/reward/run, WORKDIR/reward_model

Preferences are in the format of HH-RLHF. The held-out accuracy of each of the two sources is in
WORKDIR/reward/run/reward.json.
"""

import argparse
import json
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[2])
    sys.modules["torch"] = None  # type: ignore[assignment]  # transformers imports it, if it can, which takes seconds

import icet_jax
from examples.real_vlm import answers, parts, rows, stages
from examples.real_vlm.assemble import write_language_model
from examples.real_vlm.markers import Stages, fresh_folder, run_script
from examples.real_vlm.photographs import hash_order
from examples.real_vlm.smollm2 import read_decoder
from icet_jax.commands import reward
from icet_jax.config import ConfigDict
from icet_jax.data.hh_rlhf import ASSISTANT, HUMAN, read_pairs
from icet_jax.errors import UserError
from icet_jax.files import JsonObject
from icet_jax.media.tokenizer import Tokenizer, load_tokenizer
from icet_jax.scorers.degenerate import degenerate_reason
from icet_jax.scorers.keywords import refused


def options_of(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Returns the options of the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workdir", type=Path, required=True, help="working directory of build.py")
    parser.add_argument("--preferences", type=Path, required=True, help="pairs in the format of HH-RLHF")
    parser.add_argument("--limit", type=int, default=600, help="most preferences that are used (600)")
    parser.add_argument("--max-tokens", type=int, default=160, help="longest preference (160)")
    parser.add_argument("--batch-size", type=int, default=16, help="pairs per step (16)")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    for name in ("limit", "max_tokens", "batch_size"):
        if getattr(options, name) < 1:
            raise UserError(f"--{name.replace('_', '-')}={getattr(options, name)}: give a whole number above 0")
    return options


def make(options: argparse.Namespace) -> JsonObject:
    """Makes the reward model, or what an earlier process has left of it, and returns the content of reward.json.

    Raises:
      UserError: build.py has not run there, or not with forbidden requests; the preferences cannot be read; or the
        reward model was begun with other inputs.
    """
    build: Path = options.workdir
    forbidden, start = build / "data" / f"{rows.FORBIDDEN}.jsonl", build / "start"
    for path in (start / "config.json", forbidden):
        if not path.is_file():
            raise UserError(f"{path}: no such file; run build.py with --forbidden and --workdir={build} first")
    if not options.preferences.is_file():
        raise UserError(f"--preferences={options.preferences}: no such file")
    folder = build / "reward"
    done = Stages(folder)
    decoder, refusals, preferences = (folder / name for name in ("decoder", "refusals.jsonl", "preferences.jsonl"))
    gguf = build / "parts" / parts.DECODER.file_name
    done.run("decoder", {"sha256": parts.DECODER.sha256}, [decoder], lambda: _write_decoder(gguf, decoder))
    inputs = {"forbidden": parts.sha256(forbidden), "preferences": parts.sha256(options.preferences)}
    sizes = {"limit": options.limit, "max_tokens": options.max_tokens}
    done.run(
        "pairs", inputs | sizes, [refusals, preferences],
        lambda: {
            "refusals": write_refusals(icet_jax.load(start), rows.read_jsonl(forbidden), refusals),
            "preferences": write_preferences(options, load_tokenizer(decoder), preferences),
        },
    )  # fmt: skip
    config = training_config(options, decoder, (refusals, preferences))
    settings = {"seed": options.seed, "batch_size": options.batch_size}
    out = build / "reward_model"
    return done.run("training", settings, [out], lambda: _train(config, folder / "run", out))


def _write_decoder(gguf: Path, out: Path) -> JsonObject:
    """Writes the language model alone; returns nothing to report."""
    unfinished = fresh_folder(out.with_name(f".{out.name}"))
    write_language_model(unfinished, read_decoder(gguf))
    shutil.rmtree(out, ignore_errors=True)
    unfinished.rename(out)
    return {}


def write_refusals(vlm: icet_jax.VLM, requests: Sequence[JsonObject], out: Path) -> JsonObject:
    """Writes pairs of a refusal, which is preferred, and the model's own answer to the same request; returns counts.

    A request gives no pair if the model refuses it itself, or if its answer is degenerate or has no whole sentence.

    Args:
      vlm: the model before training.
      requests: rows of forbidden requests.
      out: JSON-lines file to write, in the format of HH-RLHF.
    """
    longest = stages.get_config("tuning").lppo.max_new_tokens
    prompts = [row["prompt"] for row in requests]
    texts = list(answers.answer_texts(vlm, prompts, longest))
    answered = [
        (prompt, text)
        for prompt, text in zip(prompts, texts, strict=True)
        if not refused(text) and degenerate_reason(text) is None
    ]
    rows.write_jsonl(out, [_pair(prompt, stages.REFUSAL, text) for prompt, text in answered])
    return {"asked": len(prompts), "refused": sum(map(refused, texts)), "pairs": len(answered)}


def write_preferences(options: argparse.Namespace, tokenizer: Tokenizer, out: Path) -> JsonObject:
    """Writes at most `--limit` of the preferences, those with at most `--max-tokens` tokens; returns counts."""
    preferences = read_pairs(options.preferences)
    usable = []
    for prompt, chosen, rejected in sorted(preferences.pairs, key=lambda pair: hash_order(pair[0])):
        lengths = [len(tokenizer(prompt + answer, verbose=False)["input_ids"]) for answer in (chosen, rejected)]
        if max(lengths) <= options.max_tokens - _TEMPLATE_TOKENS:
            usable.append(_pair(prompt, chosen, rejected))
    rows.write_jsonl(out, usable[: options.limit])
    return {"read": preferences.read, "short": len(usable), "pairs": len(usable[: options.limit])}


_TEMPLATE_TOKENS = 16
"""Tokens of the chat template around a prompt and its answer."""


def _pair(prompt: str, chosen: str, rejected: str) -> JsonObject:
    """Returns a row in the format of HH-RLHF."""
    question = f"{HUMAN} {prompt}{ASSISTANT} "
    return {"chosen": question + chosen, "rejected": question + rejected}


def training_config(options: argparse.Namespace, decoder: Path, pairs: Sequence[Path]) -> ConfigDict:
    """Returns the config of the training: one pass over the pairs, a tenth of the prompts held out."""
    config = icet_jax.config.default()
    config.seed = options.seed
    config.model.checkpoint = str(decoder)
    config.model.dtype = "float32"
    config.model.remat = "none"
    config.rm.name = "smollm2_reward"
    config.rm.train = " + ".join(map(str, pairs))
    config.rm.held_out_share = 0.1
    config.rm.max_tokens = options.max_tokens
    config.rm.batch_size = options.batch_size
    config.rm.accumulation = max(1, options.batch_size // 4)
    config.optimizer.learning_rate = 3e-5
    config.optimizer.schedule = "cosine"
    config.optimizer.warmup_steps = 5
    config.checkpoint.every = 25
    config.checkpoint.keep = 1
    config.log.tensorboard = False
    return config


def _train(config: ConfigDict, run: Path, out: Path) -> JsonObject:
    """Trains in the run directory `run`, and copies the model to `out`; returns the content of reward.json."""
    reward.run(config, run, argparse.Namespace())
    unfinished = out.with_name(f".{out.name}")
    shutil.rmtree(unfinished, ignore_errors=True)
    shutil.copytree(run / "hf", unfinished)
    shutil.rmtree(out, ignore_errors=True)
    unfinished.rename(out)
    return dict(json.loads((run / "reward.json").read_text(encoding="utf-8")))


def main(arguments: Sequence[str] | None = None) -> int:
    """Makes the reward model that the command line describes, and returns the exit code."""
    return run_script("reward model", "reward_model", lambda: options_of(arguments), make)


if __name__ == "__main__":
    sys.exit(main())
