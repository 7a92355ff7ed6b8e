"""What a compiled kernel's machine code needs: registers, stack, and loads and stores of local memory in its loops.

Read with the disassemblers that Triton ships, so no GPU and no CUDA toolkit are needed.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from dataclasses import dataclass, field
from pathlib import Path

import triton

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"

_INSTRUCTION = re.compile(r"/\*[0-9a-f]{4,}\*/\s+(?P<text>[^;]+?)\s*;")
_LABEL = re.compile(r"^(?P<name>\.L_\w+):")
_TARGET = re.compile(r"\.L_\w+")
# An instruction's name behind the predicate that may guard it.
_GUARDED = re.compile(r"^(?P<guard>@!?U?P\w+\s+)?(?P<name>\w+)(?P<operands>.*)")
_TENSOR_CORE = re.compile(r"^([HQIFBD]G?MMA|UTC\w*MMA|OMMA)$")


@dataclass
class _Block:
    """Instructions that run one after another, and the labels of the blocks that may follow."""

    num_local: int = 0
    has_tensor_core: bool = False
    targets: list[str] = field(default_factory=list)
    falls_through: bool = True


def resource_usage(cubin: bytes) -> tuple[int, int]:
    """Registers per thread and bytes of stack per thread, which in a kernel without arrays of its own are spills."""
    text = _run("cuobjdump", "-res-usage", cubin)
    found = re.search(r"REG:(\d+) STACK:(\d+)", text)
    assert found is not None, text
    return int(found[1]), int(found[2])


def local_accesses_in_loops(cubin: bytes) -> int | None:
    """Loads and stores of local memory in the innermost loops with tensor-core instructions; None: no loop has any."""
    return count_in_loops(_run("nvdisasm", "-c", cubin))


def _run(tool: str, option: str, cubin: bytes) -> str:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [str(TOOLS / tool), option, file.name]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def count_in_loops(disassembly: str) -> int | None:
    """`local_accesses_in_loops` of what nvdisasm says, with labels where branches lead."""
    blocks, successors = _flow(disassembly)
    loops = [loop for loop in _loops(successors) if any(blocks[i].has_tensor_core for i in loop)]
    if not loops:
        return None
    innermost = set().union(*(loop for loop in loops if not any(other < loop for other in loops)))
    return sum(blocks[i].num_local for i in innermost)


def _flow(disassembly: str) -> tuple[list[_Block], list[list[int]]]:
    """The blocks of a kernel in their order in memory, and for each the numbers of those that may follow it."""
    blocks, numbers = [_Block()], {}
    for line in disassembly.splitlines():
        if (label := _LABEL.match(line)) is not None:
            blocks.append(_Block())
            numbers[label["name"]] = len(blocks) - 1
        elif (found := _INSTRUCTION.search(line)) is not None:
            parts = _GUARDED.match(found["text"])
            assert parts is not None, line
            name, operands = parts["name"], parts["operands"]
            blocks[-1].num_local += name in ("LDL", "STL")
            blocks[-1].has_tensor_core |= _TENSOR_CORE.match(name) is not None
            if name in ("BRA", "BRX", "JMP", "EXIT", "RET"):
                # Where a branch is indirect the disassembler lists its targets in a comment behind it.
                blocks[-1].targets += _TARGET.findall(line) if name == "BRX" else _TARGET.findall(operands)
                # Some branches have their condition as an operand.
                conditional = parts["guard"] is not None or re.search(r"\bU?P\d", operands) is not None
                blocks[-1].falls_through = conditional
                blocks.append(_Block())
    successors = []
    for i, block in enumerate(blocks):
        following = [numbers[target] for target in block.targets if target in numbers]
        successors.append(following + ([i + 1] if block.falls_through and i + 1 < len(blocks) else []))
    return blocks, successors


def _loops(successors: list[list[int]]) -> list[set[int]]:
    """Natural loops, by their heads: the blocks from which a jump back to the head is reached without passing it.

    A jump back to a block that can be passed by, as from a wait that lies behind the kernel's end, makes none.
    """
    predecessors: list[list[int]] = [[] for _ in successors]
    for i, following in enumerate(successors):
        for j in following:
            predecessors[j].append(i)
    reachable = _reached([0], successors, set())
    loops: dict[int, set[int]] = {}
    for i in reachable:
        for head in successors[i]:
            if head <= i:
                body = _reached([i], predecessors, {head}) & reachable
                if 0 not in body or head == 0:
                    loops[head] = loops.get(head, set()) | body
    return list(loops.values())


def _reached(starts: list[int], edges: list[list[int]], stops: set[int]) -> set[int]:
    """Blocks that the edges lead to, the starts and the stops included, without going on behind a stop."""
    reached, waiting = set(stops), [i for i in starts if i not in stops]
    while waiting:
        i = waiting.pop()
        if i not in reached:
            reached.add(i)
            waiting += edges[i]
    return reached
