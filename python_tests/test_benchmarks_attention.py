"""Rows of threshold attention: each computes what it says, keeps the share it says, and finds damage."""

import pytest
import torch

from benchmarks import attention_kinds as kinds
from benchmarks import plots
from benchmarks import threshold_attention as attention_rows
from benchmarks.registry import Mismatch
from compsparse_kernels.testing import random_tensor

CASES = {
    "relative": {},
    "causal": {"causal": True},
    "clustered": {"clustered": True},
    **{name: {"rule": name} for name in attention_rows.SPARSE_PEERS},
}


@pytest.mark.parametrize("direction", attention_rows.BARS)
@pytest.mark.parametrize("name", CASES)
def test_both_sides_compute_what_the_row_says(name, direction):
    peer = name if name in attention_rows.SPARSE_PEERS else "SDPA"
    case = attention_rows._case(direction, 256, 0.1, peer, **CASES[name])
    case.ours.check(case.ours.run())
    case.peer.check(case.peer.run())
    kept = kinds.TOPK_SHARE if name == "top-k" else 0.1
    assert case.density == pytest.approx(kept, rel=0.25)  # a share of sampled queries


@pytest.mark.parametrize("indexed", [True, False])
def test_decoding_reads_the_cache(indexed):
    case = attention_rows._decoding_case(700, 0.05, indexed)
    case.ours.check(case.ours.run())
    case.peer.check(case.peer.run())
    assert case.density == pytest.approx(0.05, rel=0.1)  # of the very query that was sampled
    with pytest.raises(Mismatch, match="output 0"):
        case.ours.check(case.ours.run() * 1.001)


def test_the_table_of_bars_is_whole():
    entries = [entry for entry in attention_rows.entries() if entry.peer == "SDPA" and "bars" in entry.suites]
    for direction in attention_rows.BARS:
        for length in attention_rows.LENGTHS:
            shape = f"B1 H8 T{length} D64"
            rows = {entry.density: entry for entry in entries if (entry.direction, entry.shape) == (direction, shape)}
            assert {0.01, 0.05, 0.2, 0.4, 0.9} <= set(rows) and rows[0.9].bar("bars") == 0.9
    assert {e.bar("bars") for e in entries if e.variant == "decoding, index in the cache"} == {2.0}


def test_tokens_in_clusters_are_nearer_to_some():
    def spread(clustered):
        query, key, _ = kinds.tokens(128, clustered)
        return float((query @ key.mT).abs().amax(-1).mean())

    assert spread(True) > 1.5 * spread(False)
    query, key, _ = kinds.tokens(128, True, queries=3)
    assert query.shape == (1, kinds.HEADS, 3, kinds.WIDTH) and key.shape[2] == 128


def test_later_keys_are_hidden_from_every_other_query_too():
    hidden = kinds._hide_later(torch.zeros(3, 6), step=2).isinf()
    assert hidden.tolist() == [[j > i for j in range(6)] for i in (0, 2, 4)]


def test_queries_at_the_edge_are_not_compared():
    key = random_tensor(1, kinds.HEADS, 16, kinds.WIDTH)
    at_edge = kinds.Attention((), kinds.softmax, lambda scores: torch.zeros_like(scores))
    with pytest.raises(RuntimeError, match="nothing to compare"):
        kinds.OneHead((key, key, key), None, (at_edge,))


def test_kinds_of_rows_are_lines_of_their_own():
    rows = [{"variant": variant, "peer": "SDPA"} for variant in ("kept <= 1%", "kept <= 5%", "kept <= 5%, causal")]
    assert [*plots._lines(rows)] == [("ours", "SDPA"), ("ours, causal", "SDPA")]


def test_attention_check_finds_a_wrong_gradient():
    case = attention_rows._case("forward+backward", 64, 0.1, "SDPA")
    output, *gradients = case.ours.run()
    case.ours.check([output, *gradients])
    for number in range(3):
        damaged = [gradient * (1.001 if index == number else 1) for index, gradient in enumerate(gradients)]
        with pytest.raises(Mismatch, match=f"output {number + 1}"):
            case.ours.check([output, *damaged])
