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
from icet_jax.errors import StopRun, UserError, during
from icet_jax.evaluation.statistics import Interval, mean_interval
from icet_jax.files import JsonObject, write_text_atomic
from icet_jax.media.tokenizer import load_tokenizer
from icet_jax.parallel.mesh import visible_mesh
from icet_jax.runs import fingerprints, provenance, run_dir, run_lock, sources
from icet_jax.scorers.base import metric_name
from icet_jax.scorers.load import save_reward_model
from icet_jax.scorers.pairs import HH_TEMPLATE, GPT2PairTokenizer
from icet_jax.training.metrics_log import MetricsLog
from icet_jax.training.progress import Progress
from icet_jax.training.reward_model import RewardState, RewardTrainer, TokenPair, tokenise
from icet_jax.training.signals import delay_signals

SCHEMA = 1
_ORGANISM_PAIRS = {"train": 4096, "test": 1024}


class PairSet(NamedTuple):
    """Holds preference pairs for training or for testing.

    Attributes:
      pairs: the texts.
      tokens: the token ids of each pair.
      facts: entry of the set in reward.json: source, number of rows read, of pairs used, and of pairs left out by
        reason.
    """

    pairs: list[PreferencePair]
    tokens: list[TokenPair]
    facts: JsonObject


def run(config: ConfigDict, workdir: Path, options: argparse.Namespace) -> int:
    """Trains a reward model, tests it on held-out pairs and exports it; returns 0.

    If an earlier process stopped in `workdir`, the work continues from what that process saved. It writes
    `hf/` (the model), `reward.json` (held-out accuracy with its interval, and pairs that were left out), metrics.jsonl,
    cost.json and checkpoints.

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
        provenance.record_start(workdir)
        _check_inputs(config, workdir)
        if not (result.is_file() and (workdir / "hf" / "config.json").is_file()):
            train(config, workdir, name)
    print(f"{_summary(json.loads(result.read_text(encoding='utf-8')))}\nmodel: {workdir / 'hf'}", file=sys.stderr)
    return 0


def train(config: ConfigDict, workdir: Path, name: str) -> None:
    """Trains a reward model, tests it, and writes `hf/` and reward.json into `workdir`.

    `workdir` must already be the run directory of `config`. `name` is the name of the reward model in metrics.
    """
    template = config.rm.template or HH_TEMPLATE
    base = _load_base(config, workdir)
    tokenizer = load_tokenizer(base.directory)
    longest = min(config.rm.max_tokens, base.config.n_positions)
    encode = GPT2PairTokenizer(tokenizer, template=template, max_length=longest)
    train_set, held_out = load_sets(config, encode, base.config.vocab_size)
    steps = max(1, int(config.rm.epochs * len(train_set.pairs) / config.rm.batch_size))
    optimizer = OptimizerSettings(**dict(config.optimizer), total_steps=steps)
    trainer = RewardTrainer(
        base.graphdef,
        train_set.tokens,
        make_optimizer(optimizer),
        longest=encode.max_length,
        batch_size=config.rm.batch_size,
        seed=config.seed,
        accumulation=config.rm.accumulation,
        window=config.rm.length_window,
        mesh=visible_mesh(**config.mesh),
    )
    costs = run_dir.Costs(workdir)
    with costs.stage("train"), during("fitting the reward model"):
        state, last_metrics = _run_steps(config, workdir, trainer, trainer.start(base.params), optimizer)
    with costs.stage("held_out"):
        margins = trainer.margins(state.params, held_out.tokens)
    with costs.stage("export"):
        save_reward_model(
            workdir / "hf", nnx.merge(base.graphdef, state.params), tokenizer, name=name, template=template
        )
    prompts = [prompt for prompt, _, _ in held_out.pairs]
    content = {
        "schema": SCHEMA,
        "name": name,
        "base": config.model.checkpoint,
        "steps": steps,
        "last_step": last_metrics,
        "pairs": {"train": train_set.facts, "held_out": held_out.facts},
        "accuracy": _to_json(mean_interval((margins > 0).astype(float), prompts, share=True), len(prompts)),
        "margin": _to_json(mean_interval(margins, prompts, share=False), len(prompts)),
    }
    write_text_atomic(workdir / "reward.json", json.dumps(content, indent=1) + "\n")


def _check_inputs(config: ConfigDict, workdir: Path) -> None:
    """Raises a `UserError` if pairs or base model differ from those that the run in `workdir` started with."""
    sets = {"train": config.rm.train, "held_out": config.rm.held_out}
    pairs = {name: _read_pairs(source, config.seed).pairs for name, source in sets.items() if source is not None}
    fingerprints.check_pairs(workdir, pairs)
    fingerprints.check_checkpoint(workdir, {"model": _base_directory(config, workdir)})


def _base_directory(config: ConfigDict, workdir: Path) -> Path:
    """Returns the folder of the GPT-2 checkpoint that training starts from."""
    return local_directory(sources.checkpoint_directory(config.model.checkpoint, workdir), config.model.revision)


def _load_base(config: ConfigDict, workdir: Path) -> Checkpoint:
    """Returns the GPT-2 model that training starts from, with a score head."""
    directory = _base_directory(config, workdir)
    mesh = visible_mesh(**config.mesh)
    return load_gpt2_base(directory, dtype=config.model.dtype, mesh=mesh, remat=config.model.remat, seed=config.seed)


def load_sets(config: ConfigDict, encode: GPT2PairTokenizer, vocab_size: int) -> tuple[PairSet, PairSet]:
    """Returns the pairs for training and the pairs for testing; no prompt is in both.

    Args:
      config: config of the run; `rm.train`, `rm.held_out` or else `rm.held_out_share`, and `seed` are used.
      encode: encodes pairs as token ids.
      vocab_size: number of tokens that the network knows.

    Raises:
      UserError: a file has no usable pairs, nothing is left of a set, or the tokenizer belongs to another model.
    """
    train = _read_and_report(config.rm.train, config.seed)
    if config.rm.held_out is None:
        train_pairs, test_pairs = split_by_prompt(train.pairs, config.rm.held_out_share, config.seed)
        test_read, test_dropped = len(test_pairs), Counter[str]()
        train.dropped["held out"] += test_read
    else:
        held_out = _read_and_report(config.rm.held_out, config.seed)
        train_pairs, test_pairs = train.pairs, without_prompts(held_out.pairs, train.pairs)
        test_read, test_dropped = held_out.read, held_out.dropped
        test_dropped["a prompt of the training pairs"] += len(held_out.pairs) - len(test_pairs)
    train_set = _tokenise_set(config.rm.train, train_pairs, train.read, train.dropped, encode)
    test_set = _tokenise_set(config.rm.held_out or config.rm.train, test_pairs, test_read, test_dropped, encode)
    for field, pair_set in (("train", train_set), ("held_out", test_set)):
        if not pair_set.pairs:
            raise UserError(f"config.rm.{field}: no pair is left ({_reasons(pair_set.facts['dropped'])}); give more")
        highest = max(max(ids) for pair in pair_set.tokens for ids in pair)
        if highest >= vocab_size:
            raise UserError(
                f"config.model.checkpoint: its tokenizer gives token {highest}, but its network knows {vocab_size} "
                "tokens; give a checkpoint whose files belong together"
            )
    return train_set, test_set


def _read_and_report(source: str, seed: int) -> Preferences:
    """Returns the pairs of a source, and prints how many rows of a file were left out and why."""
    preferences = _read_pairs(source, seed)
    if not source.startswith("organism:"):
        print(f"icet-jax: {preferences.report()}", file=sys.stderr)
    return preferences


def _read_pairs(source: str, seed: int) -> Preferences:
    """Returns the pairs of a file, or pairs generated for the small embedded test model ("organism:train:COUNT")."""
    origin, _, rest = source.partition(":")
    if origin != "organism":
        return read_pairs(source)
    from icet_jax.organism.preferences import preference_pairs

    split, _, count = rest.partition(":")
    if split not in _ORGANISM_PAIRS or (count and not (count.isdigit() and int(count))):
        raise UserError(f"{source}: write organism:train[:COUNT] or organism:test[:COUNT]")
    pairs = preference_pairs(split, int(count or _ORGANISM_PAIRS[split]), seed)
    return Preferences(Path(source), pairs, len(pairs))


def _tokenise_set(
    source: str, pairs: Sequence[PreferencePair], read: int, dropped: Counter[str], encode: GPT2PairTokenizer
) -> PairSet:  # fmt: skip
    """Returns the pairs as token ids; pairs whose two texts are the same after truncation are left out.

    `read` is the number of rows read from the source. `dropped` is {reason: number of rows left out so far}, to which
    this function adds.
    """
    tokens = tokenise(encode, pairs) if pairs else []
    usable = [index for index, (chosen, rejected) in enumerate(tokens) if chosen != rejected and chosen and rejected]
    dropped["the same within rm.max_tokens"] += len(pairs) - len(usable)
    left_out = {reason: count for reason, count in dropped.items() if count}
    facts = {"source": source, "read": read, "used": len(usable), "dropped": left_out}
    return PairSet([pairs[index] for index in usable], [tokens[index] for index in usable], facts)


def _run_steps(
    config: ConfigDict, workdir: Path, trainer: RewardTrainer, state: RewardState, optimizer: OptimizerSettings
) -> tuple[RewardState, dict[str, float]]:
    """Takes the remaining optimizer steps, from the newest checkpoint in `workdir` or, if there is none, from `state`.

    Returns the last state and the metrics of the last step. A signal saves the state and raises `StopRun`.
    """
    checkpoints = RunState(workdir / "checkpoints", keep=config.checkpoint.keep)
    learning_rate_at, steps = learning_rate(optimizer), optimizer.total_steps
    metrics: dict[str, float] = {}
    try:
        restored = checkpoints.restore(like=state)
        if restored is not None:
            _, state, metadata = restored
            metrics = metadata["numbers"]
        log = MetricsLog(workdir, config, step=state.step)
        try:
            with Progress("reward model", steps, start=state.step) as progress, delay_signals() as stop_request:
                while state.step < steps:
                    rate = float(learning_rate_at(state.step))
                    state, metrics = trainer.step(state)
                    if state.step == steps or state.step % config.log.every == 0:
                        row = {f"reward_model/{name}": value for name, value in metrics.items()}
                        log.write(state.step, row | {"lr": rate})
                    stop = stop_request.received()
                    if stop or state.step == steps or state.step % config.checkpoint.every == 0:
                        checkpoints.save(state.step, state, {"numbers": metrics})
                    progress.advance({name: metrics[name] for name in ("loss", "accuracy")})
                    if stop:
                        checkpoints.wait()
                        stopped = f"{stop_request.reason}: step {state.step} is saved"
                        raise StopRun(f"{stopped}; the same command goes on from there")
        finally:
            log.close()
        checkpoints.wait()
    finally:
        checkpoints.close()
    return state, metrics


def _to_json(interval: Interval, count: int) -> JsonObject:
    """Returns a mean over `count` pairs in the form of reward.json; "ci95" is None if the interval is undefined."""
    ends = [interval.low, interval.high]
    return {"mean": interval.mean, "ci95": None if np.isnan(ends).any() else ends, "n": count}


def _reasons(dropped: dict[str, int]) -> str:
    """Returns "reason: count, ..." of the pairs that were left out."""
    return ", ".join(f"{reason}: {count}" for reason, count in dropped.items()) or "none"


def _summary(result: JsonObject) -> str:
    """Returns the content of reward.json as one sentence."""
    accuracy, ends = result["accuracy"], result["accuracy"]["ci95"]
    interval = f" (95% interval {ends[0]:.1%} to {ends[1]:.1%})" if ends else ""
    left_out = _reasons(result["pairs"]["held_out"]["dropped"])
    return (
        f"{result['name']}: ranks {accuracy['mean']:.1%}{interval} of {accuracy['n']} held-out pairs correctly after "
        f"{result['steps']} steps over {result['pairs']['train']['used']} pairs; held-out pairs left out: {left_out}"
    )
