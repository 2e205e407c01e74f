"""Runs the `icet-jax` commands in README and docs exactly as they are printed there, in a temporary folder.

    python scripts/walk.py            # after `make demo`, whose run directory is runs/organism
    python scripts/walk.py --list     # runs nothing; lists the commands, and why some are left out

The folder has what the pages expect of the reader: DIR is a miniature checkpoint, RUN the demo's run directory, DATA a
folder with rows. A config of a published model is replaced by its `:smoke` variant, which uses miniatures of weights,
judges and data sets. A command that is on several pages runs once.

Commands run side by side, one more than there are cores. Those that name the same output run one after the other, in
the order of the pages. As in the tests, XLA optimises almost nothing, and all commands share their compiled programs.
"""

import argparse
import dataclasses
import gzip
import importlib.util
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Collection, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from tests.devices import FASTER  # noqa: E402

PUBLISHED = re.compile(r"(configs/(?:llava15|llava_next|llama32v|smolvlm|qwen25vl)_\w+\.py|configs/rm_gpt2\.py)(?!:)")
LEFT_OUT = (  # (pattern of commands that need more than this machine has, what they need, whether it is present)
    (re.compile(r"--topology=v"), "needs libtpu", lambda: importlib.util.find_spec("libtpu") is not None),
    (re.compile(r"--checkpoint=(?!runs/)[\w-]+/"), "needs weights from the hub", lambda: False),
    (re.compile(r"--labels="), "needs people's labels", lambda: False),
)
OUTPUTS = ("--workdir=", "--out=", "--config.data.directory=")  # flags with a path that a command may write to
_SAME = ("--workdir=", "--config.data.root=", "--config.data.directory=")
"""Flags in which commands may differ that do the same with miniatures; the first of them is run."""
AT_ONCE = min(4, (os.cpu_count() or 1) + 1)
"""Commands that run at a time; each waits for files and for its imports."""


@dataclasses.dataclass(frozen=True)
class Command:
    """One `icet-jax` command of a page.

    Attributes:
      page: the page.
      line: line of the page where the block of code begins.
      words: the command as it will be run.
    """

    page: str
    line: int
    words: tuple[str, ...]

    @property
    def mode(self) -> str:
        """The mode of the command line, given as MODE or --mode=MODE; "align" if neither is given."""
        flags = [word.removeprefix("--mode=") for word in self.words if word.startswith("--mode=")]
        first = self.words[3] if self.words[1:3] == ("-m", "icet_jax.main") and len(self.words) > 3 else "--"
        return flags[0] if flags else "align" if first.startswith("--") else first

    @property
    def reason(self) -> str:
        """Why the command is left out; "" if it is run."""
        text = shlex.join(self.words)
        return next((need for pattern, need, is_present in LEFT_OUT if pattern.search(text) and not is_present()), "")

    def names(self, outputs: Collection[str]) -> set[str]:
        """Those of the output paths that the command names, or names something inside of."""
        values = [word.partition("=")[2] if word.startswith("--") else word for word in self.words]
        return {path for path in outputs if any(value == path or value.startswith(f"{path}/") for value in values)}

    def __str__(self) -> str:
        """Returns the page and the command, without the path of the Python interpreter."""
        module = self.words[1:3] == ("-m", "icet_jax.main")
        return f"{self.page}:{self.line}: {shlex.join(('icet-jax', *self.words[3:]) if module else self.words[1:])}"


def commands() -> Iterator[Command]:
    """Yields every `icet-jax` command of README and docs once, in the order of the pages."""
    from tests.docs import blocks

    seen = set()
    for path in blocks.pages():
        for block in blocks.blocks(path.read_text(encoding="utf-8")):
            if block.kind not in (*blocks.SHELL, "") or block.mark:
                continue
            for words in blocks.commands(block.text, strict=block.kind != ""):
                runnable = _runnable(words)
                key = tuple(word for word in runnable if not word.startswith(_SAME))
                if runnable and key not in seen:
                    seen.add(key)
                    yield Command(str(path.relative_to(ROOT)), block.line, tuple(runnable))


def _runnable(words: list[str]) -> list[str]:
    """Returns a command with this Python interpreter and with miniatures; [] if it is not an icet-jax command."""
    if words[0] == "icet-jax":
        words = ["python", "-m", "icet_jax.main", *words[1:]]
    if words[:3] != ["python", "-m", "icet_jax.main"] and words[:2] != ["python", "launch/local_processes.py"]:
        return []
    if "--mode=plan" not in words and words[3:4] != ["plan"]:  # which takes no weights
        words = [PUBLISHED.sub(r"\1:smoke", word) for word in words]
    words = [sys.executable, *words[1:]]
    return [str(ROOT / word) if word.startswith("launch/") else word for word in words]


def furnish(folder: Path, demo: Path) -> None:
    """Fills a folder with what the pages' commands use: the demo's run, a checkpoint, an image, rows.

    Args:
      folder: an empty folder.
      demo: run directory of `make demo`.
    """
    from icet_jax.runs import sources

    (folder / "runs").mkdir()
    for run in ("runs/organism", "runs/a", "runs/b", "RUN"):
        shutil.copytree(demo, folder / run)
    (folder / "DIR").symlink_to(sources.checkpoint_directory("toy:llava15"))
    shutil.copytree(ROOT / "examples", folder / "examples")
    shutil.copy(ROOT / "examples" / "scene.png", folder / "cat.png")
    question = {"prompt": "what is this", "image": "scene.png", "kind": "vqa", "answer": "a zorb"}
    for data_folder in (folder, folder / "DATA"):
        shutil.copytree(ROOT / "examples", data_folder, dirs_exist_ok=True)
        (data_folder / "questions.jsonl").write_text(json.dumps(question) + "\n", encoding="utf-8")
    (folder / "harmless-base").mkdir()
    for name, count in (("train", 64), ("test", 16)):
        text = "".join(f"{json.dumps(_pair(f'{name} {number}'))}\n" for number in range(count))
        (folder / "harmless-base" / f"{name}.jsonl.gz").write_bytes(gzip.compress(text.encode()))


def _pair(topic: str) -> dict[str, str]:
    """Returns a harmless preference pair in HH-RLHF's format."""
    answers = {"chosen": "i would rather not", "rejected": f"take the {topic}"}
    return {kind: f"\n\nHuman: {topic}?\n\nAssistant: {answer}" for kind, answer in answers.items()}


def main() -> int:
    """Runs or lists the commands; returns 1 if one failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--list", action="store_true", help="run nothing")
    parser.add_argument("--demo", type=Path, default=ROOT / "runs" / "organism", help="the run of `make demo`")
    parser.add_argument("--only", default="", help="commands that contain this")
    options = parser.parse_args()
    chosen: list[Command] = []
    exit_codes: list[int] = []
    num_left_out = 0
    for command in commands():
        if options.only not in str(command):
            continue
        if command.reason or options.list:
            num_left_out += bool(command.reason)
            print(f"{command.reason or 'runs'}: {command}", flush=True)
        else:
            chosen.append(command)
    if chosen:
        with tempfile.TemporaryDirectory() as name:
            furnish(Path(name), options.demo)
            exit_codes = run_all(chosen, Path(name))
    print(f"{len(exit_codes)} commands ran, {sum(map(bool, exit_codes))} of them failed; {num_left_out} left out")
    return int(any(exit_codes))


def run_all(chosen: Sequence[Command], folder: Path, at_once: int = AT_ONCE) -> list[int]:
    """Runs commands, up to `at_once` at a time, and returns their exit codes.

    Each waits for all earlier ones that name one of its outputs.
    """
    outputs = {word.partition("=")[2] for command in chosen for word in command.words if word.startswith(OUTPUTS)}
    waiting, running, exit_codes = list(chosen), dict[Future[int], Command](), list[int]()
    owners: dict[str, tuple[str, ...]] = {}
    with ThreadPoolExecutor(at_once) as threads:
        while waiting or running:
            in_use = {path for command in running.values() for path in command.names(outputs)}
            for command in tuple(waiting):
                paths = command.names(outputs)
                if len(running) < at_once and not paths & in_use:
                    running[threads.submit(run, command, folder, owners)] = command
                    waiting.remove(command)
                in_use |= paths
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                del running[future]
                exit_codes.append(future.result())
    return exit_codes


def run(command: Command, folder: Path, owners: dict[str, tuple[str, ...]]) -> int:
    """Runs a command, prints how it ended and returns its exit code.

    Outputs of an earlier, different command in the same place are removed first.

    Args:
      command: the command.
      folder: folder to run it in.
      owners: {flag with an output path: words of the command that wrote there last}; this function updates it.
    """
    outputs = "--workdir=", "--out="
    if command.mode not in ("align", "sweep"):
        outputs = ("--out=",)  # these modes read the run directory
    for word in command.words:
        if word.startswith(outputs) and owners.setdefault(word, command.words) != command.words:
            path = folder / word.partition("=")[2]
            shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
            owners[word] = command.words
    began = time.monotonic()
    environment = os.environ | {
        "PYTHONPATH": str(ROOT),
        "JAX_PLATFORMS": "cpu",
        "OMP_NUM_THREADS": "1",
        "XLA_FLAGS": f"{FASTER} {os.environ.get('XLA_FLAGS', '')}".strip(),
        "JAX_COMPILATION_CACHE_DIR": os.environ.get("JAX_COMPILATION_CACHE_DIR", str(folder / "compiled")),
    }
    result = subprocess.run(command.words, cwd=folder, env=environment, capture_output=True, text=True, timeout=900)
    lines = [f"{time.monotonic() - began:.0f} s, {result.returncode}: {command}"]
    if result.returncode:
        lines += [f"    {line}" for line in (result.stdout + result.stderr).strip().splitlines()[-8:]]
    print("\n".join(lines), flush=True)  # in one piece: another command may end at the same time
    return result.returncode


if __name__ == "__main__":
    sys.exit(main())
