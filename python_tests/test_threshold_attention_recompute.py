"""Training where most keys are kept: a bit for each key in place of the support, and scores computed again."""

import pytest
import torch

from compsparse_kernels import threshold_attention
from compsparse_kernels.ops.threshold_attention import autograd, reference
from compsparse_kernels.testing import DTYPES, attention_inputs
from python_tests.attention import NO_KERNELS, check_within_budget, loss_of, op_arguments
from python_tests.attention_training import KEEP, leaves_of, many_kept, train, way_of

OPS = torch.ops.compsparse
pytestmark = pytest.mark.skipif(NO_KERNELS is not None, reason=str(NO_KERNELS))
every_dtype = pytest.mark.parametrize("dtype", DTYPES)


def check(tensors, bias=None, **options):
    """Within the budget that the stored support has to keep, and some keys are dropped."""
    results = dict(zip(("out", "dq", "dk", "dv"), train(tensors, bias, **options), strict=True))
    exact = check_within_budget(results, tensors, bias, **options)
    kept = exact.to_mask()
    assert 0.2 < kept.sum() / exact.visible.expand(kept.shape[:3]).sum() < 1
    return exact


@every_dtype
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(("rule", "threshold"), [("relative", 1e-3), ("absolute", -1.0)])
def test_matches_reference(dtype, causal, rule, threshold):
    tensors = many_kept(2, 3, 150, 150, 20, dtype=dtype)
    check(tensors, rule=rule, threshold=threshold, is_causal=causal)


@every_dtype
@pytest.mark.parametrize("keys", [128, 150, 191, 192, 193, 400])
@pytest.mark.parametrize("queries", [48, 49, 97, 200])
def test_lengths(queries, keys, dtype):
    check(many_kept(1, 2, queries, keys, 24, dtype=dtype), **KEEP)


@every_dtype
@pytest.mark.parametrize("width", [1, 3, 8, 20, 67, 96, 256])
def test_widths(width, dtype):
    check(many_kept(1, 2, 60, 210, width, width + 3, dtype=dtype), **KEEP)
    check(many_kept(1, 2, 60, 210, 16, width, dtype=dtype), **KEEP)


@every_dtype
@pytest.mark.parametrize("window", [30, (70, 0), (-1, 5), (20, -1)])
def test_windows(window, dtype):
    check(many_kept(1, 2, 210, 230, 16, dtype=dtype), window=window, query_offset=20, **KEEP)
    check(many_kept(1, 2, 210, 230, 16, dtype=dtype), window=window, is_causal=True, query_offset=3, **KEEP)


@every_dtype
@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 2), (6, 1)])
def test_grouped_queries(heads, kv_heads, dtype):
    tensors = many_kept(2, heads, 70, 200, 16, 12, kv_heads, dtype=dtype)
    check(tensors, enable_gqa=True, is_causal=True, query_offset=130, **KEEP)


@every_dtype
@pytest.mark.parametrize("shape", [(2, 4, 70, 200), (1, 4, 70, 200), (4, 1, 200), (70, 1), (200,)])
def test_biases(shape, dtype):
    generator = torch.Generator().manual_seed(1)
    tensors = many_kept(2, 4, 70, 200, 16, dtype=dtype)
    check(tensors, torch.randn(shape, generator=generator).to(dtype), **KEEP)
    check(tensors, torch.rand(shape, generator=generator) > 0.2, **KEEP)


def test_bias_of_negative_infinity_hides_keys():
    hidden = torch.rand(70, 200, generator=torch.Generator().manual_seed(1)) > 0.7
    tensors = many_kept(1, 2, 70, 200, 16)
    added = train(tensors, torch.zeros(70, 200).masked_fill(hidden, -torch.inf), **KEEP)
    assert all(torch.equal(a, b) for a, b in zip(added, train(tensors, ~hidden, **KEEP), strict=True))


@every_dtype
def test_alibi(dtype):
    slopes = torch.tensor([0.0, 0.02, 0.01, -0.01])
    tensors = many_kept(1, 4, 150, 200, 16, dtype=dtype)
    check(tensors, alibi_slopes=slopes, query_offset=50, is_causal=True, **KEEP)
    check(tensors, torch.randn(4, 1, 200).to(dtype), alibi_slopes=slopes, **KEEP)


@every_dtype
def test_padding(dtype):
    """A batch of padding alone has rows without a key, whose gradients are 0."""
    lengths = torch.tensor([150, 200, 0])
    tensors = many_kept(3, 2, 70, 200, 16, dtype=dtype)
    padding = torch.arange(200) >= lengths[:, None]
    check(tensors, key_padding_mask=padding, **KEEP)
    for grad in train(tensors, key_padding_mask=padding, **KEEP):
        assert grad[1].any() and not grad[2].any()


@every_dtype
@pytest.mark.parametrize("causal", [False, True])
def test_sequences(causal, dtype):
    tensors = many_kept(1, 4, 230, 260, 16, 16, 2, dtype=dtype)
    bounds = {"cu_seqlens_q": torch.tensor([0, 60, 60, 61, 230]), "cu_seqlens_k": torch.tensor([0, 70, 79, 79, 260])}
    options = KEEP | {"enable_gqa": True, "is_causal": causal, "query_offset": 4}
    check(tensors, **bounds, **options)
    check(tensors, window=(50, 20), **bounds, **options)


def test_alibi_of_sequences():
    """Distances count from the beginning of each, as they do where it is alone."""
    tensors = many_kept(1, 2, 300, 300, 16)
    bounds = torch.tensor([0, 140, 300])
    options = KEEP | {"alibi_slopes": torch.tensor([0.01, 0.03])}
    together = train(tensors, cu_seqlens_q=bounds, cu_seqlens_k=bounds, **options)
    for first, end in ((0, 140), (140, 300)):
        leaves = leaves_of(tensor[:, :, first:end] for tensor in tensors)
        out = threshold_attention(*leaves, **options)
        assert way_of(out) == "Recomputed"
        alone = out, *torch.autograd.grad(out, leaves, loss_of(together[0])[:, :, first:end])
        for ours, expected in zip(together, alone, strict=True):
            torch.testing.assert_close(ours[:, :, first:end], expected)


@every_dtype
@pytest.mark.parametrize("shape", [(4,), (4, 1, 1), (2, 1, 70, 1)])
def test_thresholds(shape, dtype):
    draws = torch.rand(shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    tensors = many_kept(2, 4, 70, 200, 16, dtype=dtype)
    check(tensors, threshold=10 ** (-1 - 3 * draws), is_causal=True, query_offset=130)
    check(tensors, threshold=draws - 2, rule="absolute")


def test_thresholds_that_want_a_gradient_get_zeros():
    """threshold_attention refuses them: the support is constant in them almost everywhere."""
    tensors = leaves_of(many_kept(1, 2, 60, 150, 16))
    thresholds = torch.full((1, 2, 1), 1e-3, dtype=torch.float64, requires_grad=True)
    (out,) = autograd.attend(op_arguments(*tensors, thresholds=thresholds, scale=0.25), False)
    assert way_of(out) == "Recomputed"
    *grads, none = torch.autograd.grad(out.square().sum(), (*tensors, thresholds))
    assert all(grad.any() for grad in grads) and torch.equal(none, torch.zeros_like(thresholds))


@every_dtype
def test_not_contiguous(dtype):
    packed = torch.randn(2, 200, 3, 4, 16, generator=torch.Generator().manual_seed(0), dtype=dtype)
    views = [packed[:, :, which].transpose(1, 2) for which in range(3)]
    expected = train([view.contiguous() for view in views], **KEEP)
    for given_views in (views, [view.mT.contiguous().mT for view in views]):
        assert all(torch.equal(a, b) for a, b in zip(train(given_views, **KEEP), expected, strict=True))


def test_gradients_of_any_layout():
    tensors = leaves_of(many_kept(2, 2, 60, 150, 16))
    out = threshold_attention(*tensors, **KEEP)
    assert way_of(out) == "Recomputed"
    for grad in (torch.ones(()).expand_as(out), loss_of(out).mT.contiguous().mT, loss_of(out)[:1].expand_as(out)):
        ours = torch.autograd.grad(out, tensors, grad, retain_graph=True)
        plain = torch.autograd.grad(out, tensors, grad.contiguous(), retain_graph=True)
        assert all(torch.equal(a, b) for a, b in zip(ours, plain, strict=True))


@pytest.mark.parametrize("leading", [(), (3,), (2, 2, 3)])
def test_leading_dimensions(leading):
    leaves = [torch.randn(*leading, n, 8).requires_grad_() for n in (60, 150, 150)]
    flat = leaves_of(leaf.reshape(-1, 1, leaf.shape[-2], 8) for leaf in leaves)
    results = []
    for inputs in (leaves, flat):
        out = threshold_attention(*inputs, **KEEP)
        results.append((out, *torch.autograd.grad(out.square().sum(), inputs)))
    assert way_of(threshold_attention(*flat, **KEEP)) == "Recomputed"
    assert all(torch.equal(a.reshape(b.shape), b) for a, b in zip(*results, strict=True))


def test_gradcheck():
    tensors = leaves_of(many_kept(1, 2, 48, 128, 2, 3, 1, dtype=torch.float64))

    def attend(*inputs):
        return threshold_attention(*inputs, threshold=1e-3, enable_gqa=True, is_causal=True, query_offset=80)

    assert way_of(attend(*tensors)) == "Recomputed"
    assert torch.autograd.gradcheck(attend, tensors, fast_mode=True)


@every_dtype
@pytest.mark.parametrize("way", ["own", "reference"])
@pytest.mark.parametrize(
    "options",
    [
        {"is_causal": True},
        {"rule": "absolute", "threshold": -0.5},
        {"threshold": 0.3},
        {"key_padding_mask": torch.arange(137)[None] > torch.tensor([[120], [-1]])},
        {"window_left": 30, "window_right": 3},
        {"attn_bias": torch.arange(137).view(1, 1, 1, -1) % 3 != 1},
    ],
    ids=["causal", "absolute", "few", "padding", "window", "mask"],
)
def test_bits_are_the_support(options, way, dtype):
    arguments = op_arguments(*many_kept(2, 4, 61, 137, 16, kv_heads=2, dtype=dtype), **({"threshold": 1e-3} | options))
    op = OPS.threshold_attention_bits if way == "own" else reference.threshold_attention_bits
    out, kept, top, inverse = op(*arguments)
    exact_out, row_ptr, col_idx, weights, log_sum, _ = OPS.threshold_attention_support(*arguments)
    assert kept.dtype == torch.int64 and kept.shape == (2, 4, 61, 3)
    bits = (kept.unsqueeze(-1) >> torch.arange(64) & 1).flatten(3)
    expected = torch.zeros(2 * 4 * 61, 192, dtype=torch.int64)
    rows = torch.arange(len(row_ptr) - 1).repeat_interleave(row_ptr.diff())
    expected[rows, col_idx.long()] = 1
    assert torch.equal(bits.flatten(0, 2), expected) and 0 < len(rows) < expected.numel()
    torch.testing.assert_close(out, exact_out)
    largest = weights.new_zeros(len(expected)).scatter_reduce(0, rows, weights, "amax").view(top.shape)
    some = log_sum > -torch.inf
    torch.testing.assert_close(inverse, largest)  # exp(0) times it is the largest weight
    torch.testing.assert_close(top[some], (log_sum + largest.log())[some])
    assert not top[~some].any() and not inverse[~some].any()


def test_gradients_of_the_bits_are_those_of_the_reference():
    arguments = op_arguments(*many_kept(2, 4, 61, 137, 16, 9, 2), threshold=1e-3, is_causal=True, window_left=100)
    out, *kept = OPS.threshold_attention_bits(*arguments)
    backward = loss_of(out), out, *kept, *arguments
    ours = OPS.threshold_attention_bits_backward(*backward)
    for mine, expected in zip(ours, reference.threshold_attention_bits_backward(*backward), strict=True):
        torch.testing.assert_close(mine, expected)


@every_dtype
@pytest.mark.parametrize("odd", [torch.inf, -torch.inf, torch.nan])
def test_gradients_that_are_not_finite(odd, dtype):
    """They show where the stored support shows them: in dV of the keys that the row keeps, in its dQ, in their dK."""
    tensors = many_kept(1, 4, 60, 210, 16, 13, 2, dtype=dtype)
    options = {"threshold": 0.02, "enable_gqa": True}
    results, kept = [], None
    for way in ("Recomputed", "Threshold"):
        leaves = leaves_of(tensors)
        out = threshold_attention(*leaves, return_support=way == "Threshold", **options)
        if way == "Threshold":
            out, support = out
            kept = support.to_mask()
        assert way_of(out) == way
        grad = loss_of(out)
        grad[0, 1, 50, 3] = odd
        results.append(torch.autograd.grad(out, leaves, grad))
    row = kept[0, 1, 50]
    assert row.any() and not row.all()
    for ours, stored in zip(*results, strict=True):
        torch.testing.assert_close(ours, stored, equal_nan=True)
    query_grad, key_grad, value_grad = results[0]
    touched = torch.zeros(1, 2, 210, 13, dtype=torch.bool)
    touched[0, 0, row, 3] = True
    assert torch.equal(~value_grad.isfinite(), touched)
    assert torch.equal(~key_grad.isfinite().all(-1)[0, 0], row) and key_grad[0, 1].isfinite().all()
    assert not query_grad[0, 1, 50].isfinite().any() and query_grad.isfinite().sum() == query_grad.numel() - 16


@every_dtype
@pytest.mark.parametrize("odd", ["nan", "inf", "overflow"])
def test_undefined_scores_show_where_the_stored_support_shows_them(odd, dtype):
    """Finite inputs may have them: by their bias, or where a product is too large."""
    tensors, bias = many_kept(1, 2, 60, 210, 16, dtype=dtype), torch.zeros(60, 210, dtype=dtype)
    if odd == "overflow":
        tensors[0][0, 1, 50], tensors[1][0, 1, 7] = torch.finfo(dtype).max / 4, 2.0
    else:
        bias[50, 7] = float(odd)
    ours = train(tensors, bias, **KEEP)
    stored = train(tensors, bias, way="Threshold", return_support=True, **KEEP)
    assert not ours[0][0, 1, 50].isfinite().any()
    for mine, expected in zip(ours, stored, strict=True):
        torch.testing.assert_close(mine, expected, equal_nan=True)
    assert 0 < ours[3].isfinite().sum() < ours[3].numel()


@every_dtype
@pytest.mark.parametrize(
    "sizes", [(2, 4, 150, 700, 32, 24, 2), (1, 1, 200, 1700, 32, 24, 1), (1, 3, 100, 3100, 8, 8, 1)]
)
def test_bitwise_equal_for_any_number_of_threads(sizes, dtype):
    """Of one key-value head the keys are cut into ranges."""
    tensors = many_kept(*sizes, dtype=dtype)
    before = torch.get_num_threads()
    try:
        results = []
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(train(tensors, enable_gqa=True, **KEEP))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@every_dtype
def test_ranges_of_keys(dtype):
    """One key-value head, many keys: gradients of the queries are summed over ranges."""
    check(many_kept(1, 2, 60, 1700, 8, 8, 1, dtype=dtype), enable_gqa=True, **KEEP)
    check(many_kept(1, 1, 1800, 1800, 8, dtype=dtype), is_causal=True, **KEEP)


def test_every_output_is_written():
    """Deterministic mode fills fresh memory with NaN."""
    tensors = many_kept(1, 2, 60, 1700, 20, 8, 1)
    options = KEEP | {"key_padding_mask": torch.arange(1700)[None] < 300, "enable_gqa": True}
    plain = train(tensors, **options)
    torch.use_deterministic_algorithms(True)
    try:
        filled = train(tensors, **options)
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(torch.equal(a, b) for a, b in zip(plain, filled, strict=True))


def test_equal_keys_have_equal_gradients():
    """At places of different blocks, whose scores are computed again."""
    query, key, value = many_kept(1, 2, 60, 100, 20)
    copies = [torch.cat([tensor, tensor, tensor[:, :, :37]], 2) for tensor in (key, value)]
    _, _, *grads = train([query, *copies], **KEEP)
    for grad in grads:
        torch.testing.assert_close(grad[:, :, :100], grad[:, :, 100:200])
        torch.testing.assert_close(grad[:, :, :37], grad[:, :, 200:])


@pytest.mark.parametrize("position", range(3))
def test_second_derivative_is_refused(position):
    tensors = leaves_of(many_kept(1, 2, 60, 150, 16))
    out = threshold_attention(*tensors, **KEEP)
    assert way_of(out) == "Recomputed"
    grad = torch.autograd.grad(out.sum(), tensors[0], create_graph=True)[0]
    with pytest.raises(RuntimeError, match="once differentiable; backend='reference' can be"):
        torch.autograd.grad(grad.sum(), tensors[position], allow_unused=True)


def test_partial_gradients():
    tensors = many_kept(1, 2, 60, 150, 16)
    everything = train(tensors, **KEEP)[1:]
    for wanted, expected in enumerate(everything):
        inputs = [tensor.detach().requires_grad_(n == wanted) for n, tensor in enumerate(tensors)]
        out = threshold_attention(*inputs, **KEEP)
        assert way_of(out) == "Recomputed"
        assert torch.equal(torch.autograd.grad(out, inputs[wanted], loss_of(out))[0], expected)


def saved_bytes(tensors, **options):
    """What autograd holds beside the inputs."""
    leaves, saved = leaves_of(tensors), {}

    def pack(tensor):
        saved[tensor.data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        result = threshold_attention(*leaves, **options)
    assert result is not None
    return sum(count for place, count in saved.items() if place not in {leaf.data_ptr() for leaf in leaves})


def test_a_bit_is_kept_for_each_key():
    tensors = many_kept(1, 2, 200, 640, 16)
    pairs, rows = 2 * 200 * 640, 2 * 200
    bits = saved_bytes(tensors, **KEEP)
    assert bits == pairs // 8 + rows * (16 + 2) * 4  # and the output, and two numbers for each row
    stored = saved_bytes(tensors, return_support=True, **KEEP)
    assert stored > 0.3 * pairs * 8


EXAMPLES = {
    "plain": {"is_causal": True},
    "transposed": {"attn_bias": torch.randn(1, 4, 1, 137), "rule": "absolute", "threshold": -1.0},
    "masks": {"attn_bias": torch.rand(1, 1, 61, 137) > 0.2, "key_padding_mask": torch.rand(2, 137) > 0.8},
    "thresholds": {"thresholds": torch.rand(1, 4, 1).double() * 1e-2, "alibi_slopes": torch.rand(4) * 0.01},
    "empty": {},
    "keyless": {},
}


@pytest.mark.parametrize("example", EXAMPLES)
def test_opcheck(example):
    sizes = {"empty": (2, 4, 0, 0, 8), "keyless": (2, 4, 5, 0, 8)}.get(example, (2, 4, 61, 137, 8))
    tensors = many_kept(*sizes, 6, 2)
    if example == "transposed":
        tensors = [tensor.transpose(1, 2).contiguous().transpose(1, 2) for tensor in tensors]
    arguments = op_arguments(*tensors, **({"threshold": 1e-3} | EXAMPLES[example]))
    of_numbers = ("test_schema", "test_autograd_registration", "test_faketensor")  # a trace has none: False
    torch.library.opcheck(OPS.threshold_attention_is_dense.default, arguments, test_utils=of_numbers)
    torch.library.opcheck(OPS.threshold_attention_bits.default, arguments)
    out, *kept = OPS.threshold_attention_bits(*arguments)
    backward = torch.randn_like(out), out, *kept, *arguments
    torch.library.opcheck(OPS.threshold_attention_bits_backward.default, backward)


def test_reference_calls_nothing_dense():
    arguments = op_arguments(*many_kept(1, 2, 60, 150, 16), threshold=1e-3, scale=0.25)
    assert OPS.threshold_attention_is_dense(*arguments) is True
    assert reference.threshold_attention_is_dense(*arguments) is False


def test_output_may_change_in_place():
    query, key, value = (tensor.requires_grad_() for tensor in attention_inputs(1, 2, 100, 200, 16))
    out = threshold_attention(query, key, value, threshold=0.001)
    assert out.grad_fn.name() == "RecomputedAttentionBackward"
    expected = torch.autograd.grad(out.sum(), (query, key, value), retain_graph=True)
    out += 1
    for actual, wanted in zip(torch.autograd.grad(out.sum(), (query, key, value)), expected, strict=True):
        assert torch.equal(actual, wanted)


def test_halves_are_refused():
    query, key, value = (tensor.bfloat16() for tensor in attention_inputs(1, 2, 100, 200, 16))
    with pytest.raises(RuntimeError, match="query: expected float32 or float64"):
        OPS.threshold_attention_bits(*op_arguments(query, key, value))


def test_masks_may_change_in_place():
    """As where the support is stored: whether a call may be followed by a change must not depend on its numbers."""
    query, key, value = (tensor.requires_grad_() for tensor in attention_inputs(1, 2, 100, 200, 16))
    padding, slopes = torch.rand(1, 200) < 0.2, torch.tensor([0.01, 0.02])
    mask = torch.rand(100, 200) < 0.9
    options = {"key_padding_mask": padding, "alibi_slopes": slopes, "attn_bias": mask}
    out = threshold_attention(query, key, value, threshold=0.001, **options)
    assert out.grad_fn.name() == "RecomputedAttentionBackward"
    expected = torch.autograd.grad(out.sum(), (query, key, value), retain_graph=True)
    padding.fill_(True), slopes.zero_(), mask.fill_(False)
    for actual, wanted in zip(torch.autograd.grad(out.sum(), (query, key, value)), expected, strict=True):
        assert torch.equal(actual, wanted)
