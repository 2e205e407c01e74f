"""Reads safetensors files tensor by tensor and writes them as a stream, without torch."""

import json
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open

from icet_jax.errors import UserError
from icet_jax.files import LFS_ADVICE, JsonObject, is_lfs_pointer, parse_json
from icet_jax.typing import DType

DTYPES: dict[str, np.dtype] = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
}
"""{safetensors' name: dtype} of weights; other dtypes (the integers of quantised checkpoints) are refused."""

TORCH_NAMES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}
_NAMES = {dtype: name for name, dtype in DTYPES.items()}

Spec = tuple[str, tuple[int, ...]]
"""Dtype (safetensors' name) and shape of a tensor."""

SINGLE = "model.safetensors"
"""Name of the weight file if there is only one."""
INDEX = "model.safetensors.index.json"
"""Name of the file that lists the weight files if there are several ("shards")."""
_PICKLED = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.msgpack", "*.h5")


def safetensors_files(directory: Path) -> list[Path]:
    """Returns the paths of a checkpoint's weight files: the single file, or the shards in its index.

    Raises:
      UserError: there are no safetensors weights (pickled ones are refused, because opening them can run code), the
        index is broken, or shards are missing.
    """
    if (directory / SINGLE).is_file():
        return [directory / SINGLE]
    index = directory / INDEX
    if not index.is_file():
        pickled = sorted(path.name for pattern in _PICKLED for path in directory.glob(pattern))
        if pickled:
            raise UserError(
                f"{directory}: only pickled weights ({', '.join(pickled)}), which may run code when opened; convert "
                f"them: python scripts/convert_pickle.py {directory}"
            )
        raise UserError(f"{directory}: has neither {SINGLE} nor {INDEX}; give a Hugging Face model directory")
    try:
        names = sorted(set(parse_json(index.read_text(encoding="utf-8"))["weight_map"].values()))
        outside = [name for name in names if Path(name).name != name]
    except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
        raise UserError(f"{index}: not an index of safetensors shards; download it again") from error
    if outside or not names:
        raise UserError(f"{index}: must list files of its own directory, not {outside}; download it again")
    missing = [name for name in names if not os.path.isfile(directory / name)]
    if missing:
        raise UserError(
            f"{directory}: missing shard{'s' * (len(missing) > 1)} {', '.join(missing)} (of {len(names)} in {INDEX}); "
            "download them again"
        )
    return [directory / name for name in names]


def _is_shape(shape: tuple[int, ...]) -> bool:
    """Returns whether numpy allows an array of this shape; only needed for a shape that contains a 0.

    Such an array has no elements, but its other sizes may be too large for numpy. The safetensors library compares
    shapes without a 0 with the file's size.
    """
    try:
        np.empty(0, np.uint8).reshape(shape)
    except ValueError:
        return False
    return True


class TensorReader:
    """Reads tensors by key from several memory-mapped safetensors files; data is read from disk when it is used.

    Attributes:
      shapes: shape of every tensor.
      dtypes: safetensors' name ("F16") of the dtype of every tensor.
      duplicates: keys that occur in more than one file.
    """

    def __init__(self, files: Sequence[Path]):
        """Maps the files and reads their headers.

        Raises:
          UserError: a file is missing, corrupt or truncated.
        """
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.dtypes: dict[str, str] = {}
        self.duplicates: list[str] = []
        self._data: dict[str, np.ndarray] = {}
        for path in files:
            try:
                # `safe_open` only compares the header with the file's size here; tensors read with it would be copies.
                with safe_open(path, framework="numpy"):
                    pass
                mapped = np.memmap(path, np.uint8, mode="r")
            except (SafetensorError, OSError) as error:
                if is_lfs_pointer(path):
                    raise UserError(f"{path}: {LFS_ADVICE}") from error
                raise UserError(
                    f"{path}: corrupt or truncated safetensors file ({error}); download or copy it again"
                ) from error
            start = 8 + int.from_bytes(mapped[:8].tobytes(), "little")
            header = json.loads(mapped[8:start].tobytes())
            header.pop("__metadata__", None)
            for key, entry in header.items():
                if key in self._data:
                    self.duplicates.append(key)
                first, end = entry["data_offsets"]
                self._data[key] = mapped[start + first : start + end]
                self.shapes[key], self.dtypes[key] = tuple(entry["shape"]), entry["dtype"]
                if first == end and not _is_shape(self.shapes[key]):
                    raise UserError(f"{path}: tensor '{key}' is empty and its shape too large for any array; fix it")

    def __enter__(self) -> "TensorReader":
        """Returns the reader, whose files are unmapped at the end of the `with` block."""
        return self

    def __exit__(self, *exception: object) -> None:
        """Closes the reader; each file is unmapped once no array that was read from that file exists any more."""
        self._data.clear()

    def read(self, key: str) -> np.ndarray:
        """Returns the tensor `key` in its stored dtype, as a read-only view of the mapped file."""
        # A plain ndarray: results of operations on an np.memmap would keep the file mapped.
        return np.asarray(self._data[key]).view(DTYPES[self.dtypes[key]]).reshape(self.shapes[key])


def write_safetensors(path: Path, specs: dict[str, Spec], read: Callable[[str], np.ndarray]) -> None:
    """Writes one safetensors file, holding one tensor in memory at a time.

    Args:
      path: the file to write.
      specs: dtype (safetensors' name) and shape of each tensor.
      read: function that returns the tensor of a key; it is called once per key, in the order of `file_order`.
    """
    keys = file_order(specs)
    header: JsonObject = {"__metadata__": {"format": "pt"}}
    offset = 0
    for key in keys:
        dtype, shape = specs[key]
        end = offset + tensor_bytes(dtype, shape)
        header[key] = {"dtype": dtype, "shape": list(shape), "data_offsets": [offset, end]}
        offset = end
    encoded = json.dumps(header, separators=(",", ":")).encode("utf-8")
    encoded += b" " * (-len(encoded) % 8)
    with open(path, "wb") as file:
        file.write(len(encoded).to_bytes(8, "little"))
        file.write(encoded)
        for key in keys:
            tensor = np.ascontiguousarray(read(key)).reshape(specs[key][1])
            if tensor.dtype != DTYPES[specs[key][0]]:
                raise ValueError(f"{key}: the tensor is {tensor.dtype}, but `specs` says {specs[key][0]}")
            file.write(tensor.view(np.uint8).reshape(-1).data if tensor.size else b"")
        file.flush()
        os.fsync(file.fileno())


def file_order(specs: dict[str, Spec]) -> list[str]:
    """Returns the keys in the order of the file: tensors with wider elements first, as safetensors aligns them."""
    return sorted(specs, key=lambda key: (-DTYPES[specs[key][0]].itemsize, key))


def tensor_bytes(dtype: str, shape: tuple[int, ...]) -> int:
    """Returns the size of a tensor's data in bytes."""
    return DTYPES[dtype].itemsize * int(np.prod(shape, dtype=np.int64))


def dtype_name(dtype: DType) -> str:
    """Returns safetensors' name ("F16") of a floating-point dtype."""
    return _NAMES[np.dtype(dtype)]


def shard(specs: dict[str, Spec], limit: int) -> Iterator[list[str]]:
    """Yields the keys of each weight file; a file has at most `limit` bytes, or a single tensor that is larger."""
    group: list[str] = []
    group_bytes = 0
    for key, spec in specs.items():
        size = tensor_bytes(*spec)
        if group and group_bytes + size > limit:
            yield group
            group, group_bytes = [], 0
        group.append(key)
        group_bytes += size
    if group:
        yield group
