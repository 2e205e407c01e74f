"""Makes docs/real_model.md and its figure from docs/real_model.json; `real_model.py --page` calls it.

Everything in the page is generated, except what stands between the two marks: the statement of the result, which is
edited by hand and kept.
"""

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from pages import by_hand, filled

from icet_jax.report.charts.figures import Figure, Key, Panel
from icet_jax.report.charts.lines import Chart, Point, Series

Row = Mapping[str, Any]
ASR, REFUSED, DEGENERATE, ACCURACY = (
    "asr/refusal_keywords", "refusal/refusal_keywords", "degenerate/text_rules", "accuracy/vqa_exact",
)  # fmt: skip
TITLES = {
    "base/none": "before safety tuning",
    "tuned/none": "safety-tuned",
    "tuned/lppo": "after L-PPO",
    "tuned/lsft": "after L-SFT",
}
"""{MODEL/METHOD: name on the page}."""
SETS = {
    "forbidden": ("RedTeam-2K, held-out half", ASR),
    "advbench": ("AdvBench", ASR),
    "figstep": ("FigStep", ASR),
    "xstest": ("XSTest, unsafe requests", ASR),
    "xstest safe": ("XSTest, safe requests", REFUSED),
    "harmless": ("harmless instructions", REFUSED),
    "captions": ("descriptions of photographs", REFUSED),
    "questions": ("questions about photographs", ACCURACY),
}
"""{row of the table: (name, metric)}."""
_MEASURES = {ASR: "not refused", REFUSED: "refused", ACCURACY: "right"}
FIGURE = "images/real_model.png"
_PANELS = ("forbidden", "figstep", "harmless")


def page(old: str, content: Mapping[str, Any]) -> str:
    """Returns the Markdown of the page.

    Args:
      old: the present page, whose statement of the result is kept; "" if there is none.
      content: content of docs/real_model.json.
    """
    groups = by_group(content["rows"])
    parts = [
        f"# A model of real weights\n\n{by_hand(old, 'Not written yet.')}",
        f"![Shares at every exit]({FIGURE})\n\n{filled(_FIGURE_TEXT)}",
        "## How the model was built\n\n" + _built(content["build"]),
        "## Every set, at the default exit and at the worst\n\n" + filled(_READING) + "\n\n" + summary(groups),
        "## Every exit\n\n" + filled(_EXITS) + "\n\n" + exits_table(groups),
        "## What moves with the exit\n\n" + filled(_MOVES) + "\n\n" + moves_table(groups),
        _commands(content["rows"]),
    ]
    return "\n\n".join(parts) + "\n"


def by_group(rows: Sequence[Row]) -> dict[str, list[Row]]:
    """Returns {MODEL/METHOD: its rows, one per seed}, in the order of `TITLES`."""
    names = [f"{row['model']}/{row['method']}" for row in rows]
    return {
        group: [row for row, name in zip(rows, names, strict=True) if name == group]
        for group in TITLES
        if group in names
    }


def curve(rows: Sequence[Row], name: str) -> list[float] | None:
    """Returns a row of `SETS` at every exit in percent, the mean over seeds; None if it was not measured."""
    metric = SETS[name][1]
    found = [row["sets"].get(name.split()[0], {}).get(metric) for row in rows]
    means = [curve["mean"] for curve in found if curve is not None]
    return [100 * statistics.mean(at_exit) for at_exit in zip(*means, strict=True)] if means else None


def figure(rows: Sequence[Row]) -> Figure:
    """Returns the figure: shares at every exit, a panel per set and a line per group."""
    groups = by_group(rows)
    keys = tuple(Key(TITLES[group], f"run-{number}", "line") for number, group in enumerate(groups))
    panels = tuple(Panel(_chart(groups, name), f"{SETS[name][0]}: {_MEASURES[SETS[name][1]]}") for name in _PANELS)
    return Figure("A model of real weights at every exit", "share of answers, by refusal phrases", panels, keys)


def _chart(groups: Mapping[str, Sequence[Row]], name: str) -> Chart:
    """Returns the chart of a row of `SETS`; a group of one run has a band, its 95% interval."""
    series = []
    for number, (group, rows) in enumerate(groups.items()):
        means = curve(rows, name)
        if means is None:
            continue
        ends = rows[0]["sets"][name][SETS[name][1]]["ci95"] if len(rows) == 1 else [None] * len(means)
        points = [  # one prompt for all rows, as FigStep's, gives no interval
            Point(layer, mean / 100, *(end or (None, None)))
            for layer, (mean, end) in enumerate(zip(means, ends, strict=True), 1)
        ]
        series.append(Series(TITLES[group], f"run-{number}", points))
    first = next(iter(groups.values()))[0]
    return Chart(
        SETS[name][0], series, "{:.0%}".format, ticks=range(1, first["num_exits"] + 1),
        min_y_range=(0.0, 1.0), max_y_range=(0.0, 1.0), highlights={first["default_exit"]: "default"},
    )  # fmt: skip


def summary(groups: Mapping[str, Sequence[Row]]) -> str:
    """Returns the table of all sets at the default exit and at the worst one."""
    lines = ["| percent | rows | " + " | ".join(f"{TITLES[g]}: default | worst exit" for g in groups) + " |"]
    lines.append("|---" * (2 + 2 * len(groups)) + "|")
    for name, (title, metric) in SETS.items():
        cells, n = [], 0
        for rows in groups.values():
            values = curve(rows, name)
            if values is None:
                cells += ["–", "–"]
                continue
            n = rows[0]["sets"][name.split()[0]][metric]["n"]
            default = rows[0]["default_exit"]
            worst = (min if metric == ACCURACY else max)(range(len(values)), key=values.__getitem__)
            cells += [f"{values[default - 1]:.1f}", f"{values[worst]:.1f} (exit {worst + 1})"]
        lines.append(f"| {title}: {_MEASURES[metric]} | {n} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def exits_table(groups: Mapping[str, Sequence[Row]]) -> str:
    """Returns the table of forbidden requests that are not refused, and of degenerate answers to them, per exit."""
    count = next(iter(groups.values()))[0]["num_exits"]
    lines = ["| percent, at exit | " + " | ".join(map(str, range(1, count + 1))) + " |", "|---" * (count + 1) + "|"]
    for group, rows in groups.items():
        for name in SETS:
            values = curve(rows, name)
            if values is not None:
                title = f"{TITLES[group]}, {SETS[name][0]}: {_MEASURES[SETS[name][1]]}"
                lines.append(f"| {title} | " + " | ".join(f"{value:.0f}" for value in values) + " |")
        means = [row["sets"]["forbidden"][DEGENERATE]["mean"] for row in rows if DEGENERATE in row["sets"]["forbidden"]]
        if means:
            values = [100 * statistics.mean(at_exit) for at_exit in zip(*means, strict=True)]
            lines.append(
                f"| {TITLES[group]}, {SETS['forbidden'][0]}: degenerate | "
                + " | ".join(f"{v:.0f}" for v in values)
                + " |"
            )
    return "\n".join(lines)


def moves_table(groups: Mapping[str, Sequence[Row]]) -> str:
    """Returns the table of what moves with the exit before a word is said."""
    count = next(iter(groups.values()))[0]["num_exits"]
    lines = ["| at exit | " + " | ".join(map(str, range(1, count + 1))) + " |", "|---" * (count + 1) + "|"]
    for group, rows in groups.items():
        words = [row["first_words"] for row in rows if "first_words" in row]
        for name, title in _WORDS.items():
            values = [statistics.mean(at_exit) for at_exit in zip(*(word[name] for word in words), strict=True)]
            lines.append(f"| {TITLES[group]}: {title} | " + " | ".join(f"{value:.2f}" for value in values) + " |")
    geometry = next(iter(groups.values()))[0]["geometry"]
    for name in ("cosine", "norm_ratio"):
        cells = [f"{layer[name]:.2f}" if layer[name] is not None else "–" for layer in geometry]
        lines.append(
            f"| image features against the default exit's: {name.replace('_', ' ')} | " + " | ".join(cells) + " |"
        )
    return "\n".join(lines)


_WORDS = {
    "refusal_log_odds": "log-odds of the refusal's first token",
    "refusal_nats": "refusal, nats per token",
    "entropy": "entropy of the first token, nats",
}


def _built(build: Mapping[str, Any]) -> str:
    """Returns the section about the build."""
    results, seconds = build["results"], build["seconds"]
    probe, sight = results["probe"], results["sight"]
    versions = ", ".join(f"{name} {version}" for name, version in build["versions"].items())
    minutes = sum(seconds.values()) / 60
    text = (
        f"`make real` ([guide](guides/real_vlm.md)) made it of {' and '.join(build['parts'])} in {minutes:.0f} minutes "
        f"of two CPU cores, beside other work ({versions}). A linear probe of the image encoder's features has an area "
        f"under the ROC curve of {_mean(probe['encoder'])} over {probe['words']} words of the captions, that of an "
        f"encoder of random weights {_mean(probe['random'])}. After the training of the projector, held-out captions "
        f"have a loss of {_mean(sight['right'])} nats per token with their own photograph and "
        f"{_mean(sight['shuffled'])} with another one: a difference of {_mean(sight['difference'])}. The safety tuning "
        f"had {results['answers']['tuning_rows']:,} rows, {results['data']['forbidden.jsonl']} of them forbidden "
        "requests with one refusal for all, at the default exit alone."
    )
    reward = build.get("reward")
    if reward:
        parts = [
            f"{100 * part['accuracy']['mean']:.0f} % of {part['accuracy']['n']} of {source}"
            for source, part in reward["by_source"].items()
        ]
        text += f" The reward model ranks these held-out pairs correctly: {', '.join(parts)}."
    return filled(text)


def _mean(estimate: Mapping[str, Any]) -> str:
    """Returns a mean with its 95% interval as text."""
    low, high = estimate["ci95"]
    return f"{estimate['mean']:.3f} ({low:.3f} to {high:.3f})"


def _commands(rows: Sequence[Row]) -> str:
    """Returns the section with the command of every row; seeds differ in the number alone."""
    lines = []
    for row in rows:
        if row["seed"] == min(other["seed"] for other in rows if _group(other) == _group(row)):
            seeds = ", ".join(str(other["seed"]) for other in rows if _group(other) == _group(row))
            lines += [f"# {_group(row)}, seeds {seeds} (commit {row['commit']})", row["command"]]
    text = "## Commands\n\n" + filled(_RERUN)
    return f"{text}\n\n<!-- no-run: needs the built model -->\n```sh\n" + "\n".join(lines) + "\n```"


def _group(row: Row) -> str:
    """Returns the key of a row in `TITLES`."""
    return f"{row['model']}/{row['method']}"


_FIGURE_TEXT = """Shares of held-out rows, each with a photograph that the model has not seen (of FigStep, with the
picture that carries the request). Bands are 95% intervals of a single run; lines of several seeds are their mean. The
default exit is marked."""
_READING = """Greedy answers of at most 32 tokens, judged by refusal phrases: "not refused" counts every answer without
one, useful or not. The default exit is what the model was trained at; the worst exit is where the largest share is not
refused, or refused, or the smallest is right. Values of several seeds are means."""
_EXITS = "The last number is the deepest exit that the tower has; a degenerate answer is empty or repeats itself."
_MOVES = """Means over 16 held-out forbidden requests, before a word is said: how near the taught refusal is, and how
sure the model is of its first token. Features are compared after the projector of the first
model."""
_RERUN = """`python benchmarks/real_model.py` makes the runs that are missing; its docstring names the files that it
needs. `--page` makes this page from real_model.json beside it."""
