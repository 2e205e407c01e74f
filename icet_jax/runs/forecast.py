"""Describes the expected cost of sweeps in one paragraph, which is printed before they start."""

from icet_jax.evaluation.cost import Cost
from icet_jax.report.text import duration


def paragraph(what: str, cost: Cost) -> str:
    """Returns the expected cost of some sweeps as one paragraph of text.

    Args:
      what: which sweeps, such as "before mini_jailbreakv, xstest".
      cost: sum of their costs.
    """
    exits = cost.answers // max(cost.attempts, 1)
    attempts = f" with {cost.attempts:,} attempts" if cost.attempts != cost.rows else ""
    flops = cost.tower_flops + cost.prompt_flops + cost.answer_flops
    shares = [f"{part / max(flops, 1.0):.0%}" for part in (cost.tower_flops, cost.prompt_flops, cost.answer_flops)]
    sentences = [
        f"{what}: {cost.rows:,} rows{attempts} x {exits} exits = {cost.answers:,} answers;",
        f"prompts of {cost.prompt_tokens / max(cost.rows, 1):.0f} tokens,",
        f"answers of at most {cost.new_tokens / max(cost.answers, 1):.0f};",
        f"{flops:.2g} operations (images {shares[0]}, prompts {shares[1]}, answers {shares[2]}).",
        f"At the speed measured here {_range(*cost.seconds)},",
        "without compiling and without the judges.",
    ]
    judged = [f"{name} {count:,}" for name, count in cost.judged.items() if count]
    if judged:
        sentences.append(f"Responses to judge: {', '.join(judged)}.")
    for name, seconds in cost.remote_seconds.items():
        if seconds:
            sentences.append(f"{name} asks a service: its rate limit alone makes that {duration(seconds)}.")
    return " ".join(sentences)


def _range(low: float, high: float) -> str:
    """Returns a range of seconds in words, such as "5 min to 10 min"."""
    return "less than a second" if high < 1 else f"{duration(low)} to {duration(high)}"
