"""Prints what pyproject.toml asks for, all extras included, but torch: the Makefile installs the one it pins first."""

import tomllib
from pathlib import Path

project = tomllib.loads(Path("pyproject.toml").read_text())
groups = [project["build-system"]["requires"], project["project"]["dependencies"]]
groups += project["project"]["optional-dependencies"].values()
wanted = {item.replace(" ", "") for group in groups for item in group}
print(*sorted(item for item in wanted if not item.startswith("torch")))
