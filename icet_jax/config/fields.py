"""How a setting is declared: a `Field` with its default, meaning, unit, origin and rule."""

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
      accepts: function that returns whether a value is allowed; it is called only with values of the field's type.
      allowed: the allowed values in words, which complete the sentence "must be ...".
    """

    accepts: Callable[[Any], bool]
    allowed: str


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
    """Returns the rule that a value is one of `choices`."""
    return Rule(lambda value: value in choices, "one of " + ", ".join(choices))


def distinct(choices: tuple[str, ...]) -> Rule:
    """Returns the rule that a value lists one or several of `choices`, each at most once."""
    return Rule(
        lambda values: len(values) > 0 and len(set(values)) == len(values) and set(values) <= set(choices),
        "distinct names out of " + ", ".join(choices),
    )


def holds_once(text: str) -> Rule:
    """Returns the rule that a value contains `text` exactly once."""
    return Rule(lambda value: value.count(text) == 1, f"text that holds {text} once")


def matches(pattern: str, allowed: str) -> Rule:
    """Returns the rule that a regular expression matches the whole value; `allowed` describes it in words."""
    return Rule(lambda value: bool(re.fullmatch(pattern, value)), allowed)


class Table(NamedTuple):
    """Which keys and values are allowed in a field whose value is a dict, such as `config.sweep.datasets`.

    Attributes:
      of: type of the dict's values.
      keys: the possible keys, or a rule for keys that the user chooses. In an error, `allowed` of this rule follows the
        key.
      values: rule for the dict's values; None if `icet_jax.config.checks` has a function of its own for them.
    """

    of: type
    keys: tuple[str, ...] | Rule
    values: Rule | None = None


@dataclasses.dataclass(frozen=True)
class Field:
    """One setting.

    Attributes:
      default: value if the user does not set the field; None means that the field is then unset, and requires `type`.
      about: what the setting means, for the reference page.
      rule: which values of its type are allowed; None allows all.
      unit: unit of a number, such as "nats per sequence".
      origin: where the default comes from: "paper", "TRL", "RiC" or "ours" (see `icet_jax.config.defaults`), with more
        words if needed.
      type: type of the field's values, by default the type of `default`; `object` if several types are allowed.
      table: which keys and values are allowed, if the setting is a dict; otherwise None.
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
        """Returns the value to put into a new `ConfigDict`: the default, or a typed placeholder if there is none."""
        if self.table is not None:
            return ConfigDict(self.default)
        if self.default is None:
            return config_dict.placeholder(self.type)
        if self.type is object:
            return config_dict.FieldReference(self.default, field_type=object)
        return self.default

    def allowed(self) -> str:
        """Returns which values are allowed, in words."""
        if self.rule is not None:
            return self.rule.allowed
        if self.table is None:
            return TYPE_NAMES[self.type]
        keys, values = self.table.keys, self.table.values
        if isinstance(keys, Rule) or values is None:
            return "your own keys"
        return f"{values.allowed}; keys are {', '.join(keys)}"

    def summary(self) -> str:
        """Returns one line for the command line's `--fields`: default, unit, allowed values and origin."""
        unit = f" {self.unit}" if self.unit else ""
        origin = f"; {self.origin}" if self.origin else ""
        return f"{_as_command_line_value(self.default)}{unit}    ({self.allowed()}{origin})"


def _as_command_line_value(value: object) -> str:
    """Returns a value as a user types it after `--config.FIELD=`."""
    if isinstance(value, tuple):
        return ",".join(map(str, value))
    return str(value).lower() if value is None or isinstance(value, bool) else str(value)


def unset(value_type: type, about: str, rule: Rule | None = None, *, unit: str = "", origin: str = "") -> Field:
    """Returns a field of this type that is unset by default; see `Field` for the other arguments."""
    return Field(None, about, rule, unit=unit, origin=origin, type=value_type)


@dataclasses.dataclass(frozen=True)
class Section:
    """A group of fields, such as `config.lppo`.

    Attributes:
      fields: {name: field}, in the order of the reference page.
      about: text above the fields on the reference page.
    """

    fields: Mapping[str, Field]
    about: str = ""


Tree = Mapping[str, Field | Section]
"""The declaration of a config: {name: field or section}."""


def leaves(tree: Tree) -> dict[str, Field]:
    """Returns all fields of a config as {dotted name: field}, in the order of the declaration."""
    fields: dict[str, Field] = {}
    for name, node in tree.items():
        if isinstance(node, Field):
            fields[name] = node
        else:
            fields |= {f"{name}.{leaf}": field for leaf, field in node.fields.items()}
    return fields


def build(tree: Tree) -> ConfigDict:
    """Returns a new, locked `ConfigDict` with every field at its default."""
    config = ConfigDict()
    for name, node in tree.items():
        if isinstance(node, Field):
            config[name] = node.initial()
        else:
            config[name] = ConfigDict({leaf: field.initial() for leaf, field in node.fields.items()})
    return config.lock()
