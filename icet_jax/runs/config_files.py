"""Turns `--config=configs/NAME.py[:variant]` and `--config.FIELD=VALUE` into a checked config."""

import ast
import importlib.util
import inspect
import re
import traceback
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from icet_jax.config import FIELDS, OPEN_FIELDS, TYPE_NAMES, check, check_names, default, scorer_fields, unknown_field
from icet_jax.errors import UserError
from icet_jax.files import require_regular
from icet_jax.runs import shipped


def load(spec: str | None = None, overrides: Mapping[str, Any] | Iterable[tuple[str, str]] = ()) -> ConfigDict:
    """Reads `configs/NAME.py[:variant]`, applies `overrides` and checks the result.

    Args:
      spec: a path with an optional variant. A relative path is searched for in the working directory, the repository
        and the installed package. None means a config of defaults.
      overrides: values by dotted field, such as {"lppo.iterations": 10}; or (field, text) pairs, applied in order.

    Raises:
      UserError: the file does not exist or is broken, a field is unknown (the nearest one is named) or a value is
        wrong.
    """
    if spec is None:
        config = default()
    else:
        path, _, variant = spec.partition(":")
        config = _run_config_file(_find(path), variant)
    for name, value in overrides.items() if isinstance(overrides, Mapping) else overrides:
        override(config, name, str(value))
    check(config)
    return config.lock()


def override(config: ConfigDict, name: str, text: str) -> None:
    """Sets the field with the dotted name `name` in `config` to a value that was written as `text` on the command line.

    The text is parsed by the type of the field: numbers, true/false, words; tuples are comma-separated; `none` unsets
    an optional field. A field whose keys the user chooses accepts a Python dict, or a value for one key as in
    `data.mixture.vqa=0.3` and `scorers.NAME.batch_size=8`.

    Raises:
      UserError: the field is unknown (the nearest is named) or the text does not fit its type.
    """
    parent, _, key = name.rpartition(".")
    if name in FIELDS:
        kind = FIELDS[name].type
    elif parent in OPEN_FIELDS:
        kind = OPEN_FIELDS[parent].of
    elif parent.startswith("scorers.") and parent.removeprefix("scorers.") in config.scorers:
        kind = _scorer_field(config[parent], parent, key)
    else:
        raise unknown_field(name)
    can_be_unset = name in FIELDS and FIELDS[name].default is None
    value = None if can_be_unset and text.lower() == "none" else _parse(name, text, kind)
    section = config[parent] if parent else config
    with section.unlocked():
        section[key] = value


def _scorer_field(definition: ConfigDict, where: str, field: str) -> type:
    """Returns the type of a field in a scorer's section of the config.

    Args:
      definition: the section.
      where: dotted name of the section.
      field: name of the field.

    Raises:
      UserError: scorers of this kind have no such field.
    """
    fields = scorer_fields(definition.kind)
    if field not in fields:
        raise UserError(f"config.{where}.{field}: a {definition.kind} has {', '.join(fields)}")
    return fields[field]


def _parse(name: str, text: str, kind: type) -> Any:
    """Converts `text` to a value of type `kind`; raises a `UserError` about the field `name` if that is impossible.

    The type `object` means that the field accepts the word "all" or a list.
    """
    try:
        if kind is bool:
            return {"true": True, "1": True, "false": False, "0": False}[text.lower()]
        if kind in (int, float):
            return kind(text)
        if kind is dict:
            value = ast.literal_eval(text)
            if not isinstance(value, dict):
                raise ValueError
            check_names(name, value)
            return ConfigDict(value)
        if kind is tuple:
            return _parse_tuple(text)
        if kind is object:
            return text if text == "all" else _parse_tuple(text)
        return text
    except (KeyError, ValueError, SyntaxError, TypeError) as error:
        raise UserError(f"--config.{name}={text}: must be {TYPE_NAMES[kind]}") from error


def _parse_tuple(text: str) -> tuple[int | str, ...]:
    """Returns the items of a comma-separated list; whole numbers become ints."""
    items = [item.strip(" '\"") for item in text.strip("()[] ").split(",")]
    return tuple(int(item) if re.fullmatch(r"-?\d+", item) else item for item in items if item)


def _find(path: str) -> Path:
    """Returns the config file at `path`, or raises a `UserError` that names the existing configs."""
    file = shipped.find(path)
    if file is not None:
        return file
    require_regular(path, f"--config={path}")
    names = sorted(f.name for folder in shipped.FOLDERS for f in (folder / "configs").glob("[!_]*.py"))
    listed = ", ".join(f"configs/{name}" for name in dict.fromkeys(names))
    raise UserError(f"--config={path}: no such file; this project has {listed or 'no configs'}")


def _run_config_file(path: Path, variant: str) -> ConfigDict:
    """Returns the config that the file's `get_config(variant)` returns.

    Raises:
      UserError: the file raised an exception; the message names it in one line.
    """
    spec = importlib.util.spec_from_file_location(f"_icet_jax_config_{path.stem}", path)
    if spec is None or spec.loader is None:
        raise UserError(f"{path}: not a Python file; a config is configs/NAME.py")
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
        get_config = getattr(module, "get_config", None)
        if get_config is None:
            raise UserError(f"{path}: has no get_config(variant); see the files in configs/")
        takes_variant = bool(inspect.signature(get_config).parameters)
        if variant and not takes_variant:
            raise UserError(f"{path}: has no variants, so ':{variant}' is wrong")
        config = get_config(variant) if takes_variant else get_config()
    except UserError as error:
        raise error if str(path) in str(error) else UserError(f"{path}: {error}") from error
    except Exception as error:
        raise _to_user_error(path, error) from error
    if not isinstance(config, ConfigDict):
        raise UserError(
            f"{path}: get_config returned {type(config).__name__}; return icet_jax.config.default(), changed"
        )
    return config


def _to_user_error(path: Path, error: Exception) -> UserError:
    """Returns a one-line `UserError` for an exception that the config file at `path` raised.

    If ml_collections raised it because a field does not exist or has another type, the message names the field.
    """
    frames = traceback.extract_tb(error.__traceback__)
    line = next((frame.lineno for frame in reversed(frames) if frame.filename == str(path)), "?")
    missing = re.search(r"Key \"(\w+)\" does not exist|^[\"'\\]*(\w+)[\"'\\]*(?:\\n|\n|$)", str(error))
    if isinstance(error, AttributeError | KeyError) and missing:
        return UserError(f"{path}:{line}: {unknown_field(missing[1] or missing[2])}")
    mistyped = re.search(r"field '(\w+)' .*?\. (.*) is of original type .* casted to type <class '(\w+)'>", str(error))
    if isinstance(error, TypeError) and mistyped:
        return UserError(f"{path}:{line}: {mistyped[1]} is {mistyped[2]!r}, but must be of type {mistyped[3]}")
    return UserError(f"{path}:{line}: {type(error).__name__}: {' '.join(str(error).split())}")
