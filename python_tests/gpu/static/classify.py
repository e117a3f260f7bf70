"""What kind of work an instruction does, and how many bytes a lane of it moves."""

import re
from collections import Counter
from collections.abc import Iterable

from python_tests.gpu.static.instruction import Instruction

# NVIDIA: patterns of the mnemonic up to its first dot. AMD: patterns of the start of the mnemonic. First match wins.
_NVIDIA = {
    "tensor core": r"[HIDQO]MMA|[HIQ]GMMA|UTC[HIQO]MMA",
    "float": r"[FH]FMA2?|DFMA|[FHD]ADD2?|[FHD]MUL2?|MUFU",
    "async copy": r"LDGSTS|UBLKCP|UTMALDG",
    "global load": r"LDG|LD",
    "global store": r"STG|ST|UTMASTG",
    "atomic": r"ATOMG?|REDG?|UTMAREDG",
    "shared load": r"LDS|LDSM",
    "shared store": r"STS|STSM",
    "spill": r"LDL|STL",
    "barrier": r"BAR|SYNCS",
    "wait": r"DEPBAR|WARPGROUP|LDGDEPBAR|MEMBAR|FENCE",
    "shuffle": r"SHFL|REDUX",
    "branch": r"BRA|BRX|EXIT|CALL|RET|BSSY|BSYNC",
    "integer": r"U?(IMAD|IADD3?|IADD2|LEA|SHF|LOP3|ISETP|SEL|IMNMX|VIMNMX|PRMT|IABS|SGXT|I2I|VIADD|PLOP3)|R2UR|USHF",
    "move": r"U?(MOV|CS2R)|S2R|S2UR|UMOV|CS2R|ULDC|LDC|LDCU|R2P|P2R|NOP",
}
_AMD = {
    "tensor core": r"v_(s?mfmac?|s?wmmac?)_",
    "float": r"v_(pk_|dual_)?(fmac?|mul|add|sub|max|min)(k|a[mk]k)?_(bf|f)(16|32|64)|v_exp_|v_rcp_",
    "async copy": r"(global|buffer)_load_lds",
    "global load": r"(global|buffer|flat)_load",
    "global store": r"(global|buffer|flat)_store",
    "atomic": r"(global|buffer|flat)_atomic",
    "shuffle": r"ds_bpermute|ds_permute|ds_swizzle|v_permlane|v_\w+_dpp",
    "shared load": r"ds_(read|load)",
    "shared store": r"ds_(write|store)",
    "spill": r"scratch_(load|store)",
    "barrier": r"s_barrier",
    "wait": r"s_waitcnt|s_nop|s_sleep",
    "branch": r"s_branch|s_cbranch|s_endpgm",
    "scalar load": r"s_load|s_buffer_load",
    "integer": r"v_(add|sub|mul|mad|lshl|lshr|ashr|and|or|xor|cmp|cndmask)|s_(add|sub|mul|lshl|lshr|ashr|and|or|cmp)",
    "move": r"[vs]_mov|v_accvgpr|v_perm",
}
_VENDORS = {
    "cuda": [(kind, re.compile(rf"({pattern})(\.|$)")) for kind, pattern in _NVIDIA.items()],
    "hip": [(kind, re.compile(pattern)) for kind, pattern in _AMD.items()],
}
_WIDTHS = {"256": 32, "128": 16, "64": 8, "U16": 2, "S16": 2, "U8": 1, "S8": 1}


def kind(instruction: Instruction, backend: str) -> str:
    """One of the names above, or "other". ``backend``: "cuda" or "hip", Triton's names."""
    for name, pattern in _VENDORS[backend]:
        if pattern.match(instruction.mnemonic):
            return name
    return "other"


def count_kinds(instructions: Iterable[Instruction], backend: str) -> Counter:
    return Counter(kind(one, backend) for one in instructions)


def access_bytes(instruction: Instruction) -> int:
    """Bytes that each lane moves. NVIDIA writes the width as a suffix, 4 bytes where there is none."""
    if instruction.mnemonic[0].islower():
        found = re.search(r"dword(?:x(\d))?", instruction.mnemonic)
        if found:
            return 4 * int(found[1] or 1)
        return 1 if "byte" in instruction.mnemonic else 2
    for suffix in instruction.mnemonic.split(".")[1:]:
        if suffix in _WIDTHS:
            return _WIDTHS[suffix]
    return 4
