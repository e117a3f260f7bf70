"""The figure of time against density: where it says that sparse breaks even, and that every side is drawn."""

import json

import pytest

from benchmarks import density


def points(name, *ratios):
    return [{"name": name, "density": d, "ms": 1.0, "to_dense": ratio} for d, ratio in zip((0.1, 0.5, 1.0), ratios)]  # noqa: B905


@pytest.mark.parametrize(
    "ratios, expected, text",
    [
        ((0.5, 1.5, 3.0), 0.3, "breaks even with dense at density 0.30"),
        ((0.5, 0.9, 1.0), None, "as fast as dense, or faster, at every density"),
        ((1.2, 1.5, 3.0), 0.0, "slower than dense at every density"),
    ],
)
def test_break_even(ratios, expected, text):
    found = density.break_even([*points("ours", *ratios), *points("other", 9, 9, 9)], "ours")
    assert found == pytest.approx(expected) and density.describe_break_even(found) == text


def test_end_to_end(tmp_path, monkeypatch):
    monkeypatch.setattr(density, "DENSITIES", (0.1, 0.6))
    monkeypatch.setattr(density.measure, "__defaults__", ((8, 32, 48),))
    paths = tmp_path / "density.json", tmp_path / "density.png"
    assert density.main(["--rounds", "1", "--json", str(paths[0]), "--plot", str(paths[1])]) == 0
    result = json.loads(paths[0].read_text())
    sides = {(point["name"], point["density"]) for point in result["points"]}
    assert len(sides) == 9 and (density.CSR_AUTOGRAD, 0.6) not in sides  # its time would dwarf all others
    assert all(point["ms"] > 0 for point in result["points"]) and set(result["break_even"]) == set(
        density.OURS.values()
    )
    assert paths[1].stat().st_size > 10_000
