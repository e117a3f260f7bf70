"""Thresholded attention for its kernels, and how near to the float64 reference their results must be."""

from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass
from inspect import signature
from unittest import mock

import torch

from compsparse_kernels.ops.threshold_attention import reference
from compsparse_kernels.ops.threshold_attention import triton as shipped
from compsparse_kernels.ops.threshold_attention.dropout import kept_by_dropout
from compsparse_kernels.testing import assert_within_budget
from python_tests.attention import backward_arguments, op_arguments
from python_tests.gpu.interpreter.cases import PRECISIONS
from python_tests.gpu.interpreter.rounding import to_tf32

HIDDEN = 3  # queries that see nothing
RESULTS = ("out", "row_ptr", "col_idx", "weights", "log_sum", "slope")
WRITTEN = {
    "screen_kernel": ("tiles", "tile_count", "top_column", "top"),
    "decide_kernel": ("kept_tiles", "kept_count", "masks", "total", "log_sum", "slope_out", "degree"),
    "attend_kernel": ("out", "col_idx", "weights"),
    "rows_kernel": ("weight_grad", "score_grad", "cut_grad", "query_grad"),
    "keys_kernel": ("key_grad", "value_grad"),
}
GRADIENTS = ("query_grad", "key_grad", "value_grad", "score_grad", "cut_grad")


@dataclass(frozen=True)
class Case:
    """``integers``: numbers so small that scores are exact, and often equal, at the cut too."""

    queries: int = 37
    keys: int = 70
    width: int = 24
    value_width: int = 20
    batch: int = 2
    heads: int = 2
    kv_heads: int = 1
    rule: str = "relative"
    threshold: float = 0.1
    weighting: str = "softmax"
    precision: str = "ieee"
    bias: tuple[str, tuple[bool, ...]] | None = None  # bool or float, and which dimensions have full size
    padding: bool = False
    alibi: bool = False
    per_query: bool = False  # thresholds
    sequences: int = 0  # cu_seqlens of so many
    is_causal: bool = False
    window: tuple[int, int] = (-1, -1)
    query_offset: int = 0
    dropout_p: float = 0.0
    integers: bool = False
    few_scores: bool = False  # so that many are equal; with larger values, so that sums are rounded
    spoiled: bool = False  # a query and some values are not finite
    hidden: bool = False  # a key that no query sees, and queries that see no key, are NaN; causal
    transposed: bool = False  # inputs as a projection leaves them: [batch, tokens, heads, width] in memory
    seed: int = 0

    @property
    def dtype(self) -> torch.dtype:
        return PRECISIONS[self.precision]

    @property
    def of_equals(self) -> bool:
        """Only a row's equal largest scores survive, and all is exact but the last rounding."""
        halves = self.dtype in (torch.float16, torch.bfloat16) and self.dropout_p == 0 and not self.per_query
        rule = (self.rule, self.weighting, self.threshold) == ("relative", "softmax", 1.0)
        return self.integers and self.bias is None and not self.alibi and halves and rule

    @property
    def dropout_seed(self) -> int:
        return 2**40 + 12345 + self.seed

    def arguments(self) -> tuple:
        """Of the ops threshold_attention and threshold_attention_support."""
        generator = torch.Generator().manual_seed(self.seed)
        draw = _Draw(self, generator)
        tensors = draw.inputs()
        options = {
            "threshold": self.threshold,
            "rule": self.rule,
            "weighting": self.weighting,
            "attn_bias": draw.bias(),
            "key_padding_mask": draw.padding() if self.padding or self.hidden else None,
            "alibi_slopes": torch.rand(self.heads, generator=generator) if self.alibi else None,
            "thresholds": draw.thresholds() if self.per_query else None,
            "is_causal": self.is_causal or self.hidden,
            "window_left": self.window[0],
            "window_right": self.window[1],
            "query_offset": -HIDDEN if self.hidden else self.query_offset,
            "scale": 0.5 if self.integers else self.width**-0.5,
            "dropout_p": self.dropout_p,
            "seed": self.dropout_seed,
        }
        if self.sequences:
            options["cu_seqlens_q"], options["cu_seqlens_k"] = draw.boundaries(self.queries), draw.boundaries(self.keys)
        return op_arguments(*tensors, **options)

    def grad(self) -> torch.Tensor:
        generator = torch.Generator().manual_seed(self.seed + 1)
        drawn = torch.randn(self.batch, self.heads, self.queries, self.value_width, generator=generator)
        drawn = (drawn * 60).round() if self.integers else drawn
        if self.hidden:
            drawn[:, :, :HIDDEN] = torch.nan
        return drawn.to(self.dtype)

    @contextmanager
    def settings(self):
        before = torch.backends.cuda.matmul.allow_tf32
        torch.backends.cuda.matmul.allow_tf32 = self.precision == "tf32"
        try:
            yield
        finally:
            torch.backends.cuda.matmul.allow_tf32 = before


@dataclass(frozen=True)
class _Draw:
    case: Case
    generator: torch.Generator

    def inputs(self) -> list[torch.Tensor]:
        case = self.case
        shapes = (
            (case.batch, case.heads, case.queries, case.width),
            (case.batch, case.kv_heads, case.keys, case.width),
            (case.batch, case.kv_heads, case.keys, case.value_width),
        )
        query, key, value = (self._tensor(*shape) for shape in shapes)
        if case.few_scores:
            query, key = query.clamp(-1, 1), key.clamp(-1, 1)
            key[..., 6:] = 0
            value = torch.randint(-255, 256, value.shape, generator=self.generator).to(case.dtype)
        if case.spoiled:
            query[0, -1, 1, 0] = value[-1, 0, -1, 1] = torch.nan
            value[0, :, 1::3, 2] = torch.inf
        if case.hidden:
            query[:, :, :HIDDEN] = key[:, :, 0] = value[:, :, 0] = torch.nan
        return [query, key, value]

    def _tensor(self, *shape: int) -> torch.Tensor:
        drawn = torch.randn(shape, generator=self.generator) * 1.5
        drawn = (drawn.round() if self.case.integers else drawn).to(self.case.dtype)
        return drawn.transpose(1, 2).contiguous().transpose(1, 2) if self.case.transposed else drawn

    def padding(self) -> torch.Tensor:
        mask = torch.rand(self.case.batch, self.case.keys, generator=self.generator) < 0.3
        mask[:, 0] |= self.case.hidden
        return mask

    def bias(self) -> torch.Tensor | None:
        case = self.case
        if case.bias is None:
            return None
        kind, full = case.bias
        shape = (case.batch, case.heads, case.queries, case.keys)
        shape = [size if whole else 1 for size, whole in zip(shape, full, strict=True)]
        if kind == "bool":
            return torch.rand(shape, generator=self.generator) < 0.7
        hidden = torch.rand(shape, generator=self.generator) < 0.2
        return torch.randn(shape, generator=self.generator).masked_fill(hidden, -torch.inf).to(case.dtype)

    def thresholds(self) -> torch.Tensor:
        case = self.case
        drawn = torch.rand(case.batch, 1, case.queries, generator=self.generator, dtype=torch.float64)
        return drawn.clamp(min=1e-3) if case.rule == "relative" else drawn * 2 - 0.5

    def boundaries(self, tokens: int) -> torch.Tensor:
        inner = torch.randint(0, tokens + 1, (self.case.sequences - 1,), generator=self.generator)
        return torch.cat([torch.tensor([0]), inner.sort().values, torch.tensor([tokens])])


def check(
    case: Case, run: Callable[[str, tuple], object], arguments: tuple | None = None, backward: bool = True
) -> dict:
    """``run(op, arguments)``, with an op of RESULTS or GRADIENTS, is within the budget; returns all it computed.

    Dense torch, whose error sets the budget, is the reference in the case's own dtype, given the exact support.
    """
    arguments = arguments or case.arguments()
    with case.settings():
        ours = dict(zip(RESULTS, run("threshold_attention_support", arguments), strict=True))
    wide = tuple(map(_wide, arguments))
    exact = dict(zip(RESULTS, reference.threshold_attention_support(*wide), strict=True))
    assert torch.equal(ours["row_ptr"], exact["row_ptr"]), f"{case}: another number of survivors"
    assert torch.equal(ours["col_idx"], exact["col_idx"]), f"{case}: other survivors"
    assert ours["out"].dtype == case.dtype and ours["col_idx"].dtype == torch.int32
    narrow = tuple(map(_as_multiplied(case), arguments))
    dense, sizes = _on_support(exact, narrow)
    if case.precision == "tf32":
        dense["out"] = _times_values(case, dense, narrow[2])
    if case.spoiled:
        for results, given in ((exact, wide), (dense, narrow)):
            results["out"] = _of_kept_values(case, results, given[2])
    _compare(case, ours, dense, exact, RESULTS[:1] + RESULTS[3:], _magnitudes(case, wide, exact, sizes))
    if backward:
        grad = case.grad()
        tensors = tuple(one.nan_to_num() if case.hidden else one for one in (grad, *arguments[:3]))  # it has no weight
        given = backward_arguments(grad, arguments, [ours[name] for name in RESULTS[1:]])
        with case.settings():
            gradients = dict(zip(GRADIENTS, run("threshold_attention_backward", given), strict=True))
        found, true = (_gradients(tensors, arguments, one, change) for one, change in ((dense, _same), (exact, _wide)))
        for name, like in zip(GRADIENTS, arguments[:3], strict=False):
            assert gradients[name].dtype == like.dtype and gradients[name].shape == like.shape
        _compare(case, gradients, found, true, GRADIENTS, _gradient_magnitudes(tensors, arguments, exact, case))
        exact |= true
        ours |= gradients
    if case.of_equals:
        _assert_rounded_once(case, ours, exact, arguments[2])
    return ours


def _assert_rounded_once(case, ours, exact, value):
    """Weights of equal scores are rounded to the dtype of V; sums of integers are exact, and then rounded once. So are
    gradients of rows that keep a power of two of keys, whose weights are exact, and of keys that only these keep."""
    rounded = exact | {"weights": exact["weights"].to(case.dtype).double()}
    right = {"out": _of_kept_values(case, rounded, value.double())}
    skipped = {"out": torch.zeros(case.batch, case.heads, case.queries, dtype=torch.bool)}
    if "query_grad" in ours:
        right = exact | right
        skipped |= _kept_inexactly(case, exact)
    for name, some in skipped.items():
        parts = (one[name][~some].to(case.dtype).nan_to_num() for one in (ours, right))
        assert torch.equal(*parts), f"{name} of {case}: not rounded once"


def _kept_inexactly(case, exact):
    """Rows with weights that are no powers of two, and keys that these keep."""
    rows, degree = _entry_rows(exact), exact["row_ptr"].diff()
    inexact = (degree & (degree - 1)) != 0
    heads = rows // case.queries
    owners = heads // case.heads, heads % case.heads // (case.heads // case.kv_heads), exact["col_idx"].long()
    by_key = torch.zeros(case.batch, case.kv_heads, case.keys, dtype=torch.bool)
    by_key[tuple(owner[inexact[rows]] for owner in owners)] = True
    by_row = inexact.view(case.batch, case.heads, case.queries)
    return {"query_grad": by_row, "key_grad": by_key, "value_grad": by_key}


def _gradients(tensors, arguments, support, change):
    grad, *inputs = map(change, tensors)
    given = backward_arguments(grad, (*inputs, *arguments[3:]), [support[name] for name in RESULTS[1:]])
    return dict(zip(GRADIENTS, reference.threshold_attention_backward(*given), strict=True))


def _compare(case, ours, dense, exact, names, magnitudes):
    """What is undefined in float64 is undefined, and the rest within the budget."""
    for name in names:
        finite = exact[name].isfinite() & dense[name].isfinite()
        assert torch.equal(ours[name].isfinite(), finite), f"{name} of {case}: other numbers are finite"
        assert torch.equal(ours[name].isnan(), exact[name].isnan()), f"{name} of {case}: other numbers are undefined"
        magnitude = magnitudes.get(name)
        if magnitude is not None:
            # Sums are in float32 and rounded once to the dtype: what no order of summation can avoid.
            shrink = 1 if name == "out" else torch.finfo(torch.float32).eps / torch.finfo(ours[name].dtype).eps
            magnitude = magnitude if shrink == 1 else exact[name].abs() + shrink * magnitude
        parts = (one[name].masked_fill(~finite, 0) for one in (ours, dense, exact))
        magnitude = None if magnitude is None else magnitude.masked_fill(~finite, 0)
        assert_within_budget(*parts, f"{name} of {case}", magnitude)


def _on_support(exact, arguments):
    """The reference on the support that float64 has, and the size of the largest score kept of each row."""
    entries = _entry_rows(exact)
    sizes = torch.zeros(len(exact["row_ptr"]) - 1, dtype=torch.float64)

    def kept(scores, *_):
        flat = scores.flatten(0, 2)
        mask = torch.zeros(flat.shape, dtype=torch.bool)
        mask.index_put_((entries, exact["col_idx"].long()), torch.tensor(True))
        if flat.numel():
            sizes.copy_(flat.abs().masked_fill(~mask, 0).amax(-1))
        return mask.view(scores.shape)

    with mock.patch.object(reference, "_kept", kept):
        return dict(zip(RESULTS, reference.threshold_attention_support(*arguments), strict=True)), sizes


def _times_values(case, dense, value):
    """What a second product in tf32 gives: its first operand are the weights, rounded as well."""
    weights = dense["weights"]
    rows = _entry_rows(dense)
    columns = dense["col_idx"].long()
    if case.dropout_p:
        weights = weights * kept_by_dropout(rows, columns, case.dropout_p, case.dropout_seed) / (1 - case.dropout_p)
    shape = (case.batch, case.heads, case.queries, case.keys)
    shares = torch.zeros(shape).flatten(0, 2).index_put((rows, columns), torch.from_numpy(to_tf32(weights.numpy())))
    return shares.view(shape) @ value.repeat_interleave(case.heads // case.kv_heads, 1)


def _of_kept_values(case, results, value):
    """Rows of V count for those alone who keep them: 0 times infinity would be NaN for the others."""
    rows = _entry_rows(results)
    heads = value.repeat_interleave(case.heads // case.kv_heads, 1).flatten(0, 1)
    terms = results["weights"][:, None] * heads[rows // case.queries, results["col_idx"].long()]
    sums = terms.new_zeros(len(results["row_ptr"]) - 1, case.value_width).index_add(0, rows, terms)
    return sums.view(results["out"].shape).to(value.dtype)


def _magnitudes(case, wide, exact, sizes):
    """Sums of the sizes of what is added up. With scores as large as ``sizes`` a height u is a difference of at most

    u (1 + 2 size)    (u + 2 r U) (1 + 2 size)    u + 4 size    for softmax, shrink, rectified (names of reference.py).
    """
    given = dict(zip(signature(reference.threshold_attention_support).parameters, wide, strict=True))
    rows = _entry_rows(exact)
    weights, slope = exact["weights"], exact["slope"].flatten()
    if case.weighting == "rectified":
        heights = weights + 4 * (slope * sizes)[rows]
    else:
        heights = (weights + 2 * slope[rows]) * (1 + 2 * sizes[rows])
    total = torch.zeros_like(slope).index_add(0, rows, heights)
    return {
        "out": reference.threshold_attention(*(given | {"value": given["value"].abs().nan_to_num(posinf=0)}).values()),
        "weights": heights + weights * total[rows],
        "slope": (slope * (total + 1 + 2 * sizes)).view(exact["slope"].shape),
    }


def _gradient_magnitudes(tensors, arguments, exact, case):
    """Of each gradient, the formulas of reference.py with every sum and difference a sum of sizes."""
    grad, query, key, value = (_wide(tensor).abs() for tensor in tensors)
    key, value = (tensor.repeat_interleave(case.heads // case.kv_heads, 1) for tensor in (key, value))
    given = dict(zip(signature(reference.threshold_attention_support).parameters, arguments, strict=True))
    rows = _entry_rows(exact)
    kept = rows, exact["col_idx"].long()
    shape = (*query.shape[:3], key.shape[2])

    def spread(entries):
        return torch.zeros(shape, dtype=torch.float64).flatten(0, 2).index_put(kept, entries).view(shape)

    def row_sum(entries):
        return torch.zeros(len(exact["row_ptr"]) - 1, dtype=torch.float64).index_add(0, rows, entries)

    factor = 1 / (1 - case.dropout_p)
    weights, slope = exact["weights"], exact["slope"].flatten()
    of_weight = factor * (grad @ value.mT).flatten(0, 2)[kept]
    of_weight = of_weight + row_sum(weights * of_weight)[rows]
    sigma = {"softmax": weights, "shrink": weights + slope[rows], "rectified": slope[rows]}[case.weighting]
    of_score = sigma * of_weight
    if case.rule == "relative" and case.weighting != "softmax":
        of_score = of_score + row_sum(of_score)[rows] * (weights == spread(weights).amax(-1).flatten()[rows])
    group = (case.kv_heads, case.heads // case.kv_heads)
    return {
        "query_grad": given["scale"] * spread(of_score) @ key,
        "key_grad": (given["scale"] * spread(of_score).mT @ query).unflatten(1, group).sum(2),
        "value_grad": (factor * spread(weights).mT @ grad).unflatten(1, group).sum(2),
        "score_grad": of_score,
        "cut_grad": (slope * row_sum(of_weight)).view(shape[:3]),
    }


def _entry_rows(results):
    """The row of each entry of the support."""
    row_ptr = results["row_ptr"]
    return torch.arange(len(row_ptr) - 1).repeat_interleave(row_ptr.diff())


def _same(given):
    return given


def _wide(given):
    return given.double() if isinstance(given, torch.Tensor) and given.is_floating_point() else given


def _as_multiplied(case):
    """Dense torch on a CPU has no tf32; on rounded inputs it computes the same."""

    def change(given):
        cut = case.precision == "tf32" and isinstance(given, torch.Tensor) and given.dtype == torch.float32
        return torch.from_numpy(to_tf32(given.numpy())) if cut and given.dim() == 4 else given

    return change


def on_cpu(op: str, arguments: tuple):
    """Runs an op's launcher where it is: in the interpreter, or with launches that are emulated."""
    return getattr(shipped, op)(*arguments)
