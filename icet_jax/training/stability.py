"""Handles unstable iterations, whose updates are not applied: counts them, and ends or rolls back the run.

An iteration is unstable if its loss or gradient is not finite, or if the KL to the reference exceeds
`config.lppo.max_kl`. In the second case the run goes back to an earlier state and continues at half the learning rate.
`config.lppo.on_instability` says whether the run then goes on ("skip") or ends ("stop").
"""

from ml_collections import ConfigDict

from icet_jax.algorithms.base import algorithm_class
from icet_jax.algorithms.metrics import instability
from icet_jax.errors import UserError

_SLOWDOWN = 0.5  # factor of the learning rate each time the run goes back


def limits_kl(config: ConfigDict) -> bool:
    """Returns whether the config limits the KL, so that a run that exceeds `config.lppo.max_kl` goes back."""
    return config.lppo.max_kl > 0 and algorithm_class(config.algorithm).bounded


def learning_rate_scale(counts: dict[str, int]) -> float:
    """Returns the factor of the learning rate after as many rollbacks as `counts` (`Stability.counts`) records."""
    return float(_SLOWDOWN ** counts.get("rollbacks", 0))


class Stability:
    """Counts unstable iterations and rollbacks; the counts are part of every checkpoint.

    Attributes:
      rollback_reason: why the run must go back after the iteration that was checked last, in words; None if it does not
        have to.
    """

    def __init__(self, config: ConfigDict, counts: dict[str, int]) -> None:
        """Continues from the counts of an earlier process.

        Args:
          config: config of the run.
          counts: `counts` as stored in the restored checkpoint; empty for a new run.
        """
        self._skips, self._limits_kl = config.lppo.on_instability == "skip", limits_kl(config)
        self._most_in_a_row = config.lppo.max_skipped
        self._in_a_row, self._total = counts.get("in_a_row", 0), counts.get("in_all", 0)
        self._rollbacks = counts.get("rollbacks", 0)
        self.rollback_reason: str | None = None

    @property
    def counts(self) -> dict[str, int]:
        """Returns the counts for the metadata of a checkpoint: unstable iterations in a row and in total, rollbacks."""
        return {"in_a_row": self._in_a_row, "in_all": self._total, "rollbacks": self._rollbacks}

    def check(self, metrics: dict[str, float], iteration: int) -> None:
        """Counts an iteration, and adds the counts to its `metrics`.

        `train/skipped` is the number of unstable iterations so far. If the config limits the KL, `train/rollbacks` is
        the number of rollbacks, including one that this iteration causes. An iteration that causes a rollback raises
        nothing: `rollback_reason` is set and, after going back, `error_after_rollback` says whether the run ends.

        Raises:
          UserError: the loss or its gradient is not finite, and either the config says that the run then stops, or too
            many iterations in a row were unstable.
        """
        reason = instability(metrics)
        self.rollback_reason = reason if self._limits_kl and metrics.get("train/unstable") else None
        self._in_a_row = 0 if reason is None else self._in_a_row + 1
        self._total += reason is not None
        self._rollbacks += self.rollback_reason is not None
        metrics["train/skipped"] = float(self._total)
        if self._limits_kl:
            metrics["train/rollbacks"] = float(self._rollbacks)
        if reason is None or self.rollback_reason is not None or self._may_continue():
            return
        raise UserError(
            f"iteration {iteration}: {reason}{self._earlier()}; the last checkpoint is untouched, try a smaller "
            "config.optimizer.learning_rate or config.model.dtype=float32"
        )

    def error_after_rollback(self, iteration: int) -> UserError | None:
        """Returns the error that ends a run which has just gone back; None if the run did not go back or may continue.

        If it returns an error, the count of unstable iterations in a row is reset, for the next start of the run.
        """
        if self.rollback_reason is None or self._may_continue():
            return None
        reason = f"iteration {iteration}: {self.rollback_reason}{self._earlier()}"
        self._in_a_row = 0
        return UserError(
            f"{reason}; the state within it is saved as iteration {iteration}, and the same command goes on from there "
            f"at {_SLOWDOWN**self._rollbacks:.3g} of config.optimizer.learning_rate"
        )

    def _may_continue(self) -> bool:
        """Returns whether the config lets the run go on after the unstable iterations so far."""
        return self._skips and self._in_a_row <= self._most_in_a_row

    def _earlier(self) -> str:
        """Returns a clause for an error about unstable iterations right before this one; "" if there were none."""
        return f", as in the {self._in_a_row - 1} before it" if self._skips and self._in_a_row > 1 else ""
