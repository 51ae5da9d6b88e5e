"""Machine code of NVIDIA GPUs, as the disassembler shows it: what the gate reads off a binary.

A product of Hopper (HGMMA) finds an operand in shared memory by a descriptor in two uniform registers: address and
strides below, how it is swizzled above. The upper half is the same for a whole operand, so it has to be a constant
wherever the product is; wrong_descriptors follows constants through registers to see whether it is. The assembler of
CUDA 12.8, which Triton 3.6 brings, adds one of two such constants to a register of something else if both belong to
operands that do not change in a loop: the product then reads from anywhere, as it did on an H100.
"""

from __future__ import annotations

import os
import re
import subprocess
import tempfile
from typing import NamedTuple

import triton

__all__ = ["TOOLS", "Instruction", "disassemble", "inner_loops", "is_product", "main_loop", "wrong_descriptors"]

TOOLS = os.path.join(os.path.dirname(triton.__file__), "backends", "nvidia", "bin")
# Upper halves of descriptors that Triton writes: swizzles of 128, 64 and 32 bytes, and the distance between groups of
# eight rows in units of 16 bytes.
DESCRIPTORS = (2 << 29 | 64, 4 << 29 | 32, 6 << 29 | 16)
WORD = 0xFFFFFFFF


class Instruction(NamedTuple):
    """@predicate opcode operands"""

    address: int
    opcode: str
    operands: tuple[str, ...]
    predicated: bool

    @classmethod
    def of(cls, address: int, text: str) -> Instruction:
        """One line of the disassembler's, without the semicolon."""
        bare = re.sub(r"^@!?\S+\s+", "", text).replace(".reuse", "").strip()
        opcode, _, operands = bare.partition(" ")
        fields = tuple(x.strip() for x in operands.split(",")) if operands else ()
        return cls(address, opcode, fields, text.startswith("@"))

    @property
    def target(self) -> int | None:
        """Where a branch goes to."""
        if not self.opcode.startswith("BRA"):
            return None
        found = re.search(r"0x([0-9a-f]+)", self.operands[-1])
        return int(found[1], 16) if found else None

    @property
    def goes_on(self) -> bool:
        """Whether the next instruction may follow."""
        if self.opcode.startswith("BRA"):
            return self.predicated or len(self.operands) > 1
        return self.predicated or not self.opcode.startswith(("EXIT", "RET"))


def disassemble(cubin: bytes) -> list[Instruction]:
    """In the words of the disassembler that Triton brings."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [os.path.join(TOOLS, "cuobjdump"), "--dump-sass", file.name]
        listing = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    lines = re.findall(r"^\s+/\*([0-9a-f]{4,})\*/\s+(.*?);", listing, re.MULTILINE)
    return [Instruction.of(int(address, 16), text) for address, text in lines]


def is_product(x: Instruction) -> bool:
    return x.opcode.startswith(("HMMA", "HGMMA", "UTCHMMA"))


def inner_loops(code: list[Instruction]) -> list[list[Instruction]]:
    """The innermost loops that take exponentials."""
    spans = []
    for i, x in enumerate(code):
        waits = any("TRYWAIT" in before.opcode for before in code[max(0, i - 2) : i])
        if x.target is not None and x.target < x.address and not waits:  # a wait for a barrier jumps back too
            spans.append((x.target, x.address))
    loops = [[x for x in code if first <= x.address <= last] for first, last in spans]
    loops = [loop for loop in loops if any(x.opcode.startswith("MUFU.EX2") for x in loop)]
    return [
        loop
        for loop in loops
        if not any(
            loop[0].address <= other[0].address and other[-1].address <= loop[-1].address
            for other in loops
            if other is not loop
        )
    ]


def main_loop(code: list[Instruction]) -> list[Instruction]:
    """The loop over whole key blocks: that with the fewest selects, for the other one masks."""
    return min(inner_loops(code), key=lambda loop: sum(x.opcode.startswith("FSEL") for x in loop), default=[])


# ------------------------------------------------------------------------------------------------ descriptors


class Value(NamedTuple):
    """What a register holds: a number, or the exclusive or of it and of things that are not known, by name. So two
    registers exchanged by three exclusive ors, as the assembler does it, are seen to be exchanged."""

    number: int
    unknown: frozenset[tuple[int, object]] = frozenset()


ZERO = Value(0)
RIGHT = [Value(number) for number in DESCRIPTORS]
State = dict[str, Value]  # registers R.., UR.., and words of the stack, [..]


def wrong_descriptors(code: list[Instruction]) -> list[Instruction]:
    """The products of Hopper with a descriptor whose upper half is none that Triton writes, or no constant."""
    if not any(x.opcode.startswith("HGMMA") for x in code):
        return []
    at = {x.address: i for i, x in enumerate(code)}
    entry: dict[int, State] = {0: {}}
    starts = {0} | {at[x.target] for x in code if x.target in at}
    starts |= {i + 1 for i, x in enumerate(code) if x.target is not None or not x.goes_on}
    wrong: dict[int, bool] = {}
    todo = [0]
    while todo:
        i = todo.pop()
        state = dict(entry[i])
        while True:
            x = code[i]
            if x.opcode.startswith("HGMMA"):
                wrong[i] = any(state.get(name) not in RIGHT for name in _upper_halves(x))
            _execute(x, state)
            i += 1
            if i in starts or i >= len(code):
                break
        following = [at[x.target]] if x.target in at else []
        for to in following + [i] * (x.goes_on and i < len(code)):
            old = entry.get(to)
            new = dict(state)
            if old is not None:  # what differs from path to path is not known
                new = {r: v if state.get(r) == v else _unknown(code[to], r) for r, v in old.items()}
            if new != old:
                entry[to] = new
                todo.append(to)
    return [code[i] for i, is_wrong in sorted(wrong.items()) if is_wrong]


def _upper_halves(x: Instruction) -> list[str]:
    """The registers with the upper half of the descriptor of b, and of that of a if a is in shared memory."""
    place = next(i for i, operand in enumerate(x.operands) if operand.startswith("gdesc"))
    first = int(re.findall(r"\d+", x.operands[place])[0])
    return [f"UR{first + 3}"] + ([f"UR{first + 1}"] if place == 1 else [])


def _unknown(x: Instruction, which: object) -> Value:
    return Value(0, frozenset({(x.address, which)}))


def _read(state: State, name: str) -> Value | None:
    if name in ("RZ", "URZ", "SRZ"):
        return ZERO
    if re.fullmatch(r"-?0x[0-9a-f]+", name):
        return Value(int(name, 16) & WORD)
    return state.get(name)


def _next(register: str, by: int = 1) -> str:
    letters, number = re.fullmatch(r"(U?R)(\d+)", register).groups()  # type: ignore[union-attr]
    return f"{letters}{int(number) + by}"


def _read_pair(state: State, name: str) -> tuple[Value | None, Value | None]:
    """The two halves of a 64-bit operand, the lower first; a minus negates both together."""
    bare = name.removeprefix("-")
    if not re.fullmatch(r"UR\d+", bare):
        return _read(state, name), ZERO
    low, high = state.get(bare), state.get(_next(bare))
    if bare == name:
        return low, high
    if low is None or high is None or low.unknown or high.unknown:
        return None, None
    both = -(high.number << 32 | low.number)
    return Value(both & WORD), Value(both >> 32 & WORD)


def _sum(*values: Value | None) -> Value | None:
    """Without the carry, which addresses of shared memory never have."""
    known = [v for v in values if v is not None]
    if len(known) < len(values):
        return None
    unknown = [v for v in known if v.unknown]
    number = sum(v.number for v in known if not v.unknown) & WORD
    if not unknown:
        return Value(number)
    return unknown[0] if len(unknown) == 1 and number == 0 else None


def _logic(values: list[Value | None], table: int) -> Value | None:
    a, b, c = values
    if a is None or b is None or c is None:
        return None
    if table == 0x3C:
        return Value(a.number ^ b.number, a.unknown ^ b.unknown)
    if a.unknown or b.unknown or c.unknown:
        return None
    bits = (table >> ((a.number >> i & 1) * 4 + (b.number >> i & 1) * 2 + (c.number >> i & 1)) & 1 for i in range(32))
    return Value(sum(bit << i for i, bit in enumerate(bits)))


def _execute(x: Instruction, state: State) -> None:
    """state after x, as far as constants are moved, added and combined."""
    if not x.operands:
        return
    opcode, (target, *rest) = x.opcode, x.operands
    base = opcode.split(".")[0]
    words = 4 if ".128" in opcode else 2 if ".64" in opcode or "WIDE" in opcode else 1
    sources = [s for s in rest if not re.fullmatch(r"!?U?P(\d|T)", s)]
    place = re.fullmatch(r"\[R1(?:\+0x([0-9a-f]+))?\]", target if base == "STL" else rest[0] if rest else "")
    on_stack = [f"[{int(place[1] or '0', 16) + 4 * i}]" for i in range(words)] if place else []
    new: dict[str, Value | None] = {}
    if base == "STL":
        new = {at: _read(state, rest[0] if rest[0] == "RZ" else _next(rest[0], i)) for i, at in enumerate(on_stack)}
    elif not re.fullmatch(r"U?R\d+", target):
        return
    elif base == "LDL" and on_stack:
        new = {_next(target, i): state.get(at) for i, at in enumerate(on_stack)}
    elif opcode in ("MOV", "UMOV", "R2UR"):
        new[target] = _read(state, sources[0])
    elif opcode in ("IMAD.U32", "IMAD.MOV.U32", "IMAD.X") and "RZ" in sources[:2]:
        new[target] = _read(state, sources[2])
    elif base == "CS2R" and sources == ["SRZ"]:
        new = {_next(target, i): ZERO for i in range(1 if opcode == "CS2R.32" else 2)}
    elif opcode in ("UIADD3", "UIADD3.X", "IADD3", "IADD3.X"):
        new[target] = _sum(*(_read(state, s) for s in sources[:3]))
    elif opcode == "UIADD3.64":
        lows, highs = zip(*(_read_pair(state, s) for s in sources[:2]))
        new = {target: _sum(*lows), _next(target): _sum(*highs)}
    elif base in ("LOP3", "ULOP3"):
        new[target] = _logic([_read(state, s) for s in sources[:3]], int(sources[3], 16))
    else:
        if base == "HGMMA":
            words = int(opcode.split(".")[1].split("x")[1]) // 2
        new = {_next(target, i): None for i in range(words)}
    for register, value in new.items():
        value = _unknown(x, register) if value is None else value
        if x.predicated and state.get(register) != value:
            value = _unknown(x, (register, "or before"))
        state[register] = value
