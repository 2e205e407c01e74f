"""Collects all problems with a set of weights and reports them in one line."""

import re
from collections import defaultdict

from icet_jax.errors import UserError

_NUMBER = re.compile(r"(?<=\.)[0-9]{1,9}(?=\.)")


def _ranges(numbers: set[int]) -> str:
    """Converts `{0, 1, 2, 5}` to `0-2,5`."""
    parts: list[list[int]] = []
    for number in sorted(numbers):
        if parts and number == parts[-1][1] + 1:
            parts[-1][1] = number
        else:
            parts.append([number, number])
    return ",".join(str(first) if first == last else f"{first}-{last}" for first, last in parts)


def compact(keys: list[str]) -> list[str]:
    """Returns the names of all keys, with those that differ only in a layer number combined:
    `layers.{0-23}.mlp.fc1.bias`."""
    groups: dict[str, set[int]] = defaultdict(set)
    out = []
    for key in keys:
        numbers = _NUMBER.findall(key)
        if len(numbers) == 1:
            groups[_NUMBER.sub("{}", key)].add(int(numbers[0]))
        else:
            out.append(key)
    for pattern, layers in groups.items():
        text = _ranges(layers)
        out.append(pattern.replace("{}", text if text.isdigit() else f"{{{text}}}"))
    return sorted(out)


class Problems:
    """Collects keys by the kind of problem."""

    def __init__(self) -> None:
        self._keys: dict[str, list[str]] = defaultdict(list)

    def add(self, kind: str, key: str) -> None:
        """Records that `key` is "missing", "unexpected", ..."""
        self._keys[kind].append(key)

    def raise_if_any(self, where: str, what: str) -> None:
        """Raises the collected problems as `where: what: missing (2): ...`.

        Raises:
          UserError: one line with every kind, its number of tensors and all their keys.
        """
        if not self._keys:
            return
        parts = [f"{kind} ({len(keys)}): {', '.join(compact(keys))}" for kind, keys in self._keys.items()]
        raise UserError(f"{where}: {what}: {'; '.join(parts)}")
