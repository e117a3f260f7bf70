"""Level L1 in a process of its own: Triton binds its decorators to the interpreter or to the compiler at import."""

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from python_tests.gpu import ledger

ROOT = Path(__file__).resolve().parents[2]
FOLDER = "python_tests/gpu/interpreter"

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")


def run_interpreted(tmp_path: Path, *arguments: str) -> int:
    """Runs the tests of FOLDER and returns how many passed; none may fail or be skipped. Merges their ledger."""
    climbed = tmp_path / "ledger.json"
    environment = {**os.environ, "TRITON_INTERPRET": "1", ledger.FILE: str(climbed)}
    command = [sys.executable, "-m", "pytest", "-s", FOLDER, *arguments]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    output = done.stdout + done.stderr
    assert done.returncode == 0, f"the interpreted tests ended with {done.returncode}:\n{output[-6000:]}"
    print(*re.findall(r"^interpreter: .*", output, re.MULTILINE), sep="\n")
    assert not re.search(r"\d+ skipped", output), f"interpreted tests were skipped:\n{output[-1000:]}"
    passed = re.search(r"(\d+) passed", output)
    assert passed, f"no summary in what pytest printed:\n{output[-1000:]}"
    ledger.merge(climbed)
    return int(passed[1])


def test_interpreted(tmp_path):
    assert run_interpreted(tmp_path) >= 250


@pytest.mark.long
def test_interpreted_long(tmp_path):
    assert run_interpreted(tmp_path, "-m", "long") >= 1


def test_a_failure_is_not_missed(tmp_path):
    with pytest.raises(AssertionError, match="ended with 5"):
        run_interpreted(tmp_path, "-k", "no_such_test")
