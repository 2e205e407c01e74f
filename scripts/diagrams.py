"""Writes the two diagrams of docs/architecture.md: the packages of icet_jax, and one L-PPO iteration.

    python scripts/diagrams.py            # writes docs/images/packages.svg and docs/images/lppo_iteration.svg
    python scripts/diagrams.py --check    # writes nothing; exit code 1 if a file is outdated

They are SVG files and not Mermaid, because the site loads nothing from other machines.
"""

import argparse
import re
import sys
import tomllib
from html import escape
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
IMAGES = ROOT / "docs" / "images"
WIDTH = 760

BANDS = (  # (title, colour, packages), lowest layer first
    ("Foundation", "#e8eaf6", ("config", "files", "errors", "exit_groups", "typing", "parallel")),
    ("Models", "#e0f2f1", ("nn", "checkpoints", "media", "models")),
    ("Rows, answers, scores", "#fff8e1", ("data", "generation", "vlm", "scorers")),
    ("Training and measuring", "#fce4ec", ("algorithms", "evaluation", "training", "report")),
    ("Models that ship", "#f1f8e9", ("organism", "miniatures")),
    ("Commands", "#eceff1", ("runs", "planning", "commands", "main")),
)

STEPS = (  # (where it runs, what it does, equation)
    ("host", "Batch", "rows (x, image), a function of (seed, iteration)"),
    ("exits", "Draw an exit for each row", "l = l_{1} ... l_{B} from the exit schedule"),
    ("rollout", "Encode each image once, for all exits", "e_{1} ... e_{N}"),
    ("rollout", "Image features at the row's exit", "P(e_{l})"),
    ("rollout", "Sample an answer", "y ~ π_{φ}( . | P(e_{l}), x)"),
    ("host", "Score the text", "r(x, y)"),
    ("prepare", "Log-probs of policy and reference, and values", "log π_{φ old},  log π_{ref},  V"),
    ("prepare", "Reward per token",
     "R = r(x, y) - η KL(π_{φ} || π_{ref}),  r normalised, clipped, less a penalty without EOS"),
    ("prepare", "Advantages and returns", "A = GAE(R, V; γ, λ),  returns = A + V"),
    ("update", "Clipped updates, epochs × mini-batches",
     "L = E[max(-K A, -clip(K, 1-ε, 1+ε) A)] + c_{1} E[(V - returns)^{2}]"),
    ("host", "Metrics, and now and then a training checkpoint", "one row of metrics.jsonl"),
)  # fmt: skip
COLOURS = {"host": "#eceff1", "exits": "#e8eaf6", "rollout": "#e0f2f1", "prepare": "#fff8e1", "update": "#fce4ec"}


def layers() -> list[list[str]]:
    """Returns the packages of each layer that import-linter checks (pyproject.toml), lowest layer first."""
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["importlinter"]
    top_down = next(contract["layers"] for contract in settings["contracts"] if contract["type"] == "layers")
    return [[name.strip() for name in re.split(r"[:|]", layer)] for layer in reversed(top_down)]


def packages_svg() -> str:
    """Returns the diagram of the packages: a box for each layer; a package imports only from boxes above it."""
    bands = {name: (title, colour) for title, colour, names in BANDS for name in names}
    parts, y, title = [], 16, ""
    for layer in layers():
        if bands[layer[0]][0] != title:
            title = bands[layer[0]][0]
            y += 12
            parts.append(_text(32, y + 17, title, size=13, weight="bold"))
        label = ", ".join(sorted(layer))
        parts.append(_box(240, y, 300, 24, bands[layer[0]][1]))
        parts.append(_text(390, y + 16, label, size=13, anchor="middle", css="package"))
        y += 30
    parts.append(_arrow(590, y - 12, 590, 32))
    parts.append(_text(608, y // 2, "imports go up only", size=13))
    return _svg("Packages of icet_jax: a package imports only from those above it", y + 12, parts)


def iteration_svg() -> str:
    """Returns the diagram of the steps of one L-PPO iteration, each with its equation and the program that runs it."""
    parts, y = [], 20
    for number, (place, title, equation) in enumerate(STEPS, start=1):
        if number > 1:
            parts.append(_arrow(400, y - 12, 400, y - 2))
        parts.append(_box(130, y, 540, 44, COLOURS[place]))
        parts.append(_text(144, y + 18, f"{number}. {title}", size=13, weight="bold"))
        parts.append(_text(164, y + 36, equation, size=13))
        parts.append(_text(118, y + 27, place, size=13, anchor="end"))
        y += 56
    bottom, top = y - 34, 42
    parts.append(f'<path d="M670 {bottom} H716 V{top} H674" fill="none" stroke="#455a64" marker-end="url(#head)"/>')
    parts.append(
        f'<text x="732" y="{(bottom + top) // 2}" font-size="13" text-anchor="middle" fill="#263238" '
        f'transform="rotate(90 732 {(bottom + top) // 2})">next iteration</text>'
    )
    return _svg("One L-PPO iteration", y, parts)


def _svg(title: str, height: int, parts: list[str]) -> str:
    head = (
        '<defs><marker id="head" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="8" markerHeight="8" orient="auto">'
        '<path d="M0 0 L8 4 L0 8 Z" fill="#455a64"/></marker></defs>'
    )
    return "\n".join(
        (
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" width="{WIDTH}" '
            f'height="{height}" font-family="Helvetica, Arial, sans-serif" role="img">',
            f"<title>{escape(title)}</title>",
            head,
            f'<rect width="{WIDTH}" height="{height}" rx="8" fill="#ffffff"/>',
            *parts,
            "</svg>\n",
        )
    )


def _box(x: int, y: int, width: int, height: int, colour: str) -> str:
    return f'<rect x="{x}" y="{y}" width="{width}" height="{height}" rx="5" fill="{colour}" stroke="#90a4ae"/>'


def _arrow(x1: int, y1: int, x2: int, y2: int) -> str:
    return f'<line x1="{x1}" y1="{y1}" x2="{x2}" y2="{y2}" stroke="#455a64" marker-end="url(#head)"/>'


def _text(x: int, y: int, text: str, *, size: int, anchor: str = "start", weight: str = "normal", css: str = "") -> str:
    """Returns one line of text as SVG, in which `_{...}` is a subscript and `^{...}` a superscript."""
    parts, last = [], 0
    for mark, lowered, plain in re.findall(r"([_^])\{([^}]*)\}|(.+?(?=[_^]\{|$))", text):
        shift = {"_": 4, "^": -5, "": 0}[mark]
        small = ' font-size="10"' if mark else ""
        parts.append(f'<tspan dy="{shift - last}"{small}>{escape(lowered or plain)}</tspan>')
        last = shift
    content = "".join(parts) if len(parts) > 1 else escape(text)
    name = f' class="{css}"' if css else ""
    return (
        f'<text{name} x="{x}" y="{y}" font-size="{size}" font-weight="{weight}" text-anchor="{anchor}" '
        f'fill="#263238">{content}</text>'
    )


DIAGRAMS = {"packages.svg": packages_svg, "lppo_iteration.svg": iteration_svg}


def main(arguments: list[str] | None = None) -> int:
    """Writes the diagrams, or with `--check` compares them; returns 1 if one is outdated."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing")
    options = parser.parse_args(arguments)
    stale = []
    for name, draw in DIAGRAMS.items():
        path, content = IMAGES / name, draw()
        if options.check and (not path.is_file() or path.read_text(encoding="utf-8") != content):
            stale.append(name)
        elif not options.check:
            path.write_text(content, encoding="utf-8")
    if stale:
        print(f"stale: {', '.join(stale)}; type: python scripts/diagrams.py", file=sys.stderr)
    return int(bool(stale))


if __name__ == "__main__":
    sys.exit(main())
