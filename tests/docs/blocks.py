"""What is wrong with a page: commands that do not start, fields, names and files that are not there, code that fails.

A block is fenced as `sh`, `python`, `text`, `csv`, `json` or `yaml`. Every line of `sh` must be a command that is known
here; one of ours must parse, with a config and overrides that load. The `python` blocks of a page are run in order, in
one namespace and an empty folder, with stand-ins for what must be downloaded. A comment on the line before a block may
say more:

    <!-- no-run: why -->    python that is compiled, not run; commands that are checked, and left out of scripts/walk.py
    <!-- fails: why -->     shell that shows what is refused
    <!-- from: FILE -->     lines of that file, in this order
    <!-- rows -->           a data set: every row of it is read
"""

import ast
import contextlib
import dataclasses
import importlib
import itertools
import os
import re
import shlex
import tempfile
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest
from PIL import Image

from icet_jax import main
from icet_jax.config import OPEN_FIELDS, check, default, flatten
from icet_jax.data.records import read_records
from icet_jax.errors import UserError
from icet_jax.parallel import compilations
from icet_jax.runs import config_files
from icet_jax.training import signals

ROOT = Path(__file__).parents[2]
SHELL, PYTHON, OTHERS = ("sh", "bash", "console"), ("python",), ("text", "csv", "json", "yaml", "bibtex")
FREE = (
    "git",
    "gcloud",
    "kubectl",
    "cd",
    "export",
    "ls",
    "tensorboard",
    "pre-commit",
)  # commands that are nobody's here
ROOTS = ("icet_jax", "configs", "examples", "benchmarks", "launch", "scripts", "tests", "docs")
_FOLDERS = {folder.name for folder in (ROOT / "icet_jax").iterdir() if folder.is_dir()}
PACKAGES = tuple(sorted(_FOLDERS - {"checkpoints"}))  # a run directory has a folder of that name too
_FENCE = re.compile(r"^ {0,3}(`{3,}|~{3,})[ \t]*([\w+-]*)[^`]*$")
_MARK = re.compile(r"<!-- ((?:no-run|fails)(?=: \S)|from: \S+|rows)(?:: .*)? -->")
_SPAN = re.compile(r"(?<!`)`([^`\n]+)`(?!`)")
_OPTIONAL = re.compile(r"\[(-[^\]]*|[\w-]+\.\.\.)\]")
_ASSIGNED = re.compile(r"[A-Z_]+=.*")
_PLACEHOLDER = re.compile(r"[A-Z][A-Z_]*|\.\.\.|")


class Wrong(Exception):
    """What is wrong with a line of a page."""


@dataclasses.dataclass(frozen=True)
class Block:
    """A block of code of a page; `kind` is "" where it is indented, not fenced."""

    kind: str
    text: str
    line: int
    mark: str = ""


def pages(root: Path = ROOT) -> list[Path]:
    """Every Markdown file of the repository."""
    hidden = ("runs", "build", "dist", "node_modules")
    return sorted(
        path
        for path in root.rglob("*.md")
        if not any(part.startswith(".") or part in hidden for part in path.relative_to(root).parts[:-1])
        and ".egg-info" not in str(path)
        and "notebooks" not in path.relative_to(root).parts
    )


def blocks(text: str) -> list[Block]:
    """The blocks of code of a page, in order."""
    found: list[Block] = []
    lines = text.splitlines()
    number = 0
    while number < len(lines):
        fence = _FENCE.match(lines[number])
        if fence:
            first, closing = number, re.compile(rf"^ {{0,3}}{re.escape(fence[1][0])}{{{len(fence[1])},}}\s*$")
            number += 1
            while number < len(lines) and not closing.match(lines[number]):
                number += 1
            before = _MARK.fullmatch(lines[first - 1].strip()) if first else None
            body = "\n".join(lines[first + 1 : number])
            found.append(Block(fence[2] or "?", body, first + 2, before[1] if before else ""))
        elif lines[number].startswith("    ") and (number == 0 or not lines[number - 1].strip()):
            first = number
            while number + 1 < len(lines) and (lines[number + 1].startswith("    ") or not lines[number + 1].strip()):
                number += 1
            found.append(Block("", "\n".join(line[4:] for line in lines[first : number + 1]), first + 1))
        number += 1
    return found


def problems(path: Path) -> Iterator[str]:
    """One line for everything that is wrong with the commands, fields, names and files of a page."""
    text = path.read_text(encoding="utf-8")
    for block in blocks(text):
        try:
            check_block(block)
        except Wrong as wrong:
            yield f"{path.name}:{block.line}: {wrong}"
    for number, line in enumerate(outside_blocks(text), start=1):
        for span in _SPAN.findall(line):
            try:
                check_span(span.replace("\\|", "|"))
            except Wrong as wrong:
                yield f"{path.name}:{number}: `{span}`: {wrong}"


def outside_blocks(text: str) -> list[str]:
    """The lines of a page, those of blocks emptied."""
    lines = text.splitlines()
    for block in blocks(text):
        first = block.line - 1
        for number in range(first, first + len(block.text.splitlines())):
            lines[number] = ""
    return lines


def check_block(block: Block) -> None:
    """Raises `Wrong` for a command that would not start, or code that does not compile."""
    if block.mark.startswith("from: "):
        _check_excerpt(block.text, ROOT / block.mark.removeprefix("from: "))
    elif block.mark == "rows":
        _check_rows(block.text, block.kind)
    elif block.kind in SHELL:
        for words in commands(block.text):
            if block.mark != "fails":
                check_command(words)
    elif block.kind in PYTHON:
        try:
            compile(block.text, "block", "exec")
        except SyntaxError as error:
            raise Wrong(f"does not compile: {error}") from error
    elif block.kind == "":
        for words in commands(block.text, strict=False):
            if words[0] in ("python", "make", "pip", "icet-jax") or words[0].endswith((".sh", ".sbatch")):
                check_command(words)
    elif block.kind not in OTHERS:
        raise Wrong(f"a block is fenced as one of {', '.join(SHELL + PYTHON + OTHERS)}, not {block.kind!r}")


def _check_excerpt(text: str, path: Path) -> None:
    """Raises `Wrong` where a line of an excerpt does not stand in the file, behind the one before it."""
    lines = iter(line.strip() for line in path.read_text(encoding="utf-8").splitlines())
    for line in text.splitlines():
        if line.strip() and line.strip() not in lines:
            raise Wrong(f"{path.name} does not have {line.strip()!r}, or not in this order")


def _check_rows(text: str, kind: str) -> None:
    """Raises `Wrong` where a row of a data set would be left out; its images are made."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"rows.{kind}"
        path.write_text(text + "\n", encoding="utf-8")
        for name in re.findall(r"[\w./-]+\.png", text):
            image = Path(folder) / name
            image.parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (8, 8)).save(image)
        try:
            problems = read_records(path).problems
        except UserError as error:
            raise Wrong(str(error)) from error
    if problems:
        raise Wrong(f"a row is left out: {problems[0]}")


def commands(text: str, *, strict: bool = True) -> Iterator[list[str]]:
    """The words of each command of a shell block; what is optional in brackets counts as given."""
    for line in re.sub(r"\\\n\s*", " ", text).splitlines():
        line = _OPTIONAL.sub(lambda found: found[1].replace("...", ""), line)
        lexer = shlex.shlex(line, posix=True, punctuation_chars="|&;<>")
        lexer.whitespace_split = True
        try:
            words = list(lexer)
        except ValueError as error:
            if strict:
                raise Wrong(f"{line.strip()}: {error}") from error
            continue
        for separator, group in itertools.groupby(words, lambda word: set(word) <= set("|&;<>") and word != ""):
            found = list(group)
            while not separator and found and _ASSIGNED.fullmatch(found[0]):
                found.pop(0)
            if not separator and found:
                yield found


def check_command(words: list[str]) -> None:
    """Raises `Wrong` where a command is unknown, or one of ours would not start."""
    name, arguments = words[0], words[1:]
    try:
        for word in arguments:
            if re.search(r"(^|=)examples/", word):
                _check_file(word.rpartition("=")[2])
        if name == "icet-jax":
            check_main(arguments)
        elif name == "make":
            _check_make(arguments)
        elif name == "pip":
            _check_pip(arguments)
        elif name in ("python", "python3"):
            _check_python(arguments)
        elif name in ("sbatch", "sky"):
            script = next((word for word in arguments if word.startswith("launch/")), "")
            if not (ROOT / script).is_file():
                raise Wrong("starts nothing of launch/")
            _check_ours(arguments[arguments.index(script) + 1 :]) if name == "sbatch" else None
        elif "/" in name and (ROOT / name).is_file():
            _check_script(name, arguments)
        elif name not in FREE:
            raise Wrong(f"{name} is neither ours nor on the list of others' commands (tests/docs/blocks.py)")
    except Wrong as wrong:
        raise Wrong(f"{shlex.join(words)}: {wrong}") from wrong


def check_main(arguments: list[str]) -> None:
    """Raises `Wrong` where `icet_jax.main` would refuse these flags, the config or one of its fields.

    Everything happens that happens before a mode's own run, of which there is none.
    """
    started = []

    class Mode:
        @staticmethod
        def run(config, workdir, options):
            started.append(options.mode)
            return 0

    real = importlib.import_module

    def imported(name, *rest):
        return Mode if started == [] and re.fullmatch(r"icet_jax\.commands\.\w+", name) else real(name, *rest)

    with pytest.MonkeyPatch.context() as patch, contextlib.ExitStack() as around:
        from icet_jax.parallel import distributed

        patch.setattr(importlib, "import_module", imported)
        patch.setattr(compilations, "keep_programs", lambda *_: None)
        patch.setattr(signals, "handle_signals", contextlib.nullcontext)
        patch.setattr(distributed, "join_processes", lambda *_: contextlib.nullcontext())
        around.enter_context(contextlib.chdir(ROOT))
        try:
            code = main.run(arguments)
        except UserError as error:
            raise Wrong(str(error)) from error
        except SystemExit as end:  # --help, --version
            if end.code not in (0, None):
                raise Wrong(f"ends with {end.code}") from end
            return
    if len(started) != 1 and code != 0:  # --fields starts none
        raise Wrong("starts no mode")


def _check_make(arguments: list[str]) -> None:
    targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    for word in arguments:
        if "=" not in word and word not in targets:
            raise Wrong(f"the Makefile has no {word}")


def _check_pip(arguments: list[str]) -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    if arguments[:1] != ["install"]:
        raise Wrong("only pip install")
    for word in arguments:
        named = re.search(r"(?:^\.|icet[-_]jax\S*)\[([\w,-]+)\]", word)
        for extra in named[1].split(",") if named else ():
            if extra not in extras:
                raise Wrong(f"pyproject.toml has no extra {extra}")


def _check_python(arguments: list[str]) -> None:
    if arguments[:1] == ["-m"] and len(arguments) > 1:
        module, rest = arguments[1], arguments[2:]
        if module == "icet_jax.main":
            return check_main(rest)
        if module == "pip":
            return _check_pip(rest)
        if module in ("build", "venv", "http.server"):
            return None
        if module == "pytest":
            return _check_paths(rest)
        return _check_script(module.replace(".", "/") + ".py", rest)
    if not arguments or arguments[0].startswith("-"):
        raise Wrong("python without -m MODULE or a file")
    return _check_script(arguments[0], arguments[1:])


def _check_paths(arguments: list[str]) -> None:
    for word in arguments:
        if word.startswith(ROOTS) and not (ROOT / word.partition("::")[0]).exists():
            raise Wrong(f"there is no {word}")


def _check_script(name: str, arguments: list[str]) -> None:
    """A script of ours: it is there and has the flags; what it hands on to `icet_jax.main` parses there."""
    path = ROOT / name
    if not path.is_file():
        raise Wrong(f"there is no {name}")
    if path.suffix == ".sh" and path.parent.name == "launch":
        return _check_ours([word for word in arguments if word.startswith("--")])
    own, _, rest = (list(part) for part in _partition(arguments, "--"))
    if rest:
        _check_ours(rest)
    known = _flags(path)
    for word in own:
        flag = word.partition("=")[0]
        if flag.startswith("--") and flag not in known:
            raise Wrong(f"{name} has no {flag}, but {', '.join(sorted(known))}")
    return None


def _check_ours(arguments: list[str]) -> None:
    """Arguments of `icet_jax.main`, unless one word stands for them."""
    if arguments and any(word.startswith("--") for word in arguments):
        check_main(arguments)


def _partition(words: list[str], separator: str) -> tuple[list[str], list[str], list[str]]:
    at = words.index(separator) if separator in words else len(words)
    return words[:at], words[at : at + 1], words[at + 1 :]


def _flags(path: Path) -> set[str]:
    """Flags that a script reads: those of its argparse, or of a shell script's `case`."""
    text = path.read_text(encoding="utf-8")
    if path.suffix != ".py":
        return set(re.findall(r"(--[\w-]+)=\*\)", text))
    calls = (node for node in ast.walk(ast.parse(text)) if isinstance(node, ast.Call))
    added = [call for call in calls if isinstance(call.func, ast.Attribute) and call.func.attr == "add_argument"]
    words = [word.value for call in added for word in call.args if isinstance(word, ast.Constant)]
    handed_on = {"--vulnerability-service"} if "pip_audit" in text else set()  # to pip-audit
    return {word for word in words if word.startswith("--")} | {"--help"} | handed_on


def check_span(span: str) -> None:
    """Raises `Wrong` for a command, field, mode, name or file in `code` that is not there."""
    if span.startswith(
        ("python -m icet_jax", "python benchmarks/", "python scripts/", "python launch/", "icet-jax --")
    ):
        for words in commands(span):
            if len(words) > 3 and not any(_PLACEHOLDER.fullmatch(word) for word in words):
                check_command(words)
    elif span != "config.py" and (found := re.match(r"(?:--)?config((?:\.\w+)+)(=.*)?$", span)):
        _check_field(found[1][1:], found[2])
    elif found := re.match(r"--mode=(\w+)", span):
        if found[1] not in main.MODES:
            raise Wrong(f"there is no mode {found[1]}")
    elif re.fullmatch(r"icet_jax(\.\w+)+", span):
        _resolve(span)
    elif re.fullmatch(rf"({'|'.join(ROOTS + PACKAGES)})/[\w./{{}},*-]*", span):
        _check_file(span)


def _check_field(name: str, value: str | None) -> None:
    known = flatten(default())
    sections = {field.rpartition(".")[0] for field in known} - {""}
    if name == "json" or name in sections or name.partition(".")[0] == "scorers":
        return
    if name not in known and not any(name.startswith(f"{field}.") for field in OPEN_FIELDS):
        raise Wrong(f"config.{name} is not a field")
    given = (value or "").removeprefix("=").strip()
    if not given or _PLACEHOLDER.fullmatch(given) or not value:
        return
    config = default()
    try:
        config_files.override(config, name, given.strip("\"'"))
        check(config)
    except UserError as error:
        raise Wrong(str(error)) from error


def _resolve(name: str) -> None:
    """Raises `Wrong` where a dotted name is no module of ours, nor anything in one."""
    parts = name.split(".")
    for count in range(len(parts), 0, -1):
        try:
            found = importlib.import_module(".".join(parts[:count]))
        except ImportError:
            continue
        for part in parts[count:]:
            if not hasattr(found, part) and part not in getattr(found, "__annotations__", {}):
                raise Wrong(f"{'.'.join(parts[:count])} has no {part}")
            found = getattr(found, part, None)
        return
    raise Wrong("there is no such module")


def _check_file(name: str) -> None:
    options = re.search(r"\{([^}]*)\}", name)
    for option in options[1].split(",") if options else [""]:
        one = name.replace(options[0], option) if options else name
        places = (ROOT / one, ROOT / "icet_jax" / one, ROOT / "docs" / one)
        if "NAME" in one or one.startswith("runs/") and not one.endswith(".py"):  # yours, or what runs write
            continue
        if not any(place.exists() or ("*" in one and list(place.parent.glob(place.name))) for place in places):
            raise Wrong(f"there is no {one}")


def run_python(path: Path, folder: Path, stand_ins: dict[str, str]) -> int:
    """Runs the `python` blocks of a page in `folder`; how many there were.

    Args:
      path: the page.
      folder: where they run, with the files they open.
      stand_ins: text of a block -> what is run in its place.

    Raises:
      Wrong: one of them fails; the message has its line.
    """
    chosen = [block for block in blocks(path.read_text(encoding="utf-8")) if block.kind in PYTHON]
    names: dict[str, object] = {"__name__": path.stem}
    done = 0
    with contextlib.chdir(folder):
        for block in chosen:
            if block.mark == "no-run":
                continue
            text = block.text
            for theirs, ours in stand_ins.items():
                text = text.replace(theirs, ours)
            if re.match(r"config\.", text):
                names["config"] = default()
            try:
                exec(compile(text, f"{path.name}:{block.line}", "exec"), names)
                if re.match(r"config\.", text):
                    check(names["config"])  # type: ignore[arg-type]
            except Exception as error:
                raise Wrong(f"{path.name}:{block.line}: {type(error).__name__}: {error}") from error
            done += 1
    return done


def broken_links(path: Path, root: Path = ROOT) -> Iterator[str]:
    """One line for each relative link of a page that leads nowhere: no such file, or no such heading in it."""
    for number, line in enumerate(outside_blocks(path.read_text(encoding="utf-8")), start=1):
        for target in re.findall(r"\]\(([^)\s]+)\)", _SPAN.sub("", line)):
            file, _, anchor = target.partition("#")
            if re.match(r"[a-z]+:", target):
                continue
            there = path if not file else Path(os.path.normpath(path.parent / file))
            if not there.exists() or not there.is_relative_to(root):
                yield f"{path.name}:{number}: {target} leads nowhere"
            elif anchor and there.suffix == ".md" and anchor not in anchors(there.read_text(encoding="utf-8")):
                yield f"{path.name}:{number}: {there.name} has no heading #{anchor}"


def anchors(text: str) -> set[str]:
    """Anchors of a page's headings, as GitHub makes them."""
    heads = (re.match(r"#{1,6} (.*)", line) for line in outside_blocks(text))
    return {re.sub(r"[^\w\- ]", "", head[1].lower()).replace(" ", "-") for head in heads if head}
