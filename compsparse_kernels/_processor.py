"""The processor's name, by which results are labelled and measured costs are kept."""

import platform
from pathlib import Path


def processor_model() -> str:
    """The processor's own name for itself; Linux keeps it in /proc, elsewhere Python's platform module knows it."""
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text(encoding="utf-8", errors="replace").splitlines():
            key, _, value = line.partition(":")
            if key.strip() == "model name":
                return value.strip()
    return platform.processor() or platform.machine()
