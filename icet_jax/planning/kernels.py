"""Models the time of a program that was compiled for a GPU, kernel by kernel, from its operations and bytes.

Each kernel takes the longer of two times: that of its matrix products, and that of what it reads and writes, both at
speeds that an H200 was measured to reach. To this comes a constant for each launch. What a cache saves and what runs at
the same time is not modelled, and neither is the host.
"""

import dataclasses
import functools
import math
import re
from collections import Counter, defaultdict

from icet_jax.parallel.collectives import COLLECTIVES
from icet_jax.parallel.hlo import FREE, HloProgram, Instruction, dimensions
from icet_jax.parallel.topology import Chip

REACHED_FLOPS, REACHED_BANDWIDTH = 780 / 989, 4.3 / 4.8
"""Shares of the published peaks that an H200 was measured to reach: bfloat16 products at 780 of 989 Tflop/s, and copies
at 4.3 of 4.8 TB/s. Other GPUs are assumed to reach the same shares."""
LAUNCH_SECONDS = 1.5e-6
"""Time that each kernel takes in addition, an assumption."""

_REARRANGING = frozenset((
    "copy", "transpose", "convert", "concatenate", "pad", "slice", "dynamic-slice", "dynamic-update-slice", "broadcast",
    "reshape", "reverse",
))  # fmt: skip
_PRODUCTS = re.compile(r"cublas|__triton_gemm")


@dataclasses.dataclass(frozen=True)
class Kernel:
    """Holds one kernel of a program.

    Attributes:
      instruction: the instruction that launches it.
      computation: name of the computation with the instruction.
      kind: "product" (matrix product), "attention" (cuDNN's), "rearrangement" (only copies, converts or joins arrays),
        "collective" or "other".
      flops: operations of its matrix products.
      read: bytes that it reads.
      written: bytes that it writes; of an update in place, those of the update.
      runs: how often one run of the program launches it.
    """

    instruction: Instruction
    computation: str
    kind: str
    flops: int
    read: int
    written: int
    runs: float

    @property
    def bytes(self) -> int:
        """The bytes that it reads and writes."""
        return self.read + self.written

    def seconds(self, chip: Chip) -> float:
        """Returns the modelled seconds of one launch on a chip, whose peaks must be known."""
        assert chip.flops is not None and chip.bandwidth is not None
        products = self.flops / (REACHED_FLOPS * chip.flops)
        return max(products, self.bytes / (REACHED_BANDWIDTH * chip.bandwidth)) + LAUNCH_SECONDS


@dataclasses.dataclass(frozen=True)
class ProgramCost:
    """Holds what one run of a compiled program launches on each GPU, and how long that takes by the model above.

    Attributes:
      kernels: number of launches.
      step_kernels: launches in one iteration of the loop that takes longest; `kernels` without a loop.
      flops: operations of all matrix products and of cuDNN's attention.
      bytes: bytes that all kernels read and write.
      seconds: modelled time.
    """

    kernels: int
    step_kernels: int
    flops: int
    bytes: int
    seconds: float


class GpuProgram(HloProgram):
    """Holds a program that was compiled for GPUs, and the kernels that it launches."""

    @functools.cached_property
    def kernels(self) -> list[Kernel]:
        """The kernels of one run of the program; in loops of unknown length, those of one iteration."""
        return self._kernels_of(self.entry)

    def loop_kernels(self, loop: Instruction) -> list[Kernel]:
        """Returns the kernels of one iteration of a loop, one of `loops()`."""
        (body,) = loop.called("body")
        return self._kernels_of(body)

    def cost(self, chip: Chip) -> ProgramCost:
        """Returns the modelled cost of one run of the program on GPUs of this kind."""

        def seconds(kernels: list[Kernel]) -> float:
            return math.fsum(kernel.runs * kernel.seconds(chip) for kernel in kernels)

        steps = [
            (seconds(kernels) * (self.iterations(loop) or 1), kernels)
            for loop, kernels in ((loop, self.loop_kernels(loop)) for loop in self.loops())
        ]
        longest = max(steps, key=lambda step: step[0])[1] if steps else self.kernels
        return ProgramCost(
            kernels=round(sum(kernel.runs for kernel in self.kernels)),
            step_kernels=round(sum(kernel.runs for kernel in longest)),
            flops=round(sum(kernel.runs * kernel.flops for kernel in self.kernels)),
            bytes=round(sum(kernel.runs * kernel.bytes for kernel in self.kernels)),
            seconds=seconds(self.kernels),
        )

    def _kernels_of(self, computation: str) -> list[Kernel]:
        return [
            Kernel(instruction, name, self._kind(instruction), self._flops(name, instruction),
                   self._read(name, instruction), self._written(name, instruction), runs)
            for name, instruction, runs in self.launched(computation)
        ]  # fmt: skip

    def _kind(self, instruction: Instruction) -> str:
        """Returns the kind of the kernel that an instruction launches, see `Kernel`."""
        if instruction.operation.removesuffix("-start") in COLLECTIVES:
            return "collective"
        if "fmha" in instruction.target:
            return "attention"
        operations = self._operations(instruction)
        if operations["dot"] or operations["scaled-dot"] or _PRODUCTS.search(instruction.target):
            return "product"
        return "rearrangement" if operations and set(operations) <= _REARRANGING else "other"

    def _operations(self, instruction: Instruction) -> Counter[str]:
        """Returns how often each operation occurs in the kernel of an instruction, fused ones included."""
        names = instruction.called("calls")
        if not names:
            return Counter([instruction.operation.removesuffix("-start")])
        total: Counter[str] = Counter()
        for name in names:
            for fused in self.computations[name].values():
                if fused.operation not in FREE:
                    total += self._operations(fused)
        return total

    def _flops(self, computation: str, instruction: Instruction) -> int:
        """Returns the operations of the matrix products in the kernel of an instruction."""
        table = self.computations[computation]
        if "fmha" in instruction.target:
            return _attention_flops(instruction, table)
        if instruction.operation in ("dot", "scaled-dot"):
            contracted = re.search(r"lhs_contracting_dims=\{([\d,]*)\}", instruction.text)
            return _product_flops(instruction, table, contracted[1] if contracted else "")
        if "cublas" in instruction.target:
            contracted = re.search(r'"lhs_contracting_dimensions":\[([^\]]*)\]', instruction.text)
            return _product_flops(instruction, table, contracted[1].replace('"', "") if contracted else "")
        return sum(
            self._flops(name, fused)
            for name in instruction.called("calls")
            for fused in self.computations[name].values()
        )

    def _read(self, computation: str, instruction: Instruction) -> int:
        """Returns the bytes that the kernel of an instruction reads."""
        called = instruction.called("calls")
        if called:
            return sum(self._parameter_bytes(called[0], name) for name in self.computations[called[0]])
        table = self.computations[computation]
        operands = [table[name].bytes for name in instruction.operands if name in table]
        if instruction.operation in ("dynamic-slice", "slice", "gather"):
            return instruction.bytes
        return sum(operands[1:2] if instruction.operation == "dynamic-update-slice" else operands)

    def _parameter_bytes(self, computation: str, name: str) -> int:
        """Returns the bytes that a fused computation reads of a parameter; 0 if `name` is no parameter.

        Of a parameter that is only sliced, the slices are read; what is only written to in place is not read.
        """
        table = self.computations[computation]
        if table[name].operation != "parameter":
            return 0
        read = 0
        for user, place in self._users(computation, name):
            if user.operation in ("slice", "dynamic-slice", "gather") and place == 0:
                read += user.bytes
            elif user.operation not in ("dynamic-update-slice", "scatter") or place != 0:
                return table[name].bytes
        return min(read, table[name].bytes)

    def _users(self, computation: str, name: str) -> list[tuple[Instruction, int]]:
        """Returns (instruction, place among its operands) for each use of a result, through bitcasts."""
        users: list[tuple[Instruction, int]] = []
        for user, place in self._uses[computation][name]:
            users += self._users(computation, user.name) if user.operation == "bitcast" else [(user, place)]
        return users

    @functools.cached_property
    def _uses(self) -> dict[str, dict[str, list[tuple[Instruction, int]]]]:
        """The direct uses of each result, by computation and name."""
        uses: dict[str, dict[str, list[tuple[Instruction, int]]]] = {}
        for computation, table in self.computations.items():
            uses[computation] = defaultdict(list)
            for instruction in table.values():
                for place, operand in enumerate(instruction.operands):
                    uses[computation][operand].append((instruction, place))
        return uses

    def _written(self, computation: str, instruction: Instruction) -> int:
        """Returns the bytes that the kernel of an instruction writes; of an update in place, those of the update."""
        table = self.computations[computation]
        called = instruction.called("calls")
        if called:
            return self._written(called[0], self.root(called[0]))
        operands = [table[name] for name in instruction.operands if name in table]
        if instruction.operation == "tuple":
            return sum(self._written(computation, operand) for operand in operands)
        if instruction.operation == "bitcast" and operands:
            return self._written(computation, operands[0])
        if instruction.operation == "dynamic-update-slice" and len(operands) > 1:
            return operands[1].bytes
        if instruction.operation == "scatter" and len(operands) > 2:
            return operands[2].bytes
        return instruction.bytes


def _product_flops(product: Instruction, table: dict[str, Instruction], contracted: str) -> int:
    """Returns the operations of a matrix product, whose left operand is summed over the axes `contracted` ("1,2")."""
    left = table.get(product.operands[0])
    sizes = dimensions(left.shape) if left is not None else ()
    summed = math.prod(sizes[int(axis)] for axis in contracted.split(",") if axis and int(axis) < len(sizes))
    return 2 * summed * math.prod(dimensions(product.shape))


def _attention_flops(attention: Instruction, table: dict[str, Instruction]) -> int:
    """Returns the operations of cuDNN's attention: two products forward, five backward, half of each if it is causal.

    The queries are `[B, T, H, D]`, the keys `[B, S, K, D]`.
    """
    queries, keys = (dimensions(table[name].shape) for name in attention.operands[:2])
    products = 5 if "Backward" in attention.target else 2
    flops = 2 * products * math.prod(queries) * keys[1]
    return flops // 2 if "CAUSAL" in attention.text else flops
