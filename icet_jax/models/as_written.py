"""Computes the weights that an export has when it is loaded, without writing it, so that a run measures what it
releases.

The tensors come from the functions that write the export, so they agree with its files bit for bit: updates are added
in float32 to the source's tensors on the host, rounded to the file's dtype, and then to the parameter's dtype.
"""

from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import numpy as np
from flax import nnx

from icet_jax.checkpoints import streaming
from icet_jax.checkpoints.adapter import Adapter, of_lora
from icet_jax.checkpoints.hf_export import open_export
from icet_jax.checkpoints.progress import ByteProgress
from icet_jax.checkpoints.tables import Slot
from icet_jax.models import family_of
from icet_jax.models.adapters import concatenate
from icet_jax.nn.layers import Lora
from icet_jax.nn.protocols import NetworkConfig, lora_key
from icet_jax.parallel.sharding import flatten_with_names


def merged_params(
    config: NetworkConfig,
    loaded: nnx.State,
    params: nnx.State,
    *,
    source_dir: Path,
    start: Adapter | None = None,
    lora: Lora | None = None,
    trained: Sequence[str] | None = None,
    donate: bool = False,
) -> nnx.State:
    """Returns the parameters that loading would give after `models.saving.save_vlm` wrote a checkpoint with these
    arguments.

    With several processes all of them must call this function. Parameters that an export does not change are shared
    with `loaded`; the others have the dtypes and the placement of `loaded`.

    Args:
      config: config of the network.
      loaded: the parameters as they were loaded.
      params: the parameters to export (under LoRA `loaded` itself).
      source_dir, start, lora, trained: see `models.saving.save_vlm`.
      donate: if True, each replaced parameter of `loaded` is deleted at once, so that memory never holds two models.

    Raises:
      UserError: the source does not fit `config`.
    """
    adapter = None if lora is None else of_lora(lora)
    table = family_of(config).table(config)
    with open_export(table, params, source_dir, start, adapter, trained) as export:

        def tensor(slot: Slot) -> np.ndarray:
            return slot.transform.to_param(export.tensor(slot))

        changed = [slot for slot in table.slots if export.may_differ(slot) or _adapted(slot, start, adapter)]
        return _replaced(loaded, changed, tensor, donate)


def adapted_params(
    config: NetworkConfig,
    loaded: nnx.State,
    lora: Lora,
    *,
    source_dir: Path,
    start: Adapter | None = None,
    donate: bool = False,
) -> nnx.State:
    """Returns the parameters that loading the base with the adapter of `adapter_export.save_adapter` would give.

    Args:
      config: config of the network.
      loaded: the parameters as they were loaded, with the start adapter merged.
      lora: the trained adapters.
      source_dir: directory of the base.
      start: the adapter that the training began from.
      donate: see `merged_params`.

    Raises:
      UserError: the source does not fit `config`.
    """
    adapter = of_lora(lora) if start is None else concatenate(start, of_lora(lora), config)
    table = family_of(config).table(config)
    with open_export(table, loaded, source_dir, None, None, ()) as base:

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

    def tensor_with_progress(slot: Slot) -> np.ndarray:
        progress.advance(leaves[slot.path].nbytes // len(slots[slot.path]))
        return tensor(slot)

    return streaming.replace(loaded, slots, tensor_with_progress, donate=donate)
