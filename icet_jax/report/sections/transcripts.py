"""The section of responses, by row of data and exit."""

from icet_jax.report.blocks import Block, Viewer, note
from icet_jax.report.packing import compress, pack
from icet_jax.report.study import Study
from icet_jax.report.transcripts import Transcripts, collect, first_difference, shows_prompts


def of_study(study: Study, *, reveal_unsafe: bool) -> list[Block]:
    """Returns the viewer of responses; [] if there are no transcripts.

    Only with `reveal_unsafe`, it includes the text of responses that a judge called unsafe.
    """
    transcripts = collect(study, reveal_unsafe=reveal_unsafe)
    if not transcripts.prompts:
        return []
    default, exits = study.default_exit, study.num_exits
    row, exit_layer = first_difference(transcripts, default) or (0, default or exits)
    data = pack(transcripts, exits) | {
        "exits": exits,
        "default": default,
        "planted": study.planted,
        "start": {"row": row, "exit": exit_layer},
    }
    cards = ("Before", "After") if len(transcripts.phases) == 2 else ("At this exit", f"At the default exit {default}")
    return [
        note(_rows(transcripts), " ", _left_out(study, reveal_unsafe=reveal_unsafe)),
        Viewer(compress(data), exits, exit_layer, cards),
    ]


def _rows(transcripts: Transcripts) -> str:
    """Returns a sentence on which rows the section has."""
    shown, total = len(transcripts.prompts), transcripts.num_rows
    if shown == total:
        return f"All {total} rows at every measured exit. What a scorer finds safe need not be."
    return f"{shown} of {total} rows, evenly spaced, at every measured exit. What a scorer finds safe need not be."


def _left_out(study: Study, *, reveal_unsafe: bool) -> str:
    """Returns sentences on what the section does not show."""
    if shows_prompts(study):
        unsafe = "shown in full" if reveal_unsafe else "left out of this file"
        words = f"Responses judged unsafe are {unsafe}."
    else:
        words = "Prompts, pictures and responses are left out of this file: a row is named by its id."
    if any(study.attempts(dataset) > 1 for dataset in study.datasets):
        words += " Of several attempts at a prompt the first is shown."
    return words
