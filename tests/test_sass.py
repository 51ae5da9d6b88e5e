"""Descriptors of wgmma followed through registers: what an assembler does with constants, and what it must not do."""

from __future__ import annotations

import pytest

pytest.importorskip("triton")

from jvpgraph.kernels.sass import Instruction, wrong_descriptors

PRODUCT = "HGMMA.64x64x16.F32.BF16 R24, gdesc[UR4], R24"  # a by UR4 and UR5, b by UR6 and UR7
A = ["UMOV UR5, 0x40000040"]
IN_REGISTERS = "HGMMA.64x64x16.F32.BF16 R24, R88, gdesc[UR4].tnspB, R24"  # a in R88 to R91


def code(*lines: str) -> list[Instruction]:
    return [Instruction.of(16 * i, line) for i, line in enumerate(lines)]


RIGHT = {
    "moved": ["UMOV UR7, 0xc0000010"],
    "through a vector register": ["MOV R3, 0x80000020", "FADD R4, R4, R5", "R2UR UR7, R3"],
    "added with a carry": ["UMOV UR9, URZ", "UIADD3.X UR7, UR9, 0x40000040, URZ, UP1, !UPT"],
    "added as a pair": ["UMOV UR9, 0x40000040", "USGXT.U32 UR8, UR3, 0xe", "UIADD3.64 UR6, UR8, 0x7e, URZ"],
    "subtracted as a pair": [
        "USGXT.U32 UR8, UR3, 0xe",
        "UMOV UR9, URZ",
        "UMOV UR10, 0xffffffe0",
        "UMOV UR11, 0x3fffffef",
        "UIADD3.64 UR6, UR8, -UR10, URZ",
    ],
    "combined": ["UMOV UR9, URZ", "ULOP3.LUT UR7, UR9, 0x40000040, URZ, 0xfc, !UPT"],
    "exchanged": [
        "UMOV UR6, 0x40000040",
        "ULEA UR7, UR3, UR2, 0x5",
        "ULOP3.LUT UR7, UR7, UR6, URZ, 0x3c, !UPT",
        "ULOP3.LUT UR6, UR7, UR6, URZ, 0x3c, !UPT",
        "ULOP3.LUT UR7, UR7, UR6, URZ, 0x3c, !UPT",
    ],
    "on the stack": ["MOV R3, 0x40000040", "STL [R1+0x4], R3", "MOV R3, R9", "LDL R8, [R1+0x4]", "R2UR UR7, R8"],
    "zero in vector registers": ["CS2R R12, SRZ", "IADD3.X R12, R13, 0x40000040, RZ, P0, !PT", "R2UR UR7, R12"],
}
WRONG = {
    "never set": [],
    "no swizzle": ["UMOV UR7, URZ"],
    "added to something else": ["ULEA UR7, UR3, UR2, 0x5", "UIADD3.X UR7, UR7, -0x3ffffff0, URZ, UP1, !UPT"],
    "overwritten": ["UMOV UR7, 0x40000040", "ULDC.64 UR6, c[0x0][0x210]"],
    "perhaps overwritten": ["UMOV UR7, 0x40000040", "@P0 R2UR UR7, R3"],
}


@pytest.mark.parametrize("how", RIGHT)
def test_a_constant_is_found_wherever_it_went(how):
    assert not wrong_descriptors(code(*A, *RIGHT[how], PRODUCT, "EXIT"))


@pytest.mark.parametrize("how", WRONG)
def test_what_is_no_descriptor_is_wrong(how):
    found = wrong_descriptors(code(*A, *WRONG[how], PRODUCT, "EXIT"))
    assert [x.opcode for x in found] == ["HGMMA.64x64x16.F32.BF16"]


def test_the_descriptor_of_a_counts_where_a_is_in_shared_memory():
    b = "UMOV UR7, 0x40000040"
    assert wrong_descriptors(code(b, PRODUCT, "EXIT"))
    assert not wrong_descriptors(code(b, IN_REGISTERS, "EXIT"))


def test_around_a_loop():
    """What was right in the first round need not be in the second; branches are followed to where they go."""
    b = "UMOV UR7, 0x40000040"
    right = code(b, IN_REGISTERS, "FADD R4, R4, R5", "@P0 BRA 0x10", "EXIT")
    wrong = code(b, IN_REGISTERS, "UIADD3 UR7, UR7, 0x1, URZ", "@P0 BRA 0x10", "EXIT")
    skipped = code(b, "BRA 0x30", "UMOV UR7, URZ", IN_REGISTERS, "EXIT")
    assert not wrong_descriptors(right)
    assert len(wrong_descriptors(wrong)) == 1
    assert not wrong_descriptors(skipped)
