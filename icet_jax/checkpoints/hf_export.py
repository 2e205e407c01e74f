"""Writes HF checkpoint directories with the tensor names and config keys that all transformers from 4.46 to 5.x load.

"The source" is the checkpoint that the model was loaded from. Tensors that training did not change are copied from it
byte for byte; the others are cast to its dtypes. Tensors are written one by one, and the host holds one tensor (or one
layer of a stacked parameter) at a time. All processes of a run must call an export; the first one writes.
"""

import contextlib
import dataclasses
import shutil
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TypeAlias

import jax
import numpy as np
from flax import nnx

from icet_jax.checkpoints import folder, hf_config, safetensors_io
from icet_jax.checkpoints.adapter import Adapter
from icet_jax.checkpoints.hf_import import hf_shape, match_keys
from icet_jax.checkpoints.progress import ByteProgress
from icet_jax.checkpoints.safetensors_io import TensorReader, safetensors_files
from icet_jax.checkpoints.streaming import to_host
from icet_jax.checkpoints.tables import Table, TableEntry
from icet_jax.files import JsonObject
from icet_jax.parallel.distributed import barrier
from icet_jax.parallel.sharding import flatten_with_names

MAX_SHARD_BYTES = 5_000_000_000

ConfigWriter: TypeAlias = Callable[[JsonObject | None, str, set[str]], JsonObject]
"""Function of (the source's `config.json` or None, torch's name of the weights' dtype, keys that the files omit) that
returns the new `config.json`."""

COPIED = (
    "generation_config.json", "tokenizer.json", "tokenizer.model", "tokenizer_config.json", "special_tokens_map.json",
    "added_tokens.json", "vocab.json", "merges.txt", "chat_template.json", "chat_template.jinja",
    "preprocessor_config.json", "processor_config.json",
)  # fmt: skip
"""Files that are copied from the source directory if they exist."""


@dataclasses.dataclass(frozen=True)
class Export:
    """Computes the tensors of the exported files.

    Attributes:
      table: key table of the family.
      params: parameters by path; shapes are enough for those that cannot differ from the source (`trained`).
      reader: the source's open files, or None.
      keys: {key in the old layout: key in the source}.
      start: adapter that was merged into the source's weights when they were loaded, or None.
      lora: adapter that is merged into the exported tensors; None for no adapter.
      trained: prefixes of the paths of the parameters that may differ from the source; None if all may.
    """

    table: Table
    params: dict[str, jax.Array | jax.ShapeDtypeStruct]
    reader: TensorReader | None
    keys: dict[str, str]
    start: Adapter | None
    lora: Adapter | None
    trained: Sequence[str] | None

    def dtype(self, entry: TableEntry) -> str:
        """Returns safetensors' name of the source tensor's dtype, or of the parameter's if there is no source."""
        if self.reader is not None:
            return self.reader.dtypes[self.keys[entry.key]]
        return safetensors_io.dtype_name(self.params[entry.path].dtype)

    def tensor(self, entry: TableEntry) -> np.ndarray:
        """Returns the tensor to write for an entry, with adapters added in float32.

        All processes must call it for the same entries in the same order.
        """
        deltas = [] if self.lora is None else [self.lora.delta(entry)]
        tensor = None
        if self.may_differ(entry):
            parameter = self.params[entry.path]
            assert isinstance(parameter, jax.Array)
            tensor = entry.transform.to_hf(to_host(parameter, entry.layer))
        if self.reader is not None:
            source = self.source(entry)
            start = None if self.start is None else self.start.delta(entry)
            # If the parameter still equals the loaded one, use the source's tensor: a bfloat16 parameter has lost some
            # of its bits.
            if tensor is None or _same_bits(_sum(entry, source, [start]).astype(tensor.dtype, copy=False), tensor):
                tensor, deltas = source, [start, *deltas]
        assert tensor is not None
        return _sum(entry, tensor, deltas).astype(safetensors_io.DTYPES[self.dtype(entry)], copy=False)

    def source(self, entry: TableEntry) -> np.ndarray:
        """Returns the source's tensor of an entry."""
        assert self.reader is not None
        return self.reader.read(self.keys[entry.key])

    def may_differ(self, entry: TableEntry) -> bool:
        """Returns whether training may have changed the parameter itself; adapters do not count."""
        if self.reader is None or self.trained is None:
            return True
        return any(entry.path == root or entry.path.startswith(f"{root}/") for root in self.trained)

    def tied(self) -> set[str]:
        """Returns the keys whose tensors the files omit because they equal their fallback (tied embeddings).

        A tensor that the source's files contain is never omitted.
        """
        return {entry.key for entry in self.table.entries if entry.fallback and self._is_tied(entry)}

    def _is_tied(self, entry: TableEntry) -> bool:
        """Returns whether the tensor of an entry that has a fallback equals the fallback's tensor."""
        if self.reader is not None and self.keys[entry.key] != self.keys[entry.fallback or ""]:
            return False
        fallback = next(candidate for candidate in self.table.entries if candidate.key == entry.fallback)
        return _same_bits(self.tensor(entry), self.tensor(fallback))


def _same_bits(first: np.ndarray, second: np.ndarray) -> bool:
    """Returns whether two tensors of one dtype have the same bits, so that equal NaNs count as equal and 0 and -0 do
    not."""
    bits = np.dtype(f"u{first.dtype.itemsize}")
    return np.array_equal(first.view(bits), second.view(bits))


def _sum(entry: TableEntry, tensor: np.ndarray, deltas: Sequence[np.ndarray | None]) -> np.ndarray:
    """Returns an HF tensor plus updates in the parameter's layout (None: no update).

    The sum is in float32; without any update the result is the tensor itself.
    """
    for delta in deltas:
        if delta is not None:
            tensor = tensor.astype(np.float32, copy=False) + entry.transform.to_hf(delta)
    return tensor


def save_network(
    out_dir: str | Path,
    table: Table,
    params: nnx.State,
    config_json: ConfigWriter,
    *,
    source_dir: str | Path | None = None,
    start: Adapter | None = None,
    lora: Adapter | None = None,
    trained: Sequence[str] | None = None,
    value_head: dict[str, jax.Array] | None = None,
    texts: Mapping[str, str] | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    keys: Collection[str] | None = None,
) -> Path:
    """Writes a checkpoint directory, completely or not at all.

    Args:
      out_dir: a new directory, or an earlier export, which is replaced.
      table: key table of the network.
      params: parameters of the network.
      config_json: function that returns the content of `config.json`.
      source_dir: checkpoint that the network was loaded from, or None; unchanged tensors are copied from there.
      start, lora, trained: see `Export`.
      value_head, texts: what to write beside the weights, see `folder.write_beside_weights`.
      max_shard_bytes: largest size of a weight file.
      keys: keys of the table's tensors to write; None writes all.

    Returns:
      `out_dir`.

    Raises:
      UserError: the directory cannot be written or contains something else; or the source does not fit the table.
    """
    source = None if source_dir is None else Path(source_dir)
    head = folder.head_on_host(value_head)
    with open_export(table, params, source, start, lora, trained) as export:
        _save(Path(out_dir), export, source, max_shard_bytes, config_json, head, texts or {}, keys)
    return Path(out_dir)


@contextlib.contextmanager
def open_export(
    table: Table, params: nnx.State, source: Path | None, start: Adapter | None, lora: Adapter | None,
    trained: Sequence[str] | None,
) -> Iterator[Export]:  # fmt: skip
    """Yields the `Export` of `params`; the files of `source` stay open during the `with` block."""
    by_path = flatten_with_names(params)
    if source is None:
        yield Export(table, by_path, None, {}, start, lora, trained)
        return
    with TensorReader(safetensors_files(source)) as reader:
        yield Export(table, by_path, reader, match_keys(table, by_path, reader, str(source)), start, lora, trained)


def _save(
    out_dir: Path,
    export: Export,
    source: Path | None,
    max_shard_bytes: int,
    config_json: ConfigWriter,
    head: dict[str, np.ndarray] | None,
    texts: Mapping[str, str],
    keys: Collection[str] | None,
) -> None:
    """Writes all files of a checkpoint in the first process; the others only take part in reading the tensors."""
    tied = export.tied()
    entries = {entry.key: entry for entry in export.table.entries if entry.key not in tied}
    if keys is not None:
        entries = {key: entry for key, entry in entries.items() if key in keys}
    specs = {
        key: (export.dtype(entry), hf_shape(entry, export.params[entry.path].shape)) for key, entry in entries.items()
    }
    groups = list(safetensors_io.shard(specs, max_shard_bytes))
    files = {_file_name(number, len(groups)): group for number, group in enumerate(groups, start=1)}
    progress = ByteProgress("writing weights", sum(safetensors_io.tensor_bytes(*spec) for spec in specs.values()))

    def read(key: str) -> np.ndarray:
        progress.advance(safetensors_io.tensor_bytes(*specs[key]))
        return export.tensor(entries[key])

    if jax.process_index() == 0:
        folder.check_target(out_dir, source, "config.json")
        with folder.unfinished_folder(out_dir) as unfinished:
            for name, group in files.items():
                safetensors_io.write_safetensors(unfinished / name, {key: specs[key] for key in group}, read)
            _write_index(unfinished, files, specs)
            folder.write_beside_weights(unfinished, head, texts)
            for path in [source / name for name in COPIED] if source is not None else ():
                if path.is_file():
                    shutil.copyfile(path, unfinished / path.name)
            # Written last, because a folder without config.json does not count as a model.
            values = None if source is None else hf_config.read_hf_config(source)
            folder.write_json(unfinished / "config.json", config_json(values, _main_dtype(specs), tied))
    else:
        for group in files.values():
            for key in safetensors_io.file_order({key: specs[key] for key in group}):
                read(key)
    barrier()


def _file_name(number: int, count: int) -> str:
    """Returns the name of weight file `number` (from 1) of `count`."""
    return safetensors_io.SINGLE if count == 1 else f"model-{number:05d}-of-{count:05d}.safetensors"


def _write_index(unfinished: Path, files: dict[str, list[str]], specs: dict[str, safetensors_io.Spec]) -> None:
    """Writes the index of several weight files ({file name: keys}); a single file needs none."""
    if len(files) == 1:
        return
    total = sum(safetensors_io.tensor_bytes(*spec) for spec in specs.values())
    weight_map = {key: name for name, group in files.items() for key in group}
    folder.write_json(unfinished / safetensors_io.INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})


def _main_dtype(specs: dict[str, safetensors_io.Spec]) -> str:
    """Returns torch's name of the dtype that holds the most bytes."""
    by_dtype: dict[str, int] = {}
    for dtype, shape in specs.values():
        by_dtype[dtype] = by_dtype.get(dtype, 0) + safetensors_io.tensor_bytes(dtype, shape)
    return safetensors_io.TORCH_NAMES[max(by_dtype, key=lambda name: by_dtype[name])]
