"""ThresholdAttention beyond nn.MultiheadAttention: rules, learned thresholds, scores, dropout, nested inputs, stats."""

import copy
import math
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from compsparse_kernels import ThresholdAttention, threshold_attention
from python_tests.attention import CHOICE_NAMES, CHOICES, LEARNABLE, LEARNABLE_NAMES, choice_options

EMBED, HEADS, BATCH, TOKENS = 24, 3, 2, 9
TINY = 1e-30  # a threshold that keeps every key


def attention(dtype=torch.float64, embed=EMBED, heads=HEADS, **options):
    """With random biases, so that queries and keys are not centred."""
    torch.manual_seed(0)
    module = ThresholdAttention(embed, heads, batch_first=True, dtype=dtype, **options)
    nn.init.normal_(module.in_proj_bias)
    nn.init.normal_(module.out_proj.bias)
    return module


def tokens(count=TOKENS, batch=BATCH, dtype=torch.float64, seed=1, embed=EMBED):
    x = torch.randn(batch, count, embed, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    return x.to(dtype).requires_grad_()


def heads_of(module, x):
    """Query, key and value ``[B, H, T, D]``, written out."""
    projected = F.linear(x, module.in_proj_weight, module.in_proj_bias)
    return [part.unflatten(-1, (module.num_heads, -1)).transpose(1, 2) for part in projected.chunk(3, -1)]


def finished(module, attended):
    return module.out_proj(attended.transpose(1, 2).flatten(2))


# ---- rules, weights, window, ALiBi


@pytest.mark.parametrize("choice", CHOICES, ids=CHOICE_NAMES)
def test_every_rule_is_that_of_the_op(choice):
    options = choice_options(choice)
    module, x = attention(**options, window=(4, 2)), tokens()
    output, weights = module(x, x, x, average_attn_weights=False)
    expected, support = threshold_attention(*heads_of(module, x), **options, window=(4, 2), return_support=True)
    assert 0 < support.share_kept < 1
    torch.testing.assert_close(output, finished(module, expected))
    torch.testing.assert_close(weights, support.to_dense())
    torch.testing.assert_close(module.support(x).to_dense(), weights)
    wanted = [x, *module.parameters()]
    grads = [torch.autograd.grad(y.square().sum(), wanted) for y in (output, finished(module, expected))]
    torch.testing.assert_close(*grads)


@pytest.mark.parametrize(
    "heads, slopes",
    [(4, (2**-2, 2**-4, 2**-6, 2**-8)), (1, (2**-8,)), (3, (2**-4, 2**-8, 2**-2)), (8, [2.0**-i for i in range(1, 9)])],
)
def test_alibi(heads, slopes):
    """The published slopes: those of the next lower power of two, then every second one of twice that."""
    module, x = attention(heads=heads, embed=24, alibi=True, threshold=TINY), tokens()
    assert module.alibi_slopes == tuple(slopes)
    q, k, v = heads_of(module, x)
    distance = (torch.arange(TOKENS)[:, None] - torch.arange(TOKENS)).abs()
    bias = -torch.tensor(slopes, dtype=torch.float64)[:, None, None] * distance
    expected = F.scaled_dot_product_attention(q, k, v, attn_mask=bias.expand(BATCH, -1, -1, -1))
    torch.testing.assert_close(module(x, x, x)[0], finished(module, expected))
    own = attention(heads=heads, embed=24, alibi=list(slopes), threshold=TINY)
    assert torch.equal(own(x, x, x)[0], module(x, x, x)[0])


def test_window_with_causality_is_a_sliding_one():
    module, x = attention(window=2, threshold=TINY), tokens()
    weights = module(x, x, x, is_causal=True)[1]
    distance = torch.arange(TOKENS)[:, None] - torch.arange(TOKENS)
    assert torch.equal(weights[0] > 0, (distance >= 0) & (distance <= 2))


# ---- learned thresholds


def learner(rule, weighting, threshold=None, dtype=torch.float64, **options):
    choice = {"shrink": {"shrink": True}, "rectified": {"weights": "rectified"}}[weighting]
    threshold = {"relative": 0.3, "absolute": -0.4}[rule] if threshold is None else threshold
    return attention(dtype, rule=rule, threshold=threshold, learn_threshold=True, **choice, **options)


@pytest.mark.parametrize("choice", LEARNABLE, ids=LEARNABLE_NAMES)
def test_a_learned_threshold_begins_as_the_fixed_one_and_has_a_true_gradient(choice):
    rule, threshold, weighting = choice
    module, x = learner(rule, weighting, threshold), tokens()
    fixed = attention(**choice_options(choice))
    torch.testing.assert_close(module.threshold, torch.full((HEADS,), threshold, dtype=torch.float64))
    torch.testing.assert_close(module(x, x, x)[0], fixed(x, x, x)[0])
    assert 0 < module.support(x).share_kept < 1

    def output(parameter):
        return torch.func.functional_call(module, {"threshold_parameter": parameter}, (x.detach(),) * 3)[0]

    start = module.threshold_parameter.detach() + torch.linspace(-0.1, 0.1, HEADS, dtype=torch.float64)
    assert torch.autograd.gradcheck(output, (start.requires_grad_(),), nondet_tol=0)


def test_heads_learn_their_own():
    """Only the head whose values matter to the loss gets a gradient."""
    module, x = learner("relative", "shrink"), tokens()
    module.out_proj.weight.data[:, EMBED // HEADS :] = 0
    module(x, x, x)[0].square().sum().backward()
    grad = module.threshold_parameter.grad
    assert grad[0] != 0 and grad[1:].abs().max() == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("raw", [-1e6, -40.0, 40.0, 1e6])
def test_a_learned_relative_threshold_stays_inside(raw, dtype):
    """However far the optimizer goes, in every dtype the module may be moved to."""
    module, x = learner("relative", "shrink", dtype=torch.float32).to(dtype), tokens(dtype=dtype)
    nn.init.constant_(module.threshold_parameter, raw)
    threshold = module.threshold
    assert ((threshold > 0) & (threshold < 1)).all()
    assert module(x, x, x)[0].isfinite().all()


def test_learned_thresholds_travel():
    module, x = learner("relative", "rectified"), tokens()
    nn.init.constant_(module.threshold_parameter, 0.7)
    assert "threshold_parameter" in module.state_dict()
    for other in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert torch.equal(other(x, x, x)[0], module(x, x, x)[0])
    other = learner("relative", "rectified")
    assert other.load_state_dict(module.state_dict()) and torch.equal(other.threshold, module.threshold)
    dense = module.to_multihead_attention()
    assert set(dense.state_dict()) == set(module.state_dict()) - {"threshold_parameter"}
    options = {"weights": "rectified", "learn_threshold": True}
    back = ThresholdAttention.from_multihead_attention(dense, threshold=0.2, **options)
    torch.testing.assert_close(back.threshold, torch.full((HEADS,), 0.2), check_dtype=False)
    back.threshold = 0.6
    torch.testing.assert_close(back.threshold, torch.full((HEADS,), 0.6), check_dtype=False)
    assert back.threshold.requires_grad


def test_training_moves_the_threshold_where_the_loss_asks():
    """A target made with a threshold of 0.5, from a beginning at 0.1."""
    target, x = learner("relative", "shrink", 0.5), tokens(32).detach()
    module = learner("relative", "shrink", 0.1)
    optimizer = torch.optim.Adam([module.threshold_parameter], lr=0.1)
    wanted = target(x, x, x, need_weights=False)[0].detach()
    for _ in range(150):
        optimizer.zero_grad()
        F.mse_loss(module(x, x, x, need_weights=False)[0], wanted).backward()
        optimizer.step()
    torch.testing.assert_close(module.threshold.detach(), target.threshold.detach(), rtol=0.02, atol=0)


# ---- distances as scores


def distance_scores(q, k):
    """-scale |q - k|^2 / 2 by its definition."""
    difference = q.unsqueeze(3) - k.unsqueeze(2)
    return -0.5 / math.sqrt(q.shape[-1]) * difference.square().sum(-1)


@pytest.mark.parametrize("mask", ["none", "bool", "float", "causal"])
def test_mahalanobis_scores_are_distances(mask):
    module, x = attention(score="mahalanobis", threshold=TINY), tokens()
    hidden = torch.rand(TOKENS, TOKENS, generator=torch.Generator().manual_seed(3)) < 0.3
    hidden.fill_diagonal_(False)
    hidden = hidden.triu(1) | (torch.ones_like(hidden).triu(1) if mask == "causal" else hidden)
    added = torch.zeros(TOKENS, TOKENS, dtype=torch.float64).masked_fill(hidden & (mask != "none"), -math.inf)
    given = {"none": {}, "bool": {"attn_mask": hidden}, "float": {"attn_mask": added}, "causal": {"is_causal": True}}
    q, k, v = heads_of(module, x)
    expected = finished(module, (distance_scores(q, k) + added).softmax(-1) @ v)
    output = module(x, x, x, **given[mask])[0]
    torch.testing.assert_close(output, expected)
    wanted = [x, *module.parameters()]
    torch.testing.assert_close(*(torch.autograd.grad(y.square().sum(), wanted) for y in (output, expected)))


@pytest.mark.parametrize(
    "weighting, learn",
    [("softmax", False), ("shrink", False), ("shrink", True), ("rectified", False), ("rectified", True)],
)
def test_absolute_thresholds_of_distances(weighting, learn):
    """The support is a ball: -scale |q - k|^2 / 2 >= threshold, with the queries' norms in it."""
    threshold = -1.2
    choice = {"softmax": {}, "shrink": {"shrink": True}, "rectified": {"weights": "rectified"}}[weighting]
    options = {"rule": "absolute", "threshold": threshold, "learn_threshold": learn, **choice}
    module, x = attention(score="mahalanobis", **options), tokens()
    nn.init.zeros_(module.in_proj_bias)
    q, k, v = heads_of(module, x)
    scores = distance_scores(q, k)
    kept = scores >= threshold
    assert 0.1 < kept.double().mean() < 0.9
    height = {"softmax": scores.exp(), "shrink": scores.exp() - math.exp(threshold), "rectified": scores - threshold}
    height = height[weighting] * kept
    expected = finished(module, height / height.sum(-1, keepdim=True).clamp(min=1e-300) @ v)
    output, weights = module(x, x, x, average_attn_weights=False)
    assert torch.equal(weights > 0, kept)
    torch.testing.assert_close(output, expected)
    wanted = [x, module.in_proj_weight]
    torch.testing.assert_close(*(torch.autograd.grad(y.square().sum(), wanted) for y in (output, expected)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_distances_in_lower_precision(dtype):
    """As far off as dense torch in the same dtype, twice over: both round the same scores."""
    module, x = attention(score="mahalanobis", threshold=TINY), tokens()
    exact = module(x, x, x)[0].detach()
    narrow, low = copy.deepcopy(module).to(dtype), x.detach().to(dtype)
    dense = nn.MultiheadAttention(EMBED, HEADS, batch_first=True, dtype=dtype)
    dense.load_state_dict(narrow.state_dict())
    k = heads_of(narrow, low)[1]
    bias = -0.5 / math.sqrt(k.shape[-1]) * k.square().sum(-1)[:, :, None].expand(-1, -1, TOKENS, -1)
    theirs = dense(low, low, low, attn_mask=bias.flatten(0, 1))[0].detach()
    ours = narrow(low, low, low)[0].detach()
    budget = 2 * (theirs.double() - exact).abs().max() + torch.finfo(dtype).eps * exact.abs().max()
    assert (ours.double() - exact).abs().max() <= budget


# ---- dropout


def test_dropout_is_seeded_and_only_in_training():
    module, x = attention(dropout=0.4, threshold=0.3), tokens()
    runs = []
    for _ in range(2):
        torch.manual_seed(5)
        runs.append(module(x, x, x)[0])
    assert torch.equal(*runs) and not torch.equal(module(x, x, x)[0], runs[0])
    torch.manual_seed(5)
    expected = threshold_attention(*heads_of(module, x), threshold=0.3, dropout_p=0.4)
    torch.testing.assert_close(runs[0], finished(module, expected))
    plain = attention(threshold=0.3)
    assert torch.equal(module.eval()(x, x, x)[0], plain(x, x, x)[0])


def test_dropout_goes_to_multihead_attention_and_back():
    dense = nn.MultiheadAttention(EMBED, HEADS, dropout=0.2)
    ours = ThresholdAttention.from_multihead_attention(dense)
    assert ours.dropout == 0.2 and ours.to_multihead_attention().dropout == 0.2


# ---- nested inputs

LENGTHS = (4, 1, 6)


def nested(parts, layout):
    if layout == torch.jagged:
        return torch.nested.nested_tensor_from_jagged(torch.cat(parts), torch.tensor([0, *map(len, parts)]).cumsum(0))
    return torch.nested.as_nested_tensor(parts)


def sequences(lengths=LENGTHS, seed=4):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(n, EMBED, dtype=torch.float64, generator=generator).requires_grad_() for n in lengths]


@pytest.mark.parametrize("layout", [torch.strided, torch.jagged], ids=str)
@pytest.mark.parametrize("options", [{}, {"is_causal": True}], ids=["plain", "causal"])
@pytest.mark.parametrize("score", ["dot", "mahalanobis"])
def test_nested_inputs_are_attended_one_by_one(layout, options, score):
    module, parts = attention(threshold=0.4, score=score, window=(3, 3), alibi=True), sequences()
    x = nested(parts, layout)
    output, weights = module(x, x, x, average_attn_weights=False, **options)
    assert output.is_nested and output.layout == layout
    expected, grads = [], []
    for n, (part, mine) in enumerate(zip(parts, output.unbind(), strict=True)):
        single, single_weights = module(part, part, part, average_attn_weights=False, **options)
        torch.testing.assert_close(mine, single)
        torch.testing.assert_close(weights[n, :, : len(part), : len(part)], single_weights)
        assert not weights[n, :, len(part) :].any() and not weights[n, :, :, len(part) :].any()
        expected.append(single.square().sum())
        grads.append(mine.square().sum())
    wanted = [*parts, *module.parameters()]
    torch.testing.assert_close(*(torch.autograd.grad(sum(each), wanted) for each in (grads, expected)))


@pytest.mark.parametrize("layout", [torch.strided, torch.jagged], ids=str)
def test_nested_cross_attention(layout):
    module, queries, keys = attention(threshold=0.4), sequences(), sequences((3, 5, 2), seed=6)
    q, k = nested(queries, layout), nested(keys, layout)
    output, weights = module(q, k, k)
    for n, (query, key, mine) in enumerate(zip(queries, keys, output.unbind(), strict=True)):
        single, single_weights = module(query, key, key)
        torch.testing.assert_close(mine, single)
        torch.testing.assert_close(weights[n, : len(query), : len(key)], single_weights)


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors:UserWarning")
def test_an_encoder_may_nest_its_input():
    """nn.TransformerEncoder makes nested tensors of padded ones by itself; in both cases padding is 0 at the end."""
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(EMBED, 2, 32, batch_first=True, dtype=torch.float64)
    encoder = nn.TransformerEncoder(layer, 2).eval()
    x, padding = tokens(6, 3).detach(), torch.arange(6) >= torch.tensor(LENGTHS)[:, None]
    with torch.no_grad():
        expected = encoder(x, src_key_padding_mask=padding)
        for layer in encoder.layers:
            layer.self_attn = ThresholdAttention.from_multihead_attention(layer.self_attn, threshold=TINY)
        torch.testing.assert_close(encoder(x, src_key_padding_mask=padding), expected)
    for layer in encoder.layers:
        assert layer.self_attn._last.options["cu_seqlens_q"].tolist() == [0, 4, 5, 11]  # it was nested


# ---- stats


@pytest.mark.parametrize("choice", CHOICES, ids=CHOICE_NAMES)
@pytest.mark.parametrize("causal", [False, True])
def test_stats_are_those_of_dense_torch(choice, causal):
    module, x = attention(**choice_options(choice)), tokens()
    padding = torch.zeros(BATCH, TOKENS, dtype=torch.bool)
    padding[1, 6:] = True
    module(x, x, x, key_padding_mask=padding, is_causal=causal, need_weights=False)
    stats = module.stats()
    visible = ~padding[:, None, None].expand(BATCH, HEADS, TOKENS, TOKENS)
    visible = visible & torch.ones(TOKENS, TOKENS, dtype=torch.bool).tril() if causal else visible
    q, k, _ = heads_of(module, x)
    scores = (q @ k.mT / math.sqrt(q.shape[-1])).masked_fill(~visible, -math.inf)
    kept = module.support(x, key_padding_mask=padding, is_causal=causal).to_mask()
    mass = (scores.softmax(-1) * kept).sum(-1).detach()
    assert 0 < stats.share_kept < 1
    assert stats.share_kept == pytest.approx((kept.sum() / visible.sum()).item())
    assert stats.mass_kept == pytest.approx(mass.mean().item())
    assert stats.keys_kept == pytest.approx(kept.sum().item() / (BATCH * HEADS * TOKENS))
    torch.testing.assert_close(stats.mass_by_head, mass.mean((0, 2)))
    torch.testing.assert_close(stats.share_by_head, kept.sum((0, 2, 3)) / visible.sum((0, 2, 3)), check_dtype=False)


def test_stats_of_queries_that_see_or_keep_nothing():
    module, x = attention(threshold=1e6, rule="absolute"), tokens()
    hidden = torch.zeros(TOKENS, TOKENS, dtype=torch.bool)
    hidden[2] = True
    module(x, x, x, attn_mask=hidden)
    stats = module.stats()
    assert (stats.share_kept, stats.mass_kept, stats.keys_kept) == (0, 0, 0)
    module.rule, module.threshold = "relative", TINY
    module(x, x, x, attn_mask=hidden)
    assert module.stats().mass_kept == pytest.approx(1)  # the row that sees nothing doesn't count


@pytest.mark.parametrize("layout", [torch.strided, torch.jagged], ids=str)
def test_stats_of_nested_inputs(layout):
    module, parts = attention(threshold=0.4), sequences()
    x = nested(parts, layout)
    module(x, x, x, need_weights=False)
    stats, kept = module.stats(), sum(module.support(part).nnz for part in parts)
    assert stats.share_kept == pytest.approx(kept / (HEADS * sum(n * n for n in LENGTHS)))


@pytest.mark.parametrize(
    "options", [{}, {"score": "mahalanobis"}, {"score": "mahalanobis", "rule": "absolute"}], ids=str
)
def test_stats_after_autocast(options):
    """The op computes in float32 there, and so do they, wherever they are asked for."""
    module, x = attention(torch.float32, threshold=0.3 if "rule" not in options else -1.0, **options), tokens()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        module(x.float(), x.float(), x.float(), need_weights=False)
        kept = module.support(x.float())
    assert module.stats().share_kept == pytest.approx(kept.share_kept) and 0 < kept.share_kept < 1


def test_what_stats_keep():
    module, x = attention(threshold=0.4), tokens()
    with pytest.raises(ValueError, match=r"track_stats: expected True and a forward pass .*, got True and none"):
        module.stats()
    module(x, x, x)
    assert not module._last.query.requires_grad
    assert copy.deepcopy(module)._last is None and pickle.loads(pickle.dumps(module))._last is None
    quiet = attention(threshold=0.4, track_stats=False)
    quiet(x, x, x)
    with pytest.raises(ValueError, match=r"track_stats: expected True .*, got False and none"):
        quiet.stats()


def test_compiles_with_everything():
    options = {"shrink": True, "learn_threshold": True, "alibi": True, "window": 5, "score": "mahalanobis"}
    module, x = attention(threshold=0.3, **options), tokens()
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    results = []
    for each in (module, compiled):
        output = each(x, x, x, need_weights=False, is_causal=True)[0]
        results.append((output, *torch.autograd.grad(output.square().sum(), [x, *module.parameters()])))
    torch.testing.assert_close(*results)


@pytest.mark.parametrize("kind", ["bool", "float", "padding", "causal"])
def test_compiles_for_any_length(kind):
    """Sizes that are free, as torch.compile makes them by itself at the second length it meets."""
    module = attention(threshold=0.3)
    compiled = torch.compile(module, fullgraph=True, dynamic=True, backend="aot_eager")
    for count in (7, 9, 12):
        x = tokens(count).detach()
        hidden = torch.ones(count, count, dtype=torch.bool).triu(1)
        padding = torch.zeros(BATCH, count, dtype=torch.bool)
        padding[:, 5:] = True
        added = torch.zeros(count, count, dtype=torch.float64).masked_fill(hidden, -math.inf)
        masks = {"bool": {"attn_mask": hidden}, "float": {"attn_mask": added}, "causal": {"is_causal": True}}
        masks = (masks | {"padding": {"key_padding_mask": padding}})[kind]
        outputs = [each(x, x, x, need_weights=False, **masks)[0] for each in (module, compiled)]
        torch.testing.assert_close(*outputs)


# ---- errors


def make(**options):
    return lambda: ThresholdAttention(EMBED, HEADS, **options)


def call(**changed):
    def attend():
        parts = sequences()
        x = nested(parts, torch.jagged)
        options = {"batch_first": changed.pop("batch_first", True)}
        inputs = [changed.pop(name, x) for name in ("query", "key", "value")]
        ThresholdAttention(EMBED, HEADS, dtype=torch.float64, **options)(*inputs, **changed)

    return attend


def jagged(lengths, width=EMBED):
    return nested([torch.zeros(n, width, dtype=torch.float64) for n in lengths], torch.jagged)


@pytest.mark.parametrize(
    "attempt, error, message",
    [
        (make(learn_threshold=True), ValueError, "learn_threshold: expected False .*shrink=True.*, got True"),
        (make(learn_threshold=True, rule="topk", threshold=3), ValueError, "learn_threshold: expected False"),
        (make(shrink=True, threshold=1.0), ValueError, r"threshold: expected a number in \(0, 1\) .*, got 1.0"),
        (make(rule="topk", threshold=0.5), ValueError, "threshold: expected an int of at least 1"),
        (make(rule="topk", weights="rectified", threshold=2), ValueError, "weights: expected 'softmax'"),
        (make(score="cosine"), ValueError, "score: expected 'dot' or 'mahalanobis', got 'cosine'"),
        (make(window=-2), ValueError, "window: expected an int of at least 0"),
        (make(alibi=(1.0, 2.0)), ValueError, "alibi: expected a bool, or 3 finite slopes, got"),
        (make(alibi="yes"), TypeError, "alibi: expected a bool, or 3 finite slopes, got str"),
        (make(learn_threshold=1), TypeError, "learn_threshold: expected a bool, got int"),
        (make(track_stats="yes"), TypeError, "track_stats: expected a bool, got str"),
        (make(bias=0), TypeError, "bias: expected a bool, got int"),
        (make(batch_first=None), TypeError, "batch_first: expected a bool, got NoneType"),
        (make(kdim=-1), ValueError, "kdim: expected a positive int, got -1"),
        (make(vdim=1.5), TypeError, "vdim: expected a positive int, got float"),
        (call(need_weights=None), TypeError, "need_weights: expected a bool, got NoneType"),
        (call(is_causal="yes"), TypeError, "is_causal: expected a bool, got str"),
        (call(cache={}), TypeError, "cache: expected a KVCache or None, got dict"),
        (make(dropout="x"), TypeError, r"dropout: expected a number in \[0, 1\), got str"),
        (lambda: make(score="mahalanobis")().to_multihead_attention(), ValueError, "score: expected 'dot'"),
        (lambda: make(window=3)().to_multihead_attention(), ValueError, "window: expected None .*, got 3"),
        (lambda: make(alibi=True)().to_multihead_attention(), ValueError, "alibi: expected False"),
        (call(batch_first=False), ValueError, "query: expected a dense tensor, or a nested one .*batch_first=True"),
        (call(is_causal=True, attn_mask=torch.zeros(3, 3)), ValueError, "attn_mask: expected None, with nested tens"),
        (call(key_padding_mask=torch.zeros(3, 6) > 0), ValueError, "key_padding_mask: expected None, with nested"),
        (call(key=torch.zeros(3, 4, EMBED)), ValueError, "key: expected a nested tensor, like query, got 3-D float32"),
        (call(query=torch.zeros(3, 4, EMBED)), ValueError, "key: expected a dense tensor, like query, got a nested"),
        (call(value=jagged((4, 2, 5))), ValueError, "value: expected sequences as long as those of key, got others"),
        (call(key=jagged((4, 2))), ValueError, "key: expected batch 3, like query, got 3-D nested tensor"),
        (call(key=jagged(LENGTHS, 5)), ValueError, r"key: expected 2-D or 3-D tensor \[\.\.\., 24\], got 3-D nested"),
    ],
)
def test_errors(attempt, error, message):
    with pytest.raises(error, match=message):
        attempt()
