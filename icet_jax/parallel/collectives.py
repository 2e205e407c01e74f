"""Computes how many bytes the devices of a compiled program exchange, from the text of the program (HLO)."""

import math
import re
from typing import NamedTuple

_COMPUTATION = re.compile(r"(?:ENTRY )?%?([\w.\-]+) \(.*\{\s*$")
_INSTRUCTION = re.compile(r"\s*(?:ROOT )?%?([\w.\-]+) = ((?:\([^()]*(?:\([^()]*\)[^()]*)*\)|\S+)) ([\w\-]+)\(([^)]*)\)")
_SHAPE = re.compile(r"\b([a-z]+\d+|pred)(?:[a-z]\w*)?\[([\d,]*)\]")
_COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute", "ragged-all-to-all")
# Patterns of the names of other computations in an instruction: computations that it calls, in particular those of a
# fusion; branches of a conditional; condition and body of a loop.
_CALLED = re.compile(r"(?:calls|to_apply|true_computation|false_computation)=%?([\w.\-]+)")
_FUSED = re.compile(r"\bcalls=%?([\w.\-]+)")
_BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}")
_LOOP = re.compile(r"condition=%?([\w.\-]+), body=%?([\w.\-]+)")
_CONSTANT = re.compile(r" = [su]\d+\[\]\S* constant\((\d+)\)")


def moved_bytes(hlo: str) -> int | None:
    """Returns the bytes that each device sends in one run of a program.

    Each collective counts as in a ring of many devices: an all-gather with the size of its result, an all-reduce with
    twice the size of its operand, every other one with the size of its operand. Loops count with all iterations, and
    all branches of a conditional count as taken, which in training is wrong only for a skipped step.

    Args:
      hlo: text of one device's optimised program, `compiled.as_text()`.

    Returns:
      The bytes; None if the number of iterations of a loop with collectives cannot be determined.
    """
    computations = _split(hlo)
    entry = next((name for name, computation in computations.items() if computation.is_entry), None)
    if entry is None:
        return None
    runs: dict[str, float] = {}
    _count_runs(computations, entry, 1.0, runs)
    bytes_by_channel: dict[str, float] = {}
    for name, count in runs.items():
        for channel, size in _collectives(name, computations[name].lines):
            if math.isnan(count):
                return None
            # One collective may occur in several fusions with the same channel, because it overlaps a computation in a
            # loop and some fusions only pass it on. It is counted once.
            bytes_by_channel[channel] = min(bytes_by_channel.get(channel, math.inf), count * size)
    return int(sum(bytes_by_channel.values()))


class _Computation(NamedTuple):
    """Holds one function of an HLO program: whether the program starts with it, and its instructions."""

    is_entry: bool
    lines: list[str]


def _split(hlo: str) -> dict[str, _Computation]:
    """Returns the computations of a program by name."""
    computations: dict[str, _Computation] = {}
    lines: list[str] | None = None
    for line in hlo.splitlines():
        if lines is None:
            match = _COMPUTATION.match(line)
            if match:
                lines = []
                computations[match[1]] = _Computation(line.startswith("ENTRY"), lines)
        elif line.startswith("}") and not line.startswith("}}"):  # "}}" ends the metadata of a GPU kernel
            lines = None
        else:
            lines.append(line)
    return computations


def _count_runs(computations: dict[str, _Computation], name: str, count: float, runs: dict[str, float]) -> None:
    """Adds `count` runs of a computation, and the runs of all computations that it calls, to `runs`.

    `runs` is {name of a computation: number of its runs}; NaN is an unknown number.
    """
    runs[name] = runs.get(name, 0.0) + count
    for line in computations[name].lines:
        loop = _LOOP.search(line)
        if loop:
            iterations = _iterations(computations, loop[1])
            for part in loop.groups():
                _count_runs(computations, part, count * (math.nan if iterations is None else iterations), runs)
            continue
        called = _CALLED.findall(line)
        if branches := _BRANCHES.search(line):
            called += [branch.strip().lstrip("%") for branch in branches[1].split(",")]
        for called_name in called:
            if called_name in computations:
                _count_runs(computations, called_name, count, runs)


def _iterations(computations: dict[str, _Computation], condition: str) -> int | None:
    """Returns the number of iterations of a loop, given the name of its condition; None if it is unknown.

    It is known if the condition is a less-than comparison with exactly one constant, which is then the number of
    iterations: the loop is assumed to count up from 0 in steps of 1.
    """
    constants: list[int] = []
    is_less_than = False
    unvisited = [condition]
    while unvisited:
        for line in computations.get(unvisited.pop(), _Computation(False, [])).lines:
            is_less_than |= "direction=LT" in line
            constants += [int(value) for value in _CONSTANT.findall(line)]
            unvisited += _FUSED.findall(line)  # not the function of a reduction, whose constants are no limits
    return constants[0] if is_less_than and len(constants) == 1 else None


def _collectives(computation: str, lines: list[str]) -> list[tuple[str, int]]:
    """Returns (channel, bytes) of each collective in a computation; a unique name stands in for a missing channel."""
    sizes: dict[str, int] = {}
    collectives = []
    for line in lines:
        match = _INSTRUCTION.match(line)
        if match is None:
            continue
        name, shape, operation, operands = match.groups()
        sizes[name] = _bytes(shape)
        kind = operation.removesuffix("-start")
        if kind not in _COLLECTIVES:
            continue
        operand_bytes = sum(sizes.get(operand.strip().split("%")[-1], 0) for operand in operands.split(","))
        if kind == "all-gather":
            size = sizes[name] - (operand_bytes if operation.endswith("-start") else 0)
        else:
            size = operand_bytes * (2 if kind == "all-reduce" else 1)
        channel = re.search(r"channel_id=(\d+)", line)
        collectives.append((channel[1] if channel else f"{computation}/{name}", size))
    return collectives


def _bytes(shape: str) -> int:
    """Returns the bytes of an array, or of a tuple of arrays, with this HLO shape (`f32[2,3]`)."""
    total = 0
    for dtype, sizes in _SHAPE.findall(re.sub(r"/\*.*?\*/", "", shape)):
        bits = 8 if dtype == "pred" else int(re.sub(r"\D", "", dtype))
        total += math.prod(int(size) for size in sizes.split(",") if size) * max(bits, 8) // 8
    return total
