"""The command line: flags -> config -> one of the modes.

    icet-jax align --config=configs/organism_lppo.py --workdir=runs/organism [--config.lppo.kl_coef=0.1]
    icet-jax ask --checkpoint=DIR --image=cat.png --prompt="what is this" --exits=12,23
    python -m icet_jax.main --mode=ask --checkpoint=DIR --prompt="what is this"      # the same command, written out

Nothing heavy is imported before the flags and the config have been checked.

The overrides are read here and not by `ml_collections.config_flags`, which cannot add a key to a table
(`--config.sweep.datasets.mine=rows.csv`), unset a field (`none`), or split a list of words. It reports an unknown field
in two lines or without the nearest name, and needs `--config` in front of every override.
"""

import argparse
import contextlib
import difflib
import importlib
import io
import os
import signal
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple, NoReturn

import icet_jax
from icet_jax.errors import RESUMABLE, WRONG_INPUT, Stopped, UserError, full_disk, out_of_memory

COMMAND = "python -m icet_jax.main"
EXAMPLE = f"{COMMAND} --config=configs/organism_lppo.py --workdir=runs/organism"


class Mode(NamedTuple):
    """One thing that the command line can do. Its code is `icet_jax.commands.NAME`.

    Attributes:
      about: what it does, as --help says it.
      example: the arguments of a command that works.
      flags: the flags that have a meaning in this mode and not in every mode.
      takes_config: False where the mode reads the config of a run directory, or none.
      resumes: it writes to --workdir, and the same command continues there after a stop.
      reports: it ends with the headline of a report.
      is_shared: several processes can run it together.
      compiles: it compiles programs, which are kept for later runs.
    """

    about: str
    example: str
    flags: tuple[str, ...] = ()
    takes_config: bool = True
    resumes: bool = False
    reports: bool = False
    is_shared: bool = False
    compiles: bool = True


# fmt: off
MODES = {
    "align": Mode("sweep all exits, train, sweep again, utility, export, report (the default)",
        "align --config=configs/organism_lppo.py --workdir=runs/organism", resumes=True, reports=True, is_shared=True),
    "sweep": Mode("measure every exit of a checkpoint, and report",
        "sweep --checkpoint=organism:vlm --config.sweep.datasets.mine=examples/prompts.csv --workdir=runs/mine",
        resumes=True, reports=True, is_shared=True),
    "prepare": Mode("write the config's data sets where runs read them, and report what was left out",
        "prepare --config=configs/llava15_lppo.py --config.data.root=DATA --config.data.directory=PREPARED",
        flags=("out",)),
    "reward": Mode("train a GPT-2 reward model on preference pairs (config.rm)",
        "reward --config=configs/rm_gpt2.py:smoke --workdir=runs/rm", resumes=True),
    "ask": Mode("answer one prompt at chosen exits, side by side",
        'ask --checkpoint=organism:vlm --image=examples/scene.png --prompt="how do i make a zorb"',
        flags=("image", "prompt", "exits")),
    "plan": Mode("tell whether a run fits chips that need not be here (--topology), and what bounds it",
        "plan --config=configs/llava15_lppo.py --topology=v5e:4x4", flags=("topology", "largest_batch")),
    "compare": Mode("lay the curves of several finished runs over each other, in one report",
        "compare runs/organism runs/control --out=runs/compare", flags=("runs", "out"), takes_config=False,
        compiles=False),
    "export": Mode("write a run's aligned model in the Hugging Face layout",
        "export --workdir=runs/organism --out=aligned", flags=("out",), takes_config=False, is_shared=True),
    "labels": Mode("write a sample of a run's answers for people to judge, or read their labels",
        "labels --workdir=runs/organism --out=labels.csv", flags=("out", "labels", "rows", "verdicts"),
        takes_config=False, compiles=False),
    "verify": Mode("compare a checkpoint with transformers (needs torch)",
        "verify --checkpoint=organism:vlm", flags=("image", "prompt", "exits")),
}
# fmt: on
_OVERRIDE = "--config."
_USAGE = "icet-jax [MODE] [--config=FILE] [--checkpoint=DIR] [--workdir=DIR] [--config.FIELD=VALUE ...]"


class _Parser(argparse.ArgumentParser):
    """argparse with errors that fit one line and say what to type."""

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; type: {EXAMPLE} (or --help)")


def _parser(mode: str | None = None) -> argparse.ArgumentParser:
    """Returns the parser. The help of one `mode` leaves out the flags of others."""
    shown = {mode: MODES[mode]} if mode in MODES else MODES
    modes = "\n".join(f"  {name:8} {one.about}\n{'':11}icet-jax {one.example}" for name, one in shown.items())
    parser = _Parser(
        prog="icet-jax",
        usage=_USAGE if shown is MODES else _USAGE.replace("[MODE]", str(mode)),
        description="Measures and repairs the early-exit hole of vision-language models.\n\n"
        f"modes, each with an example:\n{modes}",
        epilog=f"icet-jax and {COMMAND} are the same command, and --mode=NAME is the same as NAME as the first word.\n"
        "configs/NAME.py is found in any working directory: your own file first, else the one that comes with\n"
        "the package. --fields lists every field of a config.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )

    def only(flag: str, text: str) -> str:
        if shown is not MODES and flag not in MODES[str(mode)].flags:
            return argparse.SUPPRESS
        return f"{', '.join(_modes_with(flag))}: {text}"

    add = parser.add_argument
    add("--version", action="version", version=f"icet-jax {icet_jax.__version__}")
    add("--fields", nargs="?", const="", metavar="SECTION", help="list the fields of a config, such as --fields=lppo")
    add("--config", metavar="FILE[:VARIANT]", help="the experiment; any of its fields can be overridden")
    add("--mode", default="align", metavar="MODE", help="what to do, see above; align unless given")
    add("--workdir", type=Path, metavar="DIR", help="run directory; the same command resumes there")
    add("--checkpoint", metavar="DIR", help="model (directory or hub id) instead of the config's, or without a config")
    add("runs", nargs="*", default=[], type=Path, metavar="RUN", help=only("runs", "finished run directories"))
    add("--image", action="append", default=[], type=Path, metavar="FILE", help=only("image", "may be repeated"))
    add("--prompt", metavar="TEXT", help=only("prompt", "the question about the images"))
    add("--exits", help=only("exits", '"all", or exits such as 1,12,23'))
    add("--out", type=Path, metavar="PATH", help=only("out", "where to write"))
    add("--topology", metavar="CHIPS", help=only("topology", "such as v5e:8x8, v5p:4x4x4, h100:8 or cpu:1"))
    add("--largest-batch", action="store_true", help=only("largest_batch", "also find the largest batches that fit"))
    add("--labels", type=Path, metavar="FILE", help=only("labels", "the filled-in CSV to read"))
    add("--rows", type=int, default=200, metavar="N", help=only("rows", "how many answers to sample (200)"))
    add("--verdicts", action="store_true", help=only("verdicts", "show people what the judges said"))

    def several(text: str) -> str:
        is_shared = shown is MODES or MODES[str(mode)].is_shared
        return f"of several processes that are one run, {text}" if is_shared else argparse.SUPPRESS

    add("--coordinator", metavar="HOST:PORT", help=several("where process 0 is reached; auto: the cluster knows"))
    add("--process-id", type=int, metavar="I", help=several("which one this is, from 0"))
    add("--process-count", type=int, metavar="N", help=several("how many there are"))
    return parser


def _modes_with(flag: str) -> list[str]:
    """The modes in which a flag has a meaning; none for a flag of every mode."""
    return [name for name, mode in MODES.items() if flag in mode.flags]


def _parse(words: list[str]) -> argparse.Namespace:
    """Reads the flags. One that does not exist, or not in this mode, is an error that names the nearest."""
    words = _mode_as_flag(words)
    mode = next((word.removeprefix("--mode=") for word in words if word.startswith("--mode=")), None)
    parser = _parser(mode)
    options, unknown = parser.parse_known_intermixed_args(words)
    if options.mode not in MODES:
        near = _nearest(options.mode, MODES, "--mode=")
        raise UserError(f"--mode={options.mode}: no such mode{near}; there are {', '.join(MODES)}")
    for word in unknown:
        near = _nearest(word.partition("=")[0], [f"--{name.replace('_', '-')}" for name in vars(options)])
        if "." in word.partition("=")[0]:
            near = f" (did you mean {_OVERRIDE}{word.removeprefix('--')}?)"
        raise UserError(f"{word}: no such flag{near}; type: {_example(options.mode)} (or --help)")
    for name, value in vars(options).items():
        modes = _modes_with(name)
        if not modes or value == parser.get_default(name) or options.mode in modes:
            continue
        flag, meant = f"--{name.replace('_', '-')}", " or ".join(f"--mode={mode}" for mode in modes)
        if name == "runs":
            word = str(options.runs[0])
            flag = f"'{word}' stands alone{_nearest(word, MODES)}: a mode is the first word, and a run directory"
        raise UserError(f"{flag} is for {meant} only; type: {_example(modes[0])}")
    return options


def _mode_as_flag(words: list[str]) -> list[str]:
    """Reads a mode's name as the first word as `--mode=NAME`."""
    if not words or words[0] not in MODES:
        return words
    again = next((word for word in words[1:] if word.partition("=")[0] == "--mode"), None)
    if again is not None:
        raise UserError(f"{words[0]} and {again}: the mode is given twice; leave one out")
    return [f"--mode={words[0]}", *words[1:]]


def _nearest(word: str, known: Iterable[str], before: str = "") -> str:
    """Returns what was probably meant by `word`, in brackets; empty if nothing is near."""
    near = difflib.get_close_matches(word, list(known), n=1)
    return f" (did you mean {before}{near[0]}?)" if near else ""


def _example(mode: str) -> str:
    """Returns what to type for a mode."""
    return f"{COMMAND} {MODES[mode].example}"


def _split_overrides(arguments: Sequence[str]) -> tuple[list[str], list[tuple[str, str]]]:
    """Separates `--config.FIELD=VALUE` (or two words) from the other flags."""
    rest: list[str] = []
    overrides: list[tuple[str, str]] = []
    queue = list(arguments)
    while queue:
        word = queue.pop(0)
        if not word.startswith(_OVERRIDE):
            rest.append(word)
            continue
        name, equals, value = word.removeprefix(_OVERRIDE).partition("=")
        if not equals:
            if not queue or queue[0].startswith("--"):
                raise UserError(f"{word} has no value; type {word}=VALUE")
            value = queue.pop(0)
        overrides.append((name, value))
    return rest, overrides


def _require_text(arguments: Sequence[str]) -> None:
    """Refuses bytes that are not text in the terminal's encoding, which Python passes on as surrogates."""
    flag = ""
    for word in arguments:
        name, equals, _ = word.partition("=")
        flag = name if word.startswith("--") else flag
        if any("\ud800" <= char <= "\udfff" for char in word):
            where = flag if flag and (equals or word != flag) else ascii(word)
            raise UserError(
                f"{where}: holds bytes that are not text in this terminal's encoding, {sys.getfilesystemencoding()}; "
                "write it as UTF-8, with LC_ALL=C.UTF-8 set"
            )


def run(arguments: Sequence[str]) -> int:
    """Parses `arguments`, checks the config and starts the mode; returns its exit code.

    Raises:
      UserError: wrong usage, config or input.
    """
    if not arguments:
        print(_short_usage(), file=sys.stderr)
        return WRONG_INPUT
    _require_text(arguments)
    rest, overrides = _split_overrides(arguments)
    options = _parse(rest)
    if options.fields is not None:
        print(_field_list(options.fields))
        return 0
    mode = MODES[options.mode]
    _require_inputs(options, mode)
    from icet_jax.runs import config_files

    if options.checkpoint is not None:
        overrides.append(("model.checkpoint", options.checkpoint))
    config = config_files.load(options.config, overrides)
    if mode.compiles:
        from icet_jax.parallel.compilations import keep_programs

        keep_programs(config.compilation_cache)
    with contextlib.ExitStack() as around:
        if mode.resumes:
            from icet_jax.training.signals import handled

            around.enter_context(handled())
        if mode.is_shared:
            from icet_jax.parallel.distributed import joined

            around.enter_context(joined(options.coordinator, options.process_id, options.process_count))
        module = importlib.import_module(f"icet_jax.commands.{options.mode}")
        code: int = module.run(config, options.workdir, options)
        if mode.reports:
            _print_headline(options.workdir)
        return code


def _require_inputs(options: argparse.Namespace, mode: Mode) -> None:
    """Refuses a command without the config, checkpoint or run directory that its mode needs."""
    example = f"type: {_example(options.mode)}"
    if mode.takes_config and options.config is None and options.checkpoint is None:
        raise UserError(f"no --config (nor --checkpoint); {example}")
    if options.config is None and options.mode == "align":
        raise UserError(f"--mode=align needs --config; {example}")
    if mode.resumes and options.workdir is None:
        raise UserError(f"--mode={options.mode} needs --workdir, the folder to write to; {example}")
    process = (options.coordinator, options.process_id, options.process_count)
    if not mode.is_shared and process != (None, None, None):
        raise UserError(f"--mode={options.mode} runs in one process; leave --coordinator and --process-... out")


def _short_usage() -> str:
    """Returns what the command prints without arguments."""
    modes = "\n".join(f"  {name:8} {mode.about}" for name, mode in MODES.items())
    return f"usage: {_USAGE}\n\n{modes}\n\nicet-jax --help shows an example of each mode, and every flag."


def _field_list(section: str) -> str:
    """Returns the fields of a config, or of one section of it, as lines of text."""
    from icet_jax.config import FIELDS

    shown = {name: field for name, field in FIELDS.items() if f"{name}.".startswith(f"{section}." if section else "")}
    if not shown:
        sections = dict.fromkeys(name.partition(".")[0] for name in FIELDS)
        near = _nearest(section, [*sections, *FIELDS])
        raise UserError(f"--fields={section}: no such section{near}; there are {', '.join(sections)}")
    return "\n".join(f"--config.{name}={field.summary()}\n    {field.about}" for name, field in shown.items())


def _print_headline(workdir: Path) -> None:
    from icet_jax import report
    from icet_jax.parallel.distributed import is_writer

    if is_writer() and (workdir / "report.html").is_file():
        print(report.headline(workdir))


def main(arguments: Sequence[str] | None = None) -> int:
    """Does what `run` does, and turns every expected end into one line on stderr and an exit code (docs/faults.md)."""
    try:
        return run(sys.argv[1:] if arguments is None else arguments)
    except UserError as error:
        print(f"icet-jax: {error}", file=sys.stderr)
        return error.exit_code
    except Stopped as stop:
        print(f"icet-jax: {stop.line}", file=sys.stderr)
        return RESUMABLE
    except KeyboardInterrupt:
        print("\nicet-jax: interrupted; the same command goes on from the last checkpoint", file=sys.stderr)
        return 128 + signal.SIGINT
    except BrokenPipeError:  # whoever reads our output has stopped (`| head`)
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except Exception as error:
        known = full_disk(error) or out_of_memory(error)
        if known is None:
            raise
        print(f"icet-jax: {known}", file=sys.stderr)
        return known.exit_code


def console() -> NoReturn:
    """Runs the `icet-jax` command, in a process of its own."""
    if "verify" not in (word.removeprefix("--mode=") for word in sys.argv):
        # Runs use the tokenizers and image processors of transformers, which work without torch. Where torch is
        # installed, transformers would spend two seconds on importing it.
        sys.modules["torch"] = None  # type: ignore[assignment]
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # what a terminal cannot show, as stderr does
    code = main()
    if code in (RESUMABLE, 128 + signal.SIGINT):
        # Threads may still be compiling or opening images. Do not wait for them: the machine may be about to stop.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)


if __name__ == "__main__":
    console()
