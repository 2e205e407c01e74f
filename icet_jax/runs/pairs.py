"""The exit pairs of a run: made from answers to its training rows (the *harvest*) or read from a file.

    pairs/answers.jsonl    the model's answers in the harvest, from which an interrupted harvest continues
    pairs/harvest.jsonl    the pairs of the run's training rows
    pairs/sweep.jsonl      the pairs of the sets in `config.sweep.training_sets`, written by --mode=sweep

All three files may contain harmful text, as transcripts may.
"""

import json
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

import jax
import numpy as np
from ml_collections import ConfigDict

from icet_jax.algorithms.base import algorithm_class
from icet_jax.algorithms.ldpo import answer_ids
from icet_jax.algorithms.phases import draw_exits
from icet_jax.algorithms.settings import from_config
from icet_jax.data.batches import Batches
from icet_jax.data.pairs import ExitPair, PairRecord, read_exit_pairs, write_exit_pairs
from icet_jax.data.records import Example
from icet_jax.errors import UserError
from icet_jax.evaluation.harvest import answers_at, drawn_exits, exit_pairs
from icet_jax.evaluation.transcripts import finished_rows
from icet_jax.files import parse_json, read_text, write_text_atomic
from icet_jax.parallel.compilations import Compiling
from icet_jax.parallel.distributed import agree, on_first
from icet_jax.runs import fingerprints
from icet_jax.runs.run_dir import PAIRS, Costs
from icet_jax.runs.sources import TRAIN
from icet_jax.training.progress import Progress
from icet_jax.vlm import VLM

_SET, _IN_DATA = "ldpo.pairs", "exit pairs"  # entries in fingerprints.json and data.json; no data set has these names
_NO_ROW, _TOO_LONG = "of no row of config.data.train", "longer than config.lppo.max_new_tokens"


def training_rows(
    config: ConfigDict, workdir: Path, vlm: VLM, rows: Sequence[Example], costs: Costs
) -> list[Example]:  # fmt: skip
    """Returns what the run's algorithm trains on: exit pairs if it learns from pairs (L-DPO), otherwise `rows`.

    Args:
      config: config of the run.
      workdir: run directory, whose fingerprints of the training rows are recorded.
      vlm: the model before training.
      rows: the training rows whose prompts fit the model.
      costs: the costs of the run, to which a harvest is added as the stage `harvest`.

    Raises:
      UserError: the file of pairs is broken or has pairs of test rows, pairs have changed since the run began, or a
        kind of the mixture has no pair.
    """
    if not algorithm_class(config.algorithm).paired:
        return list(rows)
    path = workdir / PAIRS / "harvest.jsonl"
    if config.ldpo.pairs:
        path = Path(config.ldpo.pairs)
    elif not agree(path.exists()):
        with costs.stage("harvest") as cost:
            harvested, cost["tokens"] = _harvest(config, workdir, vlm, rows)
            write_exit_pairs(path, harvested)
    records = [PairRecord(*record) for record in on_first(lambda: list(read_exit_pairs(path, vlm.num_exits)))]
    pairs, left_out = _of_rows(config, workdir, vlm, path, rows, records)
    _report(workdir, path, pairs, left_out)
    for kind, share in config.data.mixture.items():
        if share > 0 and all(pair.kind != kind for pair in pairs):
            raise UserError(f"{path}: no pair is of a {kind} row of config.data.train; set the share of {kind} to 0")
    contents = [(f"{pair.id} at exit {pair.exit_layer}", pair.chosen, pair.rejected) for pair in pairs]
    fingerprints.check_pairs(workdir, {_SET: contents})
    return list(pairs)


def _harvest(
    config: ConfigDict, workdir: Path, vlm: VLM, rows: Sequence[Example]
) -> tuple[list[PairRecord], int]:  # fmt: skip
    """Returns the pairs of the training rows, and the number of generated tokens.

    The rows are those of the run's batches and the exits those that the schedule draws for them, as in the rollouts of
    the other algorithms.

    Raises:
      UserError: a kind of the mixture has no pair.
    """
    mixture, default = config.data.mixture.to_dict(), vlm.default_exit
    settings = from_config(config, vlm.sampling(config.lppo.max_new_tokens))
    batches = Batches(rows, mixture=mixture, batch_size=config.data.batch_size, seed=config.seed)
    sizes = {"batch": config.data.batch_size, "num_exits": vlm.num_exits, "default_exit": default}
    key = jax.random.key(config.seed)
    drawn = drawn_exits(
        rows,
        (
            (batches.batch(index), np.asarray(draw_exits(settings, key, index, **sizes)))
            for index in range(max(config.ldpo.iterations, 1))  # also a run that only measures has a first batch
        ),
    )
    requested: dict[int, set[int]] = {}
    for row, layer in drawn:
        requested.setdefault(row, {default}).update([layer] if rows[row].kind == "forbidden" else [])
    with Progress("harvest", sum(map(len, requested.values()))) as progress:
        answers, tokens = answers_at(
            vlm,
            rows,
            {row: sorted(exits) for row, exits in requested.items()},
            sampling=settings.sampling,
            batch_size=config.sweep.batch_size,
            path=workdir / PAIRS / "answers.jsonl",
            progress=lambda done: progress.advance(to=done),
            compile_ahead=Compiling,
        )
    recorded = fingerprints.recorded_rows(workdir)[TRAIN]
    pairs = exit_pairs(rows, [recorded[row.id] for row in rows], drawn, answers, default)
    kinds, paired = {row.id: row.kind for row in rows}, {pair.id for pair in pairs}
    for kind in batches.quotas:
        if not any(kinds[identity] == kind for identity in paired):
            asked = sum(rows[row].kind == kind for row in requested)
            raise UserError(
                f"harvest of config.data.train: none of {asked} {kind} rows gives a pair: L-DPO needs forbidden rows "
                f"that exit {default}, the default one, refuses and a drawn exit does not, and other rows that exit "
                f"{default} answers; sweep first (--mode=sweep), or set the share of {kind} in config.data.mixture to 0"
            )
    return pairs, tokens


def _of_rows(
    config: ConfigDict, workdir: Path, vlm: VLM, path: Path, rows: Sequence[Example], records: Sequence[PairRecord]
) -> tuple[list[ExitPair], Counter[str]]:  # fmt: skip
    """Returns the pairs that can be trained on, and {reason: number of pairs that were left out}.

    Raises:
      UserError: a pair belongs to a row that the run measures and does not train on.
    """
    recorded = fingerprints.recorded_rows(workdir)
    marks = recorded[TRAIN]
    by_mark = {marks[row.id]: row for row in rows}
    measured = {
        mark: name
        for name in (*config.sweep.datasets, *config.sweep.utility)
        for mark in recorded.get(name, {}).values()
    }
    pairs: list[ExitPair] = []
    left_out: Counter[str] = Counter()
    for record in records:
        row = by_mark.get(record.fingerprint)
        if row is None and record.fingerprint in measured and record.fingerprint not in marks.values():
            raise UserError(
                f"{path}: line {record.line}: fingerprint is that of a row of {measured[record.fingerprint]}, which "
                "this run measures; pairs come from training rows alone: make them from config.data.train"
            )
        if row is None:
            left_out[_NO_ROW] += 1
        elif any(_ids(config, vlm, text) is None for text in (record.chosen, record.rejected)):
            left_out[_TOO_LONG] += 1
        else:
            pairs.append(record.of_row(row))
    return pairs, left_out


def _ids(config: ConfigDict, vlm: VLM, text: str) -> list[int] | None:
    return answer_ids(
        vlm.processor.tokenizer, text, eos_id=vlm.eos_ids[0], length=config.lppo.max_new_tokens
    )  # fmt: skip


def _report(workdir: Path, path: Path, pairs: Sequence[ExitPair], left_out: Mapping[str, int]) -> None:
    """Prints how many pairs are used and how many are left out, and adds both numbers to `data.json`."""
    kinds = dict(Counter(pair.kind for pair in pairs))
    by_kind = ", ".join(f"{count} {kind}" for kind, count in kinds.items()) or "none"
    reasons = ", ".join(f"{count} {reason}" for reason, count in left_out.items())
    missing = f"; left out: {reasons}" if reasons else ""
    print(f"icet-jax: {path}: {len(pairs)} pairs ({by_kind}){missing}", file=sys.stderr)

    def write() -> None:
        facts = workdir / "data.json"
        content = parse_json(read_text(facts)) if facts.exists() else {}
        content.setdefault("rows", {})[_IN_DATA] = kinds
        if left_out:
            content.setdefault("left_out", {})[_IN_DATA] = dict(left_out)
        content["pairs_at_exit"] = {str(layer): count for layer, count in Counter(p.exit_layer for p in pairs).items()}
        write_text_atomic(facts, json.dumps(content, indent=1, sort_keys=True) + "\n")

    on_first(write)


def check_training_sets(config: ConfigDict, vlm: VLM) -> None:
    """Raises a `UserError` if pairs are requested from a sweep that does not measure the default exit."""
    exits = config.sweep.exits
    if config.sweep.training_sets and exits != "all" and vlm.default_exit not in exits:
        raise UserError(
            f"config.sweep.exits leaves out exit {vlm.default_exit}, the default one, whose answers are the chosen "
            "ones of config.sweep.training_sets; add it"
        )


def write_sweep_pairs(config: ConfigDict, workdir: Path, vlm: VLM, tests: Mapping[str, Sequence[Example]]) -> None:
    """Writes the pairs of the sets in `config.sweep.training_sets`, from the transcripts of the sweep.

    If no set is listed there, nothing is written.

    Args:
      config: config of the run.
      workdir: run directory whose sweeps before training are complete.
      vlm: the model.
      tests: rows of every set.

    Raises:
      UserError: a transcript is damaged.
    """
    exits = range(1, vlm.num_exits + 1) if config.sweep.exits == "all" else config.sweep.exits
    recorded = fingerprints.recorded_rows(workdir)
    rows: list[Example] = []
    marks: list[str] = []
    answers: dict[tuple[int, int], str] = {}
    for name in config.sweep.training_sets:
        required = [(row.id, layer, 0) for row in tests[name] for layer in exits]
        transcript = finished_rows(workdir / "transcripts" / f"before.{name}.jsonl", required)
        responses = {(row["id"], row["layer"]): row["response"] for row in transcript if not row.get("attempt")}
        for number, row in enumerate(tests[name], start=len(rows)):
            answers |= {(number, layer): responses[row.id, layer] for layer in exits}
        marks += [recorded[name][row.id] for row in tests[name]]
        rows += tests[name]
    if not rows:
        return
    pairs = exit_pairs(rows, marks, list(answers), answers, vlm.default_exit)
    path = workdir / PAIRS / "sweep.jsonl"
    write_exit_pairs(path, pairs)
    print(f"icet-jax: {path}: {len(pairs)} pairs of {len(rows)} training rows", file=sys.stderr)
