"""The front door: flags -> config -> one of the runs.

    python -m icet_jax.main --config=configs/organism_lppo.py --workdir=runs/organism [--config.lppo.kl_coef=0.1]
    python -m icet_jax.main --mode=ask --checkpoint=DIR --image=cat.png --prompt="what is this" --exits=12,23

Nothing heavy is imported before the flags and the config have been checked.
"""

import argparse
import contextlib
import importlib
import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from icet_jax.errors import RESUMABLE, Stopped, UserError, full_disk

EXAMPLE = "python -m icet_jax.main --config=configs/organism_lppo.py --workdir=runs/organism"

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
    "verify": "compare a checkpoint with transformers (needs the `test` extra)",
}
_TOGETHER = ("align", "sweep", "export")  # modes that several processes can share
_RESUMED = ("align", "sweep", "reward")  # modes that go on where they were stopped
_MODULES = {"reward": "train_reward"}  # of modes whose file in icet_jax/runs has another name
_WITHOUT_PROGRAMS = ("compare", "labels")  # modes that compile nothing
_OVERRIDE = "--config."


class _Parser(argparse.ArgumentParser):
    """argparse with errors that fit one line and say what to type."""

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; type: {EXAMPLE} (or --help)")


def _parser() -> argparse.ArgumentParser:
    modes = "\n".join(f"  {name:8}{what}" for name, what in MODES.items())
    parser = _Parser(
        prog="icet-jax",
        usage=f"{EXAMPLE} [--config.FIELD=VALUE ...]",
        description=f"Measures and repairs the early-exit hole of vision-language models.\n\nmodes:\n{modes}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument(
        "--config", metavar="FILE[:VARIANT]", help="the experiment; any of its fields can be overridden"
    )
    parser.add_argument("--mode", default="align", choices=MODES)
    parser.add_argument("runs", nargs="*", type=Path, metavar="RUN", help="compare: run directories")
    parser.add_argument("--workdir", type=Path, help="run directory; the same command resumes there")
    parser.add_argument("--checkpoint", help="model instead of config.model.checkpoint; stands in for --config as well")
    parser.add_argument("--image", action="append", default=[], type=Path, help="ask: image file; may be repeated")
    parser.add_argument("--prompt", help="ask: the question")
    parser.add_argument("--exits", help='ask, verify: "all", or exits such as 1,12,23')
    parser.add_argument(
        "--out",
        type=Path,
        help="export, prepare, labels, compare: where to, instead of workdir/hf or config.data.directory",
    )
    parser.add_argument("--topology", help="plan: chips, such as v5e:8x8, v5p:4x4x4, h100:8 or cpu:1")
    parser.add_argument("--largest-batch", action="store_true", help="plan: also find the largest batches that fit")
    parser.add_argument("--labels", type=Path, help="labels: the filled-in CSV to read")
    parser.add_argument("--rows", type=int, default=200, help="labels: how many answers to sample")
    parser.add_argument(
        "--coordinator", help="HOST:PORT of process 0, where several run as one; auto: the cluster knows"
    )
    parser.add_argument("--process-id", type=int, help="which of the processes this is, from 0")
    parser.add_argument("--process-count", type=int, help="of all processes")
    parser.add_argument("--verdicts", action="store_true", help="labels: show people what the judges said")
    return parser


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


def run(arguments: Sequence[str]) -> int:
    """Parses `arguments`, checks the config and starts the mode's run; returns its exit code.

    Raises:
      UserError: wrong usage, config or input.
    """
    from icet_jax.runs import config_files

    rest, overrides = _split_overrides(arguments)
    options = _parser().parse_intermixed_args(rest)
    if options.runs and options.mode != "compare":
        raise UserError(f"'{options.runs[0]}' stands alone: only --mode=compare takes run directories; type: {EXAMPLE}")
    if options.config is None and options.checkpoint is None and options.mode not in ("export", "labels", "compare"):
        raise UserError(f"no --config (nor --checkpoint); type: {EXAMPLE}")
    if options.config is None and options.mode == "align":
        raise UserError(f"--mode=align needs --config; type: {EXAMPLE}")
    if options.mode in ("align", "sweep", "reward") and options.workdir is None:
        raise UserError(f"--mode={options.mode} needs --workdir, the folder to write to; type: {EXAMPLE}")
    if options.checkpoint is not None:
        overrides.append(("model.checkpoint", options.checkpoint))
    config = config_files.load(options.config, overrides)
    if options.mode not in _WITHOUT_PROGRAMS:
        from icet_jax.runs.compilations import keep_programs

        keep_programs(config.compilation_cache)
    process = (options.coordinator, options.process_id, options.process_count)
    if options.mode not in _TOGETHER and process != (None, None, None):
        raise UserError(f"--mode={options.mode} runs in one process; leave --coordinator and --process-... out")
    with contextlib.ExitStack() as around:
        if options.mode in _RESUMED:
            from icet_jax.runs.signals import handled

            around.enter_context(handled())
        if options.mode in _TOGETHER:
            from icet_jax.parallel.distributed import joined

            around.enter_context(joined(*process))
        module = importlib.import_module(f"icet_jax.runs.{_MODULES.get(options.mode, options.mode)}")
        return module.run(config, options.workdir, options)


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
    except OSError as error:
        known = full_disk(error)
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
    code = main()
    if code in (RESUMABLE, 128 + signal.SIGINT):
        # Threads may still be compiling or opening images; nobody waits for them, and the machine may be about to go.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)


if __name__ == "__main__":
    console()
