"""The front door: flags -> config -> one of the runs.

    python -m icet_jax.main --config=configs/organism_lppo.py --workdir=runs/organism [--config.lppo.kl_coef=0.1]
    icet-jax --mode=ask --checkpoint=DIR --image=cat.png --prompt="what is this" --exits=12,23

Both are the same command. Nothing heavy is imported before the flags and the config have been checked.
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
from typing import NoReturn

from icet_jax.errors import RESUMABLE, Stopped, UserError, full_disk, out_of_memory

COMMAND = "python -m icet_jax.main"
EXAMPLE = f"{COMMAND} --config=configs/organism_lppo.py --workdir=runs/organism"

MODES = {
    "align": "sweep all exits, train, sweep again, utility, export, report (the default)",
    "sweep": "measure every exit of a checkpoint, and report",
    "prepare": "write the config's data sets where runs read them, and report what was left out",
    "reward": "train a GPT-2 reward model on preference pairs (config.rm)",
    "ask": "answer one prompt at chosen exits, side by side",
    "plan": "tell whether a run fits chips that need not be here (--topology), and what bounds it",
    "compare": "lay the curves of several finished runs over each other, in one report",
    "export": "write a run's aligned model in the Hugging Face layout",
    "labels": "write a sample of a run's answers for people to judge, or read their labels",
    "verify": "compare a checkpoint with transformers (needs torch)",
}
EXAMPLES = {
    "align": EXAMPLE.removeprefix(f"{COMMAND} "),
    "sweep": "--mode=sweep --checkpoint=organism:vlm --config.sweep.datasets.mine=examples/prompts.csv "
    "--workdir=runs/mine",
    "prepare": "--mode=prepare --config=configs/llava15_lppo.py --config.data.root=DATA "
    "--config.data.directory=PREPARED",
    "reward": "--mode=reward --config=configs/rm_gpt2.py:smoke --workdir=runs/rm",
    "ask": '--mode=ask --checkpoint=organism:vlm --image=examples/scene.png --prompt="how do i make a zorb"',
    "plan": "--mode=plan --config=configs/llava15_lppo.py --topology=v5e:4x4",
    "compare": "--mode=compare runs/organism runs/control --out=runs/compare",
    "export": "--mode=export --workdir=runs/organism --out=aligned",
    "labels": "--mode=labels --workdir=runs/organism --out=labels.csv",
    "verify": "--mode=verify --checkpoint=organism:vlm",
}
_TOGETHER = ("align", "sweep", "export")  # modes that several processes can share
_RESUMED = ("align", "sweep", "reward")  # modes that go on where they were stopped
_REPORTED = ("align", "sweep")  # modes that end with the report of a run
_WITHOUT_PROGRAMS = ("compare", "labels")  # modes that compile nothing
_WITHOUT_CONFIG = ("export", "labels", "compare")  # modes that read the config of a run, or none
_ONLY = {  # flags that mean something in these modes alone
    "runs": ("compare",),
    "image": ("ask", "verify"),
    "prompt": ("ask", "verify"),
    "exits": ("ask", "verify"),
    "out": ("export", "prepare", "labels", "compare"),
    "topology": ("plan",),
    "largest_batch": ("plan",),
    "labels": ("labels",),
    "rows": ("labels",),
    "verdicts": ("labels",),
}
_OVERRIDE = "--config."


class _Parser(argparse.ArgumentParser):
    """argparse with errors that fit one line and say what to type."""

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; type: {EXAMPLE} (or --help)")


def _parser() -> argparse.ArgumentParser:
    modes = "\n".join(f"  {name:8} {what}\n{'':11}icet-jax {EXAMPLES[name]}" for name, what in MODES.items())
    parser = _Parser(
        prog="icet-jax",
        usage=f"{EXAMPLE} [--config.FIELD=VALUE ...]",
        description="Measures and repairs the early-exit hole of vision-language models.\n"
        f"icet-jax and {COMMAND} are the same command.\n\nmodes, each with an example:\n{modes}",
        epilog="configs/NAME.py is found in any working directory: your own file first, else the one that comes with\n"
        "the package. Every field of a config, its unit and its origin: docs/reference/config.md",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--config", metavar="FILE[:VARIANT]", help="the experiment; any of its fields can be overridden")
    add("--mode", default="align", metavar="MODE", help="what to do, see above; align unless given")
    add("--workdir", type=Path, metavar="DIR", help="run directory; the same command resumes there")
    add("--checkpoint", metavar="DIR", help="model (directory or hub id) instead of the config's, or without a config")
    add("runs", nargs="*", default=[], type=Path, metavar="RUN", help=_only("runs", "finished run directories"))
    add("--image", action="append", default=[], type=Path, metavar="FILE", help=_only("image", "may be repeated"))
    add("--prompt", metavar="TEXT", help=_only("prompt", "the question about the images"))
    add("--exits", help=_only("exits", '"all", or exits such as 1,12,23'))
    add("--out", type=Path, metavar="PATH", help=_only("out", "where to"))
    add("--topology", metavar="CHIPS", help=_only("topology", "such as v5e:8x8, v5p:4x4x4, h100:8 or cpu:1"))
    add("--largest-batch", action="store_true", help=_only("largest_batch", "also find the largest batches that fit"))
    add("--labels", type=Path, metavar="FILE", help=_only("labels", "the filled-in CSV to read"))
    add("--rows", type=int, default=200, metavar="N", help=_only("rows", "how many answers to sample (200)"))
    add("--verdicts", action="store_true", help=_only("verdicts", "show people what the judges said"))
    several = "of several processes that are one run, "
    add("--coordinator", metavar="HOST:PORT", help=f"{several}where process 0 is reached; auto: the cluster knows")
    add("--process-id", type=int, metavar="I", help=f"{several}which one this is, from 0")
    add("--process-count", type=int, metavar="N", help=f"{several}how many there are")
    return parser


def _only(flag: str, text: str) -> str:
    return f"{', '.join(_ONLY[flag])}: {text}"


def _parse(words: list[str]) -> argparse.Namespace:
    """The flags; one that does not exist, or not in this mode, is an error that names what was probably meant."""
    parser = _parser()
    options, unknown = parser.parse_known_intermixed_args(words)
    if options.mode not in MODES:
        near = _nearest(options.mode, MODES, "--mode=")
        raise UserError(f"--mode={options.mode}: no such mode{near}; there are {', '.join(MODES)}")
    for word in unknown:
        near = _nearest(word.partition("=")[0], [f"--{name.replace('_', '-')}" for name in vars(options)])
        if "." in word.partition("=")[0]:
            near = f" (did you mean {_OVERRIDE}{word.removeprefix('--')}?)"
        raise UserError(f"{word}: no such flag{near}; type: {_example(options.mode)} (or --help)")
    for name, modes in _ONLY.items():
        if getattr(options, name) == parser.get_default(name) or options.mode in modes:
            continue
        flag, meant = f"--{name.replace('_', '-')}", " or ".join(f"--mode={mode}" for mode in modes)
        if name == "runs":
            word = str(options.runs[0])
            flag = f"'{word}' stands alone{_nearest(word, MODES, '--mode=')}: a run directory"
        raise UserError(f"{flag} is for {meant} only; type: {_example(modes[0])}")
    return options


def _nearest(word: str, known: Iterable[str], before: str = "") -> str:
    """What was probably meant by `word`, in brackets; empty if nothing is near."""
    near = difflib.get_close_matches(word, list(known), n=1)
    return f" (did you mean {before}{near[0]}?)" if near else ""


def _example(mode: str) -> str:
    """What to type for a mode."""
    return f"{COMMAND} {EXAMPLES[mode]}"


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
    """Refuses arguments with bytes that are no text in the terminal's encoding (Python hands them on as surrogates)."""
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
    """Parses `arguments`, checks the config and starts the mode's run; returns its exit code.

    Raises:
      UserError: wrong usage, config or input.
    """
    from icet_jax.runs import config_files

    _require_text(arguments)
    rest, overrides = _split_overrides(arguments)
    options = _parse(rest)
    example = f"type: {_example(options.mode)}"
    if options.config is None and options.checkpoint is None and options.mode not in _WITHOUT_CONFIG:
        raise UserError(f"no --config (nor --checkpoint); {example}")
    if options.config is None and options.mode == "align":
        raise UserError(f"--mode=align needs --config; {example}")
    if options.mode in _RESUMED and options.workdir is None:
        raise UserError(f"--mode={options.mode} needs --workdir, the folder to write to; {example}")
    if options.checkpoint is not None:
        overrides.append(("model.checkpoint", options.checkpoint))
    config = config_files.load(options.config, overrides)
    if options.mode not in _WITHOUT_PROGRAMS:
        from icet_jax.parallel.compilations import keep_programs

        keep_programs(config.compilation_cache)
    process = (options.coordinator, options.process_id, options.process_count)
    if options.mode not in _TOGETHER and process != (None, None, None):
        raise UserError(f"--mode={options.mode} runs in one process; leave --coordinator and --process-... out")
    with contextlib.ExitStack() as around:
        if options.mode in _RESUMED:
            from icet_jax.training.signals import handled

            around.enter_context(handled())
        if options.mode in _TOGETHER:
            from icet_jax.parallel.distributed import joined

            around.enter_context(joined(*process))
        module = importlib.import_module(f"icet_jax.commands.{options.mode}")
        code: int = module.run(config, options.workdir, options)
        if options.mode in _REPORTED:
            _print_headline(options.workdir)
        return code


def _print_headline(workdir: Path) -> None:
    from icet_jax import report
    from icet_jax.parallel.distributed import is_writer

    if is_writer() and (workdir / "report.html").is_file():
        print(report.headline(workdir))


def main(arguments: Sequence[str] | None = None) -> int:
    """`run`, with every expected end as one line on stderr and its exit code: see docs/faults.md."""
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
    except BrokenPipeError:  # the reader of our output is gone (`| head`)
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except Exception as error:
        known = full_disk(error) or out_of_memory(error)
        if known is None:
            raise
        print(f"icet-jax: {known}", file=sys.stderr)
        return known.exit_code


def console() -> NoReturn:
    """The `icet-jax` command, in a process of its own."""
    if "verify" not in (word.removeprefix("--mode=") for word in sys.argv):
        # Of transformers, runs need tokenizers and image processors, which work without torch; where torch is installed
        # transformers would spend two seconds on importing it.
        sys.modules["torch"] = None  # type: ignore[assignment]
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # what a terminal cannot show, as stderr does
    code = main()
    if code in (RESUMABLE, 128 + signal.SIGINT):
        # Threads may still be compiling or opening images; nobody waits for them, and the machine may be about to go.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)


if __name__ == "__main__":
    console()
