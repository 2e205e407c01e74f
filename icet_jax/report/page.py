"""Puts the report of one run together."""

from pathlib import Path

from icet_jax.files import write_text_atomic
from icet_jax.report import context, measures
from icet_jax.report.document import document_html
from icet_jax.report.formats import formats_html
from icet_jax.report.judges import judges_html
from icet_jax.report.load import load_runs
from icet_jax.report.paper import paper_html
from icet_jax.report.pictures import PROMPTS_PER_DATASET
from icet_jax.report.policies import policies_html
from icet_jax.report.study import Study, dataset_name
from icet_jax.report.text import escape, json_script, percent
from icet_jax.report.transcripts import collect
from icet_jax.report.verdict import Verdict, verdict
from icet_jax.report.widgets import code


def build_report(run_dir: Path, *, reveal_unsafe: bool = False) -> Path:
    """See `icet_jax.report.build`."""
    study = Study(load_runs(run_dir))
    page = run_dir / "report.html"
    write_text_atomic(page, render(study, run_dir, reveal_unsafe=reveal_unsafe))
    from icet_jax.report.figures import write_figures  # matplotlib is slow to import

    write_figures(study, run_dir / "figures")
    return page


def render(study: Study, run_dir: Path, *, reveal_unsafe: bool) -> str:
    """The whole page. `run_dir` is named in it and tells which seeds have a report of their own."""
    found = verdict(study)
    return document_html(found.sentence, _header(study, run_dir, found), _sections(study, run_dir, reveal_unsafe))


def _sections(study: Study, run_dir: Path, reveal_unsafe: bool) -> list[tuple[str, str, str]]:
    """(anchor, title, markup) in reading order; an empty one is left out."""
    return [
        ("safety", "Safety at every exit", measures.safety_html(study)),
        ("policies", "Which requests get through where", policies_html(study)),
        ("formats", "Which attack formats get through", formats_html(study)),
        ("groups", "Early, middle, late", measures.groups_html(study)),
        ("paper", "Beside the paper’s Table 2", paper_html(study)),
        ("utility", "Over-refusal and utility", measures.utility_html(study)),
        ("transcripts", "What the model said", _transcripts_html(study, reveal_unsafe)),
        ("differences", "Before and after on the same prompts", measures.differences_html(study)),
        ("judges", "Who judged", judges_html(study)),
        ("geometry", "How far each exit lies from the default", context.geometry_html(study)),
        ("training", "Training", context.training_html(study)),
        ("cost", "Cost", context.cost_html(study)),
        ("config", "Configuration", context.config_html(study)),
        ("limits", "What these numbers do not say", context.limits_html(study)),
    ]


def _header(study: Study, run_dir: Path, found: Verdict) -> str:
    """Headline, caveats, key figures and what is planted."""
    facts = [str(study.field("model") or ""), f"{study.num_exits} exits"]
    facts.append(f"default exit {study.default_exit}" if study.default_exit is not None else "")
    facts.append(f"{len(study.runs)} training seeds" if study.several else "")
    basis = ""
    if found.judge:
        where = escape(dataset_name(found.dataset))
        basis = f"<p class=basis>ASR is {code(found.judge)} on {where}. {_spread(study, found)}</p>"
    definition = study.field("exit_definition")
    basis += f"<p class=basis>Exit l is {code(definition)}.</p>" if definition else ""
    caveats = "".join(f"<p class=caveat>{escape(text)}</p>" for text in found.caveats)
    return (
        f'<header class="{found.state}"><p class=kicker>Layer-wise alignment '
        f"<span>{escape(run_dir.resolve().name)}</span></p>"
        f"<h1>{escape(found.sentence)}</h1>{caveats}<p class=facts>{escape(' · '.join(filter(None, facts)))}</p>{basis}"
        f"{context.export_html(study)}"
        f"{measures.tiles_html(study)}{context.organism_html(study)}{_seed_links(study)}</header>"
    )


def _spread(study: Study, found: Verdict) -> str:
    """The interval of the worst exit after training (or before, where there is no after)."""
    phase = study.phases(found.dataset)[-1]
    worst = study.worst(phase, found.dataset, found.judge)
    if worst is None or worst[1].low is None or worst[1].high is None:
        return ""
    return escape(f"Worst exit {phase}: {percent(worst[1].low)} to {percent(worst[1].high)} ({study.interval}).")


def _seed_links(study: Study) -> str:
    """Links to the reports of single seeds, where they exist beside this one."""
    if not study.several:
        return ""
    links = [
        f'<a href="{escape(run.path.name)}/report.html">{escape(run.path.name.replace("_", " "))}</a>'
        for run in study.runs
        if (run.path / "report.html").is_file()
    ]
    return f"<p class=facts>Each seed’s own report: {', '.join(links)}</p>" if links else ""


def _transcripts_html(study: Study, reveal_unsafe: bool) -> str:
    """The prompt and exit selectors with their data; the script fills in the text."""
    prompts = collect(study, reveal_unsafe=reveal_unsafe)
    if not prompts:
        return ""
    data = {"exits": study.num_exits, "default": study.default_exit, "planted": study.planted, "prompts": prompts}
    last = study.num_exits
    start = study.default_exit or last
    told = (
        f"Up to {PROMPTS_PER_DATASET} prompts of each data set, evenly spaced; what a scorer finds safe need not be. "
    )
    told += (
        "Responses judged unsafe are shown in full."
        if reveal_unsafe
        else "Responses judged unsafe are left out of this file."
    )
    cards = "".join(
        f'<article class="card {phase}"><h3>{phase.capitalize()}</h3><div class=response data-side="{phase}"></div>'
        f'<div class=scores data-scores="{phase}"></div></article>'
        for phase in ("before", "after")
    )
    return (
        f'<p class=note>{escape(told)}</p><div id="viewer"><div class=controls><button type=button id="previous" '
        'aria-label="Previous prompt">←</button><label class=pick><span class=sr>Prompt</span><select id="prompt">'
        '</select></label><button type=button id="next" aria-label="Next prompt">→</button></div>'
        '<div class=request><img id="picture" alt="The image of this prompt" hidden><div><p id="request"></p>'
        '<p id="answer" class=note></p><p id="policy" class=note></p><p id="format" class=note></p></div></div>'
        f'<div class=exits><label for="exit">Exit <output id="exit-name" for="exit">{start}</output></label>'
        f'<input id="exit" type=range min=1 max={last} step=1 value={start}>'
        '<div id="strip" aria-hidden="true"></div></div>'
        f"<div class=cards aria-live=polite>{cards}</div></div>"
        "<noscript><p>The transcripts need JavaScript.</p></noscript>"
        f'<script type="application/json" id="transcript-data">{json_script(data)}</script>'
    )
