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
        ((Q.half(), K.half(), V.half()), T, TypeError, "query: expected float32 or float64, got 4-D float16"),
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
        ((Q, K, V), {"threshold": "1"}, TypeError, "threshold: expected a number, got str"),
        ((Q, K, V), {"threshold": float("nan"), "rule": "absolute"}, ValueError, "threshold: expected a finite number"),
        ((Q, K, V), T | {"scale": float("inf")}, ValueError, "scale: expected a finite number, got inf"),
        ((Q, K, V), T | {"scale": True}, TypeError, "scale: expected a number, got bool"),
        ((Q, K, V), T | {"rule": "topk"}, ValueError, "rule: expected one of relative, absolute, got 'topk'"),
        ((Q, K, V), T | {"weights": "rectified"}, ValueError, "weights: expected one of softmax, got 'rectified'"),
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


def test_errors_of_devices():
    meta = torch.zeros(6, device="meta")
    for options, name in (
        ({"attn_bias": meta > 0}, "attn_bias"),
        ({"attn_bias": meta}, "attn_bias"),
        ({"key_padding_mask": meta.expand(2, 6) > 0}, "key_padding_mask"),
    ):
        with pytest.raises(ValueError, match=f"{name}: expected a tensor on cpu, like query, got one on meta"):
            threshold_attention(Q, K, V, threshold=0.1, **options)
    with pytest.raises(ValueError, match="key: expected a tensor on cpu, like query"):
        threshold_attention(Q, K.to("meta"), V, threshold=0.1)
