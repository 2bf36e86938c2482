"""Read the machine code of a cubin: resources, loops, and registers that tensor cores may read too late.

Hopper's `HGMMA` (wgmma) multiplies asynchronously: it reads an operand in registers some time after it was issued.
`WARPGROUP.DEPBAR.LE gsb0, N` waits until at most N groups of them are left; the last instruction of a group names gsb0.
Until then no instruction may write the registers of the operand. Triton 3.6 to 3.8 can get this wrong when the operand
is computed in a pipelined loop (triton-lang/triton#9433): the results are then wrong without an error.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

import triton

BIN = Path(triton.__file__).parent / "backends/nvidia/bin"
OPERAND_REGISTERS = 4  # of a thread: 64 by 16 values of 16 bits among 128 threads
_NO_RESULT = ("ST", "RED", "BAR", "EXIT", "BRA", "NOP", "LDGSTS", "LDGDEPBAR", "DEPBAR", "WARPGROUP", "HGMMA", "MEMBAR")
GLOBAL = ("LDG", "STG", "ATOM", "RED", "UTMA")
_TESTS = ("SETP", "PLOP3", "R2P")  # their results are predicates


@dataclass(frozen=True)
class Instruction:
    """One line of SASS: the opcode with its suffixes, and the operands."""

    opcode: str
    operands: tuple[str, ...]

    def written(self) -> range:
        """The general registers that it writes."""
        if self.opcode.startswith(_NO_RESULT) or any(test in self.opcode for test in _TESTS):
            return range(0)
        operands = [op for op in self.operands if not re.fullmatch(r"!?U?P(\d|T)", op)]
        match = re.match(r"R(\d+)\b", operands[0]) if operands else None
        return range(int(match[1]), int(match[1]) + self._width()) if match else range(0)

    def _width(self) -> int:
        """How many registers the result takes."""
        parts = self.opcode.split(".")
        if "128" in parts or (parts[0] == "LDSM" and "4" in parts):
            return 4
        if "64" in parts or "WIDE" in parts or (parts[0] == "LDSM" and "2" in parts):
            return 2
        if parts[0] == "CS2R" and "32" not in parts:
            return 2
        return 4 if parts[0] in ("HMMA", "IMMA") else 1


@dataclass(frozen=True)
class Code:
    """A kernel's instructions, and its backward jumps: (first, last) instruction of each loop's body."""

    instructions: tuple[Instruction, ...]
    loops: tuple[tuple[int, int], ...]

    @staticmethod
    def parse(listing: str) -> Code:
        """From what `nvdisasm -c` prints."""
        labels: dict[str, int] = {}
        found: list[Instruction] = []
        for line in map(str.strip, listing.splitlines()):
            if match := re.match(r"(\.L_x_\d+):", line):
                labels[match[1]] = len(found)
            elif match := re.match(r"/\*[0-9a-f]{4,}\*/\s*(?:@!?U?P\w+\s+)?([A-Z][\w.]*)\s*([^;]*)", line):
                found.append(Instruction(match[1], tuple(part.strip() for part in match[2].split(",") if part.strip())))
        loops = []
        for i, instruction in enumerate(found):
            if instruction.opcode.startswith("BRA") and (match := re.search(r"\.L_x_\d+", instruction.operands[-1])):
                if (first := labels.get(match[0], i)) < i:
                    loops.append((first, i))
        return Code(tuple(found), tuple(loops))

    @property
    def longest_loop(self) -> tuple[Instruction, ...]:
        """The body of the longest loop; empty without one."""
        first, last = max(self.loops, key=lambda loop: loop[1] - loop[0], default=(0, -1))
        return self.instructions[first : last + 1]

    def count(self, opcode: str) -> int:
        """How many instructions of the longest loop begin with `opcode`."""
        return sum(instruction.opcode.startswith(opcode) for instruction in self.longest_loop)

    @property
    def in_flight(self) -> int:
        """Groups of HGMMAs that the longest loop leaves running while its next turn decodes their successors."""
        waits = [i.operands[1] for i in self.longest_loop if i.opcode.startswith("WARPGROUP.DEPBAR")]
        return int(waits[-1], 16) if waits else 0

    def before_inputs(self) -> list[str] | None:
        """Opcodes that touch global memory before the kernel waits for the kernels before it; None if it never does."""
        opcodes = [instruction.opcode for instruction in self.instructions]
        if "ACQBULK" not in opcodes:
            return None
        return [opcode for opcode in opcodes[: opcodes.index("ACQBULK")] if opcode.startswith(GLOBAL)]

    def late_writes(self) -> list[str]:
        """Instructions that write an operand's register while an HGMMA may still read it, each with the register."""
        order: list[int] = []
        for i in range(len(self.instructions)):
            order.append(i)
            for first, last in self.loops:
                if last == i:  # once more around, with what the first time left in flight
                    order += range(first, last + 1)
        groups: list[set[int]] = [set()]  # the registers that each group reads; the last one is still being issued
        found = []
        for i in order:
            instruction = self.instructions[i]
            if instruction.opcode.startswith("HGMMA"):
                if match := re.match(r"R(\d+)", instruction.operands[1]):
                    groups[-1].update(range(int(match[1]), int(match[1]) + OPERAND_REGISTERS))
                if "gsb0" in instruction.operands:
                    groups.append(set())
            elif instruction.opcode.startswith("WARPGROUP.DEPBAR"):
                left = int(instruction.operands[1], 16)
                groups = groups[max(0, len(groups) - 1 - left) :]
            else:
                late = set(instruction.written()) & set().union(*groups)
                found += [f"{instruction.opcode} {', '.join(instruction.operands)}: R{register}" for register in late]
        return found


@dataclass(frozen=True)
class Cubin:
    """registers: of a thread. spills: bytes of a thread's local memory."""

    registers: int
    spills: int
    code: Code

    @staticmethod
    def read(cubin: bytes) -> Cubin:
        with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
            file.write(cubin)
            file.flush()
            usage, listing = (
                subprocess.run([BIN / tool, option, file.name], capture_output=True, text=True, check=True).stdout
                for tool, option in (("cuobjdump", "-res-usage"), ("nvdisasm", "-c"))
            )
        registers, local = (int(re.search(rf"{name}:(\d+)", usage)[1]) for name in ("REG", "LOCAL"))
        return Cubin(registers, local, Code.parse(listing))
