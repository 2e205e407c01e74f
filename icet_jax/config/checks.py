"""Checks a config and reports the first wrong field in one line."""

import copy
import difflib
from collections.abc import Iterable, Mapping
from typing import Any

from ml_collections import ConfigDict

from icet_jax.config.defaults import FIELDS, OPEN_FIELDS
from icet_jax.config.fields import TYPE_NAMES, Field, Rule, Table
from icet_jax.config.names import ALGORITHMS, DTYPES, EXIT_SCHEDULES, SCORERS, TRAINED
from icet_jax.errors import UserError

_INT32_LIMIT = 2**31  # sizes and counts are int32 on the devices


def check(config: ConfigDict) -> None:
    """Checks every value of a config, as far as that is possible without the model.

    Raises:
      UserError: a field is unknown, missing, of the wrong type or out of range. The message names the first such field
        and its allowed values.
    """
    values = flatten(config)
    for name in values:
        if name not in FIELDS:
            raise unknown_field(name)
    for name, field in sorted(FIELDS.items()):
        if name not in values:
            raise UserError(f"config.{name} is missing: the config replaced its section; change single fields instead")
        _check_value(name, values[name], field)
    for name, table in OPEN_FIELDS.items():
        _check_table(name, values[name], table)
    _check_scorers(values["scorers"])
    _check_mixture(values["data.mixture"], values["reward.by_kind"])
    _check_combinations(config)
    if config.warm_start == config.algorithm:
        raise UserError(
            f"config.warm_start={config.warm_start} is config.algorithm itself: raise "
            f"config.{config.algorithm}.iterations to train longer, or give the directory of an earlier run"
        )
    first = warm_start_config(config)
    if first is not None:
        _check_combinations(first)
        check_warm_start_parts(first, config)


def warm_start_config(config: ConfigDict) -> ConfigDict | None:
    """Returns the config of the training that runs first if `config.warm_start` names an algorithm; else None.

    It differs in the algorithm. It has no best checkpoint, because it ends with its last policy and its algorithm may
    not have the metric, and does not log to Weights & Biases, where the run itself is one curve.
    """
    if config.warm_start not in ALGORITHMS:
        return None
    first = copy.deepcopy(config).unlock()
    first.algorithm, first.warm_start = config.warm_start, ""
    first.checkpoint.best, first.log.wandb = None, False
    return first.lock()


def group_size(config: ConfigDict) -> int:
    """Returns how many responses of each prompt a training batch has; 1 unless the algorithm has a `group_size`."""
    return config[config.algorithm].get("group_size", 1)


def trained_parts(config: ConfigDict) -> tuple[str, ...]:
    """Returns the parts of `TrainState.trainable` that the algorithm trains, beside a value head: the language model
    ("policy"), the projector ("projector") or both."""
    return TRAINED[config[config.algorithm].get("train", "language")]


def check_warm_start_parts(first: ConfigDict, config: ConfigDict) -> None:
    """Raises a `UserError` if a training with config `first` trained a part that the run of `config` does not train.

    The run would have to keep that part as it is, but a run has frozen parts of the model before all training alone.
    """
    if set(trained_parts(first)) - set(trained_parts(config)):
        raise UserError(
            f"config.warm_start={config.warm_start}: that training trains parts that this run keeps frozen "
            f"(lsft.train={first[first.algorithm].train} there); export its model (--mode=export) and give it as "
            "config.model.checkpoint"
        )


def check_exits(config: ConfigDict, num_exits: int) -> None:
    """Raises a `UserError` if the config names an exit that the model does not have (exits are 1..num_exits)."""
    exits = [("lppo.fixed_exit", config.lppo.fixed_exit)] if config.lppo.fixed_exit is not None else []
    exits += [("lppo.train_exits", number) for number in config.lppo.train_exits]
    if config.sweep.exits != "all":
        exits += [("sweep.exits", number) for number in config.sweep.exits]
    for name, number in exits:
        if number > num_exits:
            raise UserError(f"config.{name} names exit {number}, but this model's exits are 1 to {num_exits}")


def _check_value(name: str, value: Any, field: Field) -> None:
    """Raises a `UserError` if a value does not have the type of its field or breaks the field's rule.

    An int is accepted where a float is expected.
    """
    if value is None and field.default is None:
        return
    if field.table is not None:
        if not isinstance(value, Mapping):
            raise UserError(f"config.{name} is {value!r}, but must be {TYPE_NAMES[dict]}")
        check_names(name, value)
        return
    accepted = (int, float) if field.type is float else (field.type,)
    if field.type is not object and (type(value) not in accepted or value != value):
        raise UserError(f"config.{name} is {value!r}, but must be {TYPE_NAMES[field.type]}")
    if type(value) is int and value >= _INT32_LIMIT and name != "seed":
        raise UserError(f"config.{name} is {value}, but must be below 2^31: no array can be larger")
    if field.rule is not None and not field.rule.accepts(value):
        raise UserError(f"config.{name} is {value!r}, but must be {field.rule.allowed}")


def _check_table(where: str, entries: Mapping[str, Any], table: Table) -> None:
    """Checks the keys and the values of a field whose keys the user chooses; `where` is the field's dotted name."""
    for key, value in entries.items():
        if isinstance(table.keys, Rule):
            if not table.keys.accepts(key):
                raise UserError(f"config.{where}: {key!r} {table.keys.allowed}")
        elif key not in table.keys:
            hint = did_you_mean(key, table.keys)
            raise UserError(f"config.{where}.{key}: a row is one of {', '.join(table.keys)}{hint}")
        if table.values is not None and not table.values.accepts(value):
            raise UserError(f"config.{where}.{key} is {value!r}, but must be {table.values.allowed}")


def _check_mixture(mixture: Mapping[str, Any], rewards: Mapping[str, Any]) -> None:
    """Checks that some kind of row has a share above 0, and that each of these kinds has a reward."""
    if sum(mixture.values()) <= 0:
        raise UserError("config.data.mixture leaves no rows: give at least one kind a share above 0")
    for kind, share in mixture.items():
        if share > 0 and kind not in rewards:
            raise UserError(f"config.reward.by_kind.{kind} is missing: config.data.mixture draws {kind} rows")


def check_names(where: str, value: object) -> None:
    """Raises a `UserError` if a key of a dict, or of a dict in it, is not text.

    Args:
      where: dotted name of the config field, for the error.
      value: value of the field; anything but a dict passes.
    """
    for name, inner in value.items() if isinstance(value, Mapping) else ():
        if not isinstance(name, str):
            raise UserError(f"config.{where}: {name!r} is not a name; put it in quotes")
        check_names(f"{where}.{name}", inner)


def scorer_fields(kind: str) -> dict[str, type]:
    """Returns {field: type} for the definition of a scorer of this kind; an empty dict for an unknown kind."""
    if kind not in SCORERS:
        return {}
    return {"kind": str, **SCORERS[kind].all_fields}


def _check_scorers(scorers: Mapping[str, Any]) -> None:
    """Checks that every value of `config.scorers` is `{"kind": ..., fields of that kind}`."""
    for name, definition in scorers.items():
        where = f"config.scorers.{name}"
        if isinstance(definition, Mapping) and definition.get("kind") == "perspective":
            raise UserError(
                f"{where}: the Perspective API ended on 2026-12-31; use kind: toxicity (Detoxify-type checkpoint) or "
                "kind: chat"
            )
        if not isinstance(definition, Mapping) or definition.get("kind") not in SCORERS:
            raise UserError(f"{where} is {definition!r}, but must be {{'kind': one of {', '.join(SCORERS)}, ...}}")
        kind = definition["kind"]
        allowed = scorer_fields(kind)
        for field, value in definition.items():
            if field not in allowed:
                raise UserError(f"{where}.{field}: a {kind} has {', '.join(allowed)}{did_you_mean(field, allowed)}")
            accepted = {float: (int, float), tuple: (tuple, list)}.get(allowed[field], (allowed[field],))
            if not isinstance(value, accepted) or isinstance(value, bool) or value in ("", (), {}):
                raise UserError(f"{where}.{field} is {value!r}, but must be {TYPE_NAMES[allowed[field]]}")
        if "checkpoint" in allowed and "checkpoint" not in definition:
            raise UserError(f"{where}.checkpoint is missing: the directory or hub id of the {kind}'s weights")
        for field in ("endpoint", "model", "template") if kind == "chat" else ():
            if field not in definition:
                raise UserError(f"{where}.{field} is missing: a chat judge needs endpoint, model and template")
        if definition.get("dtype", DTYPES[0]) not in DTYPES:
            raise UserError(f"{where}.dtype is {definition['dtype']!r}, but must be one of {', '.join(DTYPES)}")


def _check_combinations(config: ConfigDict) -> None:
    """Checks the rules that concern several fields at once."""
    lppo, batch = config.lppo, config.data.batch_size
    if batch % (lppo.minibatches * lppo.accumulation):
        raise UserError(
            f"config.data.batch_size {batch} does not divide into {lppo.minibatches} mini-batches (lppo.minibatches) "
            f"of {lppo.accumulation} slices (lppo.accumulation)"
        )
    _check_exit_schedule(config)
    if batch % group_size(config):
        raise UserError(
            f"config.data.batch_size {batch} counts responses and does not divide into groups of {group_size(config)} "
            f"({config.algorithm}.group_size)"
        )
    if lppo.baseline != "rollout" and not lppo.whiten_advantages:
        raise UserError(f"config.lppo.baseline={lppo.baseline} needs config.lppo.whiten_advantages=true")
    if config.rm.batch_size % config.rm.accumulation:
        raise UserError(
            f"config.rm.batch_size {config.rm.batch_size} does not divide into {config.rm.accumulation} slices "
            "(rm.accumulation)"
        )
    if config.sweep.temperature == 0 and (config.sweep.top_k or config.sweep.top_p < 1):
        raise UserError("config.sweep.top_k and top_p need config.sweep.temperature above 0 (0 is greedy)")
    if config.sweep.temperature == 0 and config.sweep.attempts > 1:
        raise UserError(
            f"config.sweep.attempts={config.sweep.attempts} needs config.sweep.temperature above 0: greedy attempts "
            "are all the same"
        )
    if [config.mesh.data, config.mesh.fsdp, config.mesh.tensor].count(-1) > 1:
        raise UserError("config.mesh: only one axis may be -1 (take the remaining devices)")
    known = {*config.sweep.datasets, *config.sweep.utility}
    for name in config.sweep.training_sets:
        if name not in known:
            raise UserError(
                f"config.sweep.training_sets: {name!r} is no set of config.sweep.datasets or config.sweep.utility"
                f"{did_you_mean(name, known)}"
            )
    shared_names = set(config.sweep.datasets) & set(config.sweep.utility)
    if shared_names:
        raise UserError(
            f"config.sweep.datasets and config.sweep.utility both name {sorted(shared_names)[0]!r}; rename one"
        )


def _check_exit_schedule(config: ConfigDict) -> None:
    """Raises a `UserError` if the algorithm's exit schedule ignores `train_exits` or has no answers to learn from."""
    name, section = config.algorithm, config[config.algorithm]
    if section.exits == "fixed" and config.lppo.train_exits:
        raise UserError(f'config.{name}.exits is "fixed", which draws nothing: leave config.lppo.train_exits empty')
    if EXIT_SCHEDULES[section.exits].learns and not ALGORITHMS[name].samples(section):
        fitting = ", ".join(schedule for schedule, about in EXIT_SCHEDULES.items() if not about.learns)
        raise UserError(
            f"config.{name}.exits is {section.exits!r}, which learns from answers of the model in training, and this "
            f"{name} has none; choose one of {fitting}"
        )


def require(config: ConfigDict, *names: str) -> None:
    """Raises a `UserError` if one of these fields (dotted names) is unset or empty."""
    values = flatten(config)
    for name in names:
        if name in OPEN_FIELDS and not values[name]:
            raise UserError(f"config.{name} has no entry: give one in the config file or as --config.{name}.NAME=...")
        if values[name] in (None, ""):
            raise UserError(f"config.{name} is not set: give it in the config file or as --config.{name}=...")


def flatten(config: ConfigDict) -> dict[str, Any]:
    """Returns all values of a config as {dotted name: value}; a field whose keys the user chooses is one plain dict."""
    flat: dict[str, Any] = {}

    def add_section(prefix: str, node: ConfigDict) -> None:
        for key in node:
            name, value = f"{prefix}{key}", node[key]
            if name in OPEN_FIELDS:
                flat[name] = value.to_dict() if isinstance(value, ConfigDict) else value
            elif isinstance(value, ConfigDict):
                add_section(f"{name}.", value)
            else:
                flat[name] = value

    add_section("", config)
    return flat


def choose_variant(variant: str, allowed: tuple[str, ...]) -> str:
    """Returns `variant` unchanged, for a config file's `get_config`.

    Raises:
      UserError: `variant` is neither empty nor in `allowed`; the message lists the allowed ones.
    """
    if variant in ("", *allowed):
        return variant
    hint = did_you_mean(variant, allowed)
    raise UserError(f"variant {variant!r}: this config has {', '.join(allowed) or 'none'}{hint}")


def unknown_field(name: str) -> UserError:
    """Returns the error for a field that does not exist; it suggests a field with a similar name or last part."""
    existing = sorted(FIELDS)
    candidates = difflib.get_close_matches(name, existing, n=1, cutoff=0.6)
    if not candidates or "." not in name:
        by_last_part = {field.rpartition(".")[2]: field for field in reversed(existing)}
        similar = difflib.get_close_matches(name.rpartition(".")[2], by_last_part, n=1)
        candidates = [by_last_part[last_part] for last_part in similar] or candidates
    hint = (
        f"; the nearest is config.{candidates[0]}"
        if candidates
        else "; see icet_jax/config/defaults.py for every field"
    )
    return UserError(f"config.{name} is not a field{hint}")


def did_you_mean(word: str, candidates: Iterable[str]) -> str:
    """Returns the end of an error line that suggests the most similar candidate; "" if none is similar."""
    similar = difflib.get_close_matches(word, list(candidates), n=1, cutoff=0.5)
    return f"; did you mean {similar[0]}?" if similar else ""
