"""Collects all problems of a checkpoint's tensors and reports them in one line."""

import re
from collections import defaultdict

from icet_jax.errors import UserError

_NUMBER = re.compile(r"(?<=\.)[0-9]{1,9}(?=\.)")


def _ranges(numbers: set[int]) -> str:
    """Returns `0-2,5` for `{0, 1, 2, 5}`."""
    ranges: list[list[int]] = []
    for number in sorted(numbers):
        if ranges and number == ranges[-1][1] + 1:
            ranges[-1][1] = number
        else:
            ranges.append([number, number])
    return ",".join(str(first) if first == last else f"{first}-{last}" for first, last in ranges)


def compact(keys: list[str]) -> list[str]:
    """Returns the keys in sorted order, where keys that differ only in the layer number are combined into one.

    A combined key lists the layer numbers, such as `layers.{0-23}.mlp.fc1.bias`.
    """
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
    """Collects the keys of faulty tensors by kind of problem."""

    def __init__(self) -> None:
        self._keys: dict[str, list[str]] = defaultdict(list)

    def add(self, kind: str, key: str) -> None:
        """Records that the tensor `key` has a problem of this kind: "missing", "unexpected", "duplicate", ..."""
        self._keys[kind].append(key)

    def raise_if_any(self, where: str, what: str) -> None:
        """Raises a `UserError` if any problem was recorded.

        Its line is `where: what: missing (2): KEY, KEY; unexpected (1): KEY`, with all kinds, counts and keys.
        """
        if not self._keys:
            return
        parts = [f"{kind} ({len(keys)}): {', '.join(compact(keys))}" for kind, keys in self._keys.items()]
        raise UserError(f"{where}: {what}: {'; '.join(parts)}")
