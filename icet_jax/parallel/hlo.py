"""Reads the text of a compiled program (optimised HLO): computations, their instructions, and how loops nest."""

import dataclasses
import math
import re
from collections.abc import Iterator

_COMPUTATION = re.compile(r"(ENTRY )?%?([\w.\-]+) \(.*\) -> .*\{\s*$")
_INSTRUCTION = re.compile(r"\s+(ROOT )?%?([\w.\-]+) = (.*)$")
_OPERATION = re.compile(r"\s*([\w\-]+)\(")
_ARRAY = re.compile(r"\b(pred|[a-z]+\d+[a-z0-9]*)\[([\d,]*)\]")
_BITS = re.compile(r"\d+")
_NAME = re.compile(r"%([\w.\-]+)")
_TRIP_COUNT = re.compile(r'"known_trip_count":\{"n":"(\d+)"')
_CONSTANT = re.compile(r"^[su]\d+\[\]\S* constant\((\d+)\)")
_CALLED = re.compile(
    r"\b(body|condition|to_apply|calls|true_computation|false_computation|branch_computations|called_computations)"
    r"=(\{[^}]*\}|%[\w.\-]+)"
)

FREE = frozenset((
    "parameter", "tuple", "get-tuple-element", "bitcast", "constant", "after-all", "partition-id", "replica-id",
    "opt-barrier", "iota",
))  # fmt: skip
"""Operations that neither compute nor move anything."""


@dataclasses.dataclass(frozen=True)
class Instruction:
    """Holds one instruction of a computation.

    Attributes:
      name: its name, without "%".
      shape: HLO shape of its result, "bf16[8,4]{1,0}" or a tuple "(f32[2], s32[])".
      operation: name of the operation, such as "fusion" or "dynamic-slice".
      operands: names of its operands.
      text: everything after "name =".
      is_root: whether its result is that of the computation.
    """

    name: str
    shape: str
    operation: str
    operands: tuple[str, ...]
    text: str
    is_root: bool

    @property
    def bytes(self) -> int:
        """The bytes of the result."""
        return shape_bytes(self.shape)

    @property
    def source(self) -> str:
        """The name of the jax operation from which the compiler made the instruction, "" if it is unknown."""
        match = re.search(r'op_name="([^"]*)"', self.text)
        return match[1] if match else ""

    @property
    def target(self) -> str:
        """The function that a custom call calls, "" for other operations."""
        match = re.search(r'custom_call_target="([^"]+)"', self.text)
        return match[1] if match else ""

    def called(self, *attributes: str) -> list[str]:
        """Returns the computations that the instruction names in these attributes, such as "body" or "calls"."""
        found = (names for attribute, names in _CALLED.findall(self.text) if attribute in attributes)
        return [name for names in found for name in _NAME.findall(names)]


class HloProgram:
    """Holds the computations of a program, {name: {name of an instruction: instruction}}, and the name of the first."""

    def __init__(self, text: str) -> None:
        """Reads the text of one device's optimised program, `compiled.as_text()`.

        Raises:
          ValueError: the text has no entry computation.
        """
        self.computations: dict[str, dict[str, Instruction]] = {}
        self.entry = ""
        computation: dict[str, Instruction] | None = None
        for line in text.splitlines():
            if computation is None:
                header = _COMPUTATION.match(line)
                if header:
                    computation = self.computations.setdefault(header[2], {})
                    self.entry = header[2] if header[1] else self.entry
            elif line.startswith("}") and not line.startswith("}}"):  # "}}" ends the metadata of a kernel
                computation = None
            elif instruction := _instruction(line):
                computation[instruction.name] = instruction
        if not self.entry:
            raise ValueError("the text of the program has no ENTRY computation")

    def root(self, computation: str) -> Instruction:
        """Returns the instruction whose result is that of a computation."""
        return next(instruction for instruction in self.computations[computation].values() if instruction.is_root)

    def iterations(self, loop: Instruction) -> int | None:
        """Returns how often the body of a `while` runs at most; None if its text does not say so.

        It says so if the compiler knows the number, or if the condition compares with exactly one constant, from
        which the loop is assumed to count up from 0 in steps of 1.
        """
        known = _TRIP_COUNT.search(loop.text)
        if known:
            return int(known[1])
        limits: list[int] = []
        compares = False
        unvisited = loop.called("condition")
        while unvisited:
            for instruction in self.computations.get(unvisited.pop(), {}).values():
                compares |= "direction=LT" in instruction.text
                limits += [int(value) for value in _CONSTANT.findall(instruction.text)]
                unvisited += instruction.called("calls")  # not the function of a reduction
        return limits[0] if compares and len(limits) == 1 else None

    def launched(self, computation: str, runs: float = 1.0) -> Iterator[tuple[str, Instruction, float]]:
        """Yields (computation, instruction, number of runs) of all that a computation makes a device do.

        Loops are entered with all their iterations (once if their number is unknown), and so are computations that are
        called; of a conditional, the longest branch. Instructions inside a fusion are not yielded.
        """
        for instruction in self.computations[computation].values():
            if instruction.operation == "while":
                for body in instruction.called("body"):
                    yield from self.launched(body, runs * (self.iterations(instruction) or 1))
            elif instruction.operation == "call":
                for name in instruction.called("to_apply", "called_computations"):
                    yield from self.launched(name, runs)
            elif instruction.operation == "conditional":
                branches = instruction.called("true_computation", "false_computation", "branch_computations")
                yield from self.launched(max(branches, key=lambda name: len(self.computations[name])), runs)
            elif instruction.operation not in FREE and not instruction.operation.endswith("-done"):
                yield computation, instruction, runs

    def loops(self) -> list[Instruction]:
        """Returns the loops that are run, those inside others too, in the order of the program."""
        loops: list[Instruction] = []
        unvisited = [self.entry]
        while unvisited:
            for instruction in self.computations[unvisited.pop(0)].values():
                if instruction.operation == "while":
                    loops.append(instruction)
                if instruction.operation in ("while", "call", "conditional"):
                    attributes = "body to_apply called_computations true_computation false_computation"
                    unvisited += instruction.called(*attributes.split(), "branch_computations")
        return loops


def _instruction(line: str) -> Instruction | None:
    """Returns the instruction in a line of a computation; None if there is none."""
    match = _INSTRUCTION.match(line)
    if match is None:
        return None
    text = match[3]
    end = _closing(text, 0) + 1 if text.startswith("(") else text.find(" ")
    operation = _OPERATION.match(text, end)
    if operation is None:
        return None
    start = operation.end() - 1
    operands = tuple(_NAME.findall(text[start : _closing(text, start)]))
    return Instruction(match[2], text[:end], operation[1], operands, text, bool(match[1]))


def _closing(text: str, start: int) -> int:
    """Returns the place of the bracket that closes the one at `start`; the end of the text if none does."""
    depth = 0
    for place in range(start, len(text)):
        depth += (text[place] == "(") - (text[place] == ")")
        if depth == 0:
            return place
    return len(text)


def dimensions(shape: str) -> tuple[int, ...]:
    """Returns the sizes of an array of this HLO shape; of the first array of a tuple."""
    match = _ARRAY.search(shape)
    return tuple(int(size) for size in match[2].split(",") if size) if match else ()


def shape_bytes(shape: str) -> int:
    """Returns the bytes of an array, or of a tuple of arrays, with this HLO shape."""
    total = 0
    for dtype, sizes in _ARRAY.findall(re.sub(r"/\*.*?\*/", "", shape)):
        bits = _BITS.search(dtype)
        width = 8 if bits is None else int(bits[0])
        total += math.prod(int(size) for size in sizes.split(",") if size) * max(width, 8) // 8
    return total
