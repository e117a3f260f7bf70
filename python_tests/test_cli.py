"""The command line: what it prints, writes and returns; the check must find a damaged op."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from compsparse_kernels import ops
from compsparse_kernels.cli import bench, build_parser, check, demo, main
from compsparse_kernels.cli.cases import all_cases
from compsparse_kernels.ops import OPS
from compsparse_kernels.testing import run_in_subprocess

ROOT = Path(__file__).resolve().parent.parent


def run_json(capsys, *argv):
    code = main([*argv, "--json", "-"])
    return code, json.loads(capsys.readouterr().out)


def test_info_json(capsys):
    code, result = run_json(capsys, "info")
    assert code == 0
    assert set(result) == {"machine", "modules", "ops"}
    assert set(result["ops"]) == set(OPS)
    assert result["machine"]["versions"]["torch"] == torch.__version__
    assert result["machine"]["instruction_set"] == ops.cpu_isa()
    assert set(result["modules"]) == {"_C", "_C_cuda", "_layout"}


def test_info_writes_a_file_beside_its_tables(tmp_path, capsys):
    assert main(["info", "--json", str(tmp_path / "info.json")]) == 0
    assert json.loads((tmp_path / "info.json").read_text())["machine"]["cores"] >= 1
    out = capsys.readouterr().out
    assert "threshold_attention" in out and "instruction set" in out


def test_info_without_compiled_modules_says_why():
    blocked = ("compsparse_kernels._C", "compsparse_kernels._layout")
    out = run_in_subprocess("from compsparse_kernels.cli import main; main(['info', '--json', '-'])", blocked=blocked)
    result = json.loads(out)
    assert not result["modules"]["_C"]["present"] and result["modules"]["_C"]["reason"]
    assert result["ops"]["masked_linear"]["reference"] == "runs"
    assert "not there" in result["ops"]["masked_linear"]["cpu"]


def test_info_shows_the_cap():
    code = "from compsparse_kernels.cli import main; main(['info', '--json', '-'])"
    machine = json.loads(run_in_subprocess(code, isa="scalar"))["machine"]
    assert machine["instruction_set_cap"] == "scalar"
    assert machine["instruction_set"] in ("scalar", None)


def test_check_is_right_for_every_op(capsys):
    code, result = run_json(capsys, "check")
    wrong = [row for row in result["rows"] if not row["ok"]]
    assert code == 0 and result["ok"] and not wrong
    assert {row["op"] for row in result["rows"]} == set(OPS)
    for op in OPS:
        dtypes = {row["dtype"] for row in result["rows"] if row["op"] == op}
        assert dtypes == {str(dtype).removeprefix("torch.") for dtype in ops.backends.dtypes_on("cpu", op)}
    assert {"output", "grad of x", "grad of values", "grad of bias", "grad of query"} <= {
        row["quantity"] for row in result["rows"]
    }


@pytest.mark.parametrize("op", OPS)
def test_check_finds_a_damaged_op(op, monkeypatch, capsys):
    whole = getattr(ops, op)
    monkeypatch.setattr(ops, op, lambda *args, **kwargs: whole(*args, **kwargs) * (1 + 1e-5))
    code, result = run_json(capsys, "check", "--op", op)
    assert code == 1 and not result["ok"]
    assert all("times the budget" in row["reason"] for row in result["rows"] if not row["ok"])


def test_check_finds_a_damaged_gradient_and_only_it(monkeypatch, capsys):
    whole = ops.masked_linear

    def damaged(x, values, layout, bias):
        return whole(x, values * 1.0001 - values.detach() * 0.0001, layout, bias)

    monkeypatch.setattr(ops, "masked_linear", damaged)
    code, result = run_json(capsys, "check", "--op", "masked_linear")
    wrong = {row["quantity"] for row in result["rows"] if not row["ok"] and row["dtype"] == "float32"}
    assert code == 1 and wrong == {"grad of values"}


def test_check_finds_results_that_depend_on_threads(monkeypatch, capsys):
    whole = ops.threshold_attention

    # One unit in the last place of one element: far inside the budget, but not the same bits.
    def damaged(query, key, value, **options):
        out = whole(query, key, value, **options)
        if torch.get_num_threads() == 3:
            with torch.no_grad():
                out.view(-1)[:1] = torch.nextafter(out.view(-1)[:1], torch.full((1,), torch.inf, dtype=out.dtype))
        return out

    monkeypatch.setattr(ops, "threshold_attention", damaged)
    code, result = run_json(capsys, "check", "--op", "threshold_attention")
    wrong = [row for row in result["rows"] if not row["ok"]]
    assert code == 1 and {row["reason"] for row in wrong} == {"results with 1, 2 and 3 threads differ"}


def test_check_reports_an_op_that_raises(monkeypatch, capsys):
    def broken(*args, **kwargs):
        raise RuntimeError("no such kernel")

    monkeypatch.setattr(ops, "sampled_matmul", broken)
    code, result = run_json(capsys, "check", "--op", "sampled_matmul")
    assert code == 1 and result["rows"][0]["reason"] == "RuntimeError: no such kernel"


def test_check_keeps_the_number_of_threads(capsys):
    before = torch.get_num_threads()
    run_json(capsys, "check", "--op", "sampled_matmul")
    assert torch.get_num_threads() == before


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_check_on_cuda_says_that_there_is_no_gpu(capsys):
    assert main(["check", "--device", "cuda"]) == 2
    assert capsys.readouterr().out.startswith("torch can use no GPU here")


def test_every_op_has_a_case():
    assert {case.op for case in all_cases()} == set(OPS)


@pytest.mark.parametrize("command", ["info", "check", "demo", "bench"])
def test_help_teaches(command, capsys):
    with pytest.raises(SystemExit) as stopped:
        main([command, "--help"])
    out = capsys.readouterr().out
    assert stopped.value.code == 0
    assert "examples:" in out and "--json FILE" in out


def test_main_help_names_every_command():
    text = build_parser().format_help()
    assert all(command in text for command in ("info", "check", "bench", "demo"))


@pytest.mark.parametrize(
    "argv",
    [[], ["inform"], ["info", "--jsn"], ["info", "extra"], ["check", "--op", "conv"], ["bench", "--suite", "slow"]],
)
def test_wrong_arguments_exit_2(argv, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(argv)
    assert stopped.value.code == 2
    assert "usage:" in capsys.readouterr().err


def fake_demo(code):
    def run(report_dir, seed, json_path, quick):
        print("a table")
        if json_path is not None:
            json_path.write_text(json.dumps({"seed": seed, "quick": quick}))
        return code

    return run


def test_demo_gets_its_options(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(demo, "run", fake_demo(0))
    path = tmp_path / "demo.json"
    assert main(["demo", "--report", str(tmp_path), "--json", str(path), "--seed", "7"]) == 0
    assert json.loads(path.read_text()) == {"seed": 7, "quick": False}
    assert capsys.readouterr().out == "a table\n"


def test_demo_writes_json_alone_to_standard_output(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(demo, "run", fake_demo(0))
    assert main(["demo", "--report", str(tmp_path), "--json", "-", "--quick"]) == 0
    captured = capsys.readouterr()
    assert json.loads(captured.out) == {"seed": 0, "quick": True} and captured.err == "a table\n"


def test_demo_hands_on_its_exit_code(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(demo, "run", fake_demo(2))
    assert main(["demo", "--report", str(tmp_path), "--json", "-"]) == 2
    assert capsys.readouterr().out == ""


def test_bench_without_the_suite_says_where_it_is(monkeypatch, capsys):
    monkeypatch.setattr(bench.importlib.util, "find_spec", lambda name: None)
    assert main(["bench", "--suite", "quick"]) == 2
    assert "clone the repository" in capsys.readouterr().err


def test_interrupt_is_one_line(monkeypatch, capsys):
    def interrupted(case, dtype, device):
        raise KeyboardInterrupt

    monkeypatch.setattr(check, "check_case", interrupted)
    assert main(["check"]) == 130
    assert capsys.readouterr().err.strip() == "interrupted"


@pytest.mark.skipif(os.name != "posix", reason="sends SIGINT")
def test_ctrl_c_ends_a_running_check():
    listen = "signal.signal(signal.SIGINT, signal.default_int_handler)"  # a shell's background jobs are deaf to it
    start = "from compsparse_kernels.cli import main; print('up', flush=True); sys.exit(main())"
    code = f"import signal, sys; {listen}; {start}"
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    process = subprocess.Popen([sys.executable, "-c", code, "check"], cwd=ROOT, **pipes)
    try:
        assert process.stdout.readline().strip() == "up"
        time.sleep(0.3)
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 130
    assert errors.strip() == "interrupted"


def test_a_file_that_cannot_be_written_is_refused_before_the_work(tmp_path, capsys):
    (tmp_path / "file").touch()
    with pytest.raises(SystemExit) as stopped:
        main(["check", "--json", str(tmp_path / "file" / "below.json")])
    assert stopped.value.code == 2 and "expected a file that can be written" in capsys.readouterr().err


def test_an_unknown_cap_is_told():
    code = "import compsparse_kernels"
    environment = os.environ | {"COMPSPARSE_CPU": "AVX2"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, cwd=ROOT)
    assert "COMPSPARSE_CPU: expected one of scalar, avx2, avx512, avx512_bf16, got 'AVX2'" in done.stderr
