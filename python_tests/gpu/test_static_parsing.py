"""Machine code listings are read right: excerpts of real ones, with known contents."""

import pytest

pytest.importorskip("triton")

from python_tests.gpu.static import amdgcn, sass
from python_tests.gpu.static.classify import access_bytes, count_kinds, kind
from python_tests.gpu.static.instruction import Control, Instruction

# Of `cuobjdump -sass`, sm_80 and sm_100, with shorter addresses.
SASS = """
        Function : product_kernel
        /*0000*/                   LDG.E.64 R4, [R6.64] ;                   /* 0x0000000806047981 */
                                                                            /* 0x000ea2000c1e1b00 */
        /*0010*/                   LDSM.16.MT88.4 R72, [R121+0x4000] ;      /* 0x004000007948783b */
                                                                            /* 0x000fe20000004200 */
        /*0020*/              @!P4 LDGSTS.E.LTC128B [0x6000], [R6.64], P0 ; /* 0x0600000006ffcfae */
                                                                            /* 0x0003e80008121956 */
        /*0030*/                   LDGSTS.E.BYPASS.LTC128B.128 [R133], [R12.64], P0 ; /* 0x000000000c857fae */
                                                                            /* 0x0003e80008101c4e */
        /*0040*/                   HMMA.16816.F32.BF16 R4, R68.reuse, R2, R4 ; /* 0x000000024404723c */
                                                                            /* 0x042fe20000041804 */
        /*0050*/                   BRA.U !UP0, 0x20 ;                       /* 0x0000001100008147 */
                                                                            /* 0x000fea000b800000 */
        /*0060*/               @P0 BRA 0x10 ;                               /* 0xfffff50000000947 */
                                                                            /* 0x000fea000383ffff */
        /*0070*/              @!P5 EXIT ;                                   /* 0x000000000000d94d */
                                                                            /* 0x000fea0003800000 */
        /*0080*/                   EXIT ;                                   /* 0x000000000000794d */
                                                                            /* 0x000fea0003800000 */
        /*0090*/                   BRA 0x90;                                /* 0xfffffff000007947 */
                                                                            /* 0x000fc0000383ffff */
"""

AMDGCN = """
product_kernel:                         ; @product_kernel
; %bb.0:
\ts_load_dwordx2 s[2:3], s[0:1], 0x0
\ts_cbranch_scc1 .LBB0_2
.LBB0_1:                                ; =>This Inner Loop Header: Depth=1
\tglobal_load_dwordx4 v[66:69], v[82:83], off
\tv_mfma_f32_32x32x8_bf16 v[16:31], v[94:95], v[90:91], v[16:31]
\tds_write2st64_b64 v58, v[66:67], v[70:71] offset1:8
\ts_cbranch_scc1 .LBB0_1
; %bb.2:
\ts_branch .LBB0_2
.LBB0_2:
\tbuffer_store_short v1, v2, s[4:7], 0 offen
\ts_endpgm
.Lfunc_end0:
\t.size\tproduct_kernel, .Lfunc_end0-product_kernel
amdhsa.kernels:
  - .agpr_count:     0
    .private_segment_fixed_size: 24
    .sgpr_spill_count: 2
    .vgpr_count:     120
    .vgpr_spill_count: 5
"""


def test_sass_instructions():
    found = sass.parse(SASS)
    assert [one.address for one in found] == list(range(0, 0xA0, 0x10))
    assert found[4].mnemonic == "HMMA.16816.F32.BF16"
    assert found[4].operands == "R4, R68.reuse, R2, R4"


def test_sass_control_flow():
    found = {one.address: (one.target, one.falls_through) for one in sass.parse(SASS)}
    assert found[0x40] == (None, True)
    assert found[0x50] == (0x20, True)
    assert found[0x60] == (0x10, True)
    assert found[0x70] == (None, True)
    assert found[0x80] == (None, False)
    assert found[0x90] == (0x90, False)


def test_sass_control_bits():
    """The copy's upper half begins 0x0003e8: bits 105 up are 0100 (stall), 1, 111 (write), 001 (read), 000000."""
    load = sass.parse(SASS)[0].control
    assert load == Control(stall=1, write_barrier=2, read_barrier=7, wait_mask=0)
    copy = sass.parse(SASS)[3].control
    assert copy == Control(stall=4, write_barrier=7, read_barrier=1, wait_mask=0)
    product = sass.parse(SASS)[4].control
    assert product == Control(stall=1, write_barrier=7, read_barrier=7, wait_mask=0b000010)


def test_sass_resources():
    listing = " Function product_kernel:\n  REG:158 STACK:16 SHARED:0 LOCAL:0 CONSTANT[0]:448 TEXTURE:0"
    assert sass.parse_resources(listing) == (158, 16)


@pytest.mark.parametrize("read", [sass.parse, sass.parse_resources, amdgcn.parse, amdgcn.parse_resources])
def test_what_is_no_listing_is_an_error(read):
    with pytest.raises(ValueError, match="expected"):
        read("")


def test_sass_kinds():
    assert count_kinds(sass.parse(SASS), "cuda") == {
        "global load": 1,
        "shared load": 1,
        "async copy": 2,
        "tensor core": 1,
        "branch": 5,
    }


def test_amd_instructions():
    found = amdgcn.parse(AMDGCN)
    assert [one.mnemonic for one in found] == [
        "s_load_dwordx2",
        "s_cbranch_scc1",
        "global_load_dwordx4",
        "v_mfma_f32_32x32x8_bf16",
        "ds_write2st64_b64",
        "s_cbranch_scc1",
        "s_branch",
        "buffer_store_short",
        "s_endpgm",
    ]
    assert [one.target for one in found] == [None, 7, None, None, None, 2, 7, None, None]
    assert [one.falls_through for one in found] == [True] * 6 + [False, True, False]


def test_amd_kinds():
    kinds = [kind(one, "hip") for one in amdgcn.parse(AMDGCN)]
    assert kinds == [
        "scalar load",
        "branch",
        "global load",
        "tensor core",
        "shared store",
        "branch",
        "branch",
        "global store",
        "branch",
    ]


def test_amd_resources():
    assert amdgcn.parse_resources(AMDGCN) == (120, 24, 7, 2)


@pytest.mark.parametrize(
    ("mnemonic", "wanted"),
    [
        ("LDG.E", 4),
        ("LDG.E.64", 8),
        ("LDG.E.128", 16),
        ("LDG.E.U16", 2),
        ("LDGSTS.E.LTC128B", 4),  # the 128 is of the cache's prefetch
        ("LDGSTS.E.BYPASS.LTC128B.128", 16),
        ("global_load_dword", 4),
        ("global_load_dwordx4", 16),
        ("buffer_load_ushort", 2),
        ("buffer_load_ubyte", 1),
    ],
)
def test_access_bytes(mnemonic, wanted):
    assert access_bytes(Instruction(0, mnemonic)) == wanted


@pytest.mark.parametrize(
    ("mnemonic", "wanted"),
    [
        ("LDL.64", "spill"),
        ("LDS.128", "shared load"),
        ("LDGDEPBAR", "wait"),
        ("LDGSTS.E", "async copy"),
        ("HGMMA.64x64x16.F32.BF16", "tensor core"),
        ("UTCHMMA", "tensor core"),
        ("HMUL2.BF16_V2", "float"),
        ("FMUL", "float"),
    ],
)
def test_names_that_begin_alike_are_told_apart(mnemonic, wanted):
    assert kind(Instruction(0, mnemonic), "cuda") == wanted
