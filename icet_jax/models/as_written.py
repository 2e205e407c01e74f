"""The weights that an export has once it is loaded, without writing it: what a run measures is what it releases.

The tensors come from the functions that write the export, so that they agree with its files bit for bit: updates are
added in float32 to the source's tensors on the host and rounded to the file's dtype, and only then to the parameter's.
"""

from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from flax import nnx

from icet_jax.checkpoints import streaming
from icet_jax.checkpoints.adapter import Adapter, of_lora
from icet_jax.checkpoints.hf_export import opened
from icet_jax.checkpoints.progress import ByteProgress
from icet_jax.checkpoints.tables import Slot
from icet_jax.models import family_of
from icet_jax.models.adapters import concatenate
from icet_jax.nn.layers import Lora
from icet_jax.nn.protocols import lora_key
from icet_jax.parallel.sharding import flatten_with_names


def merged_params(
    config: Any,
    loaded: nnx.State,
    params: nnx.State,
    *,
    source_dir: Path,
    start: Adapter | None = None,
    lora: Lora | None = None,
    trained: Sequence[str] | None = None,
    donate: bool = False,
) -> nnx.State:
    """The parameters that loading gives of what `models.saving.save_vlm` writes of the same arguments.

    With several processes all of them must call it. Parameters that an export leaves as they were are shared with
    `loaded`; the others lie where those of `loaded` do and have their dtypes.

    Args:
      config: of the network.
      loaded: the parameters as they were loaded.
      params: those that are exported (under LoRA `loaded` itself).
      source_dir, start, lora, trained: see `models.saving.save_vlm`.
      donate: parameters of `loaded` that have a successor are deleted one by one, so that no two models are in memory.

    Raises:
      UserError: the source does not fit `config`.
    """
    adapter = None if lora is None else of_lora(lora)
    table = family_of(config).table(config)
    with opened(table, params, source_dir, start, adapter, trained) as export:

        def tensor(slot: Slot) -> np.ndarray:
            return slot.transform.to_param(export.tensor(slot))

        changed = [slot for slot in table.slots if export.may_differ(slot) or _adapted(slot, start, adapter)]
        return _replaced(loaded, changed, tensor, donate)


def adapted_params(
    config: Any, loaded: nnx.State, lora: Lora, *, source_dir: Path, start: Adapter | None = None, donate: bool = False
) -> nnx.State:
    """The parameters that loading the base with the adapter of `adapter_export.save_adapter` gives.

    Args:
      config: of the network.
      loaded: the parameters as they were loaded, the start adapter merged.
      lora: the trained adapters.
      source_dir: directory of the base.
      start: the adapter that the training began from.
      donate: see `merged_params`.

    Raises:
      UserError: the source does not fit `config`.
    """
    adapter = of_lora(lora) if start is None else concatenate(start, of_lora(lora), config)
    table = family_of(config).table(config)
    with opened(table, loaded, source_dir, None, None, ()) as base:

        def tensor(slot: Slot) -> np.ndarray:
            return streaming.with_delta(slot.transform.to_param(base.source(slot)), adapter.delta(slot))

        return _replaced(loaded, [slot for slot in table.slots if _adapted(slot, adapter)], tensor, donate)


def _adapted(slot: Slot, *adapters: Adapter | None) -> bool:
    target = lora_key(slot.path)
    return any(adapter is not None and target in adapter.targets for adapter in adapters)


def _replaced(
    loaded: nnx.State, changed: Iterable[Slot], tensor: Callable[[Slot], np.ndarray], donate: bool
) -> nnx.State:
    slots: dict[str, list[Slot]] = defaultdict(list)
    for slot in changed:
        slots[slot.path].append(slot)
    leaves = flatten_with_names(loaded)
    progress = ByteProgress("merging weights", sum(leaves[path].nbytes for path in slots))

    def counted(slot: Slot) -> np.ndarray:
        progress.advance(leaves[slot.path].nbytes // len(slots[slot.path]))
        return tensor(slot)

    return streaming.replace(loaded, slots, counted, donate=donate)
