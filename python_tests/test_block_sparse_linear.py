"""block_sparse_linear and sampled_block_matmul: values and gradients against the float64 reference."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from compsparse_kernels import BlockLayout, block_sparse_linear, sampled_block_matmul
from compsparse_kernels.ops import cpu_isa
from compsparse_kernels.testing import (
    DTYPES,
    HALVES,
    ISAS,
    MEMORY_FORMS,
    THREADS,
    assert_within_budget,
    num_threads,
    random_tensor,
    run_in_subprocess,
)
from python_tests.block_sparse import (
    ACTIVATIONS,
    assert_all_within_budget,
    assert_linear_right,
    assert_sampled_right,
    dense_linear,
    make_inputs,
    make_layout,
    ours_linear,
    output_and_gradients,
)

ALL_DTYPES = DTYPES + HALVES


# ---- shapes


SQUARE = [(b, b) for b in (1, 2, 3, 4, 7, 8, 16, 24, 32, 48, 64, 127, 128)]
RECTANGULAR = [(8, 32), (32, 8), (16, 4), (1, 128), (128, 1), (12, 20), (64, 48)]


@pytest.mark.parametrize("dtype", ALL_DTYPES, ids=str)
@pytest.mark.parametrize("block_shape", SQUARE + RECTANGULAR, ids=str)
@pytest.mark.parametrize("ragged", [False, True], ids=["whole", "ragged"])
def test_blocks(block_shape, ragged, dtype):
    block_out, block_in = block_shape
    cut = (block_out // 3, block_in // 2) if ragged else (0, 0)
    layout = make_layout(4 * block_out - cut[0], 3 * block_in - cut[1], block_shape, density=0.6)
    inputs = make_inputs(layout, batch=13, dtype=dtype)
    assert_linear_right(layout, inputs)
    x, values, _, grad = inputs
    assert_sampled_right(layout, grad, x, values)


# Blocks that fill no whole vectors, where the batch is the vector axis: tiles of 1 to 3 vectors of batch rows, whole or
# not, in every instruction set; two panels of the batch in the sampled product.
NARROW = [(1, 1), (2, 3), (4, 4), (5, 7), (8, 8), (8, 3), (12, 20), (24, 4), (3, 40), (100, 9)]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("block_shape", NARROW, ids=str)
@pytest.mark.parametrize("batch", [9, 16, 33, 79, 530])
@pytest.mark.parametrize("transposed", [False, True])
def test_blocks_narrower_than_vectors(block_shape, batch, transposed, dtype):
    block_out, block_in = block_shape
    layout = make_layout(5 * block_out - block_out // 3, 4 * block_in - block_in // 2, block_shape, density=0.6)
    layout = layout.T if transposed else layout
    inputs = make_inputs(layout, batch, dtype)
    assert_linear_right(layout, inputs, "relu")
    x, values, _, grad = inputs
    assert_sampled_right(layout, grad, x, values)


@pytest.mark.parametrize("dtype", ALL_DTYPES, ids=str)
@pytest.mark.parametrize("shared", [False, True])
def test_sampled_blocks_of_a_long_batch_are_summed_in_shares(shared, dtype):
    layout = make_layout(61, 90, (16, 16), density=0.6)
    slot = torch.arange(layout.nnz_blocks) % (5 if shared else layout.nnz_blocks)
    layout = BlockLayout.from_entries(*layout.coordinates(), (16, 16), 61, 90, slot=slot)
    x, values, _, grad = make_inputs(layout, 790, dtype)
    assert_sampled_right(layout, grad, x, values)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("block_shape", [(4, 4), (7, 16), (12, 8), (16, 16)], ids=str)
def test_blocks_keep_nan_and_infinity_in_their_rows(block_shape, activation):
    layout = make_layout(61, 90, block_shape)
    x, values, bias, _ = make_inputs(layout, batch=53)
    clean = block_sparse_linear(x, values, layout, bias, activation)
    x[7], x[20], x[52] = float("nan"), float("inf"), float("-inf")
    dirty = block_sparse_linear(x, values, layout, bias, activation)
    others = [n for n in range(53) if n not in (7, 20, 52)]
    assert torch.equal(clean[others], dirty[others])
    read = (layout.unpack(torch.ones_like(values)) != 0).any(1)
    assert torch.equal(dirty[7].isnan(), read) and not dirty[[20, 52]][:, read].isfinite().all()


@pytest.mark.parametrize("dtype", ALL_DTYPES, ids=str)
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("batch", [0, 1, 2, 7, 8, 37])
def test_activations_and_batches(batch, activation, dtype):
    layout = make_layout(61, 90, (16, 8))
    if batch:
        return assert_linear_right(layout, make_inputs(layout, batch, dtype), activation)
    x, values, bias, grad = make_inputs(layout, batch, dtype)
    y, grad_x, *others = output_and_gradients(ours_linear(layout, activation), (x, values, bias), grad, dtype)
    assert y.shape == (0, 61) and grad_x.shape == (0, 90)
    assert all(torch.equal(g, torch.zeros_like(t)) for g, t in zip(others, (values, bias), strict=True))


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("activation", ["none", "relu", "gelu", "silu"])
@pytest.mark.parametrize("with_bias", [False, True])
def test_scalars_reach_the_kernel(with_bias, activation, transposed):
    """Boxing does not check: each flag, number and name, straight through the registered op, against the reference."""
    from compsparse_kernels.ops.block_sparse_linear import reference

    layout = make_layout(20, 24, (8, 4))
    layout = layout.T if transposed else layout
    x, values, bias, grad = make_inputs(layout)
    arguments = (x, values, bias if with_bias else None, *layout.by_output, layout.out_features, transposed, activation)
    ours = torch.ops.compsparse.block_sparse_linear(*arguments)
    torch.testing.assert_close(ours, reference.block_sparse_linear(*arguments))
    if not transposed:
        arguments = (grad, x, *layout.by_output, layout.num_slots, False, *layout.block_shape)
        ours = torch.ops.compsparse.sampled_block_matmul(*arguments)
        torch.testing.assert_close(ours, reference.sampled_block_matmul(*arguments))


@pytest.mark.parametrize("lead", [(), (3,), (2, 3), (1, 2, 1, 3), (0, 3)], ids=str)
def test_leading_dimensions(lead):
    layout = make_layout(24, 32, (8, 8))
    _, values, bias, _ = make_inputs(layout)
    x = random_tensor(*lead, 32, requires_grad=True)
    y = block_sparse_linear(x, values, layout, bias)
    expected = F.linear(x, layout.unpack(values), bias)
    assert y.shape == expected.shape
    torch.testing.assert_close(y, expected)
    torch.testing.assert_close(torch.autograd.grad(y.sum(), x), torch.autograd.grad(expected.sum(), x))


# Without "expanded": there, all terms of a gradient are equal, and adding them in pairs, as dense torch may, is exact.
@given(
    grid=st.tuples(st.integers(1, 5), st.integers(1, 5)),
    block_shape=st.tuples(st.integers(1, 40), st.integers(1, 40)),
    cut=st.tuples(st.integers(0, 39), st.integers(0, 39)),
    batch=st.integers(1, 20),
    density=st.sampled_from([0.0, 0.1, 0.5, 1.0]),
    dtype=st.sampled_from(ALL_DTYPES),
    activation=st.sampled_from(list(ACTIVATIONS)),
    transposed=st.booleans(),
    memory=st.sampled_from([form for form in MEMORY_FORMS if form != "expanded"]),
    seed=st.integers(0, 2**20),
)
def test_any_shape(grid, block_shape, cut, batch, density, dtype, activation, transposed, memory, seed):
    features = [n * b - c % b for n, b, c in zip(grid, block_shape, cut, strict=True)]
    layout = make_layout(*features, block_shape, density, seed)
    layout = layout.T if transposed else layout
    x, values, bias, grad = make_inputs(layout, batch, dtype, seed, memory)
    assert_linear_right(layout, (x, values, bias, grad), activation)
    assert_sampled_right(layout, grad, x, values)


# ---- memory


@pytest.mark.parametrize("dtype", ALL_DTYPES, ids=str)
@pytest.mark.parametrize("memory", MEMORY_FORMS)
def test_memory_of_inputs_and_gradients(memory, dtype):
    layout = make_layout(40, 48, (8, 16))
    inputs = make_inputs(layout, batch=6, dtype=dtype, memory=memory)
    assert inputs[0].is_contiguous() == (memory == "contiguous")
    assert_linear_right(layout, inputs, "relu")
    x, values, _, grad = inputs
    assert_sampled_right(layout, grad, x, values)


def test_expanded_gradient_of_a_sum():
    layout = make_layout(40, 48, (8, 16))
    x, values, bias, grad = make_inputs(layout)
    assert_linear_right(layout, (x, values, bias, torch.ones(()).expand_as(grad)))


def test_inputs_stay_as_they_are():
    layout = make_layout(40, 48, (8, 16))
    inputs = make_inputs(layout)
    copies = [tensor.clone() for tensor in inputs]
    output_and_gradients(ours_linear(layout, "relu"), inputs[:3], inputs[3], torch.float32)
    assert all(torch.equal(tensor, before) for tensor, before in zip(inputs, copies, strict=True))


def untouched_zeros(*shape):
    """Zeros that take address space only, until they are written: numpy's come from calloc."""
    try:
        return torch.from_numpy(np.zeros(shape, dtype=np.float32))
    except MemoryError:
        pytest.skip("no room for 8 GB of address space")


@pytest.mark.skipif(not ISAS, reason="the dense reference would need the memory: no compiled kernels here")
def test_inputs_past_2_to_the_31_elements():
    block_columns = 2**23 + 1
    x = untouched_zeros(2, 128 * block_columns)
    x[1, -1] = 3
    ptr, idx, slot = torch.tensor([0, 1]), torch.tensor([block_columns - 1]).int(), torch.zeros(1, dtype=torch.int32)
    y = torch.ops.compsparse.block_sparse_linear(x, torch.ones(1, 8, 128), None, ptr, idx, slot, 8, False, "none")
    assert y.tolist() == [[0] * 8, [3] * 8]

    ptr, idx = torch.zeros(block_columns + 1, dtype=torch.int64), torch.zeros(1, dtype=torch.int32)
    ptr[-1] = 1
    values = torch.ops.compsparse.sampled_block_matmul(x, torch.ones(2, 8), ptr, idx, slot, 1, False, 128, 8)
    assert torch.equal(values[0, -1], torch.full((8,), 3.0)) and values.sum() == 24


@pytest.mark.skipif(not ISAS, reason="the dense reference would need the memory: no compiled kernels here")
@pytest.mark.parametrize("transposed", [False, True])
def test_values_past_2_to_the_31_elements(transposed):
    values = untouched_zeros(2**17 + 1, 128, 128)
    values[-1, -1, -1] = 3
    order = torch.tensor([0, 1]), torch.zeros(1, dtype=torch.int32), torch.tensor([2**17]).int()
    y = torch.ops.compsparse.block_sparse_linear(torch.ones(1, 128), values, None, *order, 128, transposed, "none")
    assert y[0, -1] == 3 and y.sum() == 3


# ---- patterns


@pytest.mark.parametrize("dtype", ALL_DTYPES, ids=str)
def test_empty_rows_and_columns_of_blocks(dtype):
    mask = torch.zeros(4, 5, dtype=torch.bool)
    mask[1, 2] = mask[1, 4] = mask[3, 2] = True
    layout = BlockLayout.from_mask(mask, (8, 8), in_features=37)
    inputs = make_inputs(layout, dtype=dtype)
    for activation in ACTIVATIONS:
        assert_linear_right(layout, inputs, activation)
    x, values, bias, _ = inputs
    assert torch.equal(block_sparse_linear(x, values, layout, bias)[:, :8], bias[:8].expand(5, 8))


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_no_blocks_at_all(activation):
    layout = BlockLayout.from_mask(torch.zeros(3, 2, dtype=torch.bool), (8, 4))
    x, values, bias, grad = make_inputs(layout)
    assert values.shape == (0, 8, 4)
    y, grad_x, grad_values, _ = output_and_gradients(ours_linear(layout, activation), (x, values, bias), grad, x.dtype)
    torch.testing.assert_close(y, ACTIVATIONS[activation](bias).expand(5, 24))
    assert torch.equal(grad_x, torch.zeros_like(x)) and grad_values.shape == values.shape


PERMUTED = [3, 1, 0, 2]  # as many slots as entries, in another order


@pytest.mark.parametrize("dtype", ALL_DTYPES, ids=str)
@pytest.mark.parametrize("slot", [[0, 0, 0, 0], [1, 0, 1, 0], [2, 0, 1, 2], PERMUTED], ids=str)
@pytest.mark.parametrize("transposed", [False, True])
def test_slots(slot, transposed, dtype):
    """Shared value blocks, and blocks stored in another order than their entries."""
    rows, columns = torch.tensor([0, 1, 2, 2]), torch.tensor([1, 0, 0, 2])
    layout = BlockLayout.from_entries(rows, columns, (8, 4), 24, 12, slot=torch.tensor(slot))
    layout = layout.T if transposed else layout
    inputs = make_inputs(layout, dtype=dtype)
    assert_linear_right(layout, inputs)
    x, values, _, grad = inputs
    assert_sampled_right(layout, grad, x, values)


@pytest.mark.parametrize("batch", [5, 40])
def test_values_outside_the_ragged_weight_have_no_part(batch):
    layout = BlockLayout.from_mask(torch.ones(2, 2, dtype=torch.bool), (8, 8), in_features=11, out_features=13)
    x, values, bias, grad = make_inputs(layout, batch)
    inside = layout.pack(torch.ones(13, 11)) == 1
    clean = output_and_gradients(ours_linear(layout), (x, values, bias), grad, x.dtype)
    values = values.where(inside, float("nan"))
    dirty = output_and_gradients(ours_linear(layout), (x, values, bias), grad, x.dtype)
    assert all(torch.equal(a, b) for a, b in zip(clean, dirty, strict=True))
    assert torch.equal(dirty[2][~inside], torch.zeros(int((~inside).sum())))


@pytest.mark.skipif(not ISAS, reason="the dense reference reads everything: no compiled kernels here")
@pytest.mark.parametrize("batch", [20, 40])
def test_what_no_block_reads_is_skipped(batch):
    """0 * NaN is NaN: what is not NaN was not multiplied. Dense torch fails this, so something is skipped here."""
    mask = torch.tensor([[True, False, True], [False, False, True], [False, False, False]])
    layout = BlockLayout.from_mask(mask, (8, 8))
    x, values, bias, grad = make_inputs(layout, batch)
    x[:, 8:16] = grad[:, 16:] = float("nan")
    y, grad_x, grad_values, _ = output_and_gradients(ours_linear(layout), (x, values, bias), grad, x.dtype)
    assert torch.isfinite(y).all() and torch.isfinite(grad_x).all() and torch.isfinite(grad_values).all()
    assert torch.equal(grad_x[:, 8:16], torch.zeros(batch, 8))
    assert dense_linear(layout)(x, values, bias).isnan().all()


# ---- convolutions are layouts with shared slots


def convolution_layout(size, kernel, channels, stride, padding, dilation):
    """Block row: an output position; block column: an input position; slot: a position in the kernel."""
    spans = [d * (k - 1) + 1 for d, k in zip(dilation, kernel, strict=True)]
    out = [(n + 2 * p - s) // t + 1 for n, p, s, t in zip(size, padding, spans, stride, strict=True)]
    at = torch.cartesian_prod(*(torch.arange(n) for n in (*out, *kernel))).view(-1, 2 * len(size))
    position, tap = at[:, : len(size)], at[:, len(size) :]
    source = position * torch.tensor(stride) + tap * torch.tensor(dilation) - torch.tensor(padding)
    inside = ((source >= 0) & (source < torch.tensor(size))).all(1)

    def flat(index, shape):
        number = torch.zeros(len(index), dtype=torch.long)
        for i, n in enumerate(shape):
            number = number * n + index[:, i]
        return number[inside]

    rows, columns, slot = flat(position, out), flat(source, size), flat(tap, kernel)
    features = (torch.Size(out).numel() * channels[1], torch.Size(size).numel() * channels[0])
    return BlockLayout.from_entries(rows, columns, channels[::-1], *features, slot=slot), out


@pytest.mark.parametrize("dtype", ALL_DTYPES, ids=str)
@pytest.mark.parametrize(
    "size, kernel, stride, padding, dilation",
    [
        ((11,), (3,), (1,), (0,), (1,)),
        ((12,), (4,), (2,), (2,), (1,)),
        ((15,), (3,), (1,), (2,), (2,)),
        ((7, 6), (3, 2), (1, 1), (0, 0), (1, 1)),
        ((8, 9), (3, 3), (2, 1), (1, 2), (1, 2)),
    ],
    ids=str,
)
def test_a_convolution_is_a_layout(size, kernel, stride, padding, dilation, dtype):
    channels, batch = (4, 6), 3
    layout, out = convolution_layout(size, kernel, channels, stride, padding, dilation)
    assert layout.shared
    convolution = F.conv1d if len(size) == 1 else F.conv2d

    def ours(x, weight, bias):
        values = weight.flatten(2).permute(2, 0, 1)
        y = block_sparse_linear(x.flatten(2).mT.flatten(1), values, layout, bias.repeat(torch.Size(out).numel()))
        return y.view(batch, -1, channels[1]).mT.unflatten(2, out)

    def dense(x, weight, bias):
        return convolution(x, weight, bias, stride, padding, dilation)

    shapes = (
        (batch, channels[0], *size),
        (channels[1], channels[0], *kernel),
        (channels[1],),
        (batch, channels[1], *out),
    )
    *inputs, grad = (random_tensor(*shape, dtype=dtype, seed=i) for i, shape in enumerate(shapes))
    names = ("output", "gradient of x", "gradient of the kernel", "gradient of bias")
    assert_all_within_budget(ours, dense, dense, inputs, grad, names)


# ---- threads and instruction sets


@pytest.mark.parametrize("dtype", ALL_DTYPES, ids=str)
@pytest.mark.parametrize(
    "out_features, in_features, block_shape, batch",
    [
        (250, 256, (16, 16), 61),
        (32, 512, (32, 32), 130),
        (200, 130, (7, 12), 50),
        (512, 512, (64, 64), 3),
        (190, 256, (8, 8), 173),
        (90, 130, (4, 4), 530),
        (100, 130, (16, 32), 600),
    ],
    ids=str,
)
def test_bitwise_equal_for_any_number_of_threads(out_features, in_features, block_shape, batch, dtype):
    layout = make_layout(out_features, in_features, block_shape, density=0.7)
    shared = BlockLayout.from_entries(
        *layout.coordinates(), block_shape, out_features, in_features, slot=torch.arange(layout.nnz_blocks) % 5
    )
    for pattern in (layout, shared):
        *inputs, grad = make_inputs(pattern, batch, dtype)
        for activation in ACTIVATIONS:
            ours, results = ours_linear(pattern, activation), []
            for threads in THREADS:
                with num_threads(threads):
                    with torch.no_grad():
                        results.append([ours(*inputs)])  # fused, whatever the activation
                    results[-1] += output_and_gradients(ours, inputs, grad, dtype)
            for other in results[1:]:
                assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("transposed", [False, True])
def test_a_long_row_bitwise_equal_for_any_number_of_threads(transposed, dtype):
    """Nearly all blocks in one row: the sampled product shares out its entries."""
    mask = torch.zeros(4, 47, dtype=torch.bool)
    mask[2] = mask[0, 5] = True
    layout = BlockLayout.from_mask(mask, (16, 20), in_features=930)
    a, b = random_tensor(70, 64, dtype=dtype, seed=1), random_tensor(70, 930, dtype=dtype, seed=2)
    if transposed:
        a, b, layout = b, a, layout.T
    results = []
    for threads in THREADS:
        with num_threads(threads):
            results.append(sampled_block_matmul(a, b, layout))
    x, y = a.double(), b.double()
    exact, magnitude = layout.pack(x.mT @ y), layout.pack(x.abs().mT @ y.abs())
    assert_within_budget(results[0], layout.pack(a.float().mT @ b.float()), exact, "blocks", magnitude)
    assert all(torch.equal(results[0], other) for other in results[1:])


@pytest.mark.parametrize("isa", [isa for isa in ISAS if isa != cpu_isa()])
def test_every_instruction_set(isa):
    """The tests that depend on it, in a process whose kernels are capped to a narrower instruction set."""
    tests = "blocks or activations or memory or slots or ragged or any_shape or threads or half"
    files = [__file__, __file__.replace(".py", "_half.py")]
    code = f"""
import sys
import pytest
from compsparse_kernels.ops import cpu_isa
assert cpu_isa() == {isa!r}
sys.exit(pytest.main(["-q", "-p", "no:cacheprovider", "-k", {tests!r}, *{files!r}]))
"""
    run_in_subprocess(code, isa=isa)


@pytest.mark.parametrize("isa", ISAS)
def test_what_reaches_past_the_edge_is_zero_even_beside_nan(isa):
    """The ragged part of a sampled block is 0; the kernels get there by zeros, which NaN would turn into NaN."""
    code = """
import torch
from compsparse_kernels import BlockLayout, sampled_block_matmul
for o, i, batch in ((32, 64, 37), (32, 64, 700), (8, 4, 37), (5, 12, 37)):
    rows, columns = 3 * o - o // 2, 3 * i - i // 4
    layout = BlockLayout.from_mask(torch.ones(3, 3, dtype=torch.bool), (o, i), out_features=rows, in_features=columns)
    a, b = torch.randn(batch, rows), torch.randn(batch, columns)
    a[:, -1] = b[:, -1] = float("nan")
    expected = torch.zeros(3 * o, 3 * i, dtype=torch.bool)
    expected[rows - 1, :columns] = expected[:rows, columns - 1] = True
    blocks = expected.view(3, o, 3, i).transpose(1, 2).reshape(9, o, i)
    values = sampled_block_matmul(a, b, layout)
    print(torch.equal(values.isnan(), blocks) and not values[-1, -1, -1])
"""
    assert run_in_subprocess(code, isa=isa).split() == ["True"] * 4
