"""Hypothesis profiles, ``ci`` draws the same examples every time, ``dev`` new ones; the GPU ladder's summary."""

import os

import pytest
from hypothesis import HealthCheck, settings

# Layouts of kind auto must not depend on the machine, nor tests write into a user's cache; inherited by subprocesses.
os.environ["COMPSPARSE_CALIBRATE"] = "0"

# Read by OpenMP when torch is first imported: idle threads sleep, for these many small calls on a shared machine.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

settings.register_profile("ci", derandomize=True, max_examples=25, deadline=None, database=None)
settings.register_profile("dev", max_examples=25, deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("ci" if os.environ.get("CI") == "true" else "dev")


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node):  # a worker of pytest-xdist has ended
    from python_tests.gpu import ledger

    ledger.add(getattr(node, "workeroutput", {}).get("ledger", {"kernels": {}, "mutants": {}}))


def pytest_terminal_summary(terminalreporter):
    from python_tests.gpu import ledger

    lines = ledger.lines()
    if lines:
        terminalreporter.section("evidence about GPU kernels (python_tests/gpu/README.md)")
        for line in lines:
            terminalreporter.write_line(line)
