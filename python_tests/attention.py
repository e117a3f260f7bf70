"""What the tests of thresholded attention share: rules, inputs, rows by definition, dense torch, the error budget."""

import math
from inspect import signature

import torch

from compsparse_kernels import threshold_attention
from compsparse_kernels.ops.backends import cpu_isa
from compsparse_kernels.ops.threshold_attention import reference
from compsparse_kernels.ops.threshold_attention.dropout import kept_by_dropout
from compsparse_kernels.testing import attention_inputs, attention_weights

# Every rule with every weighting that it has.
CHOICES = [
    (rule, threshold, weighting)
    for rule, threshold in (("relative", 0.3), ("absolute", 0.4))
    for weighting in ("softmax", "shrink", "rectified")
] + [("topk", 3.0, "softmax"), ("topp", 0.7, "softmax"), ("entmax", 1.5, "softmax"), ("entmax", 2.0, "softmax")]
CHOICE_NAMES = [f"{rule}-{threshold:g}-{weighting}" for rule, threshold, weighting in CHOICES]
LEARNABLE = [choice for choice in CHOICES if choice[2] != "softmax"]
LEARNABLE_NAMES = [f"{rule}-{weighting}" for rule, _, weighting in LEARNABLE]

_HAS_KERNELS = torch._C._dispatch_has_kernel_for_dispatch_key("compsparse::threshold_attention", "CPU")
NO_KERNELS = None if cpu_isa() and _HAS_KERNELS else "compiled kernels of threshold_attention are not there"

_DEFAULTS = {
    "threshold": 0.3,
    "rule": "relative",
    "weighting": "softmax",
    "is_causal": False,
    "window_left": -1,
    "window_right": -1,
    "query_offset": 0,
    "scale": 0.7,
    "dropout_p": 0.0,
    "seed": 0,
}


def op_arguments(query, key, value, **options):
    """The arguments of the ops threshold_attention and threshold_attention_support, in their order."""
    names = list(signature(reference.threshold_attention_support).parameters)[3:]
    assert set(options) <= set(names), set(options) - set(names)
    return (query, key, value, *((_DEFAULTS | options).get(name) for name in names))


def backward_arguments(grad, arguments, support):
    """The arguments of threshold_attention_backward after these of the forward; ``support`` as the op returns it."""
    given = dict(zip(signature(reference.threshold_attention_support).parameters, arguments, strict=True))
    row_ptr, col_idx, weights, _, slope = support
    names = ("threshold", "rule", "weighting", "scale", "dropout_p", "seed")
    return (grad, *arguments[:3], row_ptr, col_idx, weights, slope, *(given[name] for name in names))


def row_by_definition(scores, rule, threshold, weighting):
    """Support (positions among the given scores) and weights of one row of float64 scores, all of visible keys."""
    scores = [float(score) for score in scores]
    if not scores:
        return [], []
    top = max(scores)
    if rule == "entmax":
        return _entmax_by_bisection(scores, threshold)
    if rule == "relative":
        cut = top + math.log(threshold)
    elif rule == "absolute":
        cut = threshold
    else:
        cut = _cut_of_the_strongest(scores, rule, threshold)
    kept = [j for j, score in enumerate(scores) if score >= cut]
    if weighting == "softmax":
        heights = [math.exp(scores[j] - top) for j in kept]
    elif weighting == "shrink":
        heights = [math.exp(scores[j]) - math.exp(cut) for j in kept]
    else:
        heights = [scores[j] - cut for j in kept]
    total = sum(heights)
    return kept, [height / total if total > 0 else 0.0 for height in heights]


def _cut_of_the_strongest(scores, rule, threshold):
    """The least score of the fewest strongest keys that are ``threshold`` many, or have that mass."""
    ordered = sorted(scores, reverse=True)
    if rule == "topk":
        return ordered[min(int(threshold), len(ordered)) - 1]
    masses = [math.exp(score - ordered[0]) for score in ordered]
    count = 1
    while count < len(ordered) and (sum(masses[:count]) < threshold * sum(masses) or threshold == 1):
        count += 1
    return ordered[count - 1]


def _entmax_by_bisection(scores, alpha):
    """The tau at which the weights add up to 1, halving an interval; nothing is sorted."""

    top = max(scores)

    def weights(tau):
        return [max((alpha - 1) * (score - top) - tau, 0.0) ** (1 / (alpha - 1)) for score in scores]

    low, high = -1.0, 0.0
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (middle, high) if sum(weights(middle)) >= 1 else (low, middle)
    kept = [j for j, weight in enumerate(weights(low)) if weight > 0]
    return kept, [weights(low)[j] for j in kept]


def run(tensors, bias=None, thresholds=None, **options):
    """Output, support and the gradients of a fixed loss for query, key, value, a float bias and learned thresholds."""
    wanted = [tensor.detach().requires_grad_() for tensor in tensors]
    leaves = list(wanted)
    if bias is not None and bias.is_floating_point():
        wanted.append(bias := bias.detach().requires_grad_())
    if thresholds is not None:
        wanted.append(thresholds := thresholds.detach().requires_grad_())
        options = options | {"threshold": thresholds}
    out, support = threshold_attention(*leaves, attn_bias=bias, return_support=True, **options)
    return out.detach(), support, torch.autograd.grad(out, wanted, loss_of(out))


def loss_of(out):
    """A gradient of the output that every dtype holds exactly."""
    grid = (torch.cos(torch.arange(out.numel(), dtype=torch.float64)) * 64).round() / 64
    return grid.view(out.shape).to(out.dtype)


def dense(tensors, mask, bias=None, thresholds=None, threshold=None, rule="relative", weights="softmax", **options):
    """Output, weights and gradients of dense torch on the same problem, with the support given."""
    wanted = [tensor.detach().requires_grad_() for tensor in tensors]
    query, key, value = wanted
    group = query.shape[1] // key.shape[1]
    scores = (options.get("scale") or query.shape[-1] ** -0.5) * query @ key.repeat_interleave(group, 1).mT
    if bias is not None and bias.is_floating_point():
        wanted.append(bias.detach().to(query.dtype).requires_grad_())
        scores = scores + wanted[-1]
    if options.get("alibi_slopes") is not None:
        added = alibi(options["alibi_slopes"], *mask.shape[2:], options.get("query_offset", 0))
        scores = scores + added.to(scores.dtype)
    if thresholds is not None:
        wanted.append(thresholds.detach().requires_grad_())
        shape = (-1, 1, 1) if thresholds.dim() == 1 else thresholds.shape
        threshold = wanted[-1].view(shape).to(query.dtype)
    weights = attention_weights(scores, mask, threshold, rule, "shrink" if options.get("shrink") else weights)
    shares = weights
    if options.get("dropout_p"):
        rows = torch.arange(mask[..., 0].numel()).view(*mask.shape[:3], 1).expand(mask.shape)
        columns = torch.arange(mask.shape[3]).expand(mask.shape)
        stays = kept_by_dropout(rows, columns, options["dropout_p"], options["seed"])
        shares = weights * stays / (1 - options["dropout_p"])
    out = shares @ value.repeat_interleave(group, 1)
    return out.detach(), weights.detach(), *torch.autograd.grad(out, wanted, loss_of(out))


def alibi(slopes, queries, keys, offset=0):
    """float64 ``[H, Tq, Tk]``"""
    distance = (torch.arange(queries)[:, None] + offset - torch.arange(keys)).abs()
    return -slopes.double()[:, None, None] * distance


def dense_errors(tensors, mask, bias=None, thresholds=None, **options):
    """Largest errors of dense torch in the dtype of the tensors; in float64, where nothing exact is at hand, those of
    float32 scaled down."""
    dtype = torch.float32 if tensors[0].dtype == torch.float64 else tensors[0].dtype
    narrow = [tensor.to(dtype) for tensor in tensors]
    wide = [tensor.double() for tensor in narrow]
    pairs = zip(
        dense(narrow, mask, bias, thresholds, **options), dense(wide, mask, bias, thresholds, **options), strict=True
    )
    ratio = torch.finfo(tensors[0].dtype).eps / torch.finfo(dtype).eps
    return [(result.double() - truth).abs().max().item() * ratio for result, truth in pairs]


def check(tensors, bias=None, thresholds=None, **options):
    """Support equal to the reference's in float64; errors within the budget of compsparse_kernels.testing."""
    out, support, grads = run(tensors, bias, thresholds, **options)
    added = bias is not None and bias.is_floating_point()
    names = ["out", "weights", "dq", "dk", "dv"] + ["db"] * added + ["dt"] * (thresholds is not None)
    ours = dict(zip(names, (out, support.to_dense(), *grads), strict=True))
    exact = check_within_budget(ours, tensors, bias, thresholds, **options)
    assert torch.equal(support.to_mask(), exact.to_mask())
    return support


def check_within_budget(ours, tensors, bias=None, thresholds=None, **options):
    """Results by their names against the reference in float64, whose support it returns."""
    added = bias is not None and bias.is_floating_point()
    wide = [tensor.double() for tensor in tensors]
    wide_bias = bias.double() if added else bias
    exact_out, exact_support, exact_grads = run(wide, wide_bias, thresholds, backend="reference", **options)
    names = ["out", "weights", "dq", "dk", "dv"] + ["db"] * added + ["dt"] * (thresholds is not None)
    exact = (exact_out, exact_support.to_dense(), *exact_grads)
    budgets = dense_errors(tensors, exact_support.to_mask(), bias, thresholds, **options)
    sizes = magnitudes(wide, wide_bias, thresholds, exact_support.to_dense(), **options)
    roundoff = torch.finfo(tensors[0].dtype).eps
    factor = 3 if tensors[0].dtype == torch.float64 else 2  # in float64 the truth has an error of its own
    for name, truth, budget in zip(names, exact, budgets, strict=True):
        if name not in ours:
            continue
        error, size = (ours[name].double() - truth).abs().max().item(), sizes[name].max().item()
        assert error <= factor * budget + roundoff * size, (name, error, budget, size)
    return exact_support


def magnitudes(tensors, bias, thresholds, shares, **options):
    """The sum of the absolute values of the terms that each result is a sum of, in float64."""
    full = torch.zeros(shares.shape, dtype=torch.float64)
    if bias is not None:
        full = full + bias if bias.is_floating_point() else full.masked_fill(~bias, -torch.inf)
    per_query = thresholds
    if thresholds is not None:
        shape = (-1, 1, 1) if thresholds.dim() == 1 else thresholds.shape
        per_query = thresholds.double().view(shape).expand(*shares.shape[:3], 1)
    out, _, grads = run(tensors, full, per_query, backend="reference", **options)
    of_scores, of_thresholds = grads[3].abs(), grads[4:]
    query, key, value = (tensor.abs() for tensor in tensors)
    kv_heads, group = key.shape[1], query.shape[1] // key.shape[1]
    scale = abs(options.get("scale") or query.shape[-1] ** -0.5)
    sizes = {"out": shares / (1 - options.get("dropout_p", 0)) @ value.repeat_interleave(group, 1), "weights": shares}
    sizes["dq"] = scale * of_scores @ key.repeat_interleave(group, 1)
    sizes["dk"] = (scale * of_scores.mT @ query).unflatten(1, (kv_heads, group)).sum(2)
    sizes["dv"] = (shares.mT @ loss_of(out).abs()).unflatten(1, (kv_heads, group)).sum(2)
    if bias is not None and bias.is_floating_point():
        sizes["db"] = of_scores.sum_to_size(bias.shape)
    if thresholds is not None:
        rows = of_thresholds[0].abs()
        sizes["dt"] = rows.sum((0, 2, 3)) if thresholds.dim() == 1 else rows.sum_to_size(thresholds.shape)
    return sizes


def whole_inputs(*sizes, dtype=torch.float32, seed=0, kv_heads=None):
    """Query and key of small whole numbers, and any values. With the scale 3 / 8 and biases of multiples of it scores
    are exact in every dtype, many are equal, and none is near log(0.3), 0.4 or a tau of entmax: no rounding decides."""
    query, key, value = attention_inputs(*sizes, kv_heads=kv_heads, dtype=torch.float32, seed=seed)
    return [tensor.to(dtype) for tensor in (query.round(), key.round(), value)]


def choice_options(choice):
    """Arguments of threshold_attention for one of CHOICES."""
    rule, threshold, weighting = choice
    options = {"rule": rule, "threshold": int(threshold) if rule == "topk" else threshold}
    return options | {"softmax": {}, "shrink": {"shrink": True}, "rectified": {"weights": "rectified"}}[weighting]
