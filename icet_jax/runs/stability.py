"""What follows from an iteration that taught nothing (`config.lppo.on_instability`), and how many there were."""

from typing import Any

from ml_collections import ConfigDict

from icet_jax.errors import UserError
from icet_jax.lppo.metrics import instability


class Stability:
    """Counts the iterations that were skipped; what it has counted is part of every checkpoint."""

    def __init__(self, config: ConfigDict, counted: dict[str, Any]) -> None:
        """`counted`: what `counts` gave when the restored checkpoint was made; empty at the start."""
        self._skips = config.lppo.on_instability == "skip"
        self._most = config.lppo.max_skipped
        self._in_a_row, self._in_all = counted.get("in_a_row", 0), counted.get("in_all", 0)

    @property
    def counts(self) -> dict[str, int]:
        """For the metadata of a checkpoint."""
        return {"in_a_row": self._in_a_row, "in_all": self._in_all}

    def check(self, row: dict[str, float], iteration: int) -> None:
        """Adds `train/skipped`, all iterations so far that taught nothing, to an iteration's metrics.

        Raises:
          UserError: this one taught nothing, and the config says that the run stops, or there were too many in a row.
        """
        reason = instability(row)
        self._in_a_row = 0 if reason is None else self._in_a_row + 1
        self._in_all += reason is not None
        row["train/skipped"] = float(self._in_all)
        if reason is None or (self._skips and self._in_a_row <= self._most):
            return
        before = f", as in the {self._in_a_row - 1} before it" if self._skips and self._in_a_row > 1 else ""
        raise UserError(
            f"iteration {iteration}: {reason}{before}; the last checkpoint is untouched, try a smaller "
            "config.optimizer.learning_rate or config.model.dtype=float32"
        )
