"""The part on how stable a training was: guards that fired, skipped iterations, and the value head."""

from statistics import fmean, median

from icet_jax.files import JsonObject
from icet_jax.report.blocks import Block, Bullets, Heading, Text, code, text
from icet_jax.report.study import Study, as_value
from icet_jax.report.text import number

_EXPLAINED = "val/explained_variance"
_LAST = 4  # the value head is described by the last quarter of the iterations
_USEFUL, _GOOD = 0.05, 0.5  # explained variance from which a value head helps, and helps much


def of_study(study: Study) -> list[Block]:
    """Returns a list of what the guards of a training did and of how good its value head was; [] without training."""
    histories = [run.history for run in study.runs if any("train/updates" in row for row in run.history)]
    if not histories:
        return []
    items = [*_guards(histories), *_unscored(histories), *_value_head(histories)]
    return [Heading("Guards and value head"), Bullets(items)]


def _guards(histories: list[list[JsonObject]]) -> list[Text]:
    """Returns sentences on the guards that fired, or one sentence if none did."""
    rows = [row for history in histories for row in history]
    stopped = sum(_number(row, "policy/early_stop") > 0 for row in rows)
    skipped, rollbacks = (
        sum(_highest(history, name) for history in histories) for name in ("train/skipped", "train/rollbacks")
    )
    items = []
    if stopped:
        guards = text(code("config.lppo.target_kl"), " or ", code("config.lppo.max_ratio"))
        items.append(text(f"In {stopped} of {len(rows)} recorded iterations ", guards, " ended the updates early."))
    if skipped:
        reason = "their loss or gradient was not finite, or their KL was beyond "
        items.append(text(f"{_iterations(skipped)} skipped: {reason}", code("config.lppo.max_kl"), "."))
    if rollbacks:
        times = "once" if rollbacks == 1 else f"{rollbacks:g} times"
        items.append(text(f"The run went back {times}, and went on at half the learning rate."))
    return items or [text(f"No guard fired in {len(rows)} recorded iterations, and none was skipped.")]


def _iterations(count: float) -> str:
    return "1 iteration was" if count == 1 else f"{count:g} iterations were"


def _unscored(histories: list[list[JsonObject]]) -> list[Text]:
    """Returns a sentence if the reward model failed on sampled responses."""
    count = sum(_number(row, "objective/unscored") for history in histories for row in history)
    words = f"{count:g} sampled responses got no reward, because their scorer failed; nothing was learned from them."
    return [text(words)] if count else []


def _value_head(histories: list[list[JsonObject]]) -> list[Text]:
    """Returns a sentence on the explained variance of the value head; [] for an algorithm without one."""
    curves = [
        [value.mean for row in history if (value := as_value(row.get(_EXPLAINED))) is not None] for history in histories
    ]
    curves = [curve for curve in curves if curve]
    if not curves:
        return []
    last = fmean(median(curve[-max(1, len(curve) // _LAST) :]) for curve in curves)
    if last >= _GOOD:
        meaning = "it predicts most of the differences between returns"
    elif last >= _USEFUL:
        meaning = "it predicts a small part of the differences between returns"
    else:
        meaning = "it predicts returns no better than a constant would, so the advantages are as noisy as without it"
    lowest, highest = min(map(min, curves)), max(map(max, curves))
    span = f" (median of the last quarter; {number(lowest)} to {number(highest)} over all iterations)"
    return [text("Value head: ", code(_EXPLAINED), f" is {number(last)}{span}: {meaning}.")]


def _highest(history: list[JsonObject], name: str) -> float:
    """Returns the largest value of a counter in metrics.jsonl; 0 if no row has it."""
    return max((_number(row, name) for row in history), default=0.0)


def _number(row: JsonObject, name: str) -> float:
    value = as_value(row.get(name))
    return 0.0 if value is None else value.mean
