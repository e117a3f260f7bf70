"""Level L2 for the options of thresholded attention, and for widths that fill no tile."""

import pytest

pytest.importorskip("triton")

from compsparse_kernels.ops.threshold_attention import triton as kernels
from python_tests.gpu import ledger
from python_tests.gpu.aot import TARGETS, compile_launch
from python_tests.gpu.attention_cases import BACKWARD, FORWARD, WIDTHS, AttentionCase, launch_of
from python_tests.gpu.cases import DTYPES, shared_memory_of
from python_tests.gpu.covering import covering
from python_tests.gpu.static.analyse import analyse
from python_tests.gpu.static.gates import violations

OPTIONS = {
    "plain": {},
    "everything": {"attn_bias": True, "key_padding_mask": True, "alibi_slopes": True, "dropout_p": 0.1},
    "shrink": {"weighting": "shrink", "is_causal": True, "seed": 2**40},
    "rectified": {"rule": "absolute", "weighting": "rectified", "dropout_p": 0.1},
}
STRIDES = 16  # registers on gfx942: of a bias and what is added to it


def check(kernel, dtype, width, options, target, tokens=1000, most: int | None = None) -> None:
    """In each configuration that suits, or in the first ``most`` of them: no stack, no spills, tensor cores."""
    launch = launch_of(kernel, dtype, width, tokens, **OPTIONS[options])
    for config in kernels.suitable(launch.kernel.configs, launch.arguments, shared_memory_of(target))[:most]:
        case = AttentionCase(kernel, dtype, width, config.num_warps, config.num_stages, target)
        found = analyse(compile_launch(launch, config, target), target)
        told = f"{case.name} {options}"
        scalars = case.spilled_scalars + (STRIDES if case.spilled_scalars and options == "everything" else 0)
        wanted = {"tensor_cores": False, "async_copies": False, "spilled_scalars": scalars}
        assert violations(found, **wanted) == [], told
        assert not case.tensor_cores or found.total["tensor core"] > 0, told
        ledger.reached("L2", told)


@pytest.mark.parametrize(
    ("kernel", "dtype", "width", "options", "target"),
    [
        ("attend", "fp16", 100, "everything", "sm_80"),
        ("decide", "bf16", 64, "everything", "sm_90"),
    ],
)
def test_nothing_spills(kernel, dtype, width, options, target):
    check(kernel, dtype, width, options, target, most=1)


@pytest.mark.long
@pytest.mark.parametrize(("options", "width", "dtype", "target"), covering(OPTIONS, WIDTHS, DTYPES, TARGETS))
@pytest.mark.parametrize("kernel", FORWARD + BACKWARD)
def test_nothing_spills_anywhere(kernel, options, width, dtype, target):
    check(kernel, dtype, width, options, target)
