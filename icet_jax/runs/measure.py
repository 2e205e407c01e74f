"""Measures the sweeps of a run: every data set before and after training, paired differences, and utility."""

import json
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from ml_collections import ConfigDict

from icet_jax.evaluation.combined import row_attempts, transcript_key
from icet_jax.evaluation.cost import Cost, estimate
from icet_jax.evaluation.encoder_cost import encoder_cost
from icet_jax.evaluation.geometry import geometry
from icet_jax.evaluation.recheck import answer_again
from icet_jax.evaluation.summary import difference
from icet_jax.evaluation.sweep import SweepProgress, SweepResult, sweep
from icet_jax.evaluation.transcripts import finished_rows
from icet_jax.files import JsonObject, read_text, write_text_atomic
from icet_jax.parallel.compilations import Compiling
from icet_jax.parallel.distributed import agree, is_writer, on_first
from icet_jax.report.pictures import save_pictures
from icet_jax.runs.common import RunInputs, model_name
from icet_jax.runs.forecast import paragraph
from icet_jax.training.progress import Progress
from icet_jax.vlm import VLM

SCHEMA = 1


class Measurements:
    """Measures the sweeps and utility sets of one run directory. A set whose result file exists is not measured again.

    The argument `side` of the methods is "before" or "after" (training) and says which model is measured.
    """

    def __init__(self, config: ConfigDict, workdir: Path, inputs: RunInputs):
        """Stores the judges and the test rows of `inputs`; nothing is measured yet."""
        self._config, self._workdir = config, workdir
        self._scorers, self._utility_scorers = inputs.scorers, inputs.utility_scorers
        self._tests = inputs.tests

    def sweeps(self, side: str, vlm: VLM) -> int:
        """Writes `sweeps/SIDE.DATASET.json` for each data set; returns the number of generated tokens."""
        paths = {name: self._workdir / "sweeps" / f"{side}.{name}.json" for name in self._config.sweep.datasets}
        self._announce(side, vlm, paths)
        return sum(self._measure(side, name, vlm, path) for name, path in paths.items())

    def utility(self, side: str, vlm: VLM) -> int:
        """Measures the utility sets and adds the results to `utility.json`; returns the number of generated tokens."""
        names, path = list(self._config.sweep.utility), self._workdir / "utility.json"
        if not names:
            return 0
        content: JsonObject = _read(path) if path.exists() else {"schema": SCHEMA}
        parts = {name: self._workdir / "sweeps" / ".utility" / f"{side}.{name}.json" for name in names}
        self._announce(side, vlm, parts)
        tokens = sum(self._measure(side, name, vlm, part) for name, part in parts.items())
        if not is_writer():
            return tokens
        content[side] = {name: _read(part) for name, part in parts.items()}
        if side == "after":
            content["difference"] = {name: self._difference(name, content["after"][name]) for name in names}
        _write(path, content)
        return tokens

    def differences(self) -> None:
        """Writes `sweeps/difference.DATASET.json` for each data set: after minus before on the same rows."""
        if not is_writer():
            return
        for name in self._config.sweep.datasets:
            after = _read(self._workdir / "sweeps" / f"after.{name}.json")
            _write(self._workdir / "sweeps" / f"difference.{name}.json", self._difference(name, after))

    def is_complete(self, side: str) -> bool:
        """Returns whether every sweep and utility set of a side has been measured. All processes must call this."""
        settings, folder = self._config.sweep, self._workdir / "sweeps"
        paths = [folder / f"{side}.{name}.json" for name in settings.datasets]
        paths += [folder / ".utility" / f"{side}.{name}.json" for name in settings.utility]
        return agree(all(path.exists() for path in paths))

    def sizes(self) -> dict[str, tuple[int, int]]:
        """Returns {swept data set: (number of rows, number of measured exits)}. All processes must call this."""
        return {name: (len(self._tests[name]), len(self._exits(name))) for name in self._config.sweep.datasets}

    def differing(self, name: str, vlm: VLM, pairs: Sequence[tuple[int, int]]) -> list[tuple[str, int]]:
        """Returns (row id, exit) for each answer of `vlm` that differs from the one measured after training.

        All processes must call this method.

        Args:
          name: name of a data set whose sweep after training is complete.
          vlm: the model to compare.
          pairs: where to compare: (index of the row in the data set, index of the exit among the measured exits).

        Raises:
          UserError: the transcript of the sweep is damaged.
        """
        exits, rows = self._exits(name), self._tests[name]
        requested_exits: dict[int, list[int]] = {}  # by index of the row
        for row, exit_index in pairs:
            requested_exits.setdefault(row, []).append(exits[exit_index])
        if not requested_exits:
            return []
        settings = {
            key: value for key, value in self._sweep_settings(name, vlm).items() if key in ("sampling", "batch_size")
        }
        settings |= {"seed": self._config.seed, "compile_ahead": Compiling}
        answers = answer_again(vlm, rows, requested_exits, **settings)

        def compare() -> list[tuple[str, int]]:
            """Returns (row id, exit) of the differing answers; only the first process, which has the transcript, calls
            this function."""
            keys = [(rows[row].id, layer, 0) for row, layer in sorted(answers)]
            transcript = finished_rows(self._transcript("after", name), keys)
            measured = {transcript_key(row): (row["response"], row["scores"]["length"]) for row in transcript}
            return [
                (rows[row].id, layer)
                for (row, layer), answer in sorted(answers.items())
                if measured[rows[row].id, layer, 0] != (answer.text, answer.length)
            ]

        return [(row, layer) for row, layer in on_first(compare)]

    def _exits(self, name: str) -> list[int]:
        """Returns the exits at which a data set was measured after training. All processes must call this."""
        path = self._workdir / "sweeps" / f"after.{name}.json"
        return on_first(lambda: [layer["layer"] for layer in _read(path)["layers"]])

    def geometry(self, vlm: VLM) -> None:
        """Writes `geometry.json`: how far the image features of each exit are from those of the default exit.

        Training does not change the image encoder, so this is measured once.
        """
        path = self._workdir / "geometry.json"
        rows = [row for examples in self._tests.values() for row in examples if row.images]
        if rows and not agree(path.exists()):
            _write(path, geometry(vlm, rows))

    def encoder_cost(self, vlm: VLM) -> None:
        """Writes `encoder.json`: operations and weights of the image encoder at every exit, and the time it takes."""
        path = self._workdir / "encoder.json"
        rows = [row for examples in self._tests.values() for row in examples if row.images]
        if not agree(path.exists()):
            _write(path, encoder_cost(vlm, rows))

    def reuse_before_of_other_seeds(self) -> None:
        """Copies the measurements before training from another seed of the same run, if answers are greedy.

        Greedy answers do not depend on the seed.
        """
        if not is_writer() or self._config.sweep.temperature > 0 or not re.fullmatch(r"seed_\d+", self._workdir.name):
            return
        for sweep_file in self._workdir.parent.glob("seed_*/sweeps/**/before.*.json"):
            other = next(folder for folder in sweep_file.parents if folder.parent == self._workdir.parent)
            transcripts = other / "transcripts" / f"{sweep_file.stem}.jsonl"
            # The sweep's file is copied last, because its existence means that the transcripts are complete.
            for source in (transcripts, sweep_file):
                target = self._workdir / source.relative_to(other)
                if not target.exists():
                    write_text_atomic(target, source.read_text(encoding="utf-8"))

    def _announce(self, side: str, vlm: VLM, paths: Mapping[str, Path]) -> None:
        """Prints the expected cost of the sweeps that are still to be run.

        `paths` is {data set: result file of its sweep}; sweeps whose file exists are left out.
        """
        missing = [name for name, path in paths.items() if not path.exists()]
        dtype = self._config.model.dtype
        costs = [estimate(vlm, self._tests[name], dtype=dtype, **self._sweep_settings(name, vlm)) for name in missing]
        if costs:
            print(paragraph(f"{side} {', '.join(missing)}", sum(costs, Cost())), file=sys.stderr)

    def _sweep_settings(self, name: str, vlm: VLM) -> JsonObject:
        """Returns the arguments of a data set's sweep on which its cost depends."""
        settings = self._config.sweep
        sampling = vlm.sampling(settings.max_new_tokens, settings.temperature, settings.top_k, settings.top_p)
        return {
            "exits": settings.exits,
            "sampling": sampling,
            "scorers": self._utility_scorers if name in settings.utility else self._scorers,
            "batch_size": settings.batch_size,
            "attempts": settings.attempts,
        }

    def _measure(self, side: str, name: str, vlm: VLM, path: Path) -> int:
        """Sweeps a data set and writes the result to `path`; returns the number of generated tokens.

        If `path` exists, nothing is done and the result is 0.
        """
        if agree(path.exists()):
            return 0
        result: SweepResult = sweep(
            vlm,
            self._tests[name],
            **self._sweep_settings(name, vlm),
            transcript_path=self._transcript(side, name),
            progress=_progress_display(f"{side} {name}"),
            dataset=name,
            model=model_name(self._config),
            seed=self._config.seed,
            tag=side,
            compile_ahead=Compiling,
        )
        save_pictures(self._workdir, name, self._tests[name])
        _write(path, result.sweep)
        return result.tokens

    def _difference(self, name: str, after: JsonObject) -> JsonObject:
        """Returns the paired differences of a data set; `after` is the content of its sweep file after training."""
        exits = [layer["layer"] for layer in after["layers"]]
        required = [
            (example.id, layer, attempt)
            for example in self._tests[name]
            for layer in exits
            for attempt in range(row_attempts(example.kind, self._config.sweep.attempts))
        ]
        rows = {side: finished_rows(self._transcript(side, name), required) for side in ("before", "after")}
        tables = difference(rows["before"], rows["after"], exits, after["num_exits"])
        return {"schema": SCHEMA, "dataset": name, "kind": after["kind"], **tables}

    def _transcript(self, side: str, name: str) -> Path:
        return self._workdir / "transcripts" / f"{side}.{name}.jsonl"


def _progress_display(what: str) -> Callable[[SweepProgress], None]:
    """Returns a function that takes the state of the sweep `what` whenever it changes, and shows its progress.

    As soon as some answers have been timed, the function also prints the expected duration, once.
    """
    bar: Progress | None = None
    is_announced = False

    def show(state: SweepProgress) -> None:
        nonlocal bar, is_announced
        if bar is None:
            bar = Progress(what, state.total, start=state.done)
        if state.seconds_left is not None and not is_announced:
            is_announced = True
            print(f"{what}: about {state.seconds_left:.0f} s", file=sys.stderr)
        shown = {} if state.tokens_per_second is None else {"tokens/s": state.tokens_per_second}
        bar.advance(shown, to=state.done)

    return show


def _read(path: Path) -> JsonObject:
    return json.loads(read_text(path))


def _write(path: Path, content: JsonObject) -> None:
    write_text_atomic(path, json.dumps(content, indent=1, allow_nan=False) + "\n")
