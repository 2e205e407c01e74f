"""`--mode=reward` trains a reward model (GPT-2, Llama) on preference pairs and tests it on held-out pairs."""

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
from icet_jax.scorers.load import pad_token, save_reward_model
from icet_jax.scorers.networks import readable_positions
from icet_jax.scorers.reward_base import load_reward_base
from icet_jax.scorers.reward_model import PairTokenizer, pair_tokenizer, template_to_train
from icet_jax.training.metrics_log import MetricsLog
from icet_jax.training.progress import Progress
from icet_jax.training.reward_model import RewardState, RewardTrainer, TokenPair, tokenise
from icet_jax.training.signals import delay_signals

SCHEMA = 1
_REPEATED = "repeats an earlier pair"
_ORGANISM_PAIRS = {"train": 4096, "test": 1024}


class PairSet(NamedTuple):
    """Holds preference pairs for training or for testing.

    Attributes:
      pairs: the texts.
      tokens: the token ids of each pair.
      sources: the source of each pair.
      facts: entry of the set in reward.json: source, number of rows read, of pairs used, and of pairs left out by
        reason.
    """

    pairs: list[PreferencePair]
    tokens: list[TokenPair]
    sources: list[str]
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
    base = _load_base(config, workdir)
    tokenizer = load_tokenizer(base.directory)
    template = template_to_train(base.config, tokenizer, config.rm.template)
    longest = min(config.rm.max_tokens, readable_positions(base))
    encode = pair_tokenizer(base.config, tokenizer, template, max_length=longest, pad_id=pad_token(tokenizer))
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
            workdir / "hf", nnx.merge(base.graphdef, state.params), tokenizer, name=name, template=template,
            base=base.hf_config,
        )  # fmt: skip
    content = {
        "schema": SCHEMA,
        "name": name,
        "base": config.model.checkpoint,
        "steps": steps,
        "last_step": last_metrics,
        "pairs": {"train": train_set.facts, "held_out": held_out.facts},
        **_held_out_results(held_out, margins),
        "by_source": _results_by_source(held_out, margins),
    }
    write_text_atomic(workdir / "reward.json", json.dumps(content, indent=1) + "\n")


def _check_inputs(config: ConfigDict, workdir: Path) -> None:
    """Raises a `UserError` if pairs or base model differ from those that the run in `workdir` started with."""
    sets = {"train": config.rm.train, "held_out": config.rm.held_out}
    pairs = {name: _read_pairs(source, config.seed).pairs for name, source in sets.items() if source is not None}
    fingerprints.check_pairs(workdir, pairs)
    fingerprints.check_checkpoint(workdir, {"model": _base_directory(config, workdir)})


def _base_directory(config: ConfigDict, workdir: Path) -> Path:
    """Returns the folder of the checkpoint that training starts from."""
    return local_directory(sources.checkpoint_directory(config.model.checkpoint, workdir), config.model.revision)


def _load_base(config: ConfigDict, workdir: Path) -> Checkpoint:
    """Returns the model that training starts from, with a score head."""
    directory = _base_directory(config, workdir)
    mesh = visible_mesh(**config.mesh)
    return load_reward_base(directory, dtype=config.model.dtype, mesh=mesh, remat=config.model.remat, seed=config.seed)


def load_sets(config: ConfigDict, encode: PairTokenizer, vocab_size: int) -> tuple[PairSet, PairSet]:
    """Returns the pairs for training and the pairs for testing; no prompt is in both.

    Args:
      config: config of the run; `rm.train`, `rm.held_out` or else `rm.held_out_share`, and `seed` are used.
      encode: encodes pairs as token ids.
      vocab_size: number of tokens that the network knows.

    Raises:
      UserError: a file has no usable pairs, nothing is left of a set, or the tokenizer belongs to another model.
    """
    train = _read_pairs(config.rm.train, config.seed, report=True)
    held_out = train
    if config.rm.held_out is None:
        train_pairs, test_pairs = split_by_prompt(train.pairs, config.rm.held_out_share, config.seed)
        test_read, test_dropped = len(test_pairs), Counter[str]()
        train.dropped["held out"] += test_read
    else:
        held_out = _read_pairs(config.rm.held_out, config.seed, report=True)
        train_pairs, test_pairs = train.pairs, without_prompts(held_out.pairs, train.pairs)
        test_read, test_dropped = held_out.read, held_out.dropped
        test_dropped["a prompt of the training pairs"] += len(held_out.pairs) - len(test_pairs)
    train_set = _tokenise_set(train, train_pairs, train.read, train.dropped, encode)
    test_set = _tokenise_set(held_out, test_pairs, test_read, test_dropped, encode)
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


def _read_pairs(source: str, seed: int, *, report: bool = False) -> Preferences:
    """Returns the pairs of a source, or of several sources joined by `SOURCE_JOIN`, in their order.

    A pair that an earlier source has too is left out. With `report`, it prints for each file how many rows were left
    out and why.
    """
    parts = [part.strip() for part in source.split(sources.SOURCE_JOIN)]
    if not all(parts):
        raise UserError(f"{source}: a source is missing beside '{sources.SOURCE_JOIN}'")
    read, dropped, pairs = 0, Counter[str](), list[PreferencePair]()
    source_of: dict[PreferencePair, str] = {}
    for part in parts:
        preferences = _read_source(part, seed)
        if report and not part.startswith("organism:"):
            print(f"icet-jax: {preferences.report()}", file=sys.stderr)
        read += preferences.read
        dropped.update(preferences.dropped)
        new = [pair for pair in preferences.pairs if pair not in source_of]
        if len(new) < len(preferences.pairs):
            dropped[_REPEATED] += len(preferences.pairs) - len(new)
        source_of |= dict.fromkeys(new, part)
        pairs += new
    return Preferences(source, pairs, read, dropped, sources=source_of)


def _read_source(source: str, seed: int) -> Preferences:
    """Returns the pairs of a file, or pairs generated for the small embedded test model ("organism:train:COUNT")."""
    origin, _, rest = source.partition(":")
    if origin != "organism":
        return read_pairs(source)
    from icet_jax.organism.preferences import preference_pairs

    split, _, count = rest.partition(":")
    if split not in _ORGANISM_PAIRS or (count and not (count.isdigit() and int(count))):
        raise UserError(f"{source}: write organism:train[:COUNT] or organism:test[:COUNT]")
    pairs = preference_pairs(split, int(count or _ORGANISM_PAIRS[split]), seed)
    return Preferences(source, pairs, len(pairs))


def _tokenise_set(
    origin: Preferences, pairs: Sequence[PreferencePair], read: int, dropped: Counter[str], encode: PairTokenizer
) -> PairSet:  # fmt: skip
    """Returns the pairs as token ids; pairs whose two texts are the same after truncation are left out.

    `origin` is what the pairs were read from. `read` is the number of rows read from the source. `dropped` is {reason:
    number of rows left out so far}, to which this function adds.
    """
    tokens = tokenise(encode, pairs) if pairs else []
    usable = [index for index, (chosen, rejected) in enumerate(tokens) if chosen != rejected and chosen and rejected]
    dropped["the same within rm.max_tokens"] += len(pairs) - len(usable)
    left_out = {reason: count for reason, count in dropped.items() if count}
    facts = {"source": origin.source, "read": read, "used": len(usable), "dropped": left_out}
    used = [pairs[index] for index in usable]
    return PairSet(used, [tokens[index] for index in usable], [origin.sources[pair] for pair in used], facts)


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


def _held_out_results(held_out: PairSet, margins: np.ndarray) -> JsonObject:
    """Returns accuracy and mean margin of held-out pairs, from the margin of each, in the form of reward.json."""
    prompts = [prompt for prompt, _, _ in held_out.pairs]
    return {
        "accuracy": _to_json(mean_interval((margins > 0).astype(float), prompts, share=True), len(prompts)),
        "margin": _to_json(mean_interval(margins, prompts, share=False), len(prompts)),
    }


def _results_by_source(held_out: PairSet, margins: np.ndarray) -> dict[str, JsonObject]:
    """Returns {source: results of the held-out pairs that were read from it}."""
    results = {}
    for source in dict.fromkeys(held_out.sources):
        rows = [index for index, name in enumerate(held_out.sources) if name == source]
        part = held_out._replace(pairs=[held_out.pairs[index] for index in rows])
        results[source] = _held_out_results(part, margins[rows])
    return results


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
    parts = {source: part["accuracy"] for source, part in result.get("by_source", {}).items()}
    by_source = ", ".join(f"{source} {part['mean']:.1%} of {part['n']}" for source, part in parts.items())
    left_out = _reasons(result["pairs"]["held_out"]["dropped"])
    return (
        f"{result['name']}: ranks {accuracy['mean']:.1%}{interval} of {accuracy['n']} held-out pairs correctly after "
        f"{result['steps']} steps over {result['pairs']['train']['used']} pairs"
        f"{f' ({by_source})' if len(parts) > 1 else ''}; held-out pairs left out: {left_out}"
    )
