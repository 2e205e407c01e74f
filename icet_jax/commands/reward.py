"""`--mode=reward`: trains a GPT-2 reward model on preference pairs and tests it on pairs that it has not seen."""

import argparse
import json
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from flax import nnx
from ml_collections import ConfigDict

from icet_jax.algorithms.state import OptimizerSettings, learning_rate, make_optimizer
from icet_jax.checkpoints.gpt2_base import load_gpt2_base
from icet_jax.checkpoints.hf_import import Checkpoint
from icet_jax.checkpoints.run_state import RunState
from icet_jax.checkpoints.source import local_directory
from icet_jax.config import require
from icet_jax.data.hh_rlhf import Pair, Preferences, read_pairs, split_by_prompt, without_prompts
from icet_jax.errors import Stopped, UserError, during
from icet_jax.evaluation.statistics import Interval, mean_interval
from icet_jax.files import write_text_atomic
from icet_jax.media.tokenizer import load_tokenizer
from icet_jax.parallel.mesh import visible_mesh
from icet_jax.runs import fingerprints, run_dir, run_lock, sources
from icet_jax.scorers.base import metric_name
from icet_jax.scorers.load import save_reward_model
from icet_jax.scorers.pairs import HH_TEMPLATE, PairTokenizer
from icet_jax.training.metrics_log import MetricsLog
from icet_jax.training.progress import Progress
from icet_jax.training.reward_model import RewardState, RewardTrainer, TokenPair, tokenise
from icet_jax.training.signals import kept_waiting

SCHEMA = 1
_ORGANISM_PAIRS = {"train": 4096, "test": 1024}


class Set(NamedTuple):
    """Pairs of one purpose.

    Attributes:
      pairs: texts.
      tokens: of each pair.
      facts: for reward.json: where they are from, rows read, pairs used, and pairs left out by reason.
    """

    pairs: list[Pair]
    tokens: list[TokenPair]
    facts: dict[str, Any]


def run(config: ConfigDict, workdir: Path, options: argparse.Namespace) -> int:
    """Trains, tests and exports; goes on wherever an earlier process in `workdir` stopped.

    Writes `hf/` (the model), `reward.json` (held-out accuracy with its interval, and what was left out),
    metrics.jsonl, cost.json and checkpoints.

    Raises:
      UserError: bad input, before anything is trained; pairs or a base model that are not those that the run in
        `workdir` began with; a loss that is not finite.
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
    """One training in `workdir`, which `config` has claimed; `name` is what metrics will call the model."""
    template = config.rm.template or HH_TEMPLATE
    base = _load_base(config, workdir)
    tokenizer = load_tokenizer(base.directory)
    encode = PairTokenizer(tokenizer, template=template, max_length=min(config.rm.max_tokens, base.config.n_positions))
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
    """Checks that pairs and base model are those that the run in `workdir` began with, also when it has finished."""
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


def load_sets(config: ConfigDict, encode: PairTokenizer, vocab_size: int) -> tuple[Set, Set]:
    """The pairs to learn from and those to test on; no prompt is in both.

    Args:
      config: `rm.train`, `rm.held_out` or else `rm.held_out_share`, and `seed`.
      encode: how pairs become tokens.
      vocab_size: of the network.

    Raises:
      UserError: a file without usable pairs, nothing left of either set, or a tokenizer of another model.
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
    for what, found in (("train", learned), ("held_out", tested)):
        if not found.pairs:
            raise UserError(f"config.rm.{what}: no pair is left ({_reasons(found.facts['dropped'])}); bring more")
        highest = max(max(ids) for pair in found.tokens for ids in pair)
        if highest >= vocab_size:
            raise UserError(
                f"config.model.checkpoint: its tokenizer gives token {highest}, but its network knows {vocab_size}; "
                "give a checkpoint whose files belong together"
            )
    return learned, tested


def _read(source: str, seed: int) -> Preferences:
    """`_pairs`; what a file's bad rows are is said on stderr."""
    found = _pairs(source, seed)
    if not source.startswith("organism:"):
        print(f"icet-jax: {found.report()}", file=sys.stderr)
    return found


def _pairs(source: str, seed: int) -> Preferences:
    """The pairs of a file, or the organism's own."""
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
    source: str, pairs: Sequence[Pair], read: int, dropped: Counter[str], encode: PairTokenizer
) -> Set:  # fmt: skip
    """Pairs whose two texts still differ once they are cut to the longest row."""
    tokens = tokenise(encode, pairs) if pairs else []
    kept = [index for index, (chosen, rejected) in enumerate(tokens) if chosen != rejected and chosen and rejected]
    dropped["the same within rm.max_tokens"] += len(pairs) - len(kept)
    left_out = {reason: count for reason, count in dropped.items() if count}
    facts = {"source": source, "read": read, "used": len(kept), "dropped": left_out}
    return Set([pairs[index] for index in kept], [tokens[index] for index in kept], facts)


def _train(
    config: ConfigDict, workdir: Path, trainer: RewardTrainer, state: RewardState, optimizer: OptimizerSettings
) -> tuple[RewardState, dict[str, float]]:
    """Every step that the newest checkpoint has not had; also the last step's numbers."""
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


def _estimate(interval: Interval, n: int) -> dict[str, Any]:
    ends = [interval.low, interval.high]
    return {"mean": interval.mean, "ci95": None if np.isnan(ends).any() else ends, "n": n}


def _reasons(dropped: dict[str, int]) -> str:
    return ", ".join(f"{reason}: {count}" for reason, count in dropped.items()) or "none was there"


def _summary(result: dict[str, Any]) -> str:
    accuracy, ends = result["accuracy"], result["accuracy"]["ci95"]
    interval = f" (95% interval {ends[0]:.1%} to {ends[1]:.1%})" if ends else ""
    left_out = _reasons(result["pairs"]["held_out"]["dropped"])
    return (
        f"{result['name']}: ranks {accuracy['mean']:.1%}{interval} of {accuracy['n']} held-out pairs correctly after "
        f"{result['steps']} steps over {result['pairs']['train']['used']} pairs; held-out pairs left out: {left_out}"
    )
