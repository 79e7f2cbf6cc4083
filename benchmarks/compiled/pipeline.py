"""Whether the main loop of a kernel is pipelined, read from Triton's GPU dialect (TTGIR).

A main loop is an innermost loop with a matrix product and a trip count that is not a constant. It
is pipelined if no load is consumed in its own iteration and if it never waits for all matrix
instructions in flight. An ``scf.if`` that stores does not count: in a loop over several tiles'
steps it finishes a tile.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field

_DOT = re.compile(r"(tt\.dot|ttng\.warp_group_dot|ttng\.tc_gen5_mma)\b(?!_)")
_LOAD = re.compile(r"(tt\.load|amdg?\.buffer_load|tt\.descriptor_load)\b")
_COPY = re.compile(r"(async_copy_global_to_local|async_tma_copy_global_to_local|_load_to_local)\b")
_STORE = re.compile(
    r"(tt\.store|buffer_store|tt\.descriptor_store|async_tma_copy_local_to_global)\b"
)
_VALUE = re.compile(r"%[\w.#-]+")
_DEFINES = re.compile(r"^\s*(%[\w-]+)(?::\d+)? = (.*)$")
_SHAPE = re.compile(r"<((?:\d+x)+)\w+,")
_DRAIN = re.compile(r"warp_group_dot_wait.*pendings = 0\b")


@dataclass
class Loop:
    """The header of a region, such as an ``scf.for``, and the operations inside it, in order."""

    header: str
    body: list[str] = field(default_factory=list)
    nested: bool = False

    @property
    def is_loop(self) -> bool:
        """Whether it is a loop and not another region."""
        return re.search(r"\bscf\.(for|while)\b", self.header) is not None

    @property
    def dots(self) -> list[str]:
        """The operations that are matrix products."""
        return [line for line in self.body if _DOT.search(line)]

    @property
    def counted(self) -> bool:
        """Whether its trip count is a constant, as in a loop over the chunks of a rank."""
        return re.search(r" to %c-?\d+\S* step ", self.header) is not None


def loops(ttgir: str) -> Iterator[Loop]:
    """Every loop of a module, innermost ones first."""
    open_regions: list[Loop] = [Loop("module")]
    for line in ttgir.splitlines():
        line = re.sub(r" loc\(.*$", "", line.rstrip())
        if line.lstrip().startswith("}") and len(open_regions) > 1:
            closed = open_regions.pop()
            if closed.is_loop:
                yield closed
                for region in open_regions:
                    region.nested = True
            finishes = "scf.if" in closed.header and any(map(_STORE.search, closed.body))
            if not finishes:
                open_regions[-1].body += closed.body
        open_regions[-1].body.append(line)
        if line.endswith("{"):
            open_regions.append(Loop(line))


def main_loops(ttgir: str) -> list[Loop]:
    """The loops that a kernel's speed depends on."""
    return [loop for loop in loops(ttgir) if loop.dots and not loop.nested and not loop.counted]


def faults(loop: Loop) -> list[str]:
    """Why ``loop`` is not pipelined; empty if it is."""
    found = []
    if any(_DRAIN.search(line) for line in loop.body) or _waits_for_its_own(loop.body):
        found.append("waits for all matrix groups")
    definitions, alias = {}, {}
    for place, line in enumerate(loop.body):
        match = _DEFINES.match(line)
        if match:
            definitions[match.group(1)] = (place, match.group(2))
            index = re.match(r"ttg\.memdesc_(?:index|subview) (%\S+)\[(.*?)\]", match.group(2))
            if index:  # another name for the same buffer
                alias[match.group(1)] = index.groups()

    def writer(buffer: str, before: int) -> str | None:
        """The last operation of this iteration, before line ``before``, that fills ``buffer``."""
        same = alias.get(buffer, buffer)
        for line in reversed(loop.body[:before]):
            fills = _COPY.search(line) or "ttg.local_store" in line
            if fills and any(alias.get(v, v) == same for v in _operands(line)[1:]):
                return line
        return None

    def loaded_here(value: str, before: int, seen: set[str]) -> bool:
        """Whether ``value`` comes from a load in the same iteration."""
        if value in seen:
            return False
        seen.add(value)
        filled = writer(value, before)
        if filled is not None and _COPY.search(filled):
            return True
        sources = [] if filled is None else _operands(filled)[:1]
        if value in definitions:
            before, operation = definitions[value]
            if _LOAD.match(operation):
                return True
            if value not in alias:
                sources += _operands(operation)
        return any(loaded_here(source, before, seen) for source in sources)

    for place, line in enumerate(loop.body):
        if _DOT.search(line) and any(loaded_here(v, place, set()) for v in _operands(line)[:2]):
            found.append("consumes a load in its own iteration")
            break
    return found


def _waits_for_its_own(body: list[str]) -> bool:
    """Whether the loop waits for a tensor-memory product in the iteration that issues it."""
    issued = set()
    for line in body:
        waited = re.search(r"ttng\.wait_barrier (%[\w-]+)", line)
        if waited and waited.group(1) in issued:
            return True
        if "ttng.tc_gen5_mma" in line:
            issued.update(re.findall(r"(%[\w-]+)\[", line))
    return False


def _operands(line: str) -> list[str]:
    """The values that an operation reads, without their types."""
    text = re.sub(r"^\s*%\S+(?::\d+)? = ", "", line)
    return [value.partition("#")[0] for value in _VALUE.findall(text.partition(" : ")[0])]


def largest_product(ttgir: str) -> tuple[int, int, int]:
    """Rows, columns and inner size of the module's largest matrix product; zeros without one."""
    shapes = [(0, 0, 0)]
    for line in ttgir.splitlines():
        if _DOT.search(line):
            sizes = [tuple(map(int, s[:-1].split("x"))) for s in _SHAPE.findall(line)]
            (rows, inner), (_, columns) = sizes[0][-2:], sizes[1][-2:]
            shapes.append((rows, columns, inner))
    return max(shapes, key=lambda shape: shape[0] * shape[1] * shape[2])
