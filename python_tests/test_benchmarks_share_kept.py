"""The figure of attention's time over the share of keys kept: every side is in it, and where SDPA is reached."""

import json

import pytest

from benchmarks import share_kept
from benchmarks.registry import Mismatch


def test_break_even_is_of_ours_in_one_direction():
    lines = {"forward": (0.5, 1.5), "forward+backward": (0.5, 0.9)}
    points = [
        {"name": name, "direction": direction, "share": share, "to_sdpa": ratio}
        for name in (share_kept.OURS, share_kept.SDPA)
        for direction, ratios in lines.items()
        for share, ratio in zip((0.1, 0.5), ratios if name == share_kept.OURS else (1.0, 1.0), strict=True)
    ]
    found = [share_kept.break_even(points, direction) for direction in share_kept.DIRECTIONS]
    assert found == [pytest.approx(0.3), None]
    assert [share_kept.describe_break_even(share) for share in (*found, 0.0)] == [
        "breaks even with SDPA at 30% of the keys kept",
        "as fast as SDPA, or faster, at every share of keys kept",
        "slower than SDPA at every share",
    ]


def test_end_to_end(tmp_path, monkeypatch):
    monkeypatch.setattr(share_kept, "SHARES", (0.05, 0.5))
    # SDPA stands for flex_attention, which takes many seconds to compile.
    every = share_kept.kinds.peers
    monkeypatch.setattr(
        share_kept.kinds, "peers", lambda length: {**every(length), share_kept.FLEX: every(length)["SDPA"]}
    )
    json_path, figure = tmp_path / "share.json", tmp_path / "share.png"
    arguments = ["--rounds", "2", "--length", "256", "--clustered", "--json", str(json_path), "--plot", str(figure)]
    monkeypatch.setattr(share_kept.random, "randrange", lambda stop: 0)  # the same data each time
    assert share_kept.main(arguments) == 0
    result = json.loads(json_path.read_text())
    assert result["length"] == 256 and result["clustered"] and set(result["break_even"]) == {*share_kept.DIRECTIONS}
    sides = {(point["name"], point["direction"], point["aim"]) for point in result["points"]}
    both = {(name, d, aim) for name in ("this library", "SDPA") for d in share_kept.DIRECTIONS for aim in (0.05, 0.5)}
    once = {(name, d, 0.05) for name in share_kept.SPARSE_PEERS for d in share_kept.DIRECTIONS}
    assert sides == both | once | {(share_kept.FLEX, "forward", 0.05)}
    assert all(point["ms"] > 0 and abs(point["share"] / point["aim"] - 1) < 0.25 for point in result["points"])
    assert figure.stat().st_size > 10_000


def test_a_wrong_result_is_not_timed(monkeypatch):
    ours = share_kept.kinds.ours()
    damaged = share_kept.replace(ours, ways=(lambda *tensors, **options: _damaged(ours.ways[0](*tensors, **options)),))
    monkeypatch.setattr(share_kept.kinds, "ours", lambda: damaged)
    monkeypatch.setattr(share_kept, "_samples", lambda *arguments: pytest.fail("a wrong result was timed"))
    with pytest.raises(Mismatch, match="output 0"):
        share_kept.measure(0.1, 256, 1, clustered=False)


def _damaged(result):
    return result * 1.001 if not isinstance(result, tuple) else result
