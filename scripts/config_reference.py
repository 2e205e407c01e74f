"""Writes docs/reference/config.md from the code: every field's default, what it may be, and its comment.

    python scripts/config_reference.py             # writes the page
    python scripts/config_reference.py --check     # exit code 1 where the page is not what the code says

A field's meaning is its comment in icet_jax/config/defaults.py (behind it, or on the lines above it), what it may be
its rule in icet_jax/config/checks.py, an experiment's line the first of its file in configs/.
"""

import argparse
import ast
import io
import sys
import tokenize
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from icet_jax.config import checks, defaults, names
from icet_jax.errors import UserError
from icet_jax.files import write_text_atomic
from icet_jax.runs import config_files

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "reference" / "config.md"
HEAD = """<!-- Made by scripts/config_reference.py from icet_jax/config/ and configs/; edit those. -->
# Configuration reference

Every field, as the code has it. A file in `configs/` starts from `icet_jax.config.default()` and changes what its
experiment changes; the command line overrides any field: `--config.lppo.kl_coef=0.1`, tuples as
`--config.sweep.exits=1,12,23`, `none` for *unset*, one key of an open field as `--config.data.mixture.vqa=0.3`. An
unknown field or a wrong value is one line that names the nearest field, or what the value may be.

Origins in the last column: *paper* is the ICML 2025 text, *TRL* the defaults of TRL 0.11.4, *RiC*
Rewards-in-Context's PPO, *ours* this project's own choice.
"""


class Field(NamedTuple):
    """One field of the config: its dotted name, its meaning, and the function that sets it."""

    name: str
    meaning: str


def fields(source: str) -> list[Field]:
    """The fields of `default()` in the order of the file, with their comments.

    Raises:
      ValueError: a field without a comment and without a section docstring to stand for it.
    """
    tree, comments = ast.parse(source), _comments(source)
    functions = {node.name: node for node in tree.body if isinstance(node, ast.FunctionDef)}
    found = []
    for name, value, line, end in _assignments(functions["default"]):
        called = value.func.id if isinstance(value, ast.Call) and isinstance(value.func, ast.Name) else ""
        if called not in functions:
            found.append(Field(name, _meaning(comments, line, end)))
            continue
        section = functions[called]
        found += [
            Field(f"{name}.{leaf}", _meaning(comments, start, stop))
            for leaf, _, start, stop in _assignments(section)
        ]  # fmt: skip
    return found


def sections(source: str) -> dict[str, str]:
    """What a section as a whole is said to be: its function's docstring, or the comment where it is made."""
    tree, comments = ast.parse(source), _comments(source)
    found = {}
    for node in tree.body:
        if isinstance(node, ast.FunctionDef) and node.name.startswith("_"):
            made = node.body[1] if ast.get_docstring(node) else node.body[0]
            text = ast.get_docstring(node) or comments.get(made.lineno, ("", False))[0]
            found[node.name.removeprefix("_")] = " ".join(text.split())
    return found


def _assignments(function: ast.FunctionDef) -> Iterator[tuple[str, ast.expr, int, int]]:
    """(attribute, value, first line, last line) of each `config.NAME = VALUE` of a function."""
    for node in function.body:
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Attribute):
            yield node.targets[0].attr, node.value, node.lineno, node.end_lineno or node.lineno


def _comments(source: str) -> dict[int, tuple[str, bool]]:
    """Line -> (its comment, whether it stands there alone)."""
    found = {}
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            found[token.start[0]] = token.string.lstrip("# "), token.line.lstrip().startswith("#")
    return found


def _meaning(comments: dict[int, tuple[str, bool]], line: int, end: int) -> str:
    above, at = [], line - 1
    while comments.get(at, ("", False))[1]:
        above.insert(0, comments[at][0])
        at -= 1
    behind = [comments[number][0] for number in range(line, end + 1) if number in comments]
    return " ".join(above + behind)


def render() -> str:
    """The page."""
    source = Path(defaults.__file__).read_text(encoding="utf-8")
    values, about, config = checks.flatten(defaults.default()), sections(source), defaults.default()
    tables: dict[str, str] = {"": ""}  # those of no section come first
    for field in fields(source):
        if field.name not in values:
            raise ValueError(f"{field.name} is set in defaults.py, but is no field")
        section = field.name.rpartition(".")[0]
        tables[section] = tables.get(section, "") + _row(field, values[field.name], config)
    parts = [HEAD]
    for section, rows in tables.items():
        said = f"{_capital(about[section])}\n\n" if about.get(section) else ""
        title = f"`{section}`" if section else "At the top"
        parts.append(f"## {title}\n\n{said}| field | default | may be | meaning |\n| --- | --- | --- | --- |\n{rows}")
    missing = sorted(set(values) - {field.name for field in fields(source)})
    if missing:
        raise ValueError(f"defaults.py sets {', '.join(missing)} where this script does not look")
    return "\n".join([*parts, _open_fields(), _scorers(), _experiments()])


def _row(field: Field, value: Any, config: Any) -> str:
    if not field.meaning:
        raise ValueError(f"{field.name} has no comment in defaults.py")
    cells = (f"`{field.name}`", _shown(value), _allowed(field.name, value, config), field.meaning)
    return "| " + " | ".join(_cell(cell) for cell in cells) + " |\n"


def _shown(value: Any) -> str:
    if value is None:
        return "*unset*"
    if value in ({}, ()):
        return "*none*"
    if isinstance(value, dict):
        return ", ".join(f"`{key}`: `{item}`" for key, item in value.items())
    if isinstance(value, tuple):
        return f"`{','.join(map(str, value))}`"
    return f"`{str(value).lower() if isinstance(value, bool) else value}`"


def _allowed(name: str, value: Any, config: Any) -> str:
    """The rule of the field, or its type where it has none."""
    if name in checks._RULES:
        return checks._RULES[name][1]
    if name in names.OPEN_FIELDS:
        return "your own keys"
    section, _, leaf = name.rpartition(".")
    kind = type(value) if value is not None else (config[section] if section else config).get_type(leaf)
    return checks.TYPE_NAMES[kind]


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("<", "&lt;").strip()


def _capital(text: str) -> str:
    return text if text.startswith("`") else text[:1].upper() + text[1:]


def _open_fields() -> str:
    open_fields = ", ".join(f"`{name}`" for name in names.OPEN_FIELDS)
    kinds, rewards = (", ".join(f"`{item}`" for item in items) for items in (names.KINDS, names.REWARDS))
    return (
        f"## Fields with keys of your own\n\n{open_fields} are dicts. The keys\n"
        f"of `data.mixture` and `reward.by_kind` are kinds of rows ({kinds}), values of the latter\n"
        f"{rewards}. Those of `sweep.datasets` and `sweep.utility` are names of your own\n"
        "for [sources](../data.md#sources).\n"
    )


def _scorers() -> str:
    head = (
        "## `scorers`: a definition for each kind\n\n"
        "`scorers.NAME` is `{'kind': KIND, ...}`. What the kinds are: [judges](../judges.md), [what surrounds\n"
        "them](../judging.md).\n\n"
        "| kind | fields of its own | fields of its network |\n| --- | --- | --- |\n"
    )
    rows = []
    for kind, own in names.SCORER_FIELDS.items():
        network = {} if kind in names.WITHOUT_NETWORK else names.NETWORK_FIELDS
        cells = (
            ", ".join(f"`{name}` ({checks.TYPE_NAMES[of]})" for name, of in fields.items()) for fields in (own, network)
        )
        rows.append("| " + " | ".join([f"`{kind}`", *(cell or "none" for cell in cells)]) + " |")
    return head + "\n".join(rows) + "\n"


def _experiments() -> str:
    head = "## The experiments in `configs/`\n\n| file | variants | what |\n| --- | --- | --- |\n"
    rows = []
    for path in sorted((ROOT / "configs").glob("[!_]*.py")):
        what = (ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or "").splitlines()[0]
        rows.append(f"| `configs/{path.name}` | {_variants(path.name)} | {_cell(what)} |")
    return head + "\n".join(rows) + "\n"


def _variants(name: str) -> str:
    """The variants that the file names where it is asked for one that it does not have."""
    try:
        config_files.load(f"configs/{name}:?")
    except UserError as error:
        _, known, variants = str(error).partition("this config has ")
        return ", ".join(f"`:{variant}`" for variant in variants.split(", ") if known and variant != "none") or "none"
    raise ValueError(f"configs/{name} takes any variant")


def main(arguments: list[str] | None = None) -> int:
    """Writes the page, or with `--check` compares it; 1 where it is stale."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--check", action="store_true", help="write nothing; exit code 1 where the page is stale")
    options = parser.parse_args(arguments)
    page = render()
    if not options.check:
        PAGE.parent.mkdir(exist_ok=True)
        write_text_atomic(PAGE, page)
        return 0
    if PAGE.is_file() and PAGE.read_text(encoding="utf-8") == page:
        return 0
    print(f"{PAGE.name} is stale; type: python scripts/config_reference.py", file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main())
