"""Writes HF checkpoint directories in the old layout with old config keys, which transformers 4.46 to 5.x load.

Tensors that training did not change are copied from the source byte for byte; the others are cast to the source's
dtype. Tensors are written one by one, and only one piece at a time is brought to the host, whatever mesh the parameters
are on. With several processes all of them call an export and the first one writes.
"""

import contextlib
import dataclasses
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TypeAlias

import jax
import numpy as np
from flax import nnx

from icet_jax.checkpoints import folder, hf_config, safetensors_io, tables
from icet_jax.checkpoints.adapter import Adapter
from icet_jax.checkpoints.hf_import import hf_shape, match
from icet_jax.checkpoints.progress import ByteProgress
from icet_jax.checkpoints.safetensors_io import TensorReader, safetensors_files
from icet_jax.checkpoints.streaming import to_host
from icet_jax.checkpoints.tables import Slot, Table
from icet_jax.files import JsonObject
from icet_jax.nn.gpt2 import GPT2Config
from icet_jax.parallel.distributed import together
from icet_jax.parallel.sharding import flatten_with_names

MAX_SHARD_BYTES = 5_000_000_000

ConfigWriter: TypeAlias = Callable[[JsonObject | None, str, set[str]], JsonObject]
"""Function of (source's `config.json` or None, torch dtype, omitted tied keys) that returns the `config.json`."""

COPIED = (
    "generation_config.json", "tokenizer.json", "tokenizer.model", "tokenizer_config.json", "special_tokens_map.json",
    "added_tokens.json", "vocab.json", "merges.txt", "chat_template.json", "chat_template.jinja",
    "preprocessor_config.json", "processor_config.json",
)  # fmt: skip
"""Files that are copied from the source directory if they exist."""


@dataclasses.dataclass(frozen=True)
class Export:
    """Holds everything that determines the tensors of the output.

    Attributes:
      table: key table of the family.
      params: parameters by path.
      reader: the open source, or None.
      keys: {old key: key in the source}.
      start: adapter that was merged when the source was loaded, or None.
      lora: adapter to merge into the parameters, or None.
      trained: roots of the paths that may differ from the source; None if any may.
    """

    table: Table
    params: dict[str, jax.Array]
    reader: TensorReader | None
    keys: dict[str, str]
    start: Adapter | None
    lora: Adapter | None
    trained: Sequence[str] | None

    def dtype(self, slot: Slot) -> str:
        """Returns the source tensor's dtype, or the parameter's if there is no source."""
        if self.reader is not None:
            return self.reader.dtypes[self.keys[slot.key]]
        return safetensors_io.dtype_name(self.params[slot.path].dtype)

    def tensor(self, slot: Slot) -> np.ndarray:
        """Returns the HF tensor of a slot, with adapters added in float32; all processes call it for the same slots in
        order."""
        deltas = [] if self.lora is None else [self.lora.delta(slot)]
        tensor = None
        if self.may_differ(slot):
            tensor = slot.transform.to_hf(to_host(self.params[slot.path], slot.layer))
        if self.reader is not None:
            source = self.source(slot)
            start = None if self.start is None else self.start.delta(slot)
            # A parameter that still equals the loaded one is replaced by the source's own bits, because a bfloat16
            # parameter holds only a part of them.
            if tensor is None or _same_bits(_sum(slot, source, [start]).astype(tensor.dtype, copy=False), tensor):
                tensor, deltas = source, [start, *deltas]
        assert tensor is not None
        return _sum(slot, tensor, deltas).astype(safetensors_io.DTYPES[self.dtype(slot)], copy=False)

    def source(self, slot: Slot) -> np.ndarray:
        """Returns the source's tensor of a slot."""
        assert self.reader is not None
        return self.reader.read(self.keys[slot.key])

    def may_differ(self, slot: Slot) -> bool:
        """Returns whether training may have changed the parameter itself, apart from adapters."""
        if self.reader is None or self.trained is None:
            return True
        return any(slot.path == root or slot.path.startswith(f"{root}/") for root in self.trained)

    def tied(self) -> set[str]:
        """Returns the keys that the file may omit: the source omitted them, and they still equal the tensors they are
        tied to."""
        return {slot.key for slot in self.table.slots if slot.fallback and self._is_tied(slot)}

    def _is_tied(self, slot: Slot) -> bool:
        if self.reader is not None and self.keys[slot.key] != self.keys[slot.fallback or ""]:
            return False
        other = next(candidate for candidate in self.table.slots if candidate.key == slot.fallback)
        return _same_bits(self.tensor(slot), self.tensor(other))


def _same_bits(first: np.ndarray, second: np.ndarray) -> bool:
    """Returns whether two tensors of one dtype are equal, with NaN and signed zeros; comparing bits is faster for
    bfloat16."""
    bits = np.dtype(f"u{first.dtype.itemsize}")
    return np.array_equal(first.view(bits), second.view(bits))


def _sum(slot: Slot, tensor: np.ndarray, deltas: Sequence[np.ndarray | None]) -> np.ndarray:
    """Returns a tensor of the file plus updates of the parameter; the tensor itself if there are none."""
    for delta in deltas:
        if delta is not None:
            tensor = tensor.astype(np.float32, copy=False) + slot.transform.to_hf(delta)
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
) -> Path:
    """Writes a checkpoint directory, completely or not at all.

    Args:
      out_dir: a new directory, or an earlier export, which is replaced.
      table: key table of the network.
      params: its parameters.
      config_json: function that returns `config.json`.
      source_dir, start, lora, trained, value_head, texts, max_shard_bytes: see `icet_jax.models.saving.save_vlm`.

    Returns:
      `out_dir`.

    Raises:
      UserError: the directory cannot be written or holds something else; the source does not fit the table.
    """
    source = None if source_dir is None else Path(source_dir)
    head = folder.head_on_host(value_head)
    with open_export(table, params, source, start, lora, trained) as export:
        _save(Path(out_dir), export, source, max_shard_bytes, config_json, head, texts or {})
    return Path(out_dir)


def save_gpt2_reward(
    out_dir: str | Path, config: GPT2Config, params: nnx.State, *, source_dir: str | Path | None = None
) -> Path:
    """Writes a GPT-2 reward model directory (HF `GPT2ForSequenceClassification`), completely or not at all."""

    def config_json(values: JsonObject | None, dtype: str, tied: set[str]) -> JsonObject:
        return hf_config.gpt2_to_hf(config, values, dtype)

    return save_network(out_dir, tables.gpt2_table(config), params, config_json, source_dir=source_dir)


@contextlib.contextmanager
def open_export(
    table: Table, params: nnx.State, source: Path | None, start: Adapter | None, lora: Adapter | None,
    trained: Sequence[str] | None,
) -> Iterator[Export]:  # fmt: skip
    """Yields the `Export` that provides every tensor; the source's files stay open during the block."""
    by_path = flatten_with_names(params)
    if source is None:
        yield Export(table, by_path, None, {}, start, lora, trained)
        return
    with TensorReader(safetensors_files(source)) as reader:
        yield Export(table, by_path, reader, match(table, by_path, reader, str(source)), start, lora, trained)


def _save(
    out_dir: Path,
    export: Export,
    source: Path | None,
    max_shard_bytes: int,
    config_json: ConfigWriter,
    head: dict[str, np.ndarray] | None,
    texts: Mapping[str, str],
) -> None:
    tied = export.tied()
    slots = {slot.key: slot for slot in export.table.slots if slot.key not in tied}
    specs = {key: (export.dtype(slot), hf_shape(slot, export.params[slot.path].shape)) for key, slot in slots.items()}
    groups = list(safetensors_io.shard(specs, max_shard_bytes))
    files = {_file_name(number, len(groups)): group for number, group in enumerate(groups, start=1)}
    progress = ByteProgress("writing weights", sum(safetensors_io.tensor_bytes(*spec) for spec in specs.values()))

    def read(key: str) -> np.ndarray:
        progress.advance(safetensors_io.tensor_bytes(*specs[key]))
        return export.tensor(slots[key])

    if jax.process_index() == 0:
        folder.check_target(out_dir, source, "config.json")
        with folder.beside(out_dir) as unfinished:
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
    together()


def _file_name(number: int, count: int) -> str:
    return safetensors_io.SINGLE if count == 1 else f"model-{number:05d}-of-{count:05d}.safetensors"


def _write_index(unfinished: Path, files: dict[str, list[str]], specs: dict[str, safetensors_io.Spec]) -> None:
    if len(files) == 1:
        return
    total = sum(safetensors_io.tensor_bytes(*spec) for spec in specs.values())
    weight_map = {key: name for name, group in files.items() for key in group}
    folder.write_json(unfinished / safetensors_io.INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})


def _main_dtype(specs: dict[str, safetensors_io.Spec]) -> str:
    """Returns the torch name of the dtype that most bytes have."""
    by_dtype: dict[str, int] = {}
    for dtype, shape in specs.values():
        by_dtype[dtype] = by_dtype.get(dtype, 0) + safetensors_io.tensor_bytes(dtype, shape)
    return safetensors_io.TORCH_NAMES[max(by_dtype, key=lambda name: by_dtype[name])]
