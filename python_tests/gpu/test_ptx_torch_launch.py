"""Torch tensors in and out of emulated memory."""

from types import SimpleNamespace

import pytest
import torch

from python_tests.gpu.ptx import Profile, PTXFault
from python_tests.gpu.ptx.snippets import kernel
from python_tests.gpu.ptx.torch_launch import run_compiled

COPY = """mov.u32 %r0, %ctaid.x; mad.lo.s32 %r1, %r0, 32, %tid; cvt.u64.u32 %l0, %r1; cvt.u32.u64 %r2, %p2;
setp.lt.u32 %q0, %r1, %r2; mad.lo.s64 %l1, %l0, {size}, %p0; mad.lo.s64 %l2, %l0, {size}, %p1;
@%q0 ld.global.b{bits} {register}, [%l1]; @%q0 st.global.b{bits} [%l2], {register};"""


def compiled(*arguments, size: int, programs: int = 2, body: str = COPY):
    register = {2: "%h0", 4: "%r9", 8: "%l9"}[size]
    text = kernel(body.format(size=size, bits=8 * size, register=register), 3)
    asm = SimpleNamespace(asm={"ptx": text}, metadata=SimpleNamespace(shared=0))
    return SimpleNamespace(kernel=asm, arguments=arguments, programs=programs)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.int32, torch.int64])
def test_tensors_of_every_dtype_come_back(dtype):
    source = torch.arange(40).to(dtype)
    result = torch.full((5, 8), -1).to(dtype)
    counts = run_compiled(compiled(source, result, 35, size=source.element_size()))
    assert result.flatten()[:35].equal(source[:35])
    assert (result.flatten()[35:] == -1).all()
    assert sum(count for name, count in counts.items() if name.startswith("st.global")) == 2


def test_tensors_without_elements():
    empty = torch.zeros(0, 4)
    run_compiled(compiled(empty, empty, 0, size=4))
    with pytest.raises(PTXFault, match="argument 0"):
        run_compiled(compiled(empty, torch.zeros(4), 1, size=4))


def test_a_view_keeps_its_alignment_and_its_neighbours():
    storage = torch.arange(44.0)
    view = storage[2:38]
    assert view.data_ptr() % 16 == 8
    run_compiled(compiled(torch.full((36,), 7.0), view, 36, size=4))
    assert storage.tolist() == [0.0, 1.0] + [7.0] * 36 + [38.0, 39.0, 40.0, 41.0, 42.0, 43.0]
    wide = "@%q7 bra END; ld.global.v4.b32 {{%r4, %r5, %r6, %r7}}, [%p0]; END:"
    with pytest.raises(PTXFault) as caught:
        run_compiled(compiled(view, storage, 1, size=4, body=wide))
    assert caught.value.kind == "misaligned"


def test_read_only_arguments_and_profile():
    source, result, profile = torch.arange(32.0), torch.zeros(32), Profile()
    run_compiled(compiled(source, result, 32, size=4, programs=1), readonly={0}, profile=profile)
    assert profile.loads.sectors == profile.stores.sectors == 4
    with pytest.raises(PTXFault) as caught:
        run_compiled(compiled(source, result, 32, size=4), readonly={0, 1})
    assert caught.value.kind == "read-only"


def test_what_is_not_supported_is_refused():
    with pytest.raises(TypeError, match=r"torch\.complex64: wanted one of"):
        run_compiled(compiled(torch.zeros(4, dtype=torch.complex64), torch.zeros(4), 4, size=4))
    with pytest.raises(ValueError, match=r"strides \(2,\): wanted a contiguous one"):
        run_compiled(compiled(torch.zeros(8)[::2], torch.zeros(4), 4, size=4))
