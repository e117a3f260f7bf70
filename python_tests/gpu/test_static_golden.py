"""The golden tables notice what changed, and what ships is what they say and passes the gates."""

import json

import pytest

pytest.importorskip("triton")

from python_tests.gpu import ledger
from python_tests.gpu.report import examine
from python_tests.gpu.shipped import shipped
from python_tests.gpu.static import golden

ROW = {"registers": 128, "occupancy": 0.25}


def test_equal_tables():
    assert golden.compare({"kernel": ROW, "another": ROW}, {"kernel": dict(ROW)}) == []


def test_a_change_is_noticed():
    changed = {"kernel": ROW | {"registers": 129}}
    assert golden.compare({"kernel": ROW}, changed) == ["kernel: registers was 128, now 129"]


def test_a_new_kernel_is_noticed():
    assert golden.compare({}, {"kernel": ROW}) == ["kernel: not in the golden table"]


def test_a_new_column_is_noticed():
    assert golden.compare({"kernel": ROW}, {"kernel": ROW | {"stack": 0}}) == ["kernel: stack was None, now 0"]


def test_a_table_is_read_as_it_was_written(tmp_path):
    table = {"b": ROW, "a": ROW | {"registers": 1}}
    golden.write(tmp_path / "op.json", table)
    assert golden.read(tmp_path / "op.json") == table
    assert len((tmp_path / "op.json").read_text().splitlines()) == 1 + len(table) + 1


def test_a_table_of_another_compiler_is_an_error(tmp_path):
    (tmp_path / "op.json").write_text(json.dumps({"triton": "0.1", "kernels": {}}))
    with pytest.raises(ValueError, match=r"op.json: expected a table of triton .*, got 0\.1"):
        golden.read(tmp_path / "op.json")


@pytest.mark.parametrize("case", shipped(), ids=lambda case: case.name)
def test_what_ships(case):
    found = examine(case)
    assert found.violations == []
    table = golden.read(golden.path_of(case.op))
    assert golden.compare(table, {case.name: golden.golden_row(found.analysis)}) == []
    ledger.reached("L2", case.name)


def test_no_golden_row_is_left_over():
    for op in {case.op for case in shipped()}:
        names = {case.name for case in shipped() if case.op == op}
        assert golden.read(golden.path_of(op)).keys() == names


@pytest.mark.long
@pytest.mark.parametrize("case", shipped(long=True), ids=lambda case: case.name)
def test_everything_that_ships(case):
    assert examine(case).violations == []
    ledger.reached("L2", case.name)
