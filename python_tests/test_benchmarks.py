"""The benchmark suite: what it writes, that wrong results are never timed, and that the peers are what they say."""

import json

import pytest
import torch

from benchmarks import attention_peers, block_sparse_linear, overhead, plots, registry, run, timing
from benchmarks.inputs import fastest, mask_of_density, side
from benchmarks.registry import GPU_MODULES, MODULES, Case, Entry, Side, select
from compsparse_kernels.testing import random_tensor

ROW_KEYS = {"name", "op", "variant", "shape", "density", "dtype", "direction", "peer", "threads", "ours_ms", "peer_ms"}
ROW_KEYS |= {"ratio", "spread", "bar", "limit_ms", "ok", "error"}


def entry_of(make, **options):
    options = {"suites": {"quick": 0.001}} | options
    return Entry("op", "variant", "(1, 2->2)", 0.5, "forward", "dense", make, **options)


def matching_case():
    x = torch.randn(4, 4)
    return Case(side(x.sin, [x.double().sin()], [x.sin()]), side(x.sin, [x.double().sin()], [x.sin()]))


def wrong_case():
    x = torch.randn(4, 4)
    return Case(side(x.cos, [x.double().sin()], [x.sin()]), side(x.sin, [x.double().sin()], [x.sin()]))


def run_main(monkeypatch, tmp_path, entries, *argv):
    monkeypatch.setattr(run, "select", lambda suite, ops, device: entries)
    path = tmp_path / "result.json"
    code = run.main(["--json", str(path), *argv])
    return code, json.loads(path.read_text())


def test_quick_rows_of_one_op_end_to_end(tmp_path):
    path = tmp_path / "quick.json"
    code = run.main(["--op", "overhead", "--json", str(path), "--plot", str(tmp_path / "plots"), "--seed", "3"])
    result = json.loads(path.read_text())
    assert code == 0 and result["complete"] and result["schema"] == run.SCHEMA
    assert {"processor", "cores", "instruction_set", "versions", "commit", "dirty", "date"} <= set(result["machine"])
    assert result["settings"]["seed"] == 3 and result["settings"]["rounds"] == timing.LEAST_ROUNDS
    assert len(result["rows"]) == len(select("quick", ["overhead"]))
    for row in result["rows"]:
        assert set(row) == ROW_KEYS
        assert row["error"] is None and row["ours_ms"] > 0 and row["peer_ms"] > 0 and row["spread"] >= 0
        assert row["ok"] == (row["ours_ms"] <= row["limit_ms"])


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_on_cuda_it_says_that_there_is_no_gpu(capsys):
    assert run.main(["--device", "cuda"]) == 2
    assert capsys.readouterr().out.startswith("torch can use no GPU here")


def test_rows_of_a_gpu_have_names_of_their_own_and_compute_the_same():
    entries = select("all", device="cuda")
    assert {entry.op for entry in entries} == set(GPU_MODULES)
    assert len({entry.name for entry in entries}) == len(entries)
    small = (64, 96, 64, 32, 0.5)
    for peer in ("dense", "F.linear(x, BSR)"):
        case = block_sparse_linear._typed_forward_case(*small, peer, torch.float32, device="cpu")
        case.ours.check(case.ours.run())
        case.peer.check(case.peer.run())
    case = block_sparse_linear._typed_backward_case(*small, "dense", torch.float32, device="cpu")
    case.ours.check(case.ours.run())
    case.peer.check(case.peer.run())


@pytest.mark.parametrize("module", [name for name in MODULES if name != "overhead"])
def test_each_op_has_a_row_that_runs(module):
    smallest = select("quick", [module])[-1]
    rows = []
    run.run_entry(smallest, "quick", [1], timing.LEAST_ROUNDS, rows.append)
    assert [row["error"] for row in rows] == [None]
    assert rows[0]["ratio"] > 0


def test_rows_for_each_number_of_threads(monkeypatch, tmp_path):
    seen = []

    def make():
        case = matching_case()
        return Case(Side(lambda: seen.append(torch.get_num_threads()), lambda result: None), case.peer)

    before = torch.get_num_threads()
    code, result = run_main(monkeypatch, tmp_path, [entry_of(make)], "--threads", "1,2")
    assert code == 0 and [row["threads"] for row in result["rows"]] == [1, 2]
    assert set(seen) == {1, 2} and torch.get_num_threads() == before


def test_a_wrong_result_is_an_error_and_never_timed(monkeypatch, tmp_path):
    monkeypatch.setattr(run, "measure", lambda case, rounds: pytest.fail("a wrong result was timed"))
    code, result = run_main(monkeypatch, tmp_path, [entry_of(wrong_case)])
    (row,) = result["rows"]
    assert code == 1 and row["error"].startswith("ours: output 0: error is")
    assert row["ratio"] is row["ok"] is row["ours_ms"] is None


def test_a_damaged_op_is_an_error(monkeypatch):
    from benchmarks import block_sparse_linear as rows_of

    whole = rows_of.block_sparse_linear
    monkeypatch.setattr(rows_of, "block_sparse_linear", lambda *args: whole(*args) * 1.001)
    rows = []
    run.run_entry(rows_of._entry("forward", (8, 64, 64), 16, 0.5, "dense", {}), "bars", [1], 7, rows.append)
    assert rows[0]["error"].startswith("ours")


def test_a_case_that_fails_does_not_end_the_suite(monkeypatch, tmp_path):
    def make():
        raise MemoryError("too large")

    code, result = run_main(monkeypatch, tmp_path, [entry_of(make), entry_of(matching_case)])
    assert code == 1 and [row["error"] for row in result["rows"]] == ["MemoryError: too large", None]


def test_interrupt_writes_what_was_measured(monkeypatch, tmp_path):
    def interrupted():
        raise KeyboardInterrupt

    code, result = run_main(monkeypatch, tmp_path, [entry_of(matching_case), entry_of(interrupted)])
    assert code == 130 and not result["complete"] and len(result["rows"]) == 1


def test_bars_decide_ok(monkeypatch, tmp_path):
    entries = [entry_of(matching_case, suites={"quick": bar}) for bar in (None, 1e-6, 1e6)]
    code, result = run_main(monkeypatch, tmp_path, entries)
    assert code == 0 and [row["ok"] for row in result["rows"]] == [None, True, False]


def test_ratio_is_peer_over_ours():
    ticks = {"ours": iter([1.0, 2.0, 4.0]), "peer": iter([2.0, 6.0, 8.0])}
    sides = [Side(lambda: None, lambda result: None, lambda name=name: next(ticks[name])) for name in ticks]
    result = timing.measure(Case(*sides), rounds=3)
    assert (result.ours_ms, result.peer_ms, result.ratio, result.spread) == (2000, 6000, 2.0, 0.5)


def test_short_calls_are_repeated():
    calls = []
    repeats = timing._repeats(lambda: calls.append(None))
    assert repeats > 100


def test_names_are_unique_and_bars_are_there():
    entries = select("all")
    assert len({entry.name for entry in entries}) == len(entries)
    assert {entry.op for entry in select("foundation")} == {
        "block_sparse_linear",
        "masked_linear",
        "threshold_attention",
    }
    assert all(entry.bar("foundation") is not None for entry in select("foundation"))
    assert all(entry.bar("all") == entry.bar("bars") for entry in entries)
    assert set(MODULES) == {path.stem for path in registry_modules()}


def registry_modules():
    from pathlib import Path

    folder = Path(registry.__file__).parent
    return [path for path in folder.glob("*.py") if "def entries()" in path.read_text()]


@pytest.mark.parametrize(
    "argv", [["--rounds", "3"], ["--threads", "0"], ["--threads", "two"], ["--suite", "slow"], ["x"]]
)
def test_wrong_arguments_exit_2(argv, capsys):
    with pytest.raises(SystemExit) as stopped:
        run.main(argv)
    assert stopped.value.code == 2 and "usage:" in capsys.readouterr().err


def test_mask_of_density_is_exact():
    assert int(mask_of_density(20, 30, 0.1).sum()) == 60


def test_fastest_takes_the_fastest():
    import time

    slow, fast = (lambda: time.sleep(0.01)), (lambda: None)
    assert fastest([slow, fast]) is fast


def test_import_time_is_measured_in_a_fresh_process():
    case = overhead._import_case()
    case.ours.check(case.ours.run())


def test_plots_have_a_file_per_op_and_threads(tmp_path):
    common = {"direction": "forward", "variant": "block 32", "shape": "(1, 2->2)", "peer": "dense", "bar": 5.0}
    rows = [
        {**common, "op": op, "threads": threads, "density": density, "ratio": 0.9 / density}
        for op in ("a", "b")
        for threads in (1, 2)
        for density in (0.1, 0.5)
    ]
    machine = {"commit": None, "dirty": None, "processor": "p", "instruction_set": "scalar", "versions": {"torch": "2"}}
    paths = plots.draw({"rows": rows, "machine": machine}, tmp_path)
    assert sorted(path.name for path in paths) == [f"{op}_{n}_threads.png" for op in "ab" for n in (1, 2)]
    assert all(path.stat().st_size > 5000 for path in paths)


# ---- the peers made of torch ops


@pytest.mark.parametrize("by_sorting", [True, False])
@pytest.mark.parametrize("function, power", [(attention_peers.Sparsemax, 1), (attention_peers.Entmax15, 2)])
def test_entmax_peers_sum_to_one_and_are_sparse(function, power, by_sorting):
    scores = 3 * random_tensor(5, 40)
    p = function.apply(scores, by_sorting)
    assert torch.allclose(p.sum(-1), torch.ones(5), atol=1e-5)
    assert (p == 0).any()
    # The definition: p^(1 / power) = relu(z / power - tau) with one tau a row.
    tau = torch.where(p > 0, scores / power - p ** (1 / power), torch.nan)
    row_tau = tau.nanmean(-1, keepdim=True)
    assert torch.allclose(tau[p > 0], row_tau.expand_as(tau)[p > 0], atol=1e-5)
    assert (scores / power <= row_tau + 1e-5)[p == 0].all()


@pytest.mark.parametrize("function", [attention_peers.Sparsemax, attention_peers.Entmax15])
def test_entmax_peers_have_the_right_gradient(function):
    scores = (3 * random_tensor(4, 12)).double().requires_grad_()
    assert torch.autograd.gradcheck(lambda z: function.apply(z, True), scores)


def test_topk_peer_keeps_k():
    query, key = random_tensor(1, 1, 6, 8), random_tensor(1, 1, 20, 8, seed=1)
    weights = attention_peers.topk_attention(query, key, torch.eye(20).view(1, 1, 20, 20), kept=5)
    assert ((weights > 0).sum(-1) == 5).all()
