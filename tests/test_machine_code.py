"""What the offline check reads from machine code."""

from __future__ import annotations

import pytest

pytest.importorskip("triton", reason="reads machine code with Triton's tools")

from machine_code import count_in_loops

# A loop over query blocks with a loop of matmuls in it, whose wait lies behind the end and jumps back into it.
NESTED = """
        /*0000*/                   STL [R1], R0 ;
.L_x_0:
        /*0010*/                   LDL R2, [R1] ;
.L_x_1:
        /*0020*/              @!P0 BRA `(.L_x_3) ;
.L_x_2:
        /*0030*/                   HGMMA.64x64x16.F32.BF16 R24, R120, gdesc[UR16], R24 ;{in_loop}
        /*0040*/               @P1 BRA `(.L_x_1) ;
        /*0050*/                   LDL R3, [R1] ;
        /*0060*/               @P2 BRA `(.L_x_0) ;
        /*0070*/                   EXIT ;
.L_x_3:
        /*0080*/                   SYNCS.PHASECHK.TRANS64.TRYWAIT P0, [UR4], R0 ;
        /*0090*/              @!P0 BRA `(.L_x_3) ;
        /*00a0*/                   BRA `(.L_x_2) ;
.L_x_4:
        /*00b0*/                   BRA `(.L_x_4);
"""


def test_local_memory_outside_the_loop_of_matmuls_does_not_count() -> None:
    assert count_in_loops(NESTED.format(in_loop="")) == 0


@pytest.mark.parametrize("instruction", ["LDL.LU R5, [R1+0x4]", "STL.64 [R1+0x4], R5", "@!P3 LDL R5, [R1]"])
def test_local_memory_in_the_loop_of_matmuls_counts(instruction: str) -> None:
    line = f"\n        /*0038*/                   {instruction} ;"
    assert count_in_loops(NESTED.format(in_loop=line)) == 1


def test_local_memory_in_the_wait_of_a_loop_of_matmuls_counts() -> None:
    text = NESTED.format(in_loop="").replace("/*00a0*/ ", "/*0098*/ LDL R4, [R1] ;\n        /*00a0*/ ")
    assert count_in_loops(text) == 1


def test_code_without_a_loop_of_matmuls_has_no_count() -> None:
    assert count_in_loops(NESTED.format(in_loop="").replace("HGMMA", "FFMA")) is None
