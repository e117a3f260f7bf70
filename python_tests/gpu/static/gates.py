"""What the machine code of a kernel that ships must and must not contain (level L2)."""

from python_tests.gpu.static.analyse import INDEX_BYTES, TILE_BYTES, Analysis

# Column and slot of an entry: what walking a sparse row needs. Twice, as loops may be unrolled by two.
INDEX_LOADS = 4


def violations(
    analysis: Analysis,
    *,
    tensor_cores: bool = True,
    async_copies: bool = True,
    index_loads: int | None = INDEX_LOADS,
    tile_loads: int = 0,
    least_occupancy: float = 0.0,
    inner_loop: bool = True,
    spilled_scalars: int = 0,
) -> list[str]:
    """One sentence for each gate that the kernel fails; none is good.

    Args:
        analysis: of the compiled kernel.
        tensor_cores: whether the inner loop must use them.
        async_copies: whether operand tiles must go from global to shared memory without a stop in registers. Asked of
            NVIDIA only: for gfx942 the compiler pipelines through registers.
        index_loads: how many narrow (4 or 8 bytes a lane) global loads the inner loop may contain, to find the next
            block; None: one for each copy of the loop, as where each row is found by its own index. Operand tiles are
            loaded 16 bytes a lane where aligned and 2 where not, or by many narrow loads.
        tile_loads: how many wider loads, of an operand tile into registers.
        least_occupancy: share of the warps a multiprocessor can hold.
        inner_loop: whether there must be one; the gates before it ask about it.
        spilled_scalars: how many scalar registers may be parked in lanes of vector registers (gfx942 alone has such);
            that touches no memory.
    """
    found = []
    if analysis.stack:
        found.append(f"stack: expected 0 bytes a thread, got {analysis.stack}")
    if analysis.spills > min(analysis.scalar_spills, spilled_scalars):
        found.append(f"spills: expected none, got {analysis.spills}")
    limit = analysis.occupancy.limited_by
    if analysis.occupancy.blocks == 0:
        found.append(f"blocks: expected at least one to fit on a multiprocessor, got none, limited by {limit}")
    if analysis.occupancy.share < least_occupancy:
        share = analysis.occupancy.share
        found.append(f"occupancy: expected at least {least_occupancy:.3f}, got {share:.3f}, limited by {limit}")
    if analysis.inner_loop is None:
        return [*found, "inner loop: expected one, got none"] if inner_loop else found
    if tensor_cores and not analysis.inner["tensor core"]:
        found.append("tensor cores: expected their instructions in the inner loop, got none")
    if async_copies and analysis.backend == "cuda":
        found += _copy_violations(analysis, index_loads, tile_loads)
    return found


def _copy_violations(analysis: Analysis, index_loads: int | None, tile_loads: int) -> list[str]:
    found = []
    if index_loads is None:
        index_loads = analysis.inner["async copy"]
    if not analysis.tile_copies:
        found.append(f"async copies: expected some of {TILE_BYTES} bytes a lane in the inner loop, got none")
    loads = analysis.inner["global load"]
    narrow = analysis.inner_accesses("global load", INDEX_BYTES)
    if loads - narrow > tile_loads:
        wanted = f"at most {tile_loads}" if tile_loads else "no"
        found.append(f"global loads: expected {wanted} operand tile loaded into registers, got {loads - narrow} loads")
    if narrow > index_loads:
        found.append(f"global loads: expected at most {index_loads} of indices in the inner loop, got {narrow}")
    return found
