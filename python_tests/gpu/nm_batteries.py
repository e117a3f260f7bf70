"""The problems that damaged kernels of N:M products are run on."""

from dataclasses import dataclass
from functools import partial

from compsparse_kernels.ops.masked_linear import triton as kernels
from python_tests.gpu.aot import compile_launch
from python_tests.gpu.battery import Battery
from python_tests.gpu.nm_problems import PRODUCT, SAMPLED, TRANSPOSED, problem
from python_tests.gpu.nm_products import Case
from python_tests.gpu.problems import SHARED_MEMORY

# Sizes end in all quarters of a tile, as each register has a comparison of its own with the end.
BATCHES = (37, 7, 14, 65, 23, 30, 58, 51)
RAGGED = ((41, 70), (20, 107), (75, 33), (5, 58), (39, 130), (13, 7), (66, 91), (52, 45))  # out, in


@dataclass(frozen=True)
class Kernel:
    op: int
    pattern: tuple[int, int]
    features: tuple[tuple[int, int], ...]
    tile: dict[str, object]
    more: int = 0  # rows of each batch: steps along it, before what is left over

    def problems(self) -> list:
        n, m = self.pattern
        cases = [
            Case(n, m, self.features[i % len(self.features)], self.more + batch, "float16", integers=True, seed=i)
            for i, batch in enumerate(BATCHES)
        ]
        return [problem(case, self.op, self.tile) for case in cases]


AT_ONCE = {"TILE_BATCH": 32, "TILE_OUT": 32, "GROUPS": 8, "EVEN": True}
BY_SLOT = {"TILE_BATCH": 32, "TILE_OUT": 32, "GROUPS": 8, "EVEN": False}
PADDED = BY_SLOT | {"GROUPS": 4}  # of groups that are 5 columns in 8
WHOLE = ((64, 96), (32, 32), (96, 64))
KERNELS = {
    "product at once": Kernel(PRODUCT, (2, 4), WHOLE, AT_ONCE),
    "product by slot": Kernel(PRODUCT, (3, 5), RAGGED, PADDED),
    "transposed at once": Kernel(TRANSPOSED, (2, 4), WHOLE, AT_ONCE),
    "transposed by slot": Kernel(TRANSPOSED, (2, 4), RAGGED, BY_SLOT),
    "sampled, whole tiles": Kernel(SAMPLED, (2, 4), WHOLE, AT_ONCE | {"EVEN_BATCH": False}, 96),
    "sampled, ragged": Kernel(SAMPLED, (3, 5), RAGGED, PADDED | {"EVEN_BATCH": False}),
}


def nm_battery(name: str, target: str) -> Battery:
    """In the configuration with most warps, so that there are barriers to damage."""
    problems = KERNELS[name].problems()
    launch = problems[0].launch
    suitable = kernels.suitable(launch.kernel.configs, launch.arguments, SHARED_MEMORY)
    compiled = compile_launch(launch, max(suitable, key=lambda config: config.num_warps), target)
    checks = [partial(p.check, compiled.serving(p.launch)) for p in problems]
    return Battery(f"nm {name} {target}", compiled.kernel.asm["ptx"], checks)
