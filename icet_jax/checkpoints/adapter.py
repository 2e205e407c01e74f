"""A low-rank adapter of a network's kernels, independent of where its weights are."""

import dataclasses
from collections.abc import Callable

import numpy as np

from icet_jax.checkpoints.streaming import to_host
from icet_jax.checkpoints.tables import Slot
from icet_jax.nn.layers import Lora
from icet_jax.nn.protocols import lora_key
from icet_jax.typing import Float


@dataclasses.dataclass(frozen=True)
class Adapter:
    """Provides low-rank updates of decoder projections, `W += scale * a @ b`, one layer at a time on the host.

    Attributes:
      rank: r, the same for every target.
      scale: alpha / r (or alpha / sqrt(r)).
      targets: adapted projections, with the names in `Lora.weights`.
      factors: function of (target, layer of its stack) that returns float32 `a [in, r]` and `b [r, out]`, in the order
        x @ a @ b; zero if that layer is not adapted. With several processes it may be collective, so all must call it
        in the same order.
    """

    rank: int
    scale: float
    targets: tuple[str, ...]
    factors: Callable[[str, int], tuple[np.ndarray, np.ndarray]]

    def delta(self, slot: Slot) -> Float[np.ndarray, "size_in size_out"] | None:
        """Returns the float32 update `[in, out]` of the kernel that `slot` fills; None if there is none."""
        target = lora_key(slot.path)
        if target not in self.targets or slot.layer is None:
            return None
        # The same memory layout always, so that an adapter read from a file gives the same bits as the written one.
        a, b = map(np.ascontiguousarray, self.factors(target, slot.layer))
        return np.float32(self.scale) * (a @ b) if b.any() else None


def of_lora(lora: Lora) -> Adapter:
    """Returns trained LoRA weights, on whatever devices they are, as an `Adapter`."""
    rank = next(iter(lora.weights.values()))["a"].shape[-1]

    def factors(target: str, layer: int) -> tuple[np.ndarray, np.ndarray]:
        a, b = (to_host(lora.weights[target][side], layer).astype(np.float32) for side in "ab")
        return a, b

    return Adapter(rank, lora.scale, tuple(sorted(lora.weights)), factors)
