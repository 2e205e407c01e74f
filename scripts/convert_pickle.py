"""Converts a checkpoint that exists only as pickle (`pytorch_model.bin`) to safetensors, which icet_jax reads.

    python scripts/convert_pickle.py DIR                      # writes model.safetensors beside pytorch_model.bin
    python scripts/convert_pickle.py DIR --out NEW            # writes a complete checkpoint to NEW, nothing to DIR
    python scripts/convert_pickle.py unitary/toxic-bert --out toxic-bert [--revision COMMIT]

Needs torch 2.6 or newer and safetensors; a hub id needs huggingface_hub too. Opening a pickle can run code, so the
files are read with `torch.load(weights_only=True)`, which accepts tensors only. Older versions of torch are refused,
because a file could make them run code even so.

Names, shapes, dtypes and bits of all tensors stay the same. Sharded checkpoints stay sharded, with an index. Tensors
that share memory (tied embeddings) are written once under each name. A file gets its name when it is complete, and the
index is written last, so that an interrupted conversion leaves nothing that could be loaded.
"""

import argparse
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

INDEX = "pytorch_model.bin.index.json"
NAMES = {"pytorch_model.bin": "model.safetensors", "adapter_model.bin": "adapter_model.safetensors"}
WRAPPERS = ("state_dict", "model_state_dict")  # keys under which training frameworks put the weights
OTHER_FILES = ("*.json", "*.txt", "*.model", "*.jinja", "*.md", "LICENSE*")  # of a checkpoint, besides weights
SAFE_TORCH = (2, 6)  # torch.load(weights_only=True) could run code before (CVE-2025-32434)


class ConversionError(Exception):
    """Bad input: one line that names the file, what was wrong and how to fix it."""


def convert(directory: Path, out: Path | None = None) -> list[Path]:
    """Converts the pickled weights of a checkpoint directory.

    Args:
      directory: holds `pytorch_model.bin`, or `pytorch_model.bin.index.json` with its shards, or `adapter_model.bin`.
      out: a new or empty directory that gets the other files of the checkpoint too; None writes into `directory`.

    Returns:
      The safetensors files; empty if the directory has safetensors weights already.

    Raises:
      ConversionError: no pickled weights, a file that is broken or holds more than tensors, an index that does not fit
        its shards, or a target that cannot be written.
    """
    if not directory.is_dir():
        raise ConversionError(f"{directory}: no such directory; give the folder of a checkpoint")
    plan, index = _plan(directory)
    if not plan:
        return []
    try:
        if out is None:
            return _write(directory, directory, plan, index)
        with _new_directory(out) as folder:
            for path in _other_files(directory):
                shutil.copyfile(path, folder / path.name)
            _write(directory, folder, plan, index)
    except OSError as error:
        raise ConversionError(f"{out or directory}: cannot be written ({error.strerror}); free space?") from error
    return [out / name for name in plan.values()]


def _plan(directory: Path) -> tuple[dict[str, str], dict[str, Any] | None]:
    """Returns ({pickled file: safetensors file to write}, parsed index of a sharded checkpoint or None).

    The first is empty if there are safetensors weights already. Raises a ConversionError as `convert` does.
    """
    for pickled, name in NAMES.items():
        if (directory / name).is_file() or (directory / f"{name}.index.json").is_file():
            return {}, None
        if (directory / pickled).is_file():
            return {pickled: name}, None
    if not (directory / INDEX).is_file():
        raise ConversionError(
            f"{directory}: holds none of {', '.join(NAMES)} and {INDEX}; give the folder that has the pickled weights"
        )
    try:
        index = json.loads((directory / INDEX).read_text(encoding="utf-8"))
        shards = sorted(set(index["weight_map"].values()))
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise ConversionError(f"{directory / INDEX}: not an index of shards; download it again") from error
    if not shards or any(Path(shard).name != shard for shard in shards):
        raise ConversionError(f"{directory / INDEX}: names no shards of this directory; download it again")
    missing = [shard for shard in shards if not (directory / shard).is_file()]
    if missing:
        raise ConversionError(f"{directory}: missing shards {', '.join(missing)}; download them again")
    count = len(shards)
    return {old: f"model-{number:05d}-of-{count:05d}.safetensors" for number, old in enumerate(shards, 1)}, index


def _write(source: Path, target: Path, plan: Mapping[str, str], index: dict[str, Any] | None) -> list[Path]:
    """Converts the files of a plan one after the other from `source` to `target`; returns the written files."""
    expected: dict[str, set[str]] = {old: set() for old in plan}
    for key, shard in index["weight_map"].items() if index else ():
        expected[shard].add(key)
    weight_map: dict[str, str] = {}
    total = 0
    for old, new in plan.items():
        tensors = read_tensors(source / old)
        if index is not None and set(tensors) != expected[old]:
            wrong = sorted(set(tensors) ^ expected[old])
            raise ConversionError(f"{source / old}: does not fit {INDEX} ({', '.join(wrong[:3])}); download both again")
        _save(tensors, target / new)
        weight_map |= dict.fromkeys(tensors, new)
        total += sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
    if index is not None:
        content = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
        with _complete_file(target / "model.safetensors.index.json") as path:
            path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    return [target / name for name in plan.values()]


def read_tensors(path: Path) -> dict[str, Any]:
    """Returns {name: tensor} of a pickled state dict; the tensors are contiguous and share no memory.

    Raises:
      ConversionError: torch is too old, or the file is broken or contains anything but named tensors.
    """
    torch = _torch()
    state = _load(torch, path)
    for wrapper in WRAPPERS:
        if isinstance(state, Mapping) and isinstance(state.get(wrapper), Mapping):
            state = state[wrapper]
    if not isinstance(state, Mapping) or not state:
        raise ConversionError(f"{path}: holds a {type(state).__name__}, not a state dict of named tensors")
    tensors: dict[str, Any] = {}
    memory: set[int] = set()
    for name, value in state.items():
        if not isinstance(name, str) or not isinstance(value, torch.Tensor):
            raise ConversionError(f"{path}: entry {name!r} is a {type(value).__name__}, not a tensor under a name")
        if value.layout != torch.strided or value.is_quantized or value.is_complex():
            raise ConversionError(f"{path}: {name} is sparse, quantised or complex, which safetensors does not hold")
        value = value.detach().contiguous()
        storage = value.untyped_storage()
        fills_storage = storage.nbytes() == value.numel() * value.element_size()
        # safetensors refuses tensors that overlap in memory, and would not write a part of a larger block.
        tensors[name] = value if fills_storage and storage.data_ptr() not in memory else value.clone()
        memory.add(storage.data_ptr())
    return tensors


def _torch() -> Any:
    """Returns the module torch; raises a ConversionError if it is missing or too old."""
    try:
        import torch
    except ImportError as error:
        raise ConversionError("torch is not installed; pip install torch safetensors, and run this again") from error
    version = tuple(int(part) for part in torch.__version__.split("+")[0].split(".")[:2])
    if version < SAFE_TORCH:
        raise ConversionError(
            f"torch {torch.__version__} can be made to run code by a weights-only pickle; install torch 2.6 or newer"
        )
    return torch


def _load(torch: Any, path: Path) -> Any:
    """Returns the content of a pickle that has only weights; raises a ConversionError for any other file."""
    try:
        try:
            return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        except RuntimeError:  # files from before torch 1.6 cannot be mapped
            return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises pickle's, zip's, its own and the system's errors
        lines = str(error).strip().splitlines()
        reason = lines[0][:200] if lines else type(error).__name__
        raise ConversionError(
            f"{path}: not a weights-only pickle ({type(error).__name__}: {reason}); download it again, and do not open "
            "it in any other way unless you trust where it comes from"
        ) from error


def _save(tensors: dict[str, Any], path: Path) -> None:
    from safetensors.torch import save_file

    with _complete_file(path) as temporary:
        save_file(tensors, temporary, metadata={"format": "pt"})


@contextmanager
def _complete_file(path: Path) -> Iterator[Path]:
    """Yields a temporary file in the same folder, which is renamed to `path` if the block succeeds, else removed."""
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        temporary.chmod(0o644)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def _new_directory(out: Path) -> Iterator[Path]:
    """Yields a temporary folder, which is renamed to `out` if the block succeeds, else removed."""
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ConversionError(f"--out {out}: is there already; give a new directory")
    out.parent.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(dir=out.parent, prefix=f".{out.name}."))
    try:
        folder.chmod(0o755)
        yield folder
        folder.replace(out)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _other_files(directory: Path) -> list[Path]:
    """Returns the files of a checkpoint besides its weights and their index."""
    files = {path for pattern in OTHER_FILES for path in directory.glob(pattern) if path.is_file()}
    return sorted(path for path in files if path.name != INDEX)


def download(name: str, revision: str | None) -> Path:
    """Downloads the files of a hub id, with pickled weights, and returns their folder; cached files are used.

    Raises:
      ConversionError: the download failed.
    """
    try:
        from huggingface_hub import snapshot_download

        patterns = [*OTHER_FILES, "pytorch_model*.bin", "adapter_model.bin"]
        return Path(snapshot_download(name, revision=revision, allow_patterns=patterns))
    except Exception as error:  # the hub's client raises its own, its HTTP library's and the system's errors
        reason = " ".join(str(error).split())[:200]
        raise ConversionError(
            f"{name}: no such directory, and not to be had from the hub ({type(error).__name__}: {reason})"
        ) from error


class _Parser(argparse.ArgumentParser):
    """An argparse parser that raises a one-line ConversionError instead of printing its usage."""

    def error(self, message: str) -> NoReturn:
        raise ConversionError(f"{message}; type: python scripts/convert_pickle.py DIR [--out NEW] (or --help)")


def run(arguments: list[str] | None = None) -> None:
    """Converts the checkpoint that the command line names and prints the written files.

    Raises:
      ConversionError: wrong usage or input.
    """
    parser = _Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", metavar="DIR", help="checkpoint directory, or a hub id together with --out")
    parser.add_argument("--out", type=Path, help="new directory for the whole checkpoint; by default beside the pickle")
    parser.add_argument("--revision", help="of a hub id: branch, tag or commit")
    options = parser.parse_args(arguments)
    directory = Path(options.source).expanduser()
    if not directory.is_dir():
        if options.out is None:
            raise ConversionError(f"{options.source}: no such directory; for a hub id give --out NEW too")
        directory = download(options.source, options.revision)
    elif options.revision is not None:
        raise ConversionError(f"--revision {options.revision}: {directory} is a directory; revisions are of hub ids")
    written = convert(directory, options.out)
    for path in written:
        print(f"{path}: {path.stat().st_size / 1e6:.1f} MB")
    if not written:
        print(f"{directory}: has safetensors weights already; nothing to convert")


def main(arguments: list[str] | None = None) -> int:
    """Runs the command line and returns its exit code; bad input is one line on stderr and exit code 2."""
    try:
        run(arguments)
    except ConversionError as error:
        print(f"convert_pickle: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
