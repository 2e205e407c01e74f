"""Computes what the devices of a compiled program exchange, from its HLO text."""

import math
import re

_COMPUTATION = re.compile(r"(?:ENTRY )?%?([\w.\-]+) \(.*\{\s*$")
_INSTRUCTION = re.compile(r"\s*(?:ROOT )?%?([\w.\-]+) = ((?:\([^()]*(?:\([^()]*\)[^()]*)*\)|\S+)) ([\w\-]+)\(([^)]*)\)")
_SHAPE = re.compile(r"\b([a-z]+\d+|pred)(?:[a-z]\w*)?\[([\d,]*)\]")
_COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute", "ragged-all-to-all")
_CALLED = re.compile(r"(?:calls|to_apply|true_computation|false_computation)=%?([\w.\-]+)")
_FUSED = re.compile(r"\bcalls=%?([\w.\-]+)")
_BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}")
_LOOP = re.compile(r"condition=%?([\w.\-]+), body=%?([\w.\-]+)")
_CONSTANT = re.compile(r" = [su]\d+\[\]\S* constant\((\d+)\)")


def moved_bytes(hlo: str) -> int | None:
    """Returns the bytes that each device exchanges in one run of a program, with every loop at its full length.

    A gather counts with its result, an all-reduce twice with its operand, every other collective with its operand, as
    in a ring of many devices. All branches count as taken; in training that differs only for a skipped step.

    Args:
      hlo: text of the optimised program of one device, `compiled.as_text()`.

    Returns:
      The bytes; None if the length of a loop with collectives cannot be determined.
    """
    computations = _split(hlo)
    entry = next((name for name, (first, _) in computations.items() if first), None)
    if entry is None:
        return None
    runs: dict[str, float] = {}
    _count(computations, entry, 1.0, runs)
    bytes_by_channel: dict[str, float] = {}
    for name, times in runs.items():
        for key, size in _collectives(name, computations[name][1]):
            if math.isnan(times):
                return None
            # One collective may occur in several fusions with the same channel, some of which only pass it through a
            # loop of the computation that it overlaps; its bytes are counted once.
            bytes_by_channel[key] = min(bytes_by_channel.get(key, math.inf), times * size)
    return int(sum(bytes_by_channel.values()))


def _split(hlo: str) -> dict[str, tuple[bool, list[str]]]:
    """Returns the computations by name: whether it is the entry, and its lines."""
    computations: dict[str, tuple[bool, list[str]]] = {}
    lines: list[str] | None = None
    for line in hlo.splitlines():
        if lines is None:
            match = _COMPUTATION.match(line)
            if match:
                lines = []
                computations[match[1]] = (line.startswith("ENTRY"), lines)
        elif line.startswith("}") and not line.startswith("}}"):  # a kernel's metadata spans lines, and ends in two
            lines = None
        else:
            lines.append(line)
    return computations


def _count(computations: dict[str, tuple[bool, list[str]]], name: str, times: float, runs: dict[str, float]) -> None:
    """Adds to `runs` how often each computation runs when `name` runs `times` times; nan is unknown."""
    runs[name] = runs.get(name, 0.0) + times
    for line in computations[name][1]:
        loop = _LOOP.search(line)
        if loop:
            length = _trips(computations, loop[1])
            for part in loop.groups():
                _count(computations, part, times * (math.nan if length is None else length), runs)
            continue
        called = _CALLED.findall(line)
        if branches := _BRANCHES.search(line):
            called += [branch.strip().lstrip("%") for branch in branches[1].split(",")]
        for other in called:
            if other in computations:
                _count(computations, other, times, runs)


def _trips(computations: dict[str, tuple[bool, list[str]]], condition: str) -> int | None:
    """Returns the length of a loop that counts from 0 to the only constant of its condition."""
    constants: list[int] = []
    less = False
    waiting = [condition]
    while waiting:
        for line in computations.get(waiting.pop(), (False, []))[1]:
            less |= "direction=LT" in line
            constants += [int(value) for value in _CONSTANT.findall(line)]
            waiting += _FUSED.findall(line)  # a reduction's own function may have constants, but no bound
    return constants[0] if less and len(constants) == 1 else None


def _collectives(computation: str, lines: list[str]) -> list[tuple[str, int]]:
    """Returns (channel, bytes) of each collective in a computation."""
    shapes: dict[str, int] = {}
    collectives = []
    for line in lines:
        match = _INSTRUCTION.match(line)
        if match is None:
            continue
        name, shape, operation, operands = match.groups()
        shapes[name] = _bytes(shape)
        kind = operation.removesuffix("-start")
        if kind not in _COLLECTIVES:
            continue
        operand_bytes = sum(shapes.get(operand.strip().split("%")[-1], 0) for operand in operands.split(","))
        if kind == "all-gather":
            size = shapes[name] - (operand_bytes if operation.endswith("-start") else 0)
        else:
            size = operand_bytes * (2 if kind == "all-reduce" else 1)
        channel = re.search(r"channel_id=(\d+)", line)
        collectives.append((channel[1] if channel else f"{computation}/{name}", size))
    return collectives


def _bytes(shape: str) -> int:
    """Returns the bytes of an HLO shape or of a tuple of shapes."""
    total = 0
    for kind, sizes in _SHAPE.findall(re.sub(r"/\*.*?\*/", "", shape)):
        width = 8 if kind == "pred" else int(re.sub(r"\D", "", kind))
        total += math.prod(int(size) for size in sizes.split(",") if size) * max(width, 8) // 8
    return total
