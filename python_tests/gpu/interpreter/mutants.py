"""Damages the source of Triton kernels in one place at a time: tests that see no difference prove nothing."""

import ast
import importlib.util
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

NEXT_COMPARISON = {ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt}


@dataclass(frozen=True)
class Mutant:
    kind: str
    line: int
    changed: str  # the expression that took the place of another
    source: str  # of the whole module


def mutants(path: str) -> list[Mutant]:
    """Every single change of the functions that are decorated by ``triton.jit`` in a file."""
    source = Path(path).read_text()
    found = []
    for function in ast.parse(source).body:
        if isinstance(function, ast.FunctionDef) and any(map(_is_jit, function.decorator_list)):
            for node in ast.walk(function):
                found += [_mutant(source, node, kind, changed) for kind, changed in _changes(node)]
    return found


def load(mutant: Mutant, folder: Path) -> ModuleType:
    """The mutant as a module: from a file, as Triton reads the source of kernels again."""
    path = folder / f"mutant_{abs(hash(mutant))}.py"
    path.write_text(mutant.source)
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _is_jit(decorator: ast.expr) -> bool:
    return ast.unparse(decorator) in ("triton.jit", "jit")


def _changes(node: ast.AST) -> Iterator[tuple[str, str]]:
    """(kind, expression that replaces this one)"""
    if isinstance(node, ast.Call):
        yield from _changes_of_call(node)
    elif isinstance(node, ast.BinOp) and isinstance(node.op, ast.BitAnd):
        yield "condition dropped", ast.unparse(node.left)
        yield "condition dropped", ast.unparse(node.right)
    elif isinstance(node, ast.Compare) and type(node.ops[0]) in NEXT_COMPARISON:
        operator = NEXT_COMPARISON[type(node.ops[0])]()
        yield "comparison", ast.unparse(ast.Compare(node.left, [operator], node.comparators))
    elif isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        yield "term dropped", ast.unparse(node.left)


def _changes_of_call(node: ast.Call) -> Iterator[tuple[str, str]]:
    name = ast.unparse(node.func)
    given = {keyword.arg for keyword in node.keywords}
    if "mask" in given:
        yield "mask dropped", _without(node, "mask", "other")
    if "other" in given:
        yield "other dropped", _without(node, "other")
    if name.endswith(".to") and ast.unparse(node.args[0]) == "tl.int64":
        yield "int64 dropped", ast.unparse(node.func.value)
    if name in ("min", "tl.minimum"):
        yield "minimum dropped", ast.unparse(node.args[0])
        yield "minimum dropped", ast.unparse(node.args[1])


def _without(call: ast.Call, *names: str) -> str:
    keywords = [keyword for keyword in call.keywords if keyword.arg not in names]
    return ast.unparse(ast.Call(call.func, call.args, keywords))


def _mutant(source: str, node: ast.expr, kind: str, changed: str) -> Mutant:
    """Brackets keep the place of the new expression among its neighbours."""
    lines = source.encode().splitlines(keepends=True)  # the columns of ast count bytes
    before = b"".join(lines[: node.lineno - 1]) + lines[node.lineno - 1][: node.col_offset]
    after = lines[node.end_lineno - 1][node.end_col_offset :] + b"".join(lines[node.end_lineno :])
    return Mutant(kind, node.lineno, changed, (before + f"({changed})".encode() + after).decode())
