"""Writes HF checkpoint directories in the OLD layout with old config keys: transformers 4.46 to 5.x load them.

Tensors that training did not touch are copied from the source byte for byte; the others are cast to the source's
dtype. Files are streamed tensor by tensor into a folder beside the target, which is renamed at the end.
"""

import contextlib
import dataclasses
import json
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from icet_jax.checkpoints import hf_config, safetensors_io, tables
from icet_jax.checkpoints.hf_import import hf_shape, lora_delta, match, on_host
from icet_jax.checkpoints.safetensors_io import TensorReader, safetensors_files
from icet_jax.checkpoints.tables import Slot, Table
from icet_jax.errors import UserError
from icet_jax.files import replace_dir_atomic
from icet_jax.models.gpt2 import GPT2Config
from icet_jax.models.layers import Lora
from icet_jax.models.llava import LlavaConfig
from icet_jax.parallel.sharding import flatten_with_names

MAX_SHARD_BYTES = 5_000_000_000
VALUE_HEAD = "value_head.safetensors"
COPIED = (
    "generation_config.json", "tokenizer.json", "tokenizer.model", "tokenizer_config.json", "special_tokens_map.json",
    "added_tokens.json", "vocab.json", "merges.txt", "chat_template.json", "chat_template.jinja",
    "preprocessor_config.json", "processor_config.json",
)  # fmt: skip
"""What comes along from the source directory, where it is there."""


@dataclasses.dataclass(frozen=True)
class _Export:
    """Everything that decides one tensor of the output.

    Attributes:
      table: of the family.
      params: parameters by path.
      reader: the open source, or None.
      keys: OLD key -> key in the source.
      lora: adapters to merge, or None.
    """

    table: Table
    params: dict[str, jax.Array]
    reader: TensorReader | None
    keys: dict[str, str]
    lora: Lora | None

    def dtype(self, slot: Slot) -> str:
        """The source tensor's dtype, or the parameter's."""
        if self.reader is not None:
            return self.reader.dtypes[self.keys[slot.key]]
        return safetensors_io.dtype_name(self.params[slot.path].dtype)

    def tensor(self, slot: Slot) -> np.ndarray:
        """The HF tensor of a slot, adapters merged in float32."""
        tensor = slot.transform.to_hf(on_host(self.params[slot.path], slot.layer))
        if self.reader is not None:
            source = self.reader.read(self.keys[slot.key])
            # A parameter that still equals what was loaded stands for the source's own bits, of which a bfloat16
            # parameter holds only a part.
            if np.array_equal(source.astype(tensor.dtype), tensor):
                tensor = source
        delta = lora_delta(self.lora, slot)
        if delta is not None:
            tensor = tensor.astype(np.float32) + slot.transform.to_hf(delta)
        return tensor.astype(safetensors_io.DTYPES[self.dtype(slot)])

    def tied(self) -> list[Slot]:
        """Slots that the file may leave out: the source lacked them, and they still equal what they are tied to."""
        return [slot for slot in self.table.slots if slot.fallback and self._is_tied(slot)]

    def _is_tied(self, slot: Slot) -> bool:
        if self.reader is not None and self.keys[slot.key] != self.keys[slot.fallback or ""]:
            return False
        other = next(candidate for candidate in self.table.slots if candidate.key == slot.fallback)
        return np.array_equal(self.tensor(slot), self.tensor(other))


def save_llava(
    out_dir: str | Path,
    config: LlavaConfig,
    params: nnx.State,
    *,
    source_dir: str | Path | None = None,
    lora: Lora | None = None,
    value_head: dict[str, jax.Array] | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> Path:
    """Writes a LLaVA-1.5 checkpoint directory, all of it or nothing.

    Args:
      out_dir: new, or an earlier export, which is replaced.
      config: of the network.
      params: its parameters, as `load_llava` returned or training left them.
      source_dir: the directory they were loaded from: gives dtypes, untouched tensors, config keys unknown here,
        generation config, tokenizer and processor files. None for a network made here: dtypes are the parameters'.
      lora: adapters to merge, in float32, into the source's weights.
      value_head: saved beside the model as `value_head.safetensors`, which transformers does not read.
      max_shard_bytes: larger models are cut into shards with an index.

    Returns:
      `out_dir`.

    Raises:
      UserError: the directory cannot be written or holds something else; the source does not fit `config`.
    """

    def write(folder: Path, export: _Export, values: dict[str, Any] | None, dtype: str) -> None:
        out = hf_config.llava_to_hf(config, values, dtype)
        if config.text.tie_word_embeddings and not export.tied():
            out["tie_word_embeddings"] = out["text_config"]["tie_word_embeddings"] = False
        _write_json(folder / "config.json", out)
        if value_head is not None:
            _write_value_head(folder / VALUE_HEAD, value_head)

    source = None if source_dir is None else Path(source_dir)
    return _save(Path(out_dir), tables.llava_table(config), params, source, lora, max_shard_bytes, write)


def save_gpt2_reward(
    out_dir: str | Path, config: GPT2Config, params: nnx.State, *, source_dir: str | Path | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> Path:  # fmt: skip
    """Writes a GPT-2 reward model directory (HF `GPT2ForSequenceClassification`); see `save_llava`."""

    def write(folder: Path, export: _Export, values: dict[str, Any] | None, dtype: str) -> None:
        _write_json(folder / "config.json", hf_config.gpt2_to_hf(config, values, dtype))

    source = None if source_dir is None else Path(source_dir)
    return _save(Path(out_dir), tables.gpt2_table(config), params, source, None, max_shard_bytes, write)


def load_value_head(directory: str | Path) -> dict[str, jax.Array]:
    """The value head that `save_llava` put beside a model: float32 `kernel [E, 1]` and `bias [1]`.

    Raises:
      UserError: the file is missing or broken.
    """
    with TensorReader([Path(directory) / VALUE_HEAD]) as reader:
        return {name: jnp.asarray(reader.read(name)) for name in reader.shapes}


def _save(
    out_dir: Path,
    table: Table,
    params: nnx.State,
    source: Path | None,
    lora: Lora | None,
    max_shard_bytes: int,
    write_rest: Callable[[Path, _Export, dict[str, Any] | None, str], None],
) -> Path:
    _check_target(out_dir, source)
    by_path = flatten_with_names(params)
    with contextlib.ExitStack() as stack:
        reader, keys, values = None, {}, None
        if source is not None:
            values = hf_config.read_hf_config(source)
            reader = stack.enter_context(TensorReader(safetensors_files(source)))
            keys = match(table, by_path, reader, str(source))
        export = _Export(table, by_path, reader, keys, lora)
        folder = stack.enter_context(_beside(out_dir))
        dtype = _write_tensors(folder, export, max_shard_bytes)
        write_rest(folder, export, values, dtype)
        for path in [source / name for name in COPIED] if source is not None else ():
            if path.is_file():
                shutil.copyfile(path, folder / path.name)
    return out_dir


def _check_target(out_dir: Path, source: Path | None) -> None:
    if source is not None and out_dir.resolve() == source.resolve():
        raise UserError(f"{out_dir}: is the model's own source; export to another directory")
    if out_dir.exists() and not out_dir.is_dir():
        raise UserError(f"{out_dir}: is a file; give a directory")
    if out_dir.is_dir() and any(out_dir.iterdir()) and not (out_dir / "config.json").is_file():
        raise UserError(f"{out_dir}: holds something else than an exported model; give a new directory")


@contextlib.contextmanager
def _beside(out_dir: Path) -> Iterator[Path]:
    """A folder next to `out_dir` that takes its place if the block succeeds and vanishes otherwise."""
    folder: Path | None = None
    try:
        out_dir.parent.mkdir(parents=True, exist_ok=True)
        folder = Path(tempfile.mkdtemp(dir=out_dir.parent, prefix=f".{out_dir.name}."))
        folder.chmod(0o755)
        yield folder
        replace_dir_atomic(folder, out_dir)
    except OSError as error:
        raise UserError(
            f"{out_dir}: cannot be written ({error.strerror}); choose another place or free space"
        ) from error
    finally:
        if folder is not None:
            shutil.rmtree(folder, ignore_errors=True)


def _write_tensors(folder: Path, export: _Export, max_shard_bytes: int) -> str:
    """Writes the weight files; returns the torch name of the dtype that most bytes have."""
    left_out = {slot.key for slot in export.tied()}
    slots = {slot.key: slot for slot in export.table.slots if slot.key not in left_out}
    shapes = {key: hf_shape(slot, export.params[slot.path].shape) for key, slot in slots.items()}
    specs = {key: (export.dtype(slot), shapes[key]) for key, slot in slots.items()}
    sizes = {key: safetensors_io.tensor_bytes(*spec) for key, spec in specs.items()}
    groups = list(safetensors_io.shard(specs, max_shard_bytes))
    weight_map: dict[str, str] = {}
    for number, group in enumerate(groups, start=1):
        name = safetensors_io.SINGLE if len(groups) == 1 else f"model-{number:05d}-of-{len(groups):05d}.safetensors"
        part = {key: specs[key] for key in group}
        safetensors_io.write_safetensors(folder / name, part, lambda key: export.tensor(slots[key]))
        weight_map |= dict.fromkeys(group, name)
    if len(groups) > 1:
        index = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": weight_map}
        _write_json(folder / safetensors_io.INDEX, index)
    by_dtype: dict[str, int] = {}
    for key, size in sizes.items():
        by_dtype[specs[key][0]] = by_dtype.get(specs[key][0], 0) + size
    return safetensors_io.TORCH_NAMES[max(by_dtype, key=lambda name: by_dtype[name])]


def _write_value_head(path: Path, head: dict[str, jax.Array]) -> None:
    arrays = {name: np.asarray(array) for name, array in head.items()}
    specs = {name: (safetensors_io.dtype_name(array.dtype), array.shape) for name, array in arrays.items()}
    safetensors_io.write_safetensors(path, specs, lambda name: arrays[name])


def _write_json(path: Path, values: dict[str, Any]) -> None:
    path.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
