"""The README's Python and every docstring's example run as printed."""

import doctest
import importlib
import pkgutil
import re
from pathlib import Path

import pytest
import torch

import compsparse_kernels

README = Path(__file__).resolve().parent.parent / "README.md"
BLOCKS = re.findall(r"^```python\n(.*?)^```", README.read_text(), re.MULTILINE | re.DOTALL)
MODULES = [
    name
    for _, name, _ in pkgutil.walk_packages(compsparse_kernels.__path__, "compsparse_kernels.")
    if not name.endswith(("__main__", "._C", "._layout", "._C_cuda", ".triton"))
]


def test_the_readme_has_python_in_it():
    assert BLOCKS


@pytest.mark.parametrize("number", range(len(BLOCKS)))
def test_a_readme_block_runs_as_printed(number, tmp_path, monkeypatch):
    """Each in a namespace of its own, as whoever pastes it has."""
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    line = README.read_text().split(BLOCKS[number])[0].count("\n")
    exec(compile("\n" * line + BLOCKS[number], str(README), "exec"), {"__name__": "readme"})


@pytest.mark.parametrize("name", MODULES)
def test_examples_in_docstrings(name):
    if name.endswith(".huggingface"):
        pytest.importorskip("transformers")
    torch.manual_seed(0)
    flags = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE
    assert doctest.testmod(importlib.import_module(name), optionflags=flags).failed == 0


def test_what_is_public_has_an_example():
    parser = doctest.DocTestParser()
    for name in compsparse_kernels.__all__:
        public = getattr(compsparse_kernels, name)
        if callable(public):
            assert parser.get_examples(public.__doc__ or ""), f"{name} has no runnable example"
