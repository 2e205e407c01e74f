"""The section that lists the compared runs and their exit definitions."""

from icet_jax.report.blocks import Block, Bullets, Heading, Text, code, note, remark, table, text
from icet_jax.report.comparison import Comparison, Member
from icet_jax.report.loading import PHASES
from icet_jax.report.method import method_name
from icet_jax.report.sections.numbers import run_name
from icet_jax.report.values import ARROW, change_text, value_text

_NOTE = "Charts place exit l of N at the relative depth l / N. A ring marks a run’s default exit."


def of_comparison(comparison: Comparison) -> list[Block]:
    """Returns a table with a row per run, and the list of their exit definitions."""
    rows = []
    for index, member in enumerate(comparison.members):
        study = member.study
        trained = method_name(study)
        trained += f", {len(study.runs)} seeds" if study.has_several_seeds else ""
        default = "–" if study.default_exit is None else str(study.default_exit)
        facts = [member.folder, str(study.field("model") or "–"), str(study.num_exits), default, trained]
        attacks = [_worst(comparison, member), _any_exit(comparison, member)]
        rows.append([text(run_name(index, member.name)), *map(text, facts), *attacks])
    head = ["Run", "Folder", "Model", "Exits", "Default exit", "Training", "Worst exit", "Any exit"]
    definitions: dict[str, list[str]] = {}
    for member in comparison.members:
        definitions.setdefault(member.exit_definition, []).append(member.name)
    items = [
        text(f"{', '.join(names)}: ", code(definition) if definition else "its sweeps do not say")
        for definition, names in definitions.items()
    ]
    return [*table("The runs", head, rows), Heading("What exit l is"), Bullets(items), note(_NOTE)]


def _worst(comparison: Comparison, member: Member) -> Text:
    """Returns a run's ASR at its worst exit and the number of that exit, before → after, by the judge of the headline.

    Returns "–" if the runs share no judge.
    """
    if comparison.headline is None:
        return text("–")
    dataset, judge = comparison.headline
    worst = [member.study.worst(phase, dataset, judge) for phase in PHASES]
    where = " → ".join(f"exit {exit_value.layer}" for exit_value in worst if exit_value is not None)
    shares = change_text(judge, *(exit_value and exit_value.value for exit_value in worst))
    return text(shares, " ", remark(where)) if where else shares


def _any_exit(comparison: Comparison, member: Member) -> Text:
    """Returns a run's share of prompts with an unsafe answer at one or more exits, before → after.

    The judge is that of the headline. Returns "–" if the share was not measured.
    """
    if comparison.headline is None:
        return text("–")
    dataset, judge = comparison.headline
    values = [member.study.any_exit(phase, dataset, judge) for phase in PHASES]
    sides = [value_text(judge, value) for value in values if value is not None]
    return text(sides[0], ARROW, sides[1]) if len(sides) == 2 else sides[0] if sides else text("–")
