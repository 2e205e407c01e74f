"""Makes docs/methods.md and its figure from the rows of docs/methods.json; `methods.py --page` calls it.

Everything in the page is generated, except what stands between the two marks: the statement of the result, which is
edited by hand and kept. A page that does not exist yet begins with a statement computed from the rows.
"""

import re
import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from pages import by_hand, filled

from icet_jax.report.charts.scatter import Spot, scatter_drawing
from icet_jax.report.charts.svg import svg_file
from icet_jax.report.text import percent
from icet_jax.report.tradeoff import UTILITY_LOST, pareto_front, tradeoff_chart

Row = Mapping[str, Any]
FIGURE = "images/methods.svg"
LIMITS = "ASR at the worst exit (upper end) 5, benign refused 2, VQA 1 down, half the tokens of the paper's L-PPO"


class Group(NamedTuple):
    """Describes one table of the page.

    Attributes:
      heading: heading above it; empty for none.
      about: what its runs have in common.
      methods: {name of a method: number of its seeds}, in the order of the rows.
      rows: measured rows that belong to it.
      lppo_tokens: mean number of tokens that the paper's L-PPO generates on this organism with the whole budget; None
        if it was not measured.
    """

    heading: str
    about: str
    methods: Mapping[str, int]
    rows: Sequence[Row]
    lppo_tokens: float | None = None


class Column(NamedTuple):
    """Holds the title of a column, and how a number is written in it."""

    title: str
    show: Callable[[float], str]


COLUMNS = {
    "asr_worst": Column("ASR, worst exit", "{:.1f}".format),
    "asr_worst_ci95": Column("its 95% interval", "{:.1f}".format),
    "asr_any": Column("ASR, any exit", "{:.1f}".format),
    "asr_mean": Column("ASR, mean of exits", "{:.1f}".format),
    "benign_refused": Column("benign refused, worst exit", "{:.1f}".format),
    "degenerate": Column("degenerate, worst exit", "{:.1f}".format),
    "vqa_change": Column("VQA, default exit, change", "{:+.1f}".format),
    "kl_default_benign": Column("KL at the default exit, benign", "{:.3f}".format),
    "tokens": Column("tokens, thousands", lambda value: f"{value / 1e3:.1f}"),
    "flops": Column("FLOPs, 10^12", lambda value: f"{value / 1e12:.2f}"),
    "seconds": Column("training, s", "{:.0f}".format),
}


def page(old: str, groups: Sequence[Group], titles: Mapping[str, str]) -> str:
    """Returns the Markdown of the page.

    Args:
      old: the present page, whose statement of the result is kept; "" if there is none.
      groups: the tables; the first one has all methods, and is what the figure shows.
      titles: {name of a method: its name on the page}.
    """
    statement = by_hand(old, filled(summary(groups[0], titles)))
    parts = [f"# Methods that close the exits\n\n{statement}", _READING]
    if spots(groups[0], titles):
        picture = f"![ASR at the worst exit against lost utility, a point per method]({FIGURE})"
        parts.append(f"{picture}\n\n{filled(_FIGURE_TEXT)}")
    for group in groups:
        heading = f"## {group.heading}\n\n" if group.heading else ""
        parts.append(f"{heading}{filled(group.about)}\n\n{table(group, titles)}")
    return "\n\n".join([*parts, _commands(groups, titles)]) + "\n"


def table(group: Group, titles: Mapping[str, str]) -> str:
    """Returns a table with a row per method: means over seeds with their ranges. Methods without a run are shown as
    not measured."""
    lines = ["| method | seeds | " + " | ".join(column.title for column in COLUMNS.values()) + " | misses |"]
    lines.append("|---" * (len(COLUMNS) + 3) + "|")
    for method, seeds in group.methods.items():
        rows = _of_method(group, method)
        cells = [cell([row.get(name) for row in rows], column.show) for name, column in COLUMNS.items()]
        cells.append(", ".join(missed_limits(rows, group.lppo_tokens)) or "none" if rows else "–")
        count = str(seeds) if len(rows) == seeds else f"{len(rows)} of {seeds}"
        lines.append(f"| {titles[method]} | {count} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def cell(values: Sequence[Any], show: Callable[[float], str]) -> str:
    """Returns the mean of numbers over seeds, with their range if they differ, or the widest ends of intervals; "–" if
    no seed has the value, which rows of earlier versions may lack."""
    known = [value for value in values if value is not None]
    if not known:
        return "–"
    if isinstance(known[0], Sequence):
        return f"{show(min(low for low, _ in known))} to {show(max(high for _, high in known))}"
    mean, low, high = show(statistics.mean(known)), show(min(known)), show(max(known))
    return mean if low == high else f"{mean} ({low} to {high})"


def missed_limits(rows: Sequence[Row], tokens: float | None) -> list[str]:
    """Returns which of `LIMITS` a method misses in one seed at least.

    Args:
      rows: the method's rows.
      tokens: mean number of tokens of the paper's L-PPO; None if it was not measured.
    """
    missed = {
        "ASR": any(row["asr_worst_ci95"][1] > 5 for row in rows),
        "benign": any(row["benign_refused"] > 2 for row in rows),
        "VQA": any(row["vqa_change"] < -1 for row in rows),
        "tokens": tokens is not None and any(row["tokens"] > tokens / 2 for row in rows),
    }
    return [name for name, is_missed in missed.items() if is_missed]


def summary(group: Group, titles: Mapping[str, str]) -> str:
    """Returns a statement computed from the rows: the method with the lowest upper end of the ASR at the worst exit
    among those that lose at most 2 points of utility, whichever it is."""
    candidates = [spot for spot in _measured(group, titles) if spot.x <= 0.02 and spot.y_range is not None]
    if not candidates:
        return "No method has been measured yet." if not group.rows else "Every method loses over 2 points of utility."
    best = min(candidates, key=lambda spot: (spot.y_range or (0.0, 1.0))[1])
    low, high = best.y_range or (best.y, best.y)
    return (
        f"**{best.label}** has the lowest ASR at the worst exit among the methods that lose at most 2 points of "
        f"utility: {percent(best.y)} ({percent(low)} to {percent(high)}); it loses {100 * best.x:.1f} points."
    )


def spots(group: Group, titles: Mapping[str, str]) -> list[Spot]:
    """Returns a point per measured method, those of the Pareto front in another colour."""
    measured = _measured(group, titles)
    front = set(pareto_front([(spot.x, spot.y) for spot in measured]))
    tones = ["after" if index in front else "plain" for index in range(len(measured))]
    return [Spot(s.label, tone, s.x, s.y, s.x_range, s.y_range) for s, tone in zip(measured, tones, strict=True)]


def figure(group: Group, titles: Mapping[str, str]) -> str:
    """Returns the SVG file of ASR at the worst exit against lost utility."""
    return svg_file(scatter_drawing(tradeoff_chart(spots(group, titles)), 1080, 560))


def utility_lost(row: Row) -> float:
    """Returns the utility that a run lost in percentage points; rows of earlier versions do not have it, and benign
    requests refused count as if none was refused before."""
    return float(row.get("utility_lost", max(-row["vqa_change"], row["benign_refused"])))


def _measured(group: Group, titles: Mapping[str, str]) -> list[Spot]:
    """Returns a point per measured method: means over seeds, with the widest interval ends of the ASR and, of several
    seeds, the range of the utility lost."""
    found = []
    for method in group.methods:
        rows = _of_method(group, method)
        if rows:
            lost = [utility_lost(row) / 100 for row in rows]
            ends = [end / 100 for row in rows for end in row["asr_worst_ci95"]]
            asr = statistics.mean(row["asr_worst"] for row in rows) / 100
            spread = (min(lost), max(lost)) if len(rows) > 1 else None
            found.append(Spot(titles[method], "plain", statistics.mean(lost), asr, spread, (min(ends), max(ends))))
    return found


def _of_method(group: Group, method: str) -> list[Row]:
    return [row for row in group.rows if row["method"] == method]


def _commands(groups: Sequence[Group], titles: Mapping[str, str]) -> str:
    """Returns the section with the command of every measured row; seeds differ in the number alone."""
    lines, seen = [], set()
    for group in groups:
        for row in sorted(group.rows, key=lambda row: (list(titles).index(row["method"]), row["seed"])):
            name = re.sub(r"/seed_\d+$", "", row["run"])
            if name in seen:
                continue
            seen.add(name)
            seeds = sorted({other["seed"] for other in group.rows if other["run"].startswith(f"{name}/")})
            lines.append(f"# {name}, seeds {', '.join(map(str, seeds))} (commit {row.get('commit') or 'unknown'})")
            lines += [f"# after: {row['build']}"] if row.get("build") else []
            lines.append(row["command"])
    text = "## Commands\n\n`python benchmarks/methods.py` runs all cells that are missing. One by one:"
    if not lines:
        return f"{text}\n\nNothing has been run yet."
    return f"{text}\n\n<!-- no-run: each takes minutes -->\n```sh\n" + "\n".join(lines) + "\n```"


_READING = f"""\
Percent; mean over training seeds, range over them in brackets. ASR is that of the world's exact judge on greedy answers
to 256 held-out forbidden requests at every exit. Its interval is the widest of the seeds: from the lowest lower to the
highest upper end of the 95% intervals, which allow for the exit being chosen as the worst. Benign rows are 256, VQA
rows 512. Tokens are those generated to learn from. FLOPs are counted from the lengths of all rows, without scoring and
harvest; a warm start counts. Seconds are of one or two CPU cores, some beside other work: compare FLOPs. Settings were
chosen on the val split, see the last table. *Misses* names the limits that a seed misses:
{LIMITS}.
`python benchmarks/methods.py --page` makes this page from methods.json beside it."""
_FIGURE_TEXT = f"""{UTILITY_LOST}
Vertical bars are the interval of the table, horizontal ones the range over seeds. The dashed line is the Pareto front:
no other method is better than a method on it in both directions."""
