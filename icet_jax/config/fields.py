"""How a setting is declared: its default, meaning, unit, origin and rule stand in one `Field`."""

import dataclasses
import re
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from ml_collections import ConfigDict, config_dict

TYPE_NAMES = {
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    str: "text",
    tuple: "a list such as 1,2,3",
    ConfigDict: "a dict such as {'a': 1}",
    dict: "a dict such as {'a': 1}",
}


class Rule(NamedTuple):
    """Which values a field may have.

    Attributes:
      accepts: whether a value of the field's type is allowed.
      says: the allowed values in words, behind "must be".
    """

    accepts: Callable[[Any], bool]
    says: str


POSITIVE = Rule(lambda value: value > 0, "above 0")
NOT_NEGATIVE = Rule(lambda value: value >= 0, "0 or more")
SHARE = Rule(lambda value: 0 <= value <= 1, "between 0 and 1")
DECAY = Rule(lambda value: 0 <= value < 1, "at least 0 and below 1")
OFF_OR_ABOVE_1 = Rule(lambda value: value == 0 or value > 1, "0, which is off, or above 1")
EXIT_NUMBERS = Rule(
    lambda values: all(type(value) is int and value >= 1 for value in values) and len(set(values)) == len(values),
    "numbers of exits, from 1, each once",
)
AXIS = Rule(lambda value: value == -1 or value > 0, "-1 or above 0")


def one_of(choices: tuple[str, ...]) -> Rule:
    """Accepts one of `choices`."""
    return Rule(lambda value: value in choices, "one of " + ", ".join(choices))


def distinct(choices: tuple[str, ...]) -> Rule:
    """Accepts one or several of `choices`, each once."""
    return Rule(
        lambda values: len(values) > 0 and len(set(values)) == len(values) and set(values) <= set(choices),
        "distinct names out of " + ", ".join(choices),
    )


def holds_once(text: str) -> Rule:
    """Accepts text that contains `text` exactly once."""
    return Rule(lambda value: value.count(text) == 1, f"text that holds {text} once")


def matches(pattern: str, says: str) -> Rule:
    """Accepts text that matches the whole `pattern`; `says` puts the pattern in words."""
    return Rule(lambda value: bool(re.fullmatch(pattern, value)), says)


class Table(NamedTuple):
    """What a field may hold whose value is a table with keys of the user's choice.

    Attributes:
      of: the type of its values.
      keys: the possible keys, or a rule for keys that the user makes up; its `says` stands behind the key.
      values: which values are allowed; None is judged elsewhere.
    """

    of: type
    keys: tuple[str, ...] | Rule
    values: Rule | None = None


@dataclasses.dataclass(frozen=True)
class Field:
    """One setting.

    Attributes:
      default: None is a setting that is unset by default, which then needs `type`.
      about: what it means, for the reference page.
      rule: which values are allowed beside those of the wrong type; None: all.
      unit: of the number, such as "nats per sequence".
      origin: where the default comes from: "paper", "TRL", "RiC" or "ours" (see `icet_jax.config.defaults`), with more
        words where they help.
      type: `object` where values may have several types; by default the type of `default`.
      table: what its keys and values may be, where the user chooses the keys.
    """

    default: Any
    about: str
    rule: Rule | None = None
    _: dataclasses.KW_ONLY
    unit: str = ""
    origin: str = ""
    type: Any = None
    table: Table | None = None

    def __post_init__(self) -> None:
        if not self.about:
            raise ValueError("a field needs a description")
        if self.type is None and self.default is None:
            raise ValueError(f"'{self.about}': a field that is unset by default needs a type")
        object.__setattr__(self, "type", self.type or type(self.default))

    def initial(self) -> Any:
        """The default as a new `ConfigDict` takes it, with the field's type where it is unset."""
        if self.table is not None:
            return ConfigDict(self.default)
        if self.default is None:
            return config_dict.placeholder(self.type)
        if self.type is object:
            return config_dict.FieldReference(self.default, field_type=object)
        return self.default

    def allowed(self) -> str:
        """What it may be, in words: its rule, or its type where it has none."""
        if self.rule is not None:
            return self.rule.says
        if self.table is None:
            return TYPE_NAMES[self.type]
        keys, values = self.table.keys, self.table.values
        if isinstance(keys, Rule) or values is None:
            return "your own keys"
        return f"{values.says}; keys are {', '.join(keys)}"

    def summary(self) -> str:
        """The default as the command line takes it, its unit, what it may be and its origin, in one line."""
        unit = f" {self.unit}" if self.unit else ""
        origin = f"; {self.origin}" if self.origin else ""
        return f"{_as_typed(self.default)}{unit}    ({self.allowed()}{origin})"


def _as_typed(value: Any) -> str:
    if isinstance(value, tuple):
        return ",".join(map(str, value))
    return str(value).lower() if value is None or isinstance(value, bool) else str(value)


def unset(kind: type, about: str, rule: Rule | None = None, *, unit: str = "", origin: str = "") -> Field:
    """A field of type `kind` that is unset by default."""
    return Field(None, about, rule, unit=unit, origin=origin, type=kind)


@dataclasses.dataclass(frozen=True)
class Section:
    """A group of fields, such as `config.lppo`.

    Attributes:
      fields: by name, in the order of the reference page.
      about: what all of them are about; "" where their names say it.
    """

    fields: Mapping[str, Field]
    about: str = ""


Tree = Mapping[str, Field | Section]
"""A whole config as it is declared."""


def leaves(tree: Tree) -> dict[str, Field]:
    """{dotted name: field} of a whole config, in the order of the declaration."""
    flat: dict[str, Field] = {}
    for name, node in tree.items():
        flat |= {name: node} if isinstance(node, Field) else {f"{name}.{leaf}": f for leaf, f in node.fields.items()}
    return flat


def build(tree: Tree) -> ConfigDict:
    """A new `ConfigDict` with every field at its default, locked."""
    config = ConfigDict()
    for name, node in tree.items():
        if isinstance(node, Field):
            config[name] = node.initial()
        else:
            config[name] = ConfigDict({leaf: field.initial() for leaf, field in node.fields.items()})
    return config.lock()
