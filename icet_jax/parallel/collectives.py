"""Computes how many bytes the devices of a compiled program exchange, from the text of the program (HLO)."""

import math
import re

from icet_jax.parallel.hlo import HloProgram

COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute", "ragged-all-to-all")
"""Operations by which devices exchange data; one that runs in the background begins as "NAME-start"."""
_CALLED = ("calls", "to_apply", "true_computation", "false_computation", "branch_computations")


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
    try:
        program = HloProgram(hlo)
    except ValueError:
        return None
    runs: dict[str, float] = {}
    _count_runs(program, program.entry, 1.0, runs)
    bytes_by_channel: dict[str, float] = {}
    for name, count in runs.items():
        for channel, size in _collectives(program, name):
            if math.isnan(count):
                return None
            # One collective may occur in several fusions with the same channel, because it overlaps a computation in a
            # loop and some fusions only pass it on. It is counted once.
            bytes_by_channel[channel] = min(bytes_by_channel.get(channel, math.inf), count * size)
    return int(sum(bytes_by_channel.values()))


def _count_runs(program: HloProgram, name: str, count: float, runs: dict[str, float]) -> None:
    """Adds `count` runs of a computation, and the runs of all computations that it calls, to `runs`.

    `runs` is {name of a computation: number of its runs}; NaN is an unknown number.
    """
    runs[name] = runs.get(name, 0.0) + count
    for instruction in program.computations[name].values():
        called, times = instruction.called(*_CALLED), count
        if instruction.operation == "while":
            iterations = program.iterations(instruction)
            called = instruction.called("condition", "body")
            times *= math.nan if iterations is None else iterations
        for called_name in called:
            if called_name in program.computations:
                _count_runs(program, called_name, times, runs)


def _collectives(program: HloProgram, computation: str) -> list[tuple[str, int]]:
    """Returns (channel, bytes) of each collective in a computation; a unique name stands in for a missing channel."""
    table, collectives = program.computations[computation], []
    for instruction in table.values():
        kind = instruction.operation.removesuffix("-start")
        if kind not in COLLECTIVES:
            continue
        operand_bytes = sum(table[name].bytes for name in instruction.operands if name in table)
        if kind == "all-gather":
            size = instruction.bytes - (operand_bytes if instruction.operation.endswith("-start") else 0)
        else:
            size = operand_bytes * (2 if kind == "all-reduce" else 1)
        channel = re.search(r"channel_id=(\d+)", instruction.text)
        collectives.append((channel[1] if channel else f"{computation}/{instruction.name}", size))
    return collectives
