"""Computes the weights that an exported model will have when it is loaded, without writing it.

A run sweeps with these weights, so it measures exactly the model that it releases. They are computed by the functions
that write the export, and therefore agree with its files bit for bit: on the host, changes are added in float32 to the
tensors of the source checkpoint, and the sum is rounded to the file's dtype and then to the parameter's dtype.
"""

from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import numpy as np
from flax import nnx

from icet_jax.checkpoints import streaming
from icet_jax.checkpoints.adapter import Adapter, adapter_from_lora
from icet_jax.checkpoints.hf_export import open_export
from icet_jax.checkpoints.progress import ByteProgress
from icet_jax.checkpoints.tables import TableEntry
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
    """Returns the parameters that would be loaded from a checkpoint which `models.saving.save_vlm` writes.

    All processes of a run must call this function. Parameters that the export leaves unchanged are the arrays of
    `loaded` themselves. The other parameters are new arrays with the dtypes and shardings of those that they replace.

    Args:
      config: config of the network.
      loaded: the parameters as they were loaded.
      params: the parameters to export (with LoRA, `loaded` itself).
      source_dir, start, lora, trained: see `models.saving.save_vlm`.
      donate: if True, each parameter of `loaded` is deleted as soon as it is replaced, which saves memory.

    Raises:
      UserError: the source does not fit `config`.
    """
    adapter = None if lora is None else adapter_from_lora(lora)
    table = family_of(config).table(config)
    with open_export(table, params, source_dir, start, adapter, trained) as export:

        def exported_tensor(entry: TableEntry) -> np.ndarray:
            return entry.transform.to_param(export.tensor(entry))

        changed = [entry for entry in table.entries if export.may_differ(entry) or _is_adapted(entry, start, adapter)]
        return _replace_tensors(loaded, changed, exported_tensor, donate)


def adapted_params(
    config: NetworkConfig,
    loaded: nnx.State,
    lora: Lora,
    *,
    source_dir: Path,
    start: Adapter | None = None,
    donate: bool = False,
) -> nnx.State:
    """Returns the base model's parameters, merged with the adapter that `adapter_export.save_adapter` would write.

    Args:
      config: config of the network.
      loaded: the parameters as they were loaded, with `start` merged.
      lora: the trained adapters.
      source_dir: directory of the base model.
      start: the adapter that the training began from; None if it began from the base model.
      donate: see `merged_params`.

    Raises:
      UserError: the source does not fit `config`.
    """
    adapter = adapter_from_lora(lora) if start is None else concatenate(start, adapter_from_lora(lora), config)
    table = family_of(config).table(config)
    with open_export(table, loaded, source_dir, None, None, ()) as base:

        def merged_tensor(entry: TableEntry) -> np.ndarray:
            return streaming.with_delta(entry.transform.to_param(base.source(entry)), adapter.delta(entry))

        adapted = [entry for entry in table.entries if _is_adapted(entry, adapter)]
        return _replace_tensors(loaded, adapted, merged_tensor, donate)


def _is_adapted(entry: TableEntry, *adapters: Adapter | None) -> bool:
    """Returns whether one of the adapters changes this tensor."""
    target = lora_key(entry.path)
    return any(adapter is not None and target in adapter.targets for adapter in adapters)


def _replace_tensors(
    loaded: nnx.State, changed: Iterable[TableEntry], tensor: Callable[[TableEntry], np.ndarray], donate: bool
) -> nnx.State:
    """Returns `loaded` with the `changed` tensors replaced by the results of `tensor(entry)`; prints the progress."""
    entries: dict[str, list[TableEntry]] = defaultdict(list)
    for entry in changed:
        entries[entry.path].append(entry)
    leaves = flatten_with_names(loaded)
    progress = ByteProgress("merging weights", sum(leaves[path].nbytes for path in entries))

    def tensor_with_progress(entry: TableEntry) -> np.ndarray:
        progress.advance(leaves[entry.path].nbytes // len(entries[entry.path]))
        return tensor(entry)

    return streaming.refill_params(loaded, entries, tensor_with_progress, donate=donate)
