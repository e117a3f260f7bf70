"""Prints what pyproject.toml asks for to build and to run, with the extras named as arguments, but for torch: the
Makefile installs the one it pins first."""

import sys
import tomllib
from pathlib import Path

project = tomllib.loads(Path("pyproject.toml").read_text())
extras = project["project"]["optional-dependencies"]
groups = [project["build-system"]["requires"], project["project"]["dependencies"]]
groups += [extras[name] for name in sys.argv[1:]]
wanted = {item.replace(" ", "") for group in groups for item in group}
print(*sorted(item for item in wanted if not item.startswith("torch")))
