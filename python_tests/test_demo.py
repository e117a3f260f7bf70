"""The demo end to end in its quick form, its graph, what it counts, and what it says when a package is missing."""

import base64
import importlib.util
import json
import re
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

from compsparse_kernels import MaskedLinear
from compsparse_kernels.cli import demo
from compsparse_kernels.cli.demo import data, training

NEEDED = ("mlxtend", "matplotlib")
with_packages = pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in NEEDED), reason="needs mlxtend and matplotlib"
)
PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"


@pytest.fixture(scope="module")
def result(tmp_path_factory):
    folder = tmp_path_factory.mktemp("demo")
    code = demo.run(folder / "report", seed=3, json_path=folder / "numbers" / "demo.json", quick=True)
    html = (folder / "report" / demo.REPORT_NAME).read_text(encoding="utf-8")
    return SimpleNamespace(code=code, html=html, numbers=json.loads((folder / "numbers" / "demo.json").read_text()))


@with_packages
def test_report_is_one_file_with_every_section_and_figure(result):
    assert result.code == 0
    sections = re.findall(r'<section id="(\w)">(.*?)</section>', result.html, re.DOTALL)
    assert [key for key, _ in sections] == ["a", "b", "c"]
    for (_, body), figures in zip(sections, (3, 2, 2), strict=True):
        pictures = re.findall(r'src="data:image/png;base64,([^"]+)"', body)
        assert len(pictures) == figures
        assert all(base64.b64decode(picture).startswith(PNG_SIGNATURE) for picture in pictures)
        assert "<table>" in body and "<p>" in body
    assert "http" not in result.html  # nothing is fetched when it is opened


@with_packages
def test_json_has_every_number(result):
    numbers = result.numbers
    assert set(numbers) == {"environment", "quick", "seconds", "a", "b", "c"}
    assert numbers["quick"] is True and numbers["environment"]["seed"] == 3
    assert {"processor", "threads", "torch", "instruction set"} <= set(numbers["environment"])
    assert set(numbers["a"]) == {"rounds", "accuracy", "step_ms", "step_speedup", "bytes", "layer_density"}
    assert set(numbers["a"]["step_ms"]) == set(numbers["a"]["bytes"]) == {"dense", "W*M", "MaskedLinear"}
    assert set(numbers["b"]) == {"accuracy", "parameters", "density", "step_ms", "step_speedup"}
    assert set(numbers["b"]["accuracy"]) == {"local graph", "permuted graph", "dense"}
    assert set(numbers["c"]) == {
        "threshold",
        "accuracy",
        "kept_per_layer",
        "attention_step_ms",
        "attention_step_speedup",
    }


@with_packages
def test_numbers_are_what_they_say(result):
    a, b, c = (result.numbers[key] for key in "abc")
    assert a["rounds"][-1]["density"] == pytest.approx(0.05, abs=1e-4)
    sparse, simulated = (sum(a["bytes"][name].values()) for name in ("MaskedLinear", "W*M"))
    assert sparse < 0.1 * simulated
    assert b["parameters"]["local graph"] == b["parameters"]["permuted graph"] < 0.25 * b["parameters"]["dense"]
    assert all(0 < share <= 1 for share in c["kept_per_layer"])


@with_packages
def test_what_is_worse_is_shown_as_worse():
    from compsparse_kernels.cli.demo import report

    assert report.time_row("step", [0.2, 0.2], "dense", [0.1, 0.1]) == report.Row(
        "step", "200.00 ms", "dense 100.00 ms", "2.0x slower", True
    )
    assert report.accuracy_row("accuracy", 0.9, "dense", 0.95).verdict == "5.0 points worse"
    assert not report.accuracy_row("accuracy", 0.95, "dense", 0.95).worse
    assert report.size_row("bytes", 4, "dense", 2, "MiB").worse
    row = report.Row("step", "2 ms", "dense 1 ms", "2.0x slower", True)
    section = report.Section("a", "title", ["text"], rows=[row])
    verdict = list(report.summary_table([section]).columns[-1].cells)
    assert verdict == ["[red]2.0x slower[/]"]
    assert '<td class="worse">2.0x slower</td>' in report._section_html(section)


@with_packages
def test_split_is_stratified_and_does_not_change():
    digits, again = data.load_digits(per_class=50), data.load_digits(per_class=50)
    assert digits.train_y.bincount().tolist() == [40] * 10 and digits.test_y.bincount().tolist() == [10] * 10
    assert torch.equal(digits.train_x, again.train_x) and torch.equal(digits.test_x, again.test_x)
    assert not (digits.train_x[:, None] == digits.test_x[None]).all(-1).any()


@with_packages
def test_local_graph_sees_neighbours_only():
    from compsparse_kernels.cli.demo import graph

    order = graph.patch_order()
    assert sorted(order.tolist()) == list(range(784))
    assert order[:5].tolist() == [0, 1, 2, 3, 28]  # the first patch's rows
    first = graph.neighbours(7, 7, 1.1)
    assert first[0].nonzero().flatten().tolist() == [0, 1, 7, 8]
    assert int(first[24].sum()) == 9
    seen = [int(pixels.sum()) for pixels in graph.fields(graph.local_layouts(), order, (0.5, 0.4))]
    assert seen[0] == 9 * 16 and seen == sorted(seen) and seen[-1] == 784


def test_stored_bytes_counts_weights_gradients_state_and_indices():
    layer = MaskedLinear(32, 16, torch.eye(16, 32, dtype=torch.bool), kind="csr")
    optimizer = torch.optim.Adam(layer.parameters())
    layer(torch.randn(4, 32)).sum().backward()
    optimizer.step()
    held = training.stored_bytes(layer, optimizer)
    parameters = 4 * (16 + 16)
    assert held["weights"] == held["gradients"] == parameters
    assert held["optimizer"] == 2 * parameters + 2 * 4  # two moments, and a step counter for each parameter
    pointers, columns = 8 * 17, 4 * 16
    assert held["indices"] >= pointers + columns


@pytest.mark.parametrize("missing", NEEDED)
def test_missing_package_is_named_with_the_extra(missing, monkeypatch, tmp_path, capsys):
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == missing else find_spec(name))
    assert demo.run(tmp_path / "report") == 2
    message = capsys.readouterr().err.strip()
    assert "\n" not in message and missing in message and "compsparse_kernels[demo]" in message
    assert not (tmp_path / "report").exists()


def test_import_needs_neither_package():
    code = f"""
import sys
sys.modules.update(dict.fromkeys({NEEDED!r}))  # None: importing them fails
from compsparse_kernels.cli import demo
print(demo.REPORT_NAME)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == demo.REPORT_NAME
