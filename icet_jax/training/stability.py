"""What follows from an iteration that taught nothing (`config.lppo.on_instability`), and how many there were."""

from typing import Any

from ml_collections import ConfigDict

from icet_jax.algorithms.base import algorithm_class
from icet_jax.algorithms.metrics import instability
from icet_jax.errors import UserError

_SLOWER = 0.5  # the learning rate after a KL beyond the bound, relative to that before it


def bounded(config: ConfigDict) -> bool:
    """Whether a KL beyond `config.lppo.max_kl` takes the run back to a state within it."""
    return config.lppo.max_kl > 0 and algorithm_class(config.algorithm).bounded


def learning_rate_scale(counted: dict[str, Any]) -> float:
    """What multiplies the learning rate, from what `Stability.counts` gave."""
    return float(_SLOWER ** counted.get("rollbacks", 0))


class Stability:
    """Counts the iterations that taught nothing; what it has counted is part of every checkpoint.

    Attributes:
      beyond: why the run has to go back, in words, if the iteration that was checked last met a KL beyond the bound.
    """

    def __init__(self, config: ConfigDict, counted: dict[str, Any]) -> None:
        """`counted`: what `counts` gave when the restored checkpoint was made; empty at the start."""
        self._skips, self._bounded = config.lppo.on_instability == "skip", bounded(config)
        self._most = config.lppo.max_skipped
        self._in_a_row, self._in_all = counted.get("in_a_row", 0), counted.get("in_all", 0)
        self._rollbacks = counted.get("rollbacks", 0)
        self.beyond: str | None = None

    @property
    def counts(self) -> dict[str, int]:
        """For the metadata of a checkpoint."""
        return {"in_a_row": self._in_a_row, "in_all": self._in_all, "rollbacks": self._rollbacks}

    def check(self, row: dict[str, float], iteration: int) -> None:
        """Adds to an iteration's metrics `train/skipped`, all iterations so far that taught nothing.

        With a bound of the KL also `train/rollbacks`, how often the run went back, this time included. Where it has to,
        nothing is raised: `beyond` tells, and afterwards `ends`.

        Raises:
          UserError: the loss or its gradient is not finite, and the config says that the run stops, or there were too
            many in a row.
        """
        reason = instability(row)
        self.beyond = reason if self._bounded and row.get("train/unstable") else None
        self._in_a_row = 0 if reason is None else self._in_a_row + 1
        self._in_all += reason is not None
        self._rollbacks += self.beyond is not None
        row["train/skipped"] = float(self._in_all)
        if self._bounded:
            row["train/rollbacks"] = float(self._rollbacks)
        if reason is None or self.beyond is not None or self._goes_on():
            return
        raise UserError(
            f"iteration {iteration}: {reason}{self._before()}; the last checkpoint is untouched, try a smaller "
            "config.optimizer.learning_rate or config.model.dtype=float32"
        )

    def ends(self, iteration: int) -> UserError | None:
        """The error that ends a run that went back, where the config says so, or there were too many in a row.

        Started again it has as many in a row as before.
        """
        if self.beyond is None or self._goes_on():
            return None
        said = f"iteration {iteration}: {self.beyond}{self._before()}"
        self._in_a_row = 0
        return UserError(
            f"{said}; the state within it is saved as iteration {iteration}, and the same command goes on from there "
            f"at {_SLOWER**self._rollbacks:.3g} of config.optimizer.learning_rate"
        )

    def _goes_on(self) -> bool:
        return self._skips and self._in_a_row <= self._most

    def _before(self) -> str:
        return f", as in the {self._in_a_row - 1} before it" if self._skips and self._in_a_row > 1 else ""
