"""`--mode=labels` adds people as one more judge of a run's responses.

`--out=labels.csv` writes a sample of responses to label. `--labels=labels.csv` reads it back: the labelled responses
get the metric `asr/human`, and the run's tables, agreement and report are written again.
"""

import argparse
import json
import sys
from collections import Counter
from collections.abc import Mapping
from pathlib import Path

from ml_collections import ConfigDict

from icet_jax import report
from icet_jax.errors import UserError
from icet_jax.evaluation.summary import Row, difference, summarise
from icet_jax.files import JsonObject, seal, write_text_atomic
from icet_jax.report.loading import read_json
from icet_jax.runs import run_dir
from icet_jax.runs.agreement import finished_sweeps, read_transcript, write_agreement
from icet_jax.scorers.human import METRIC, Answer, read_labels, sample, to_csv


def run(config: ConfigDict, workdir: Path | None, options: argparse.Namespace) -> int:
    """Writes a sample of the run's responses for people to label, or adds their labels to the run; returns 0.

    One sample and one file of labels cover all seeds of a run.

    Args:
      config: unused; the config.json in the run directory is read instead.
      workdir: the run directory.
      options: `out`, the file to write, with `rows`, the number of responses, and `verdicts`, whether to show judges'
        verdicts; or `labels`, the file to read.

    Raises:
      UserError: there is no run, it has no responses to forbidden prompts yet, the file `out` exists already, or the
        file `labels` is not a table of labels.
    """
    if workdir is None or (options.out is None) == (options.labels is None):
        raise UserError(
            "--mode=labels needs --workdir=RUN and either --out=labels.csv (to write a sample) or --labels=labels.csv"
        )
    if not (workdir / "config.json").is_file():
        raise UserError(f"--workdir={workdir}: no run (config.json) is there; give the folder of a run")
    config = run_dir.read_config(workdir / "config.json")
    folders = {f"seed_{seed}": workdir / f"seed_{seed}" for seed in config.seeds} or {"": workdir}
    answers = [answer for name, folder in folders.items() for answer in _forbidden_answers(name, folder)]
    if not answers:
        raise UserError(f"--workdir={workdir}: has no finished sweep of forbidden rows to label; let it go on")
    if options.out is not None:
        _write_sample(answers, options, config.seed)
        return 0
    labels = read_labels(options.labels, {answer.key for answer in answers})
    _print_labels(labels.unsafe, labels.dropped, options.labels)
    if not labels.unsafe:
        raise UserError(f"--labels={options.labels}: gives no verdict on an answer of this run; fill in column unsafe")
    for name, folder in folders.items():
        _add_to_transcripts(labels.unsafe, name, folder)
        _summarise_again(folder)
        _print_agreement(write_agreement(folder))
        if folder != workdir:
            report.build(folder, reveal_unsafe=config.sweep.reveal_unsafe)
    page = report.build(workdir, reveal_unsafe=config.sweep.reveal_unsafe)
    print(f"report: {page}", file=sys.stderr)
    return 0


def _forbidden_answers(seed_name: str, folder: Path) -> list[Answer]:
    """Returns the answers to forbidden prompts in the run directory `folder`.

    `seed_name` is "seed_K", or "" if the run has one seed.
    """
    return [
        Answer(seed_name, dataset, side, row)
        for side, dataset, path in finished_sweeps(folder)
        for row in read_transcript(path)
        if row["kind"] == "forbidden"
    ]


def _write_sample(answers: list[Answer], options: argparse.Namespace, seed: int) -> None:
    """Writes at most `options.rows` randomly chosen answers to the CSV file `options.out`, and prints their number."""
    if options.out.exists():
        raise UserError(f"--out={options.out}: exists already and may hold labels; choose another name")
    if options.rows < 1:
        raise UserError(f"--rows={options.rows}: must be above 0")
    sampled = sample(answers, options.rows, seed)
    write_text_atomic(options.out, to_csv(sampled, verdicts=options.verdicts))
    print(
        f"{options.out}: {len(sampled)} of {len(answers)} answers. Fill in column unsafe with yes or no and keep "
        "column key; the answers may be offensive or dangerous, so mind who gets the file.",
        file=sys.stderr,
    )


def _add_to_transcripts(unsafe: Mapping[str, bool], seed_name: str, folder: Path) -> None:
    """Adds people's verdicts to the transcripts in the run directory `folder`.

    `unsafe` is {`Answer.key`: whether people call the answer unsafe}. `seed_name` is the part of these keys that names
    the seed, "" if the run has one seed.
    """
    for side, dataset, path in finished_sweeps(folder):
        rows = read_transcript(path)
        for row in rows:
            row.pop("crc32", None)  # the checksum of the row without the label
            verdict = unsafe.get(Answer(seed_name, dataset, side, row).key)
            if verdict is not None:
                row["scores"][METRIC] = float(verdict)
                row.setdefault("labels", {})[METRIC] = "unsafe" if verdict else "safe"
        write_text_atomic(path, "".join(seal(row) + "\n" for row in rows))


def _summarise_again(folder: Path) -> None:
    """Writes the tables of all finished sweeps and their differences again from the transcripts."""
    rows: dict[tuple[str, str], list[Row]] = {}
    for side, dataset, path in finished_sweeps(folder):
        rows[side, dataset] = read_transcript(path)
        sweep_file = folder / "sweeps" / f"{side}.{dataset}.json"
        content = read_json(sweep_file)
        exits = [layer["layer"] for layer in content["layers"]]
        _write(sweep_file, content | summarise(rows[side, dataset], exits, content["num_exits"]))
        difference_file = folder / "sweeps" / f"difference.{dataset}.json"
        if side == "after" and difference_file.exists():
            sides = rows["before", dataset], rows["after", dataset]
            _write(difference_file, read_json(difference_file) | difference(*sides, exits, content["num_exits"]))


def _print_labels(unsafe: Mapping[str, bool], dropped: Counter[str], path: Path) -> None:
    """Prints how many labels were read from `path`, and for each reason how many rows were left out."""
    print(f"{path}: {len(unsafe)} labels, {sum(unsafe.values())} of them unsafe", file=sys.stderr)
    for reason, count in dropped.most_common():
        print(f"  {count} rows left out: {reason}", file=sys.stderr)


def _print_agreement(table: JsonObject) -> None:
    """Prints the agreement of people with every other judge, from the content of agreement.json."""
    for pair in table["pairs"]:
        if METRIC in (pair["a"], pair["b"]):
            kappa = "undefined" if pair["kappa"] is None else f"{pair['kappa']:z.2f}"
            print(f"{pair['a']} and {pair['b']}: kappa {kappa} over {pair['n']} answers", file=sys.stderr)


def _write(path: Path, content: JsonObject) -> None:
    write_text_atomic(path, json.dumps(content, indent=1, allow_nan=False) + "\n")
