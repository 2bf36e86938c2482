"""sass.py finds registers that are written while a tensor core may still read them, and counts what is in a loop."""

from __future__ import annotations

import pytest
from sass import Code, Instruction

# The loop of a prefill's gate_up as Triton 3.6 and 3.9 compile it for sm_90, without what does not matter here.
LOOP = """
.L_x_0:
        /*1710*/                   LDS.U8 R100, [R16+UR9+0xc008] ;
        /*1720*/                   HMUL2.BF16_V2 R88, R90, R107.reuse.H0_H0 ;
        /*17b0*/                   WARPGROUP.ARRIVE ;
        /*1810*/                   HGMMA.64x128x16.F32.BF16 R24, R100, gdesc[UR16], R24, gsb0 ;
        /*1cd0*/                   WARPGROUP.DEPBAR.LE gsb0, {first} ;
        /*1cf0*/                   HGMMA.64x128x16.F32.BF16 R24, R88, gdesc[UR16], R24, gsb0 ;
        /*1e60*/                   WARPGROUP.DEPBAR.LE gsb0, {second} ;
        /*1f60*/                   LDGSTS.E [R117+0xc000], desc[UR12][R104.64+0x40], P5 ;
        /*1f70*/                   LDG.E.U16 R7, desc[UR12][R102.64] ;
        /*21f0*/              @!P6 BRA `(.L_x_0) ;
        /*2220*/                   WARPGROUP.DEPBAR.LE gsb0, 0x0 ;
        /*2230*/                   MOV R88, RZ ;
        /*2240*/                   EXIT ;
"""


@pytest.mark.parametrize(
    ("first", "second", "late"),
    [
        ("0x3", "0x3", ["LDS.U8 R100", "HMUL2.BF16_V2 R88"]),  # the next turn overwrites both operands
        ("0x1", "0x1", ["HMUL2.BF16_V2 R88"]),  # the first product is waited for, the second is not
        ("0x0", "0x0", []),
        ("0x1", "0x0", []),
    ],
)
def test_an_operand_written_too_early(first, second, late):
    found = Code.parse(LOOP.format(first=first, second=second)).late_writes()
    assert [line.split(",")[0] for line in found] == late


def test_groups_end_with_the_instruction_that_names_the_barrier():
    """A product without gsb0 belongs to the group of the next one, as Triton 3.9 has it."""
    listing = LOOP.format(first="0x1", second="0x0").replace("R100, gdesc[UR16], R24, gsb0", "R100, gdesc[UR16], R24")
    assert not Code.parse(listing).late_writes()
    listing = listing.replace("DEPBAR.LE gsb0, 0x0 ;\n        /*1f60*/", "DEPBAR.LE gsb0, 0x1 ;\n        /*1f60*/")
    assert [line.split(",")[0] for line in Code.parse(listing).late_writes()] == ["LDS.U8 R100", "HMUL2.BF16_V2 R88"]


def test_a_loop_and_what_is_in_it():
    code = Code.parse(LOOP.format(first="0x0", second="0x0"))
    assert code.loops == ((0, 9),) and len(code.instructions) == 13
    assert code.count("LDG.") == 1 and code.count("HGMMA") == 2 and code.count("MOV") == 0


@pytest.mark.parametrize(
    ("opcode", "operands", "registers"),
    [
        ("LDS.128", ("R88", "[R2+0x10]"), [88, 89, 90, 91]),
        ("LDG.E.64", ("R4", "desc[UR4][R2.64]"), [4, 5]),
        ("IMAD.WIDE.U32", ("R114", "R11", "0x10", "R100"), [114, 115]),
        ("LDSM.16.M88.4", ("R8", "[R3]"), [8, 9, 10, 11]),
        ("SHFL.UP", ("PT", "R7", "R6", "0x1", "RZ"), [7]),
        ("LOP3.LUT", ("P0", "RZ", "R3", "0x1", "RZ", "0xc0", "!PT"), []),
        ("ISETP.GE.AND", ("P0", "PT", "R3", "R4", "PT"), []),
        ("STG.E.128", ("desc[UR4][R2.64]", "R8"), []),
        ("R2UR", ("UR4", "R3"), []),
    ],
)
def test_registers_that_an_instruction_writes(opcode, operands, registers):
    assert list(Instruction(opcode, operands).written()) == registers


def test_what_is_left_running_at_the_end_of_a_loop():
    assert Code.parse(LOOP.format(first="0x0", second="0x1")).in_flight == 1
    assert Code.parse(LOOP.format(first="0x1", second="0x0")).in_flight == 0


def test_accesses_before_the_inputs_are_there():
    """ACQBULK is griddepcontrol.wait; a load before it may read what an earlier kernel has yet to write."""
    listing = """
        /*0010*/                   S2R R0, SR_TID.X ;
        /*0020*/                   LDG.E R2, desc[UR4][R2.64] ;
        /*0030*/                   ACQBULK ;
        /*0040*/                   LDGSTS.E [R17], desc[UR8][R12.64] ;
        /*0050*/                   EXIT ;
    """
    assert Code.parse(listing).before_inputs() == ["LDG.E"]
    assert Code.parse(listing.replace("LDG.E R2,", "MOV R2,")).before_inputs() == []
    assert Code.parse(listing.replace("ACQBULK", "NOP")).before_inputs() is None
