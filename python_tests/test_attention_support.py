"""The dataclass of a returned support: its checks and views."""

import pytest
import torch

from compsparse_kernels import AttentionSupport, threshold_attention

PTR, IDX, W = torch.tensor([0, 2, 3]), torch.tensor([0, 2, 1]).int(), torch.ones(3)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((PTR, IDX, W, [1, 1, 2, 4]), TypeError, "shape: expected a tuple (B, H, Tq, Tk)"),
        ((PTR, IDX, W, (1, 1, -2, 4)), ValueError, "shape: Tq: expected a positive int, got -2"),
        ((PTR.int(), IDX, W, (1, 1, 2, 4)), ValueError, "row_ptr: expected 1-D int64 tensor"),
        ((PTR, IDX, W, (1, 1, 3, 4)), ValueError, "row_ptr: expected 4 offsets, got 3"),
        ((PTR, IDX, W, (1, 1, 2, 2)), ValueError, "col_idx: expected values in 0..1"),
        (
            (PTR, torch.tensor([2, 0, 1]).int(), W, (1, 1, 2, 4)),
            ValueError,
            "col_idx: expected strictly ascending values",
        ),
        ((PTR, IDX, W[:2], (1, 1, 2, 4)), ValueError, "weights: expected float tensor [3]"),
        ((PTR, IDX, W.int(), (1, 1, 2, 4)), ValueError, "weights: expected float tensor [3]"),
        ((PTR, IDX, W.to("meta"), (1, 1, 2, 4)), ValueError, "weights: expected a tensor on cpu, like row_ptr"),
        ((PTR, IDX, W, (1, 1, 2, 4), W), ValueError, "log_sum: expected float tensor [1, 1, 2], got 1-D"),
        ((PTR, IDX, W, (1, 1, 2, 4), None, W), ValueError, "visible: expected int64 tensor broadcastable to [1, 1, 2]"),
        (
            (PTR, IDX, W, (1, 1, 2, 4), None, torch.ones(1, 1, 3).long()),
            ValueError,
            "visible: expected int64 tensor broadcastable to [1, 1, 2], of as many dimensions, got 3-D int64 tensor",
        ),
    ],
)
def test_errors_of_support(arguments, error, message):
    with pytest.raises(error) as raised:
        AttentionSupport(*arguments)
    assert message in str(raised.value)


def test_views_of_support():
    support = AttentionSupport(PTR, IDX, W / 2, (1, 1, 2, 4))
    assert support.nnz == 3 and support.density == 3 / 8
    assert support.degree.tolist() == [[[2, 1]]]
    assert torch.equal(support.to_dense(), torch.tensor([[[[0.5, 0, 0.5, 0], [0, 0.5, 0, 0]]]]))
    assert torch.equal(support.to_mask(), support.to_dense() > 0)
    assert support.log_sum is None and support.share_kept == support.density


def test_share_of_the_visible_keys():
    for visible, share in ((torch.tensor([[[2, 3]]]), 3 / 5), (torch.tensor([[[2]]]), 3 / 4), (None, 3 / 8)):
        assert AttentionSupport(PTR, IDX, W, (1, 1, 2, 4), visible=visible).share_kept == share
    nothing = AttentionSupport(PTR * 0, IDX[:0], W[:0], (1, 1, 2, 4), visible=torch.zeros(1, 1, 1).long())
    assert nothing.share_kept == 0


def test_no_keys():
    out, support = threshold_attention(
        *(torch.randn(1, 2, n, 4) for n in (3, 0, 0)), threshold=0.1, return_support=True
    )
    assert not out.any() and support.to_dense().shape == support.to_mask().shape == (1, 2, 3, 0)
