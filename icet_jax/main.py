"""The command line: reads the flags, loads and checks the config, and runs one of the modes.

    icet-jax align --config=configs/organism_lppo.py --workdir=runs/organism [--config.lppo.kl_coef=0.1]
    icet-jax ask --checkpoint=DIR --image=cat.png --prompt="what is this" --exits=12,23
    python -m icet_jax.main --mode=ask --checkpoint=DIR --prompt="what is this"      # the same command, written out

jax is imported only after the flags and the config have been checked.

Overrides (`--config.FIELD=VALUE`) are read here and not by `ml_collections.config_flags`, which cannot add a key to a
field that is a dict (`--config.sweep.datasets.mine=rows.csv`), unset a field (`none`), or split a list of words. That
module also reports an unknown field in two lines or without a similar name, and needs `--config` before every override.
"""

import argparse
import contextlib
import difflib
import gc
import importlib
import io
import os
import signal
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple, NoReturn

import icet_jax
from icet_jax.errors import RESUMABLE, WRONG_INPUT, StopRun, UserError, full_disk, out_of_memory

COMMAND = "python -m icet_jax.main"
EXAMPLE = f"{COMMAND} --config=configs/organism_lppo.py --workdir=runs/organism"


class Mode(NamedTuple):
    """Describes one mode of the command line, which `icet_jax.commands.NAME` implements.

    Attributes:
      about: what the mode does, for --help.
      example: arguments of a command that works.
      flags: flags of this mode, apart from those that all modes have.
      takes_config: whether it needs --config or --checkpoint; other modes read the config of a run directory, or none.
      resumes: whether it writes to --workdir, where the same command continues after an interruption.
      reports: whether it prints the headline of a report at the end.
      is_shared: whether several processes can run it together.
      compiles: whether it compiles programs, which are stored for later runs.
      defaults: (field, value) of the config fields that have another default in this mode if no --config is given.
    """

    about: str
    example: str
    flags: tuple[str, ...] = ()
    takes_config: bool = True
    resumes: bool = False
    reports: bool = False
    is_shared: bool = False
    compiles: bool = True
    defaults: tuple[tuple[str, str], ...] = ()


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
    "export": Mode("write a run's aligned model in the Hugging Face layout, or one exit of it (--exit)",
        "export --workdir=runs/organism --out=aligned", flags=("out", "exit"), takes_config=False, is_shared=True),
    "labels": Mode("write a sample of a run's answers for people to judge, or read their labels",
        "labels --workdir=runs/organism --out=labels.csv", flags=("out", "labels", "rows", "verdicts"),
        takes_config=False, compiles=False),
    "verify": Mode("compare a checkpoint with transformers (needs torch)",
        "verify --checkpoint=organism:vlm", flags=("image", "prompt", "exits"), defaults=(("model.dtype", "float32"),)),
}
# fmt: on
_OVERRIDE = "--config."
_USAGE = "icet-jax [MODE] [--config=FILE] [--checkpoint=DIR] [--workdir=DIR] [--config.FIELD=VALUE ...]"


class _Parser(argparse.ArgumentParser):
    """An argparse parser that raises a one-line UserError with an example instead of printing its usage."""

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; type: {EXAMPLE} (or --help)")


def _build_parser(mode: str | None = None) -> argparse.ArgumentParser:
    """Returns a parser of all flags, whose --help describes only `mode` and its flags; None describes all modes."""
    shown_modes = {mode: MODES[mode]} if mode in MODES else MODES
    modes = "\n".join(
        f"  {name:8} {shown.about}\n{'':11}icet-jax {shown.example}" for name, shown in shown_modes.items()
    )
    parser = _Parser(
        prog="icet-jax",
        usage=_USAGE if shown_modes is MODES else _USAGE.replace("[MODE]", str(mode)),
        description="Measures and repairs the early-exit hole of vision-language models.\n\n"
        f"modes, each with an example:\n{modes}",
        epilog=f"icet-jax and {COMMAND} are the same command, and --mode=NAME is the same as NAME as the first word.\n"
        "configs/NAME.py is found in any working directory: your own file first, else the one that comes with\n"
        "the package. --fields lists every field of a config.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )

    def help_of_mode(flag: str, text: str) -> str:
        """Returns the help of a flag that only some modes have; hides it if `mode` does not have it."""
        if shown_modes is not MODES and flag not in MODES[str(mode)].flags:
            return argparse.SUPPRESS
        return f"{', '.join(_modes_with(flag))}: {text}"

    add = parser.add_argument
    add("--version", action="version", version=f"icet-jax {icet_jax.__version__}")
    add("--fields", nargs="?", const="", metavar="SECTION", help="list the fields of a config, such as --fields=lppo")
    add("--config", metavar="FILE[:VARIANT]", help="the experiment; any of its fields can be overridden")
    add("--mode", default="align", metavar="MODE", help="what to do, see above; align unless given")
    add("--workdir", type=Path, metavar="DIR", help="run directory; the same command resumes there")
    add("--checkpoint", metavar="DIR", help="model (directory or hub id) instead of the config's, or without a config")
    add("runs", nargs="*", default=[], type=Path, metavar="RUN", help=help_of_mode("runs", "finished run directories"))
    add(
        "--image", action="append", default=[], type=Path, metavar="FILE", help=help_of_mode("image", "may be repeated")
    )
    add("--prompt", metavar="TEXT", help=help_of_mode("prompt", "the question about the images"))
    add("--exits", help=help_of_mode("exits", '"all", or exits such as 1,12,23'))
    add("--exit", type=_exit_number, metavar="L",
        help=help_of_mode("exit", "write a model with this exit alone, without the encoder's blocks behind it; "
                          "of --workdir's run or of any --checkpoint"))  # fmt: skip
    add("--out", type=Path, metavar="PATH", help=help_of_mode("out", "where to write"))
    add("--topology", metavar="CHIPS", help=help_of_mode("topology", "such as v5e:8x8, v5p:4x4x4, h100:8 or cpu:1"))
    add(
        "--largest-batch",
        action="store_true",
        help=help_of_mode("largest_batch", "also find the largest batches that fit"),
    )
    add("--labels", type=Path, metavar="FILE", help=help_of_mode("labels", "the filled-in CSV to read"))
    add("--rows", type=int, default=200, metavar="N", help=help_of_mode("rows", "how many answers to sample (200)"))
    add("--verdicts", action="store_true", help=help_of_mode("verdicts", "show people what the judges said"))

    def help_of_processes(text: str) -> str:
        """Returns the help of a flag for runs of several processes; hides it if `mode` runs in one process."""
        is_shared = shown_modes is MODES or MODES[str(mode)].is_shared
        return f"of several processes that are one run, {text}" if is_shared else argparse.SUPPRESS

    add("--coordinator", metavar="HOST:PORT",
        help=help_of_processes("where process 0 is reached; auto: the cluster knows"))  # fmt: skip
    add("--process-id", type=int, metavar="I", help=help_of_processes("which one this is, from 0"))
    add("--process-count", type=int, metavar="N", help=help_of_processes("how many there are"))
    return parser


def _exit_number(word: str) -> int:
    """Returns the value of --exit; raises a `UserError` if it is not a whole number."""
    try:
        return int(word)
    except ValueError as error:
        raise UserError(f"--exit={word}: give one exit, a whole number such as 12") from error


def _modes_with(flag: str) -> list[str]:
    """Returns the modes that list a flag in `Mode.flags`; none for a flag that all modes have."""
    return [name for name, mode in MODES.items() if flag in mode.flags]


def _parse(words: list[str]) -> argparse.Namespace:
    """Returns the values of all flags.

    Raises:
      UserError: a flag or mode does not exist, or the mode does not have a flag. The line suggests a similar name.
    """
    words = _mode_as_flag(words)
    mode = next((word.removeprefix("--mode=") for word in words if word.startswith("--mode=")), None)
    parser = _build_parser(mode)
    options, unknown = parser.parse_known_intermixed_args(words)
    if options.mode not in MODES:
        hint = _did_you_mean(options.mode, MODES, "--mode=")
        raise UserError(f"--mode={options.mode}: no such mode{hint}; there are {', '.join(MODES)}")
    for word in unknown:
        hint = _did_you_mean(word.partition("=")[0], [f"--{name.replace('_', '-')}" for name in vars(options)])
        if "." in word.partition("=")[0]:
            hint = f" (did you mean {_OVERRIDE}{word.removeprefix('--')}?)"
        raise UserError(f"{word}: no such flag{hint}; type: {_example(options.mode)} (or --help)")
    for name, value in vars(options).items():
        modes = _modes_with(name)
        if not modes or value == parser.get_default(name) or options.mode in modes:
            continue
        flag, modes_text = f"--{name.replace('_', '-')}", " or ".join(f"--mode={mode}" for mode in modes)
        if name == "runs":
            word = str(options.runs[0])
            flag = f"'{word}' stands alone{_did_you_mean(word, MODES)}: a mode is the first word, and a run directory"
        raise UserError(f"{flag} is for {modes_text} only; type: {_example(modes[0])}")
    return options


def _mode_as_flag(words: list[str]) -> list[str]:
    """Returns the arguments with a mode's name at the beginning replaced by `--mode=NAME`."""
    if not words or words[0] not in MODES:
        return words
    mode_flag = next((word for word in words[1:] if word.partition("=")[0] == "--mode"), None)
    if mode_flag is not None:
        raise UserError(f"{words[0]} and {mode_flag}: the mode is given twice; leave one out")
    return [f"--mode={words[0]}", *words[1:]]


def _did_you_mean(word: str, candidates: Iterable[str], prefix: str = "") -> str:
    """Returns " (did you mean ...?)" with the most similar candidate, after `prefix`; "" if none is similar."""
    similar = difflib.get_close_matches(word, list(candidates), n=1)
    return f" (did you mean {prefix}{similar[0]}?)" if similar else ""


def _example(mode: str) -> str:
    """Returns a command that runs a mode."""
    return f"{COMMAND} {MODES[mode].example}"


def _split_overrides(arguments: Sequence[str]) -> tuple[list[str], list[tuple[str, str]]]:
    """Returns (all other arguments, (FIELD, VALUE) of each `--config.FIELD=VALUE` or `--config.FIELD VALUE`)."""
    flags: list[str] = []
    overrides: list[tuple[str, str]] = []
    queue = list(arguments)
    while queue:
        word = queue.pop(0)
        if not word.startswith(_OVERRIDE):
            flags.append(word)
            continue
        name, equals, value = word.removeprefix(_OVERRIDE).partition("=")
        if not equals:
            if not queue or queue[0].startswith("--"):
                raise UserError(f"{word} has no value; type {word}=VALUE")
            value = queue.pop(0)
        overrides.append((name, value))
    return flags, overrides


def _require_text(arguments: Sequence[str]) -> None:
    """Raises a UserError if an argument has bytes that are not text in the terminal's encoding.

    Python passes such bytes on as surrogate characters.
    """
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
    """Parses the command line, checks the config, runs the mode and returns its exit code.

    Raises:
      UserError: wrong usage, config or input.
    """
    if not arguments:
        print(_short_usage(), file=sys.stderr)
        return WRONG_INPUT
    _require_text(arguments)
    flags, overrides = _split_overrides(arguments)
    options = _parse(flags)
    if options.fields is not None:
        print(_field_list(options.fields))
        return 0
    mode = MODES[options.mode]
    _require_inputs(options, mode)
    from icet_jax.runs import config_files

    if options.config is None:
        overrides = [*mode.defaults, *overrides]
    if options.checkpoint is not None:
        overrides.append(("model.checkpoint", options.checkpoint))
    config = config_files.load(options.config, overrides)
    from icet_jax.media.library_messages import quiet_pillow

    quiet_pillow()
    if mode.compiles:
        from icet_jax.parallel.compilations import keep_programs

        keep_programs(config.compilation_cache)
    with contextlib.ExitStack() as contexts:
        if mode.resumes:
            from icet_jax.training.signals import handle_signals

            contexts.enter_context(handle_signals())
        if mode.is_shared:
            from icet_jax.parallel.distributed import join_processes

            contexts.enter_context(join_processes(options.coordinator, options.process_id, options.process_count))
        module = importlib.import_module(f"icet_jax.commands.{options.mode}")
        code: int = module.run(config, options.workdir, options)
        if mode.reports:
            _print_headline(options.workdir)
        return code


def _require_inputs(options: argparse.Namespace, mode: Mode) -> None:
    """Raises a UserError if the config, checkpoint or run directory that the mode needs is missing."""
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
    """Returns the text that is printed for a command without arguments."""
    modes = "\n".join(f"  {name:8} {mode.about}" for name, mode in MODES.items())
    return f"usage: {_USAGE}\n\n{modes}\n\nicet-jax --help shows an example of each mode, and every flag."


def _field_list(section: str) -> str:
    """Returns the text of --fields: all fields of one section of the config, or of all if `section` is empty.

    Raises:
      UserError: there is no such section.
    """
    from icet_jax.config import FIELDS

    fields = {name: field for name, field in FIELDS.items() if f"{name}.".startswith(f"{section}." if section else "")}
    if not fields:
        sections = dict.fromkeys(name.partition(".")[0] for name in FIELDS)
        hint = _did_you_mean(section, [*sections, *FIELDS])
        raise UserError(f"--fields={section}: no such section{hint}; there are {', '.join(sections)}")
    return "\n".join(f"--config.{name}={field.summary()}\n    {field.about}" for name, field in fields.items())


def _print_headline(workdir: Path) -> None:
    """Prints the headline of the run's report, in the process that writes."""
    from icet_jax import report
    from icet_jax.parallel.distributed import is_writer

    if is_writer() and (workdir / "report.html").is_file():
        print(report.headline(workdir))


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line and returns its exit code; an expected error is one line on stderr (docs/faults.md)."""
    try:
        return run(sys.argv[1:] if arguments is None else arguments)
    except UserError as error:
        print(f"icet-jax: {error}", file=sys.stderr)
        return error.exit_code
    except StopRun as stop:
        print(f"icet-jax: {stop.line}", file=sys.stderr)
        return RESUMABLE
    except KeyboardInterrupt:
        print("\nicet-jax: interrupted; the same command goes on from the last checkpoint", file=sys.stderr)
        return 128 + signal.SIGINT
    except BrokenPipeError:  # the program that reads the output has stopped (`| head`)
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except Exception as error:
        user_error = full_disk(error) or out_of_memory(error)
        if user_error is None:
            raise
        print(f"icet-jax: {user_error}", file=sys.stderr)
        return user_error.exit_code


def console() -> NoReturn:
    """Runs the command line and ends the process; the entry point of the `icet-jax` command."""
    # With Python's default of 700 objects, the garbage collector runs 900 times in a run of the toy model and takes
    # 15 % of its processor time. What is imported and traced stays.
    gc.set_threshold(20_000, 20, 20)
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
