"""Graphs of formulas. ``from_sympy`` is a classmethod of FunctionGraph."""

from collections.abc import Iterable
from string import ascii_lowercase
from typing import TYPE_CHECKING

from compsparse_kernels.graphs.checks import import_extra, listing, require

if TYPE_CHECKING:
    import sympy

    from compsparse_kernels.graphs.function_graph import FunctionGraph


def from_sympy(
    cls,
    expressions: "sympy.Expr | Iterable[sympy.Expr]",
    symbols: "Iterable[sympy.Symbol] | None" = None,
) -> "FunctionGraph":
    """Graph of a formula: each operation is a node of its arguments, and is there once however often it occurs.

    Common subexpressions come from ``sympy.cse``. Constants are part of the node: ``3 * x`` is a node of x. The label
    of a node is its operation on its parents ``a, b, c, ...``, such as ``a*b``, ``3*a`` or ``sin(a)``. Sources are
    named like their symbols.

    Args:
        expressions: scalar expressions, one for each output. (An output that is a symbol, or occurs twice, is a node
            labelled ``a``.)
        symbols: the sources, in order; by default the symbols of the expressions, by name.

    Raises:
        ImportError: where sympy is missing.
        TypeError, ValueError: naming the expression, what was wanted and what came: constants, matrices, integrals and
            what else is no function of scalars.

    Source: Poggio, "It is Compositional Sparsity: a framework for ML", section 2 (functions as compositions).

    Example:
        >>> import sympy
        >>> from compsparse_kernels import FunctionGraph
        >>> x, y, z = sympy.symbols("x y z")
        >>> graph = FunctionGraph.from_sympy(sympy.sin(x * y) + 3 * z * sympy.exp(x * y))
        >>> graph.names[:3], graph.labels
        (('x', 'y', 'z'), ('a*b', 'exp(a)', '3*a*b', 'sin(a)', 'a + b'))
        >>> graph.parents_of(6), graph.effective_dimension
        (array([3], dtype=int32), 2)
    """
    sympy = import_extra("sympy")
    expressions = list(expressions) if isinstance(expressions, Iterable) else [expressions]
    require(len(expressions) > 0, "expressions", "at least one expression", "none")
    for number, expression in enumerate(expressions):
        _check_scalars(sympy, f"expressions[{number}]", expression)
        constant = not expression.free_symbols
        require(not constant, f"expressions[{number}]", "an expression with symbols", repr(expression))
    symbols = _checked_symbols(sympy, symbols, set().union(*(each.free_symbols for each in expressions)))
    shared, reduced = sympy.cse(expressions, symbols=sympy.numbered_symbols(cls=sympy.Dummy))
    nodes = _Nodes(sympy, symbols)
    for symbol, expression in shared:
        nodes.vertices[symbol] = nodes.vertex(expression)
    sinks = []
    for expression in reduced:
        vertex = nodes.vertex(expression)
        sinks.append(nodes.append([vertex], "a") if vertex < len(symbols) or vertex in sinks else vertex)
    names = [symbol.name for symbol in symbols] + [None] * len(nodes.parents)
    return cls(len(symbols), nodes.parents, sinks=sinks, names=names, labels=nodes.labels)


class _Nodes:
    """Nodes as they are found, and the vertex of each expression that has one."""

    def __init__(self, sympy, symbols):
        self.sympy = sympy
        self.vertices = {symbol: vertex for vertex, symbol in enumerate(symbols)}
        self.num_sources = len(symbols)
        self.parents, self.labels = [], []

    def append(self, parents, label) -> int:
        self.parents.append(parents)
        self.labels.append(label)
        return self.num_sources + len(self.parents) - 1

    def vertex(self, expression) -> int:
        if expression not in self.vertices:
            places = {}  # the argument's letter, by parent
            arguments = [self._argument(argument, places) for argument in expression.args]
            label = self.sympy.sstr(expression.func(*arguments))
            self.vertices[expression] = self.append(list(places), label)
        return self.vertices[expression]

    def _argument(self, argument, places):
        if not argument.free_symbols:
            return argument
        return places.setdefault(self.vertex(argument), self.sympy.Symbol(_letter(len(places))))


def _letter(number: int) -> str:
    letter = ascii_lowercase[number % 26]
    return letter if number < 26 else f"{letter}{number // 26}"


def _check_scalars(sympy, argument, expression) -> None:
    """The expression and all that it is made of."""
    kinds = (sympy.Expr, sympy.logic.boolalg.Boolean)
    wanted = "sums, products, powers and functions of scalars (sympy)"
    require(isinstance(expression, kinds), argument, wanted, f"{type(expression).__name__} {expression!r}", TypeError)
    for part in sympy.preorder_traversal(expression):
        if not isinstance(part, kinds) or part.is_commutative is False:
            came = f"{type(part).__name__} {part!r}" + ("" if part is expression else f" in {expression!r}")
            require(False, argument, wanted, came, TypeError)


def _checked_symbols(sympy, symbols, free):
    others = [repr(symbol) for symbol in free if not isinstance(symbol, sympy.Symbol)]
    require(not others, "expressions", "plain symbols", listing(sorted(others)), TypeError)
    if symbols is None:
        return sorted(free, key=sympy.default_sort_key)
    symbols = list(symbols)
    missing = sorted(str(symbol) for symbol in free - set(symbols))
    require(not missing, "symbols", "all symbols of the expressions", f"none for {listing(missing)}")
    return symbols
