"""Settings of the ladder, and its summary at the end of a run."""

import os
from pathlib import Path

# Triton 3.10 changes this default, and the golden tables with it. Read when triton is first imported.
os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")

from python_tests.gpu import ledger


def pytest_sessionfinish():
    if ledger.FILE in os.environ:
        ledger.save(Path(os.environ[ledger.FILE]))


def pytest_terminal_summary(terminalreporter):
    lines = ledger.lines()
    if lines:
        terminalreporter.section("evidence about GPU kernels (python_tests/gpu/README.md)")
        for line in lines:
            terminalreporter.write_line(line)
