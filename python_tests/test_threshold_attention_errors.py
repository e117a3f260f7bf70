"""Every error message of thresholded attention."""

import pytest
import torch

from compsparse_kernels import threshold_attention

Q, K, V = torch.zeros(2, 4, 5, 8), torch.zeros(2, 4, 6, 8), torch.zeros(2, 4, 6, 8)
T = {"threshold": 0.1}


@pytest.mark.parametrize(
    ("tensors", "options", "error", "message"),
    [
        (([], K, V), T, TypeError, "query: expected tensor [..., heads, tokens, width], got list"),
        (
            (Q[0, 0, 0], K, V),
            T,
            ValueError,
            "query: expected tensor [..., heads, tokens, width], got 1-D float32 tensor",
        ),
        ((Q, K[0], V), T, ValueError, "key: expected 4-D tensor, like query, got 3-D"),
        ((Q, K, None), T, TypeError, "value: expected 4-D tensor, like query, got NoneType"),
        ((Q, K.double(), V), T, TypeError, "key: expected float32, like query, got 4-D float64"),
        (
            (Q.int(), K.int(), V.int()),
            T,
            TypeError,
            "query: expected float32, float64, float16 or bfloat16, got 4-D int32",
        ),
        ((Q, K[:1], V), T, ValueError, "key: expected leading dimensions [2], like query"),
        ((Q, K[:, :2], V[:, :2]), T, ValueError, "key: expected 4 heads, like query (or enable_gqa=True), got 2"),
        ((Q, K[:, :3], V[:, :3]), T | {"enable_gqa": True}, ValueError, "key: expected a divisor of 4 heads, got 3"),
        ((Q, K[..., :7], V), T, ValueError, "key: expected width 8, like query"),
        ((Q[..., :0], K[..., :0], V), T, ValueError, "query: expected a width of at least 1"),
        ((Q, K, V[:, :, :5]), T, ValueError, "value: expected tensor [2, 4, 6, 'any width'], like key"),
        (
            (Q, K, V),
            {"threshold": 0.0},
            ValueError,
            "threshold: expected a number in (0, 1] (rule 'relative'), got 0.0",
        ),
        ((Q, K, V), {"threshold": 1.5}, ValueError, "threshold: expected a number in (0, 1]"),
        ((Q, K, V), {"threshold": "1"}, TypeError, "threshold: expected a number in (0, 1] (rule 'relative'), got str"),
        ((Q, K, V), {"threshold": float("nan"), "rule": "absolute"}, ValueError, "threshold: expected a finite number"),
        ((Q, K, V), T | {"scale": float("inf")}, ValueError, "scale: expected a finite number, got inf"),
        ((Q, K, V), T | {"scale": True}, TypeError, "scale: expected a number, got bool"),
        (
            (Q, K, V),
            T | {"attn_bias": torch.zeros(5, 5)},
            ValueError,
            "attn_bias: expected tensor broadcastable to [2, 4",
        ),
        ((Q, K, V), T | {"attn_bias": torch.zeros(6).double()}, TypeError, "attn_bias: expected float32, like query"),
        (
            (Q, K, V),
            T | {"attn_bias": 3},
            ValueError,
            "attn_bias: expected tensor broadcastable to [2, 4, 5, 6], got int",
        ),
        (
            (Q, K, V),
            T | {"key_padding_mask": torch.zeros(2, 6)},
            ValueError,
            "key_padding_mask: expected bool tensor [2, 6]",
        ),
        (
            (Q, K, V),
            T | {"key_padding_mask": torch.zeros(6, 2) > 0},
            ValueError,
            "key_padding_mask: expected bool tensor",
        ),
        (
            (Q, K, V),
            T | {"backend": "gpu"},
            ValueError,
            "backend: expected one of cpu, triton, cuda, reference or None, got 'gpu'",
        ),
    ],
)
def test_errors(tensors, options, error, message):
    with pytest.raises(error) as raised:
        threshold_attention(*tensors, **options)
    assert message in str(raised.value)


RULE = "rule: expected one of relative, absolute, topk, topp, entmax, got 'top'"
NO_CUT = "(rule 'topk' has no cut of its own to measure scores from)"
AT_ONE = "whose weights would all be 0 at 1), got 1.0"


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"rule": "top", "threshold": 1}, ValueError, RULE),
        ({"weights": "relu"}, ValueError, "weights: expected one of softmax, rectified, got 'relu'"),
        ({"shrink": 1}, TypeError, "shrink: expected a bool, got int"),
        ({"shrink": True, "weights": "rectified"}, ValueError, "shrink: expected False (weights='rectified' are 0 at"),
        (
            {"rule": "topk", "threshold": 2, "weights": "rectified"},
            ValueError,
            f"weights: expected 'softmax' {NO_CUT}, got 'rectified'",
        ),
        ({"rule": "topk", "threshold": 2, "shrink": True}, ValueError, f"shrink: expected False {NO_CUT}, got True"),
        ({"rule": "topp", "shrink": True}, ValueError, "shrink: expected False (rule 'topp' has no cut"),
        ({"rule": "topp", "weights": "rectified"}, ValueError, "weights: expected 'softmax' (rule 'topp' has no cut"),
        (
            {"rule": "entmax", "threshold": 2, "weights": "rectified"},
            ValueError,
            "weights: expected 'softmax' (rule 'entmax' has weights of its own), got 'rectified'",
        ),
        (
            {"rule": "entmax", "threshold": 2, "shrink": True},
            ValueError,
            "shrink: expected False (rule 'entmax' has weights of its own), got True",
        ),
        (
            {"threshold": 1.0, "shrink": True},
            ValueError,
            f"threshold: expected a number in (0, 1) (rule 'relative' with shrink=True, {AT_ONE}",
        ),
        (
            {"threshold": 1.0, "weights": "rectified"},
            ValueError,
            f"threshold: expected a number in (0, 1) (rule 'relative' with weights='rectified', {AT_ONE}",
        ),
        ({"rule": "topk", "threshold": 0}, ValueError, "threshold: expected an int of at least 1 (rule 'topk'), got 0"),
        ({"rule": "topk", "threshold": 2.0}, ValueError, "threshold: expected an int of at least 1 (rule 'topk'), got"),
        ({"rule": "topk", "threshold": True}, TypeError, "threshold: expected an int of at least 1 (rule 'topk'), got"),
        ({"rule": "topp", "threshold": 1.2}, ValueError, "threshold: expected a number in (0, 1] (rule 'topp'), got"),
        (
            {"rule": "entmax", "threshold": 1.7},
            ValueError,
            "threshold: expected 1.5 or 2 (rule 'entmax', where 2 is sparsemax), got 1.7",
        ),
        ({"window": 1.5}, TypeError, "window: expected an int of at least 0, or a pair of ints of"),
        ({"window": True}, TypeError, "window: expected an int of at least 0"),
        ({"window": (1, 2, 3)}, TypeError, "window: expected an int of at least 0, or a pair"),
        ({"window": -1}, ValueError, "window: expected an int of at least 0"),
        ({"window": (3, -2)}, ValueError, "window: expected an int of at least 0, or a pair of ints of at least -1"),
        ({"dropout_p": "0.1"}, TypeError, "dropout_p: expected a number in [0, 1), got str"),
        ({"dropout_p": 1.0}, ValueError, "dropout_p: expected a number in [0, 1), got 1.0"),
        ({"dropout_p": -0.1}, ValueError, "dropout_p: expected a number in [0, 1), got -0.1"),
        ({"dropout_p": 0.1, "seed": 0.5}, TypeError, "seed: expected an int or None, got float"),
        ({"dropout_p": 0.1, "seed": 2**63}, ValueError, "seed: expected an int of 64 bits, got 92"),
        ({"query_offset": 1.0}, TypeError, "query_offset: expected an int, got float"),
        ({"return_support": "coo"}, ValueError, "return_support: expected False, True, 'csr' or 'degree', got 'coo'"),
        ({"return_support": 1}, ValueError, "return_support: expected False, True, 'csr' or 'degree', got 1"),
        ({"alibi_slopes": 0.5}, TypeError, "alibi_slopes: expected float32 tensor [4], one slope a head, got float"),
        ({"alibi_slopes": torch.ones(4).double()}, ValueError, "alibi_slopes: expected float32 tensor [4], one slope"),
        ({"alibi_slopes": torch.ones(2)}, ValueError, "alibi_slopes: expected float32 tensor [4], one slope a head"),
        (
            {"alibi_slopes": torch.ones(4, requires_grad=True)},
            ValueError,
            "alibi_slopes: expected tensor that wants no gradient, got one with requires_grad=True",
        ),
        (
            {"index": torch.zeros(3)},
            ValueError,
            "index: expected uint8 tensor [2, 4, 1, 1344], as torch.ops.",
        ),
        ({"index": 3}, TypeError, "index: expected uint8 tensor [2, 4, 1, 1344]"),
    ],
)
def test_errors_of_choices(options, error, message):
    with pytest.raises(error) as raised:
        threshold_attention(Q, K, V, **(T | options))
    assert message in str(raised.value)


WANTED = "threshold: expected number, or float32 or float64 tensor broadcastable to [2, 4, 5, 1] or of shape [4], got"
NO_GRADIENT = "threshold: expected tensor that wants no gradient (the support is piecewise constant in it"


@pytest.mark.parametrize(
    ("threshold", "options", "error", "message"),
    [
        (torch.ones(5) / 2, {}, ValueError, f"{WANTED} 1-D float32 tensor [5]"),
        (torch.ones(4, 5) / 2, {}, ValueError, f"{WANTED} 2-D float32 tensor [4, 5]"),
        (torch.ones(1, 1, 1, 1, 1) / 2, {}, ValueError, f"{WANTED} 5-D float32 tensor"),
        (torch.ones(4).half() / 2, {}, ValueError, f"{WANTED} 1-D float16 tensor [4]"),
        (torch.ones(4, dtype=torch.int64), {}, TypeError, f"{WANTED} 1-D int64 tensor [4]"),
        (
            torch.tensor([0.5, 0, 0.5, 1]),
            {},
            ValueError,
            "that are each a number in (0, 1] (rule 'relative')",
        ),
        (torch.tensor([0.5, 1, 0.5, 1]), {"shrink": True}, ValueError, "are each a number in (0, 1) (rule 'relative'"),
        (torch.tensor(torch.nan), {}, ValueError, "values that are each a number in (0, 1]"),
        (
            torch.tensor(torch.inf),
            {"rule": "absolute"},
            ValueError,
            "that are each a finite number, got inf",
        ),
        (torch.tensor(0.5, requires_grad=True), {}, ValueError, NO_GRADIENT),
        (torch.tensor(0.5, requires_grad=True), {"rule": "absolute"}, ValueError, NO_GRADIENT),
        (
            torch.tensor(0.5, device="meta"),
            {},
            ValueError,
            "threshold: expected a tensor on cpu, like query",
        ),
        (
            torch.tensor(2),
            {"rule": "topk"},
            TypeError,
            "an int of at least 1 (rule 'topk'), got 0-D",
        ),
        (
            torch.tensor(0.5),
            {"rule": "topp"},
            TypeError,
            "a number in (0, 1] (rule 'topp'), got 0-D",
        ),
        (torch.tensor(2.0), {"rule": "entmax"}, TypeError, "threshold: expected 1.5 or 2 (rule 'entmax', where 2 is"),
    ],
)
def test_errors_of_thresholds(threshold, options, error, message):
    with pytest.raises(error) as raised:
        threshold_attention(Q, K, V, threshold=threshold, **options)
    assert message in str(raised.value)


def test_a_threshold_that_wants_no_gradient_now():
    threshold = torch.tensor(0.5, requires_grad=True)
    with torch.no_grad():
        out = threshold_attention(Q, K, V, threshold=threshold)
    assert torch.equal(out, threshold_attention(Q, K, V, threshold=threshold.detach()))


SEQUENCES = "1-D int32 or int64 tensor [sequences + 1] (both or neither of cu_seqlens_q and cu_seqlens_k)"


@pytest.mark.parametrize(
    ("batch", "bounds", "error", "message"),
    [
        (1, ([0, 5], None), TypeError, f"cu_seqlens_k: expected {SEQUENCES}, got NoneType"),
        (1, (None, [0, 6]), TypeError, f"cu_seqlens_q: expected {SEQUENCES}, got NoneType"),
        (1, ([0.0, 5.0], [0, 6]), ValueError, f"cu_seqlens_q: expected {SEQUENCES}, got 1-D float32 tensor"),
        (1, ([[0, 5]], [0, 6]), ValueError, f"cu_seqlens_q: expected {SEQUENCES}, got 2-D int64 tensor"),
        (1, ([0, 2, 5], [0, 6]), ValueError, "cu_seqlens_k: expected 3 bounds, like cu_seqlens_q, got 2"),
        (
            2,
            ([0, 5], [0, 6]),
            ValueError,
            "query: expected a batch of 1 (its tokens are those of all",
        ),
        (1, ([0, 4], [0, 6]), ValueError, "cu_seqlens_q: expected bounds ascending from 0 to 5, got 0..4"),
        (1, ([1, 5], [0, 6]), ValueError, "cu_seqlens_q: expected bounds ascending from 0 to 5, got 1..5"),
        (
            1,
            ([0, 3, 5], [0, 7, 6]),
            ValueError,
            "cu_seqlens_k: expected bounds ascending from 0 to 6, got 0..6, with",
        ),
    ],
)
def test_errors_of_sequences(batch, bounds, error, message):
    starts, key_starts = (None if given is None else torch.tensor(given) for given in bounds)
    with pytest.raises(error) as raised:
        threshold_attention(Q[:batch], K[:batch], V[:batch], **T, cu_seqlens_q=starts, cu_seqlens_k=key_starts)
    assert message in str(raised.value)


NESTED = "a nested tensor [B, H, tokens, width] of layout torch.jagged, as query, key and value must all be or none"


def test_errors_of_nested_tensors():
    values, bounds = torch.zeros(5, 4, 8), torch.tensor([0, 2, 5])
    untransposed = torch.nested.nested_tensor_from_jagged(values, bounds)
    nested = untransposed.transpose(1, 2)
    other = torch.nested.nested_tensor_from_jagged(values, torch.tensor([0, 1, 5])).transpose(1, 2)
    holes = torch.nested.nested_tensor_from_jagged(values, bounds, lengths=torch.tensor([1, 3])).transpose(1, 2)
    strided = torch.nested.nested_tensor([torch.zeros(4, 2, 8), torch.zeros(4, 3, 8)])
    flat = torch.nested.nested_tensor_from_jagged(values[:, 0], bounds)
    for tensors, options, error, message in (
        ((nested, K, V), {}, TypeError, f"key: expected {NESTED}, got 4-D float32 tensor"),
        ((Q, nested, nested), {}, TypeError, f"query: expected {NESTED}, got 4-D float32 tensor"),
        ((strided,) * 3, {}, TypeError, f"query: expected {NESTED}, got one of layout torch.strided"),
        ((flat,) * 3, {}, ValueError, f"query: expected {NESTED}, got a 3-D one"),
        (
            (untransposed,) * 3,
            {},
            ValueError,
            "(a transpose(1, 2) of [B, tokens, H, width]), got one",
        ),
        (
            (holes,) * 3,
            {},
            ValueError,
            "query: expected a contiguous nested tensor, without holes",
        ),
        ((nested, nested, other), {}, ValueError, "value: expected sequences as long as those of key"),
        (
            (nested,) * 3,
            {"attn_bias": torch.zeros(1)},
            ValueError,
            "attn_bias: expected None, with nested tensors",
        ),
        (
            (nested,) * 3,
            {"cu_seqlens_q": bounds},
            ValueError,
            "cu_seqlens_q: expected None, with nested tensors",
        ),
        (
            (nested,) * 3,
            {"key_padding_mask": bounds},
            ValueError,
            "key_padding_mask: expected None, with nested",
        ),
    ):
        with pytest.raises(error) as raised:
            threshold_attention(*tensors, **T, **options)
        assert message in str(raised.value)


@pytest.mark.parametrize(
    "options, error, message",
    [
        ({"is_causal": "yes"}, TypeError, "is_causal: expected a bool, got str"),
        ({"is_causal": 1}, TypeError, "is_causal: expected a bool, got int"),
        ({"enable_gqa": None}, TypeError, "enable_gqa: expected a bool, got NoneType"),
        ({"window": 2**63}, ValueError, f"window: expected an int of 64 bits, got {2**63}"),
        ({"window": (0, 2**70)}, ValueError, f"window: expected an int of 64 bits, got {2**70}"),
        ({"query_offset": -(2**64)}, ValueError, f"query_offset: expected an int of 64 bits, got -{2**64}"),
        ({"scale": 10**400}, ValueError, "scale: expected a finite number, got 1000"),
        ({"threshold": 10**400, "rule": "absolute"}, ValueError, "threshold: expected a finite number, got 1000"),
        ({"threshold": 10**400, "rule": "topk"}, ValueError, "threshold: expected an int of at least 1"),
        ({"attn_bias": (torch.zeros(5, 6) > 0).to_sparse()}, TypeError, "attn_bias: expected a dense (strided) tensor"),
        ({"key_padding_mask": (torch.zeros(2, 6) > 0).to_sparse()}, TypeError, "key_padding_mask: expected a dense"),
        ({"alibi_slopes": torch.ones(4).to_sparse()}, TypeError, "alibi_slopes: expected a dense (strided) tensor"),
        ({"threshold": torch.full((4,), 0.1).to_sparse()}, TypeError, "threshold: expected a dense (strided) tensor"),
    ],
)
def test_errors_of_flags_sizes_and_layouts(options, error, message):
    with pytest.raises(error) as raised:
        threshold_attention(Q, K, V, **({"threshold": 0.1} | options))
    assert message in str(raised.value)


def test_errors_of_bounds_without_data():
    bounds = torch.tensor([0, 6])
    with pytest.raises(ValueError, match="cu_seqlens_k: expected a tensor with data, since query has some, got one on"):
        threshold_attention(
            Q[:1], K[:1], V[:1], threshold=0.1, cu_seqlens_q=torch.tensor([0, 5]), cu_seqlens_k=bounds.to("meta")
        )


def test_errors_of_devices():
    meta = torch.zeros(6, device="meta")
    for options, name in (
        ({"attn_bias": meta > 0}, "attn_bias"),
        ({"attn_bias": meta}, "attn_bias"),
        ({"alibi_slopes": meta[:4]}, "alibi_slopes"),
        ({"index": torch.zeros(2, 4, 1, 1344, dtype=torch.uint8, device="meta")}, "index"),
        ({"key_padding_mask": meta.expand(2, 6) > 0}, "key_padding_mask"),
    ):
        with pytest.raises(ValueError, match=f"{name}: expected a tensor on cpu, like query, got one on meta"):
            threshold_attention(Q, K, V, threshold=0.1, **options)
    with pytest.raises(ValueError, match="key: expected a tensor on cpu, like query"):
        threshold_attention(Q, K.to("meta"), V, threshold=0.1)
