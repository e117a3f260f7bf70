"""What stands beside every result: the machine, and which commit was measured."""

import datetime
import subprocess
from pathlib import Path

from compsparse_kernels.cli.machine import describe_machine

ROOT = Path(__file__).resolve().parent.parent


def describe_run() -> dict:
    """Machine, versions, date, commit, and whether files differ from that commit."""
    status = _git("status", "--porcelain", "--untracked-files=no")
    return {
        **describe_machine(),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "commit": _git("rev-parse", "HEAD"),
        "dirty": None if status is None else bool(status),
    }


def _git(*arguments: str) -> str | None:
    """What git says, or None where this is no checkout or git is not there."""
    try:
        done = subprocess.run(["git", "-C", str(ROOT), *arguments], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()
