"""The kernels of thresholded attention, as the ladder compiles and runs them: kernel, dtype, width, configuration."""

from dataclasses import dataclass
from functools import cache

import torch
import triton

from compsparse_kernels.ops.threshold_attention import triton as kernels
from compsparse_kernels.ops.threshold_attention.triton import KEYS
from compsparse_kernels.ops.triton_launch import MOST_REGISTERS, Launch
from python_tests.attention import op_arguments
from python_tests.gpu.aot import TARGETS, Compiled, compile_launch, float32_precision
from python_tests.gpu.cases import DTYPES, shared_memory_of
from python_tests.gpu.covering import covering
from python_tests.gpu.static.analyse import TILE_BYTES

TOKENS, HEADS, KV_HEADS = 1024, 4, 2
FORWARD, BACKWARD = ("screen", "decide", "attend"), ("rows", "keys")
WIDTHS = (16, 64, 100, 128, 256)
DEFAULT = (
    ("screen", "bf16", 64),
    ("decide", "tf32", 64),
    ("attend", "fp16", 128),
    ("rows", "bf16", 64),
    ("keys", "fp32", 64),
)
PLAIN = {"rule": "relative", "threshold": 0.1}


@dataclass(frozen=True)
class AttentionCase:
    """A kernel on heads whose width is also that of the values."""

    kernel: str
    dtype: str
    width: int
    num_warps: int
    num_stages: int
    target: str
    least_occupancy = 0.0
    emulated = False  # at L4: what a kernel reads depends on what survives

    @property
    def op(self) -> str:
        return "threshold_attention" if self.kernel in FORWARD else "threshold_attention_backward"

    @property
    def name(self) -> str:
        config = f"w{self.num_warps}s{self.num_stages}"
        return f"attention-{self.kernel}-{self.dtype}-{self.width}-{config}-{self.target}"

    @property
    def config(self) -> triton.Config:
        return triton.Config({}, num_warps=self.num_warps, num_stages=self.num_stages, maxnreg=MOST_REGISTERS)

    @property
    def tensor_cores(self) -> bool:
        """The backward gathers rows, each for one entry: a product with nothing to share."""
        return self.kernel in FORWARD and self.dtype != "fp32"

    @property
    def inner_loop(self) -> bool:
        return True

    @property
    def async_copies(self) -> bool:
        """Not of exact float32 products, whose operands pass through registers anyhow; of rows whose length is no
        multiple of 16, which the compiler can't align; of tiles of less than 16 bytes a lane; and of tf32 operands of
        the product with V, which lie across the summed dimension, as wgmma and tcgen05 don't take them."""
        turned = self.kernel == "attend" and self.dtype == "tf32" and self.target in ("sm_90", "sm_100")
        copied = KEYS * self.width * DTYPES[self.dtype].itemsize >= TILE_BYTES * 32 * self.num_warps
        return self.tensor_cores and self.width % 16 == 0 and copied and not turned

    @property
    def tile_loads(self) -> int:
        """For sm_100 the compiler reads the queries again in each step of the screen and of decide."""
        if self.target != "sm_100" or self.kernel not in ("screen", "decide"):
            return 0
        queries = self.launch().arguments["BLOCK_M"] * self.width * DTYPES[self.dtype].itemsize
        return queries // (TILE_BYTES * 32 * self.num_warps)

    @property
    def index_loads(self) -> int:
        """The number of a tile, and the norms of 8 keys that a thread has, two at a time. For attend instead of these
        whether a value is not finite, and a mask for each row that a warp has where it stores the support."""
        if self.kernel == "attend":
            return 2 + self.launch().arguments["BLOCK_M"] // self.num_warps
        return 5

    @property
    def spilled_scalars(self) -> int:
        """On gfx942 what the loops don't need (strides, bounds) is parked in lanes of a vector register; the backward
        fits."""
        return 48 if self.target == "gfx942" and self.kernel in FORWARD else 0

    def launch(self) -> Launch:
        """The numbers in its tensors are whatever lies in memory: it is to be compiled only."""
        return launch_of(self.kernel, self.dtype, self.width)

    def compiled(self) -> Compiled:
        return compile_launch(self.launch(), self.config, self.target)


def shipped(long: bool = False) -> list[AttentionCase]:
    """Every configuration that a target's autotuner would try, of kernels, dtypes and widths that cover all pairs and
    hold the defaults; or a few, first choices only."""
    if not long:
        return [_cases(*kernel, target)[0] for kernel in DEFAULT for target in TARGETS]
    chosen = covering(FORWARD + BACKWARD, DTYPES, WIDTHS, TARGETS)
    chosen += [one for kernel in DEFAULT for target in TARGETS if (one := (*kernel, target)) not in chosen]
    return [case for one in chosen for case in _cases(*one)]


@cache
def launch_of(kernel: str, dtype: str, width: int, tokens: int = TOKENS, **options) -> Launch:
    """A launch to be compiled. ``options`` are hashable ones of ``op_arguments``, or true for a tensor to be drawn."""
    with float32_precision("ieee" if dtype == "fp32" else "tf32"):
        return _launches(DTYPES[dtype], width, tokens, options)[kernel]


def _launches(dtype: torch.dtype, width: int, tokens: int, options: dict) -> dict[str, Launch]:
    query, grad = (torch.empty(1, HEADS, tokens, width, dtype=dtype) for _ in range(2))
    key, value = (torch.empty(1, KV_HEADS, tokens, width, dtype=dtype) for _ in range(2))
    drawn = {
        "attn_bias": lambda: torch.empty(1, HEADS, tokens, tokens, dtype=dtype),
        "key_padding_mask": lambda: torch.zeros(1, tokens, dtype=torch.bool),
        "alibi_slopes": lambda: torch.empty(HEADS),
    }
    chosen = PLAIN | {name: drawn[name]() if name in drawn else value for name, value in options.items()}
    arguments = op_arguments(query, key, value, **chosen)
    given = kernels.scoring(*arguments[:9], *arguments[10:18])
    screen = kernels.screen_launch(given)
    screen.arguments["tile_count"].zero_()
    found = {name: screen.arguments[name] for name in ("tiles", "tile_count", "top_column", "top")}
    rows = torch.empty(query.shape[:3])
    decide = kernels.decide_launch(given, found, rows, rows.clone())
    row_ptr = torch.zeros(rows.numel() + 1, dtype=torch.int64)
    support = {"row_ptr": row_ptr, "col_idx": torch.zeros(64, dtype=torch.int32), "weights": torch.empty(64)}
    row_ptr[-1] = 64
    dropout = arguments[18:]
    attend = kernels.attend_launch(given, decide.arguments, value, grad, tuple(support.values()), *dropout)
    narrow = kernels.gathering(query, key, value, arguments[17], *dropout)
    scores, choice = torch.empty(64), arguments[11:13]
    by_rows = kernels.rows_launch(narrow, grad, key, value, support, rows, *choice, scores, rows.clone(), query)
    by_keys = kernels.keys_launch(narrow, grad, query, key, support, scores, key, value)
    return dict(zip(FORWARD + BACKWARD, (screen, decide, attend, by_rows, by_keys), strict=True))


def _cases(kernel: str, dtype: str, width: int, target: str) -> list[AttentionCase]:
    launch = launch_of(kernel, dtype, width)
    configs = kernels.suitable(launch.kernel.configs, launch.arguments, shared_memory_of(target))
    return [AttentionCase(kernel, dtype, width, one.num_warps, one.num_stages, target) for one in configs]
