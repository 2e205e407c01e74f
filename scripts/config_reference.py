"""Writes docs/reference/config.md: every field's default, what it may be, its meaning and its origin.

    python scripts/config_reference.py             # writes the page
    python scripts/config_reference.py --check     # writes nothing; exit code 1 if the page differs from the code

The descriptions of fields come from their declarations in icet_jax/config/defaults.py, those of experiments from the
first lines of the files in configs/.
"""

import argparse
import ast
import sys
from pathlib import Path
from typing import Any

from icet_jax.config import FIELDS, OPEN_FIELDS, TYPE_NAMES, defaults, names
from icet_jax.config.fields import Field, Section
from icet_jax.errors import UserError
from icet_jax.files import write_text_atomic
from icet_jax.runs import config_files

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "reference" / "config.md"
HEAD = """<!-- Made by scripts/config_reference.py from icet_jax/config/ and configs/; edit those. -->
# Configuration reference

Every field, as the code declares it. A file in `configs/` starts from `icet_jax.config.default()` and changes what its
experiment changes; the command line overrides any field: `--config.lppo.kl_coef=0.1`, tuples as
`--config.sweep.exits=1,12,23`, `none` for *unset*, one key of an open field as `--config.data.mixture.vqa=0.3`. An
unknown field or a wrong value is one line that names the nearest field, or what the value may be.

Origins in the last column: *paper* is the ICML 2025 text, *TRL* the defaults of TRL 0.11.4, *RiC*
Rewards-in-Context's PPO, *ours* this project's own choice.
"""


def render() -> str:
    """Returns the text of the page."""
    parts = [HEAD, _table("At the top", "", [name for name in FIELDS if "." not in name])]
    for name, section in defaults.CONFIG.items():
        if isinstance(section, Section):
            parts.append(_table(f"`{name}`", section.about, [f"{name}.{leaf}" for leaf in section.fields]))
    return "\n".join([*parts, _open_fields(), _scorers(), _experiments()])


def _table(title: str, about: str, fields: list[str]) -> str:
    head = "| field | default | may be | meaning | origin |\n| --- | --- | --- | --- | --- |\n"
    rows = "".join(_row(name, FIELDS[name]) for name in fields)
    return f"## {title}\n\n{about}{about and chr(10) * 2}{head}{rows}"


def _row(name: str, field: Field) -> str:
    default = f"{_as_markdown(field.default)} {field.unit}" if field.unit and field.default is not None else ""
    unit = f" In {field.unit}." if field.unit and field.default is None else ""
    cells = (f"`{name}`", default or _as_markdown(field.default), field.allowed(), field.about + unit, field.origin)
    return "| " + " | ".join(_cell(cell) for cell in cells) + " |\n"


def _as_markdown(value: Any) -> str:
    if value is None:
        return "*unset*"
    if value in ({}, ()):
        return "*none*"
    if isinstance(value, dict):
        return ", ".join(f"`{key}`: `{item}`" for key, item in value.items())
    if isinstance(value, tuple):
        return f"`{','.join(map(str, value))}`"
    return f"`{str(value).lower() if isinstance(value, bool) else value}`"


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("<", "&lt;").strip()


def _open_fields() -> str:
    open_fields = ", ".join(f"`{name}`" for name in OPEN_FIELDS)
    kinds, rewards = (", ".join(f"`{item}`" for item in items) for items in (names.KINDS, names.REWARDS))
    return (
        f"## Fields with keys of your own\n\n{open_fields} are\n"
        "dicts. The keys of `data.mixture`, `lppo.kl_coef_by_kind` and `reward.by_kind` are kinds of rows\n"
        f"({kinds}), the values of `reward.by_kind` are\n"
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
    for kind, scorer in names.SCORERS.items():
        network = names.NETWORK_FIELDS if scorer.architectures else {}
        tables = scorer.fields, network
        cells = (", ".join(f"`{name}` ({TYPE_NAMES[of]})" for name, of in fields.items()) for fields in tables)
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
    """Returns the variants of a config file, which its error message for an unknown variant lists."""
    try:
        config_files.load(f"configs/{name}:?")
    except UserError as error:
        _, known, variants = str(error).partition("this config has ")
        return ", ".join(f"`:{variant}`" for variant in variants.split(", ") if known and variant != "none") or "none"
    raise ValueError(f"configs/{name} takes any variant")


def main(arguments: list[str] | None = None) -> int:
    """Writes the page, or with `--check` compares it; returns 1 if it is outdated."""
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
