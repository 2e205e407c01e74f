"""Represents LoRA adapters by one type, whether their factors are on devices or come from a file."""

import dataclasses
from collections.abc import Callable

import numpy as np

from icet_jax.checkpoints.streaming import to_host
from icet_jax.checkpoints.tables import TableEntry
from icet_jax.nn.layers import Lora
from icet_jax.nn.protocols import lora_key
from icet_jax.typing import Float


@dataclasses.dataclass(frozen=True)
class Adapter:
    """Computes the low-rank updates `W += scale * a @ b` of decoder projections W, one layer at a time on the host.

    Attributes:
      rank: r, the same for every target.
      scale: alpha / r (or alpha / sqrt(r)).
      targets: names of the adapted projections, the keys of `Lora.weights`.
      factors: function of (target, layer index in its stack) that returns float32 `a [in, r]` and `b [r, out]` for
        x @ a @ b; zeros if that layer is not adapted. All processes of a run must call this function in the same order,
        because the factors may have to be gathered from several processes.
    """

    rank: int
    scale: float
    targets: tuple[str, ...]
    factors: Callable[[str, int], tuple[np.ndarray, np.ndarray]]

    def delta(self, entry: TableEntry) -> Float[np.ndarray, "size_in size_out"] | None:
        """Returns the float32 update `[in, out]` of the weight matrix of `entry`; None if it has no adapter."""
        target = lora_key(entry.path)
        if target not in self.targets or entry.layer is None:
            return None
        # A fixed memory layout, so that an adapter read from a file gives the same bits as the one that was written.
        a, b = map(np.ascontiguousarray, self.factors(target, entry.layer))
        return np.float32(self.scale) * (a @ b) if b.any() else None


def adapter_from_lora(lora: Lora) -> Adapter:
    """Returns an `Adapter` whose factors are those of trained LoRA weights, which may be on several devices."""
    rank = next(iter(lora.weights.values()))["a"].shape[-1]

    def factors(target: str, layer: int) -> tuple[np.ndarray, np.ndarray]:
        a, b = (to_host(lora.weights[target][side], layer).astype(np.float32) for side in "ab")
        return a, b

    return Adapter(rank, lora.scale, tuple(sorted(lora.weights)), factors)
