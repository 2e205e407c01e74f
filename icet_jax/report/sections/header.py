"""The top of a page: the headline, its caveats, and the most important values."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from icet_jax.report.blocks import Block, Header, Links, Notice, Paragraph, Span, Text, Tile, Tiles, code, text
from icet_jax.report.comparison import Comparison
from icet_jax.report.loading import PHASES
from icet_jax.report.sections import provenance, trust
from icet_jax.report.study import Study, Value, dataset_name
from icet_jax.report.text import percent
from icet_jax.report.values import change_text
from icet_jax.report.verdict import Headline, make_headline


def of_study(study: Study, run_dir: Path) -> Header:
    """Returns the top of a run's report: headline, caveats and most important values.

    For an organism (the embedded test model) it also says what was planted in the model.
    """
    headline = make_headline(study)
    facts = [
        str(study.field("model") or ""),
        f"{study.num_exits} exits",
        f"default exit {study.default_exit}" if study.default_exit is not None else "",
        f"{len(study.runs)} training seeds" if study.has_several_seeds else "",
    ]
    blocks: list[Block] = [_caveat(words) for words in headline.caveats]
    blocks.append(Paragraph(text(" · ".join(filter(None, facts))), "facts"))
    if headline.judge:
        basis = text(
            "ASR is ", code(headline.judge), f" on {dataset_name(headline.dataset)}. {_intervals(study, headline)}"
        )
        blocks.append(Paragraph(basis, "basis"))
    definition = study.field("exit_definition")
    if definition:
        blocks.append(Paragraph(text("Exit l is ", code(str(definition)), "."), "basis"))
    blocks += [*_export(study), *_tiles(study), *_organism(study), *_seed_links(study), *provenance.of_study(study)]
    name = run_dir.resolve().name
    return Header("Layer-wise alignment", name, headline.sentence, blocks, trust.of_study(study))


def of_comparison(comparison: Comparison) -> Header:
    """Returns the top of a comparison: the headline, and reasons besides the models why values may differ."""
    blocks: list[Block] = []
    if comparison.headline:
        dataset, judge = comparison.headline
        blocks.append(Paragraph(text("ASR is ", code(judge), f" on {dataset_name(dataset)}."), "basis"))
    caveats = [*_unusable_answers(comparison), *_cautions(comparison)]
    planted = [member.name for member in comparison.members if member.study.first_run.organism]
    if planted:
        caveats.append(
            f"{', '.join(planted)}: a small model trained here, whose hole, where it has one, was built in. It is no "
            "evidence that the hole emerges in real models."
        )
    blocks += map(_caveat, caveats)
    return Header("Layer-wise comparison", "", sentence(comparison), blocks, trust.of_comparison(comparison))


def sentence(comparison: Comparison) -> str:
    """Returns one sentence on the worst exits of all runs, the headline of a comparison."""
    count = f"{len(comparison.members)} runs side by side"
    if comparison.headline is None:
        return f"{count}; they share no attack success rate."
    dataset, judge = comparison.headline
    parts = []
    for phase in comparison.phases(dataset, judge):
        worst = [m.study.worst(phase, dataset, judge) for _, m in comparison.members_with(dataset, judge)]
        shares = [exit_value.value.mean for exit_value in worst if exit_value is not None]
        low, high = percent(min(shares)), percent(max(shares))
        shown = low if low == high else f"between {low} and {high}"
        parts.append(
            f"{phase} training the worst exit is {shown} unsafe{_any_exits(comparison, dataset, judge, phase)}"
        )
    return f"{count}: {', '.join(parts)}."


def _any_exits(comparison: Comparison, dataset: str, judge: str, phase: str) -> str:
    """Returns a phrase with the smallest and largest share of prompts with an unsafe answer at any exit, over all runs.

    Returns "" if a run that was measured on this side does not have that share.
    """
    studies = [m.study for _, m in comparison.members_with(dataset, judge) if m.study.worst(phase, dataset, judge)]
    values = [study.any_exit(phase, dataset, judge) for study in studies]
    shares = [value.mean for value in values if value is not None]
    if len(shares) < len(values):
        return ""
    low, high = percent(min(shares)), percent(max(shares))
    return f" ({low if low == high else f'{low} to {high}'} of the prompts at one exit or another)"


def _caveat(words: str) -> Paragraph:
    return Paragraph(text(words), "caveat")


def _intervals(study: Study, headline: Headline) -> str:
    """Returns a sentence with the intervals of the ASR at the worst exit and at any exit; "" if both are unknown.

    They are those after training or, if that was not measured, before it.
    """
    phase = study.phases(headline.dataset)[-1]
    worst = study.worst(phase, headline.dataset, headline.judge)
    values = {
        "Worst exit": worst and worst.value,
        "Any exit": study.any_exit(phase, headline.dataset, headline.judge),
    }
    spans = [
        f"{name} {phase}: {percent(value.low)} to {percent(value.high)}"
        for name, value in values.items()
        if value is not None and value.low is not None and value.high is not None
    ]
    return f"{'; '.join(spans)} ({study.interval})." if spans else ""


def _export(study: Study) -> list[Block]:
    """Returns a paragraph that says how many answers the exported model gives as they were measured.

    Returns [] if no run has an export_check.json.
    """
    checks = [run.export_check for run in study.runs if run.export_check]
    if not checks:
        return []
    count, equal = (sum(check[name] for check in checks) for name in ("n", "n_equal"))
    seeds = f" over {len(checks)} seeds" if study.has_several_seeds else ""
    words = (
        f"Measured after training is the exported model: loaded from its files, it gave {equal} of {count} answers"
        f"{seeds} again as they were measured."
    )
    if equal == count:
        return [Paragraph(text(words), "basis")]
    return [Paragraph(text(f"{words} The others are named in ", code("export_check.json"), "."), "caveat")]


def _tiles(study: Study) -> list[Block]:
    """Returns the most important values, before → after.

    They are the ASR at the worst exit, at any exit, on average over exits and at the default exit, and refusals and
    accuracies at the default exit.
    """
    tiles: list[Tile] = []
    default = study.default_exit
    for dataset in study.of_kind("forbidden", "mixed")[:1]:
        for metric in study.judges(dataset)[:1]:
            worst = [study.worst(phase, dataset, metric) for phase in PHASES]
            anywhere = [study.any_exit(phase, dataset, metric) for phase in PHASES]
            averages = [study.group(phase, dataset, metric, "average") for phase in PHASES]
            tiles += _tile(
                "ASR, worst exit", metric, [exit_value.value if exit_value else None for exit_value in worst]
            )
            tiles += _tile(_any_exit_title(study, dataset), metric, anywhere)
            tiles += _tile("ASR, average", metric, averages)
            tiles += _tile(f"ASR, default exit {default}", metric, _at_default(study, dataset, metric))
    for dataset in study.datasets:
        families_by_kind = {"benign": ("refusal", "accuracy"), "mixed": ("refusal",), "vqa": ("vqa", "accuracy")}
        families = families_by_kind.get(study.kind(dataset), ())
        for metric in [name for family in families for name in study.metrics(dataset, family)[:1]]:
            what = "refusals" if metric.startswith("refusal") else "accuracy"
            what += " of safe requests" if study.kind(dataset) == "mixed" else ""
            label = f"{dataset_name(dataset)} {what}, default exit {default}"
            tiles += _tile(label, metric, _at_default(study, dataset, metric))
    return [Tiles(tiles)] if tiles else []


def _any_exit_title(study: Study, dataset: str) -> str:
    """Returns the label of the share of prompts that have an unsafe answer at one or more exits."""
    attempts = study.attempts(dataset)
    return "ASR, any exit" + (f", any of {attempts} attempts" if attempts > 1 else "")


def _at_default(study: Study, dataset: str, metric: str) -> list[Value | None]:
    return [study.value(phase, dataset, metric, study.default_exit) for phase in PHASES]


def _tile(label: str, metric: str, sides: Sequence[Value | None]) -> list[Tile]:
    return [Tile(label, change_text(metric, *sides), metric)] if any(sides) else []


def _organism(study: Study) -> list[Block]:
    """Returns a notice on what was planted in the organism (the embedded test model); [] for any other model."""
    organism = study.first_run.organism
    if not organism:
        return []
    default = study.default_exit
    if study.planted:
        exits = ", ".join(map(str, study.planted))
        statement = text(
            Span("This model is constructed, and its hole is planted.", "b"),
            f" It is a small vision-language model made for this project: after safety training at its default exit "
            f"{default}, exits {exits} were kept usable on helpful-only data, the way a model would be left that was "
            "never made safe there.",
        )
    else:
        statement = text(
            Span("This is the un-planted control.", "b"),
            f" It is the same small constructed model, made safe at its default exit {default} and nowhere kept on "
            "helpful-only data.",
        )
    scope = text(
        "It shows whether training repairs such a hole, at what cost, and that the whole pipeline works. It is ",
        Span("no evidence that the hole emerges in real models", "b"),
        ", or how large it would be there. Its “forbidden” requests are harmless placeholders about invented things.",
    )
    notes = organism.get("notes")
    more = [text(str(words)) for words in notes] if isinstance(notes, list) else []
    return [Notice([statement, *_open_unplanted(study), scope, *more])]


def _open_unplanted(study: Study) -> list[Text]:
    """Returns a sentence on exits with many unsafe answers before training although nothing was planted there.

    These are the exits where the first judge calls half of the answers or more unsafe. Returns [] if there are none.
    """
    for dataset in study.of_kind("forbidden", "mixed"):
        for judge in study.judges(dataset)[:1]:
            expected = {*study.planted, study.default_exit}
            exits = [
                f"exit {layer} at {percent(value.mean)}"
                for layer, value in study.curve("before", dataset, judge)
                if value.mean >= 0.5 and layer not in expected
            ]
            if exits and study.planted:
                name = dataset_name(dataset)
                open_exits = f" of 50% or more): {', '.join(exits)}."
                return [text(f"Not planted, yet open before training on {name} (", code(judge), open_exits)]
    return []


def _seed_links(study: Study) -> list[Block]:
    """Returns links to the reports of the single seeds that have one."""
    if not study.has_several_seeds:
        return []
    links = [
        (f"{run.path.name}/report.html", run.path.name.replace("_", " "))
        for run in study.runs
        if (run.path / "report.html").is_file()
    ]
    return [Links("Each seed’s own report", links)] if links else []


def _unusable_answers(comparison: Comparison) -> list[str]:
    """Returns a sentence that names runs with empty or degenerate answers at their worst exit; [] without such runs."""
    if comparison.headline is None:
        return []
    dataset, judge = comparison.headline
    listed = []
    for phase in comparison.phases(dataset, judge):
        for _, member in comparison.members_with(dataset, judge):
            worst = member.study.worst(phase, dataset, judge)
            share = worst and member.study.unusable(phase, dataset, worst.layer)
            if worst and share:
                listed.append(f"{member.name}, {phase} training, exit {worst.layer}: {percent(share.mean)}")
    return [f"Some answers of the worst exits are empty or degenerate ({'; '.join(listed)})."] if listed else []


def _cautions(comparison: Comparison) -> list[str]:
    """Returns sentences on reasons besides the models why values of the same metric may differ between runs."""
    cautions = [
        f"{names} {'is not the same set' if is_one_set else 'are not the same sets'} in all runs ({listed})."
        for names, is_one_set, listed in _listed(comparison.differing_sources())
    ]
    cautions += [
        f"The runs answered different numbers of rows of {names} at each exit ({listed})."
        for names, _, listed in _listed(comparison.differing_sizes())
    ]
    runs_by_settings = comparison.differing_generation()
    if runs_by_settings:
        listed = "; ".join(f"{', '.join(runs)}: {settings}" for settings, runs in runs_by_settings.items())
        cautions.append(f"The responses were not generated alike ({listed}).")
    return cautions


def _listed(differing: Mapping[str, Mapping[str, list[str]]]) -> list[tuple[str, bool, str]]:
    """Groups data sets for which the runs have the same values.

    `differing` is {data set: {value: names of runs}}. Returns for each group (names of the data sets, whether it is
    only one, "runs: value; runs: value").
    """
    datasets_by_text: dict[str, list[str]] = {}
    for dataset, values in differing.items():
        listed = "; ".join(f"{', '.join(runs)}: {value}" for value, runs in values.items())
        datasets_by_text.setdefault(listed, []).append(dataset_name(dataset))
    return [(" and ".join(names), len(names) == 1, listed) for listed, names in datasets_by_text.items()]
