"""Sweeps of a run: every data set before and after training, their paired differences, utility."""

import json
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from icet_jax.evaluation.cost import Cost, estimate
from icet_jax.evaluation.geometry import geometry
from icet_jax.evaluation.recheck import answer_again
from icet_jax.evaluation.summary import difference
from icet_jax.evaluation.sweep import SweepProgress, SweepResult, sweep
from icet_jax.evaluation.transcripts import finished_rows
from icet_jax.files import read_text, write_text_atomic
from icet_jax.parallel.compilations import compile_programs
from icet_jax.parallel.distributed import agree, is_writer, on_first
from icet_jax.report.pictures import save_pictures
from icet_jax.runs.common import Setting, model_name
from icet_jax.runs.forecast import paragraph
from icet_jax.training.progress import Progress
from icet_jax.vlm import VLM

SCHEMA = 1


class Measurements:
    """The sweeps and utility files of one run directory. A finished file is never measured again."""

    def __init__(self, config: ConfigDict, workdir: Path, setting: Setting):
        """`setting`: what measures, and the rows of every data set that the config names."""
        self._config, self._workdir = config, workdir
        self._scorers, self._utility_scorers = setting.scorers, setting.utility_scorers
        self._tests = setting.tests

    def sweeps(self, phase: str, vlm: VLM) -> int:
        """Writes `sweeps/PHASE.DATASET.json` for each data set ("before" or "after"); returns the tokens generated."""
        paths = {name: self._workdir / "sweeps" / f"{phase}.{name}.json" for name in self._config.sweep.datasets}
        self._announce(phase, vlm, paths)
        return sum(self._measure(phase, name, vlm, path) for name, path in paths.items())

    def utility(self, phase: str, vlm: VLM) -> int:
        """Adds the utility sets to `utility.json`; returns the tokens generated."""
        names, path = list(self._config.sweep.utility), self._workdir / "utility.json"
        if not names:
            return 0
        content: dict[str, Any] = _read(path) if path.exists() else {"schema": SCHEMA}
        parts = {name: self._workdir / "sweeps" / ".utility" / f"{phase}.{name}.json" for name in names}
        self._announce(phase, vlm, parts)
        tokens = sum(self._measure(phase, name, vlm, part) for name, part in parts.items())
        if not is_writer():
            return tokens
        content[phase] = {name: _read(part) for name, part in parts.items()}
        if phase == "after":
            content["difference"] = {name: self._difference(name, content["after"][name]) for name in names}
        _write(path, content)
        return tokens

    def differences(self) -> None:
        """Writes `sweeps/difference.DATASET.json`, after - before on the same rows."""
        if not is_writer():
            return
        for name in self._config.sweep.datasets:
            after = _read(self._workdir / "sweeps" / f"after.{name}.json")
            _write(self._workdir / "sweeps" / f"difference.{name}.json", self._difference(name, after))

    def is_complete(self, phase: str) -> bool:
        """Whether every sweep and utility set of a phase has been measured; all processes call it."""
        settings, folder = self._config.sweep, self._workdir / "sweeps"
        paths = [folder / f"{phase}.{name}.json" for name in settings.datasets]
        paths += [folder / ".utility" / f"{phase}.{name}.json" for name in settings.utility]
        return agree(all(path.exists() for path in paths))

    def sizes(self) -> dict[str, tuple[int, int]]:
        """(rows, exits) of every swept data set; all processes call it."""
        return {name: (len(self._tests[name]), len(self._exits(name))) for name in self._config.sweep.datasets}

    def differing(self, name: str, vlm: VLM, pairs: Sequence[tuple[int, int]]) -> list[tuple[str, int]]:
        """The (row id, exit) that `vlm` answers otherwise than the model that was measured after training.

        All processes call it.

        Args:
          name: of a data set whose sweep after training is complete.
          vlm: the model to ask.
          pairs: (number of the row, place of the exit among those measured) to ask about.

        Raises:
          UserError: the sweep's transcript is damaged.
        """
        exits, rows = self._exits(name), self._tests[name]
        wanted: dict[int, list[int]] = {}
        for row, place in pairs:
            wanted.setdefault(row, []).append(exits[place])
        if not wanted:
            return []
        how = {key: value for key, value in self._how(name, vlm).items() if key in ("sampling", "batch_size")}
        how |= {"seed": self._config.seed, "compile_ahead": compile_programs}
        answers = answer_again(vlm, rows, wanted, **how)

        def compare() -> list[tuple[str, int]]:
            keys = [(rows[row].id, layer) for row, layer in sorted(answers)]
            transcript = finished_rows(self._transcripts("after", name), keys)
            known = {(row["id"], row["layer"]): (row["response"], row["scores"]["length"]) for row in transcript}
            return [
                (rows[row].id, layer)
                for (row, layer), answer in sorted(answers.items())
                if known[rows[row].id, layer] != (answer.text, answer.length)
            ]

        return [(row, layer) for row, layer in on_first(compare)]

    def _exits(self, name: str) -> list[int]:
        path = self._workdir / "sweeps" / f"after.{name}.json"
        return on_first(lambda: [layer["layer"] for layer in _read(path)["layers"]])

    def geometry(self, vlm: VLM) -> None:
        """Writes `geometry.json`, how far P(e_l) lies from the default exit's; training cannot change it."""
        path = self._workdir / "geometry.json"
        rows = [row for examples in self._tests.values() for row in examples if row.images]
        if rows and not agree(path.exists()):
            _write(path, geometry(vlm, rows))

    def reuse_before_of_other_seeds(self) -> None:
        """Takes what another seed's run beside this one measured before training: greedy answers have no seed."""
        if not is_writer() or self._config.sweep.temperature > 0 or not re.fullmatch(r"seed_\d+", self._workdir.name):
            return
        for sweep_file in self._workdir.parent.glob("seed_*/sweeps/**/before.*.json"):
            other = next(folder for folder in sweep_file.parents if folder.parent == self._workdir.parent)
            transcripts = other / "transcripts" / f"{sweep_file.stem}.jsonl"
            # The sweep's file last: it is what says that its transcripts are complete.
            for source in (transcripts, sweep_file):
                target = self._workdir / source.relative_to(other)
                if not target.exists():
                    write_text_atomic(target, source.read_text(encoding="utf-8"))

    def _announce(self, phase: str, vlm: VLM, paths: Mapping[str, Path]) -> None:
        """Says what the sweeps whose files are not there yet will take."""
        missing = [name for name, path in paths.items() if not path.exists()]
        dtype = self._config.model.dtype
        costs = [estimate(vlm, self._tests[name], dtype=dtype, **self._how(name, vlm)) for name in missing]
        if costs:
            print(paragraph(f"{phase} {', '.join(missing)}", sum(costs, Cost())), file=sys.stderr)

    def _how(self, name: str, vlm: VLM) -> dict[str, Any]:
        """The settings of a data set's sweep that its cost depends on."""
        settings = self._config.sweep
        limit = (settings.max_new_tokens, settings.temperature, settings.top_k, settings.top_p)
        return {
            "exits": settings.exits,
            "sampling": vlm.sampling(*limit),
            "scorers": self._utility_scorers if name in settings.utility else self._scorers,
            "batch_size": settings.batch_size,
        }

    def _measure(self, phase: str, name: str, vlm: VLM, path: Path) -> int:
        if agree(path.exists()):
            return 0
        result: SweepResult = sweep(
            vlm,
            self._tests[name],
            **self._how(name, vlm),
            transcript_path=self._transcripts(phase, name),
            progress=_show(f"{phase} {name}"),
            dataset=name,
            model=model_name(self._config),
            seed=self._config.seed,
            tag=phase,
            compile_ahead=compile_programs,
        )
        save_pictures(self._workdir, name, self._tests[name])
        _write(path, result.sweep)
        return result.tokens

    def _difference(self, name: str, after: dict[str, Any]) -> dict[str, Any]:
        exits = [layer["layer"] for layer in after["layers"]]
        wanted = [(example.id, layer) for example in self._tests[name] for layer in exits]
        rows = {phase: finished_rows(self._transcripts(phase, name), wanted) for phase in ("before", "after")}
        tables = difference(rows["before"], rows["after"], exits, after["num_exits"])
        return {"schema": SCHEMA, "dataset": name, "kind": after["kind"], **tables}

    def _transcripts(self, phase: str, name: str) -> Path:
        return self._workdir / "transcripts" / f"{phase}.{name}.jsonl"


def _show(what: str) -> Callable[[SweepProgress], None]:
    """Shows a sweep's progress, and says how long it will take as soon as some answers have been timed."""
    bar: list[Progress] = []
    announced: list[float] = []

    def show(state: SweepProgress) -> None:
        if not bar:
            bar.append(Progress(what, state.total, start=state.done))
        if state.seconds_left is not None and not announced:
            announced.append(state.seconds_left)
            print(f"{what}: about {state.seconds_left:.0f} s", file=sys.stderr)
        shown = {} if state.tokens_per_second is None else {"tokens/s": state.tokens_per_second}
        bar[0].advance(shown, to=state.done)

    return show


def _read(path: Path) -> dict[str, Any]:
    return json.loads(read_text(path))


def _write(path: Path, content: dict[str, Any]) -> None:
    write_text_atomic(path, json.dumps(content, indent=1, allow_nan=False) + "\n")
