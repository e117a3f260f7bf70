"""Settings of the ladder, and what a process that ran a part of it leaves."""

import os
from pathlib import Path

# Triton 3.10 changes this default, and the golden tables with it. Read when triton is first imported.
os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")

from python_tests.gpu import ledger


def pytest_sessionfinish(session):
    if ledger.FILE in os.environ:
        ledger.save(Path(os.environ[ledger.FILE]))
    elif hasattr(session.config, "workeroutput"):  # of pytest-xdist
        session.config.workeroutput["ledger"] = ledger.contents()
