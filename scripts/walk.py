"""Runs this package's commands of README and docs as they stand there, one after the other, in a folder of their own.

    python scripts/walk.py            # after `make demo`: runs/organism is that run's
    python scripts/walk.py --list     # what would run, and what is left out, and why

What a reader brings is there under the names that the pages give it: DIR is a toy checkpoint, RUN the demo's run, DATA
a folder with rows; a config of a published model is its `:smoke` variant, which makes miniatures of weights, judges and
data sets. All else is what the page says. A command that several pages have runs once.
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
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PUBLISHED = re.compile(r"(configs/(?:llava15|llava_next|llama32v)_\w+\.py|configs/rm_gpt2\.py)(?!:)")
LEFT_OUT = (  # commands that no page's reader has at hand here
    (re.compile(r"--topology=v"), "needs libtpu", lambda: importlib.util.find_spec("libtpu") is not None),
    (re.compile(r"--checkpoint=(?!runs/)[\w-]+/"), "needs weights from the hub", lambda: False),
    (re.compile(r"--labels="), "needs people's labels", lambda: False),
)


@dataclasses.dataclass(frozen=True)
class Command:
    """A command of ours and the page that has it."""

    page: str
    line: int
    words: tuple[str, ...]

    @property
    def mode(self) -> str:
        """What the command does, whether it says MODE or --mode=MODE; "align" where it says neither."""
        named = [word.removeprefix("--mode=") for word in self.words if word.startswith("--mode=")]
        first = self.words[3] if self.words[1:3] == ("-m", "icet_jax.main") and len(self.words) > 3 else "--"
        return named[0] if named else "align" if first.startswith("--") else first

    @property
    def reason(self) -> str:
        """Why it is left out, or "" where it is run."""
        text = shlex.join(self.words)
        return next((why for found, why, there in LEFT_OUT if found.search(text) and not there()), "")

    def __str__(self) -> str:
        """The page and the command as it is run, without this Python."""
        module = self.words[1:3] == ("-m", "icet_jax.main")
        return f"{self.page}:{self.line}: {shlex.join(('icet-jax', *self.words[3:]) if module else self.words[1:])}"


def commands() -> Iterator[Command]:
    """Each of our commands once, in the pages' order."""
    from tests.docs import blocks

    seen = set()
    for path in blocks.pages():
        for block in blocks.blocks(path.read_text(encoding="utf-8")):
            if block.kind not in (*blocks.SHELL, "") or block.mark:
                continue
            for words in blocks.commands(block.text, strict=block.kind != ""):
                ours = _ours(words)
                # The folder of the published files changes nothing where miniatures are made.
                key = tuple(word for word in ours if not word.startswith(("--workdir", "--config.data.root")))
                if ours and key not in seen:
                    seen.add(key)
                    yield Command(str(path.relative_to(ROOT)), block.line, tuple(ours))


def _ours(words: list[str]) -> list[str]:
    """The command with this Python and with miniatures; empty where it is not `icet_jax.main`'s."""
    if words[0] == "icet-jax":
        words = ["python", "-m", "icet_jax.main", *words[1:]]
    if words[:3] != ["python", "-m", "icet_jax.main"] and words[:2] != ["python", "launch/local_processes.py"]:
        return []
    if "--mode=plan" not in words and words[3:4] != ["plan"]:  # which takes no weights
        words = [PUBLISHED.sub(r"\1:smoke", word) for word in words]
    words = [sys.executable, *words[1:]]
    return [str(ROOT / word) if word.startswith("launch/") else word for word in words]


def furnish(folder: Path, demo: Path) -> None:
    """What the pages speak of: the demo's run, a checkpoint, an image, rows."""
    from icet_jax.runs import sources

    (folder / "runs").mkdir()
    for run in ("runs/organism", "runs/a", "runs/b", "RUN"):
        shutil.copytree(demo, folder / run)
    (folder / "DIR").symlink_to(sources.checkpoint_directory("toy:llava15"))
    shutil.copytree(ROOT / "examples", folder / "examples")
    shutil.copy(ROOT / "examples" / "scene.png", folder / "cat.png")
    question = {"prompt": "what is this", "image": "scene.png", "kind": "vqa", "answer": "a zorb"}
    for place in (folder, folder / "DATA"):
        shutil.copytree(ROOT / "examples", place, dirs_exist_ok=True)
        (place / "questions.jsonl").write_text(json.dumps(question) + "\n", encoding="utf-8")
    (folder / "harmless-base").mkdir()
    for name, count in (("train", 64), ("test", 16)):
        text = "".join(f"{json.dumps(_pair(f'{name} {number}'))}\n" for number in range(count))
        (folder / "harmless-base" / f"{name}.jsonl.gz").write_bytes(gzip.compress(text.encode()))


def _pair(topic: str) -> dict[str, str]:
    """One of HH-RLHF's lines, about nothing."""
    answers = {"chosen": "i would rather not", "rejected": f"take the {topic}"}
    return {kind: f"\n\nHuman: {topic}?\n\nAssistant: {answer}" for kind, answer in answers.items()}


def main() -> int:
    """See the module; 0 if every command ended well."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--list", action="store_true", help="run nothing")
    parser.add_argument("--demo", type=Path, default=ROOT / "runs" / "organism", help="the run of `make demo`")
    parser.add_argument("--only", default="", help="commands that contain this")
    options = parser.parse_args()
    sys.path.insert(0, str(ROOT))
    done: list[int] = []
    left, owners = 0, dict[str, tuple[str, ...]]()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if not options.list:
            furnish(folder, options.demo)
        for command in commands():
            if options.only not in str(command):
                continue
            if command.reason or options.list:
                left += bool(command.reason)
                print(f"{command.reason or 'runs'}: {command}", flush=True)
            else:
                done.append(run(command, folder, owners))
    print(f"{len(done)} commands ran, {sum(map(bool, done))} of them failed; {left} left out")
    return int(any(done))


def run(command: Command, folder: Path, owners: dict[str, tuple[str, ...]]) -> int:
    """Runs a command, to a run directory and a file that no other page's command has written; how it ended."""
    made = "--workdir=", "--out="
    if command.mode not in ("align", "sweep"):
        made = ("--out=",)  # these modes read the run
    for word in command.words:
        if word.startswith(made) and owners.setdefault(word, command.words) != command.words:
            path = folder / word.partition("=")[2]
            shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
            owners[word] = command.words
    began = time.monotonic()
    environment = os.environ | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
    ended = subprocess.run(command.words, cwd=folder, env=environment, capture_output=True, text=True, timeout=900)
    print(f"{time.monotonic() - began:.0f} s, {ended.returncode}: {command}", flush=True)
    if ended.returncode:
        print("    " + "\n    ".join((ended.stdout + ended.stderr).strip().splitlines()[-8:]), flush=True)
    return ended.returncode


if __name__ == "__main__":
    sys.exit(main())
