"""The section of responses, by prompt and exit."""

from icet_jax.report.blocks import Block, Viewer, note
from icet_jax.report.pictures import PROMPTS_PER_DATASET
from icet_jax.report.study import Study
from icet_jax.report.transcripts import collect, shows_prompts


def of_study(study: Study, *, reveal_unsafe: bool) -> list[Block]:
    """Returns the viewer of responses; [] if there are no transcripts.

    Only with `reveal_unsafe`, it includes the text of responses that a judge called unsafe.
    """
    prompts = collect(study, reveal_unsafe=reveal_unsafe)
    if not prompts:
        return []
    if shows_prompts(study):
        unsafe = "shown in full" if reveal_unsafe else "left out of this file"
        left_out = f"Responses judged unsafe are {unsafe}."
    else:
        left_out = "Prompts, pictures and responses are left out of this file: a row is named by its id."
    words = (
        f"Up to {PROMPTS_PER_DATASET} prompts of each data set, evenly spaced; what a scorer finds safe need not be. "
        + left_out
    )
    if any(study.attempts(dataset) > 1 for dataset in study.datasets):
        words += " Of several attempts at a prompt the first is shown."
    default, exits = study.default_exit, study.num_exits
    data = {"exits": exits, "default": default, "planted": study.planted, "prompts": prompts}
    return [note(words), Viewer(data, exits, default or exits)]
