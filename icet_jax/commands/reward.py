"""`--mode=reward` trains a GPT-2 reward model on preference pairs and tests it on held-out pairs."""

import argparse
import json
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from flax import nnx
from ml_collections import ConfigDict

from icet_jax.algorithms.state import OptimizerSettings, learning_rate, make_optimizer
from icet_jax.checkpoints.gpt2_base import load_gpt2_base
from icet_jax.checkpoints.hf_import import Checkpoint
from icet_jax.checkpoints.run_state import RunState
from icet_jax.checkpoints.source import local_directory
from icet_jax.config import require
from icet_jax.data.hh_rlhf import PreferencePair, Preferences, read_pairs, split_by_prompt, without_prompts
from icet_jax.errors import Stopped, UserError, during
from icet_jax.evaluation.statistics import Interval, mean_interval
from icet_jax.files import JsonObject, write_text_atomic
from icet_jax.media.tokenizer import load_tokenizer
from icet_jax.parallel.mesh import visible_mesh
from icet_jax.runs import fingerprints, run_dir, run_lock, sources
from icet_jax.scorers.base import metric_name
from icet_jax.scorers.load import save_reward_model
from icet_jax.scorers.pairs import HH_TEMPLATE, GPT2PairTokenizer
from icet_jax.training.metrics_log import MetricsLog
from icet_jax.training.progress import Progress
from icet_jax.training.reward_model import RewardState, RewardTrainer, TokenPair, tokenise
from icet_jax.training.signals import kept_waiting

SCHEMA = 1
_ORGANISM_PAIRS = {"train": 4096, "test": 1024}


class PairSet(NamedTuple):
    """Holds preference pairs for training or for testing.

    Attributes:
      pairs: the texts.
      tokens: the tokens of each pair.
      facts: fields for reward.json: source, rows read, pairs used, and pairs left out by reason.
    """

    pairs: list[PreferencePair]
    tokens: list[TokenPair]
    facts: JsonObject


def run(config: ConfigDict, workdir: Path, options: argparse.Namespace) -> int:
    """Trains, tests and exports, continuing where an earlier process in `workdir` stopped.

    Writes `hf/` (the model), `reward.json` (held-out accuracy with its interval, and pairs that were left out),
    metrics.jsonl, cost.json and checkpoints.

    Raises:
      UserError: some input is bad (found before training), pairs or base model differ from those that the run in
        `workdir` started with, or a loss is not finite.
    """
    require(config, "model.checkpoint", "rm.train")
    if config.seeds:
        raise UserError("config.seeds: --mode=reward trains one model; set config.seed and start it once per seed")
    name = config.rm.name or metric_name(workdir.resolve().name) or "reward_model"
    result = workdir / "reward.json"
    with run_lock.locked(workdir):
        run_dir.claim(workdir, config)
        _check_same(config, workdir)
        if not (result.is_file() and (workdir / "hf" / "config.json").is_file()):
            train(config, workdir, name)
    print(f"{_summary(json.loads(result.read_text(encoding='utf-8')))}\nmodel: {workdir / 'hf'}", file=sys.stderr)
    return 0


def train(config: ConfigDict, workdir: Path, name: str) -> None:
    """Performs one training in `workdir`, which `config` has claimed; `name` is the model's name in metrics."""
    template = config.rm.template or HH_TEMPLATE
    base = _load_base(config, workdir)
    tokenizer = load_tokenizer(base.directory)
    encode = GPT2PairTokenizer(
        tokenizer, template=template, max_length=min(config.rm.max_tokens, base.config.n_positions)
    )
    learned, held_out = load_sets(config, encode, base.config.vocab_size)
    steps = max(1, int(config.rm.epochs * len(learned.pairs) / config.rm.batch_size))
    optimizer = OptimizerSettings(**dict(config.optimizer), total_steps=steps)
    trainer = RewardTrainer(
        base.graphdef,
        learned.tokens,
        make_optimizer(optimizer),
        longest=encode.max_length,
        batch_size=config.rm.batch_size,
        seed=config.seed,
        accumulation=config.rm.accumulation,
        window=config.rm.length_window,
        mesh=visible_mesh(**config.mesh),
    )
    costs = run_dir.Costs(workdir)
    with costs.phase("train"), during("fitting the reward model"):
        state, last = _train(config, workdir, trainer, trainer.start(base.params), optimizer)
    with costs.phase("held_out"):
        margins = trainer.margins(state.params, held_out.tokens)
    with costs.phase("export"):
        save_reward_model(
            workdir / "hf", nnx.merge(base.graphdef, state.params), tokenizer, name=name, template=template
        )
    prompts = [prompt for prompt, _, _ in held_out.pairs]
    content = {
        "schema": SCHEMA,
        "name": name,
        "base": config.model.checkpoint,
        "steps": steps,
        "last_step": last,
        "pairs": {"train": learned.facts, "held_out": held_out.facts},
        "accuracy": _estimate(mean_interval((margins > 0).astype(float), prompts, share=True), len(prompts)),
        "margin": _estimate(mean_interval(margins, prompts, share=False), len(prompts)),
    }
    write_text_atomic(workdir / "reward.json", json.dumps(content, indent=1) + "\n")


def _check_same(config: ConfigDict, workdir: Path) -> None:
    """Checks that pairs and base model are those that the run in `workdir` started with, even if it has finished."""
    sets = {"train": config.rm.train, "held_out": config.rm.held_out}
    pairs = {name: _pairs(source, config.seed).pairs for name, source in sets.items() if source is not None}
    fingerprints.check_pairs(workdir, pairs)
    fingerprints.check_checkpoint(workdir, {"model": _base_directory(config, workdir)})


def _base_directory(config: ConfigDict, workdir: Path) -> Path:
    return local_directory(sources.checkpoint_directory(config.model.checkpoint, workdir), config.model.revision)


def _load_base(config: ConfigDict, workdir: Path) -> Checkpoint:
    directory = _base_directory(config, workdir)
    mesh = visible_mesh(**config.mesh)
    return load_gpt2_base(directory, dtype=config.model.dtype, mesh=mesh, remat=config.model.remat, seed=config.seed)


def load_sets(config: ConfigDict, encode: GPT2PairTokenizer, vocab_size: int) -> tuple[PairSet, PairSet]:
    """Returns the pairs for training and those for testing; no prompt is in both.

    Args:
      config: `rm.train`, `rm.held_out` or else `rm.held_out_share`, and `seed`.
      encode: encodes pairs as tokens.
      vocab_size: vocabulary size of the network.

    Raises:
      UserError: a file has no usable pairs, nothing is left of a set, or the tokenizer belongs to another model.
    """
    train = _read(config.rm.train, config.seed)
    if config.rm.held_out is None:
        pairs, tests = split_by_prompt(train.pairs, config.rm.held_out_share, config.seed)
        read, dropped = len(tests), Counter[str]()
        train.dropped["held out"] += read
    else:
        held_out = _read(config.rm.held_out, config.seed)
        pairs, tests = train.pairs, without_prompts(held_out.pairs, train.pairs)
        read, dropped = held_out.read, held_out.dropped
        dropped["a prompt of the training pairs"] += len(held_out.pairs) - len(tests)
    learned = _tokenised(config.rm.train, pairs, train.read, train.dropped, encode)
    tested = _tokenised(config.rm.held_out or config.rm.train, tests, read, dropped, encode)
    for what, pair_set in (("train", learned), ("held_out", tested)):
        if not pair_set.pairs:
            raise UserError(f"config.rm.{what}: no pair is left ({_reasons(pair_set.facts['dropped'])}); bring more")
        highest = max(max(ids) for pair in pair_set.tokens for ids in pair)
        if highest >= vocab_size:
            raise UserError(
                f"config.model.checkpoint: its tokenizer gives token {highest}, but its network knows {vocab_size}; "
                "give a checkpoint whose files belong together"
            )
    return learned, tested


def _read(source: str, seed: int) -> Preferences:
    """Returns `_pairs`, and prints a report of bad rows to standard error."""
    preferences = _pairs(source, seed)
    if not source.startswith("organism:"):
        print(f"icet-jax: {preferences.report()}", file=sys.stderr)
    return preferences


def _pairs(source: str, seed: int) -> Preferences:
    """Returns the pairs of a file, or of the organism."""
    origin, _, rest = source.partition(":")
    if origin != "organism":
        return read_pairs(source)
    from icet_jax.organism.preferences import preference_pairs

    split, _, count = rest.partition(":")
    if split not in _ORGANISM_PAIRS or (count and not (count.isdigit() and int(count))):
        raise UserError(f"{source}: write organism:train[:COUNT] or organism:test[:COUNT]")
    pairs = preference_pairs(split, int(count or _ORGANISM_PAIRS[split]), seed)
    return Preferences(Path(source), pairs, len(pairs))


def _tokenised(
    source: str, pairs: Sequence[PreferencePair], read: int, dropped: Counter[str], encode: GPT2PairTokenizer
) -> PairSet:  # fmt: skip
    """Returns the pairs whose two texts still differ after truncation to the longest row."""
    tokens = tokenise(encode, pairs) if pairs else []
    usable = [index for index, (chosen, rejected) in enumerate(tokens) if chosen != rejected and chosen and rejected]
    dropped["the same within rm.max_tokens"] += len(pairs) - len(usable)
    left_out = {reason: count for reason, count in dropped.items() if count}
    facts = {"source": source, "read": read, "used": len(usable), "dropped": left_out}
    return PairSet([pairs[index] for index in usable], [tokens[index] for index in usable], facts)


def _train(
    config: ConfigDict, workdir: Path, trainer: RewardTrainer, state: RewardState, optimizer: OptimizerSettings
) -> tuple[RewardState, dict[str, float]]:
    """Performs the steps that the newest checkpoint does not have; also returns the last step's numbers."""
    checkpoints = RunState(workdir / "checkpoints", keep=config.checkpoint.keep)
    rate, steps = learning_rate(optimizer), optimizer.total_steps
    numbers: dict[str, float] = {}
    try:
        restored = checkpoints.restore(like=state)
        if restored is not None:
            _, state, metadata = restored
            numbers = metadata["numbers"]
        log = MetricsLog(workdir, config, step=state.step)
        try:
            with Progress("reward model", steps, start=state.step) as progress, kept_waiting() as told:
                while state.step < steps:
                    rate_now = float(rate(state.step))
                    state, numbers = trainer.step(state)
                    if state.step == steps or state.step % config.log.every == 0:
                        row = {f"reward_model/{name}": value for name, value in numbers.items()}
                        log.write(state.step, row | {"lr": rate_now})
                    stop = told()
                    if stop or state.step == steps or state.step % config.checkpoint.every == 0:
                        checkpoints.save(state.step, state, {"numbers": numbers})
                    progress.advance({name: numbers[name] for name in ("loss", "accuracy")})
                    if stop:
                        checkpoints.wait()
                        raise Stopped(f"{told.name}: step {state.step} is saved; the same command goes on from there")
        finally:
            log.close()
        checkpoints.wait()
    finally:
        checkpoints.close()
    return state, numbers


def _estimate(interval: Interval, n: int) -> JsonObject:
    ends = [interval.low, interval.high]
    return {"mean": interval.mean, "ci95": None if np.isnan(ends).any() else ends, "n": n}


def _reasons(dropped: dict[str, int]) -> str:
    return ", ".join(f"{reason}: {count}" for reason, count in dropped.items()) or "none was there"


def _summary(result: JsonObject) -> str:
    accuracy, ends = result["accuracy"], result["accuracy"]["ci95"]
    interval = f" (95% interval {ends[0]:.1%} to {ends[1]:.1%})" if ends else ""
    left_out = _reasons(result["pairs"]["held_out"]["dropped"])
    return (
        f"{result['name']}: ranks {accuracy['mean']:.1%}{interval} of {accuracy['n']} held-out pairs correctly after "
        f"{result['steps']} steps over {result['pairs']['train']['used']} pairs; held-out pairs left out: {left_out}"
    )
