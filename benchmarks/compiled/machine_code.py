"""Read a cubin or a code object: registers, spills, instructions, the main loop's body.

NVIDIA's machine code is read with ``cuobjdump`` (shipped in Triton's wheel), AMD's from the
assembly that Triton keeps.
"""

from __future__ import annotations

import re
import subprocess
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import triton

from . import limits
from .driver import Binary

CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
MATRIX = re.compile(r"(HMMA|HGMMA|IMMA|DMMA|QGMMA|UTC\w*MMA|v_mfma|v_smfmac)")
ASYNC = re.compile(r"(LDGSTS|UTMALDG|UBLKCP|buffer_load\w*_lds|global_load_lds)")
STORE = re.compile(r"(ST|STG|UTMASTG|buffer_store|global_store|flat_store)(?![A-Za-z])")
LOCAL = re.compile(r"(LDL|STL|scratch_load|scratch_store)(?![A-Za-z])")
WAIT = re.compile(r"(WARPGROUP\.DEPBAR)")
TRAP = re.compile(r"(BPT|s_trap)\b")
_SASS = re.compile(r"^\s+/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)\s*([^;]*);", re.M)
_GCN = re.compile(r"^(\.LBB\w+):|^\s+([a-z]\w+)[ \t]*([^;\n]*)", re.M)


@dataclass(frozen=True)
class Instruction:
    """An instruction's address and name, and the target of a jump."""

    address: int
    name: str  # with its modifiers: "HMMA.16816.F32.BF16"
    target: int | None = None


@dataclass(frozen=True)
class Code:
    """A kernel's machine code."""

    registers: int
    stack: int  # bytes of local memory per thread
    instructions: list[Instruction]

    def count(self, pattern: re.Pattern) -> Counter:
        """Number of instructions that begin with ``pattern``, by the text that it matched."""
        found = (pattern.match(i.name) for i in self.instructions)
        return Counter(match.group(1) for match in found if match)

    @property
    def spill(self) -> int:
        """Bytes of local memory per thread; if none are declared, the number of accesses to it."""
        return self.stack or sum(self.count(LOCAL).values())

    @property
    def traps_only(self) -> bool:
        """Traps and no stores: what ``ptxas`` emits for a body that it cannot translate."""
        return bool(self.count(TRAP)) and not self.count(STORE)

    def main_loop(self) -> list[Instruction]:
        """The innermost loop with the most matrix instructions; among equals the shortest.

        If it stores, it walks the steps of several tiles: what its jumps skip is done per tile, and
        left out.
        """
        jumps = [i for i in self.instructions if i.target is not None and i.target < i.address]
        bodies = [
            [i for i in self.instructions if jump.target <= i.address <= jump.address]
            for jump in jumps
        ]
        inner = [
            body
            for body, jump in zip(bodies, jumps, strict=True)
            if not any(
                jump.target <= other.target and other.address < jump.address for other in jumps
            )
        ]
        loop = max(inner, key=lambda body: (_matrix_count(body), -len(body)), default=[])
        if not any(STORE.match(i.name) for i in loop):
            return loop
        end = loop[-1].address
        skips = [
            (i.address, i.target)
            for i in loop
            if i.target is not None and i.address < i.target <= end
        ]
        return [i for i in loop if not any(jump < i.address < to for jump, to in skips)]


def are_serial(loop: list[Instruction]) -> bool:
    """Whether the PTX assembler inserted a wait after every matrix instruction of a warp group."""
    products = sum(i.name.startswith("HGMMA") for i in loop)
    return 1 < products <= sum(bool(WAIT.match(i.name)) for i in loop)


def _matrix_count(instructions: list[Instruction]) -> int:
    return sum(bool(MATRIX.match(i.name)) for i in instructions)


def read(binary: Binary) -> Code:
    """The machine code of a compiled kernel."""
    return _read_cubin(binary) if limits.is_nvidia(binary.arch) else _read_amdgcn(binary)


def _read_cubin(binary: Binary) -> Code:
    done = subprocess.run(
        [CUOBJDUMP, "-sass", "-res-usage", binary.files["cubin"]],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    registers, stack = re.search(r"REG:(\d+) STACK:(\d+)", done.stdout).groups()
    return Code(int(registers), int(stack), parse_sass(done.stdout))


def parse_sass(text: str) -> list[Instruction]:
    """Parse the output of ``cuobjdump -sass``."""
    instructions = []
    for address, name, operands in _SASS.findall(text):
        jump = re.search(r"\b0x([0-9a-f]+)\s*$", operands) if name.startswith("BRA") else None
        target = int(jump.group(1), 16) if jump else None
        instructions.append(Instruction(int(address, 16), name, target))
    return instructions


def _read_amdgcn(binary: Binary) -> Code:
    text = binary.text("amdgcn")

    def note(key: str) -> int:
        return int(re.search(rf"\.{key}:\s+(\d+)", text).group(1))

    stack = note("private_segment_fixed_size") or 4 * note("vgpr_spill_count")
    registers = int(re.search(r"; TotalNumVgprs: (\d+)", text).group(1))
    return Code(registers, stack, parse_amdgcn(text.partition(".rodata")[0]))


def parse_amdgcn(text: str) -> list[Instruction]:
    """Parse AMD assembly; an instruction's address is its position in the text."""
    labels, lines = {}, []
    for label, name, operands in _GCN.findall(text):
        if label:
            labels[label] = len(lines)
        else:
            lines.append((name, operands.strip()))
    return [
        Instruction(place, name, labels.get(operands) if "branch" in name else None)
        for place, (name, operands) in enumerate(lines)
    ]
