"""What is done with a model's attention from outside: annealing, calibration, the support graph and its picture."""

import copy
import math

import matplotlib
import pytest
import torch
from torch import nn

from compsparse_kernels import FunctionGraph, ThresholdAttention, TransformerBlock
from compsparse_kernels.nn import ThresholdSchedule, calibrate, draw_support_graph, support_graph

matplotlib.use("Agg")
DIM, HEADS, BATCH, TOKENS = 16, 2, 3, 10


class Causal(nn.Module):
    """Blocks that see the past only."""

    def __init__(self, blocks):
        super().__init__()
        self.blocks = nn.ModuleList(blocks)

    def forward(self, x):
        for block in self.blocks:
            x = block(x, is_causal=True)
        return x


def attention(seed=0, dtype=torch.float64, **options):
    torch.manual_seed(seed)
    return ThresholdAttention(DIM, HEADS, batch_first=True, dtype=dtype, **options)


def network(layers=2, dtype=torch.float64, **options):
    torch.manual_seed(0)
    return Causal(TransformerBlock(DIM, HEADS, 2, dtype=dtype, **options) for _ in range(layers))


def tokens(batch=BATCH, count=TOKENS, seed=1, dtype=torch.float64):
    x = torch.randn(batch, count, DIM, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    return (3 * x).to(dtype)


# ---- annealing


@pytest.mark.parametrize(
    "rule, kind, initial, final, wanted",
    [
        ("relative", None, 1e-4, 1e-2, [1e-4, 1e-4, 1e-4, 1e-3, 1e-2, 1e-2]),
        ("relative", "linear", 0.1, 0.3, [0.1, 0.1, 0.1, 0.2, 0.3, 0.3]),
        ("absolute", None, -2.0, 1.0, [-2, -2, -2, -0.5, 1, 1]),
        ("topp", None, 1.0, 0.5, [1, 1, 1, 0.75, 0.5, 0.5]),
    ],
)
def test_a_schedule_reaches_what_it_should(rule, kind, initial, final, wanted):
    model = network(rule=rule, threshold=0.9)
    schedule = ThresholdSchedule(model, initial=initial, final=final, begin=2, end=4, kind=kind)
    seen = [schedule.threshold]
    for _ in range(5):
        seen.append(schedule.step())
        assert all(block.attention.threshold == seen[-1] for block in model.blocks)
    assert seen == pytest.approx(wanted) and seen[-1] == final and seen[0] == initial


def test_a_schedule_goes_on_from_its_state():
    model, other = network(), network()
    first, second = (ThresholdSchedule(each, initial=1e-3, final=0.1, end=10) for each in (model, other))
    for _ in range(4):
        first.step()
    second.load_state_dict(first.state_dict())
    assert other.blocks[0].attention.threshold == model.blocks[0].attention.threshold == first.threshold
    assert second.step() == first.step()


# ---- calibration


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("density", [0.3, 0.5, 0.9, 1.0])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"shrink": True},
        {"rule": "absolute", "threshold": 0.0},
        {"rule": "absolute", "threshold": 0.0, "score": "mahalanobis"},
        {"rule": "absolute", "threshold": 0.0, "score": "mahalanobis", "shrink": True, "learn_threshold": True},
        {"weights": "rectified", "learn_threshold": True, "alibi": True},
    ],
    ids=str,
)
def test_calibration_keeps_the_wanted_share_in_every_layer(options, density, dtype):
    """Of the visible pairs (here 55 of 100), on all batches together, in the model as it is afterwards."""
    model, data = network(dtype=dtype, **options), [tokens(dtype=dtype), tokens(2, 7, seed=2, dtype=dtype)]
    thresholds = calibrate(model, data, density=density)
    visible = HEADS * (BATCH * TOKENS * (TOKENS + 1) // 2 + 2 * 7 * 8 // 2)
    kept = [0.0] * len(model.blocks)
    with torch.no_grad():
        for batch in data:
            model(batch)
            for number, block in enumerate(model.blocks):
                kept[number] += block.attention.stats().keys_kept * HEADS * batch.shape[0] * batch.shape[1]
    # relative with continuous weights stays below 1 strictly, and with float32 a score may fall to the other side
    slack = 1 if dtype == torch.float64 else 2
    assert all(abs(each - round(density * visible)) <= slack + 1e-6 for each in kept), (kept, density * visible)
    assert thresholds == {f"blocks.{n}.attention": block.attention._threshold for n, block in enumerate(model.blocks)}


def test_calibration_keeps_equal_scores_together():
    module, x = attention(), tokens(1)
    x[:, 1::2] = x[:, ::2]  # each key twice
    calibrate(module, x, density=0.33)
    degrees = module.support(x).degree
    assert (degrees % 2 == 0).all() and degrees.sum() >= round(0.33 * HEADS * TOKENS**2)


def test_calibration_leaves_the_rest_alone():
    model, data = network(), tokens()
    model.train()
    model.blocks[0].eval()
    model.blocks[1].attention.track_stats = False
    state = copy.deepcopy(model.state_dict())
    calibrate(model, data, density=0.4)
    assert model.training and not model.blocks[0].training and model.blocks[1].training
    assert not model.blocks[1].attention.track_stats and model.blocks[1].attention._last is None
    assert not any(module._forward_hooks for module in model.modules())
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


# ---- the graph


def test_the_graph_has_the_edges_of_the_support():
    module, x = attention(threshold=0.3), tokens()
    support = module.support(x)
    mask, weights = support.to_mask()[1], support.to_dense()[1]
    graph = support_graph(module, x, example=1)
    assert graph.number_of_nodes() == 2 * TOKENS and 0 < graph.number_of_edges() < TOKENS**2
    for query in range(TOKENS):
        for key in range(TOKENS):
            edge = ((0, key), (1, query))
            assert graph.has_edge(*edge) == bool(mask[:, query, key].any())
            if graph.has_edge(*edge):
                facts = graph.edges[edge]
                assert facts["weight"] == pytest.approx(weights[:, query, key].mean().item())
                assert facts["heads"] == mask[:, query, key].sum() and facts["position"] == key
    one = support_graph(module, x, example=1, head=1)
    assert one.number_of_edges() == mask[1].sum()


def test_the_graph_of_a_causal_model_is_a_function_graph():
    model, x = network(3, threshold=0.3), tokens()
    graph = support_graph(model, x)
    assert all(tail[0] + 1 == head[0] and tail[1] <= head[1] for tail, head in graph.edges)
    found = FunctionGraph.from_networkx(graph)
    assert (found.num_sources, found.num_nodes, found.num_levels) == (TOKENS, 3 * TOKENS, 3)
    assert found.num_edges == graph.number_of_edges()
    # What the first output depends on is the first input alone.
    assert found.parents_of(found.index((1, 0))).tolist() == [found.index((0, 0))]


def test_an_output_depends_only_on_its_ancestors():
    """The graph tells the truth: what is no ancestor of a token may change without changing it."""
    import networkx

    model, x = network(2, threshold=1.0), tokens(1, 24)
    graph = support_graph(model, x, residual=True)
    token = 23
    ancestors = {vertex[1] for vertex in networkx.ancestors(graph, (2, token)) if vertex[0] == 0}
    assert len(ancestors) < 24
    x.requires_grad_()
    grad = torch.autograd.grad(model(x)[0, token].square().sum(), x)[0][0].abs().amax(-1)
    assert {int(n) for n in grad.nonzero()} == ancestors


def test_residual_edges():
    model, x = network(2, threshold=1.0), tokens()
    plain, graph = (support_graph(model, x, residual=residual) for residual in (False, True))
    straight = [((layer, token), (layer + 1, token)) for layer in range(2) for token in range(TOKENS)]
    assert all(graph.edges[edge]["residual"] for edge in straight)
    added = set(graph.edges) - set(plain.edges)
    assert added and added <= set(straight) and all(graph.edges[edge]["heads"] == 0 for edge in added)


def test_cross_attention_has_keys_of_its_own():
    module, query, key = attention(threshold=0.3), tokens(count=4), tokens(count=6, seed=2)
    graph = support_graph(module, (query, key, key))
    assert graph.number_of_nodes() == 4 + 4 + 6
    assert {tail[0] for tail, _ in graph.edges} == {"keys 1"} and {head[0] for _, head in graph.edges} == {1}
    draw_support_graph(graph)


def test_the_picture_shows_each_edge():
    model, x = network(2, threshold=0.3), tokens()
    graph = support_graph(model, x, residual=True)
    ax = draw_support_graph(graph, labels=[f"t{n}" for n in range(TOKENS)])
    kept = sum(1 for *_, heads in graph.edges(data="heads") if heads)
    assert [len(lines.get_segments()) for lines in ax.collections[:2]] == [kept, 2 * TOKENS]
    title = f"10 tokens, 2 layers, {kept} edges, {kept / 20:.3g} a query"
    assert ax.get_title(loc="left") == title
    assert [text.get_text() for text in ax.get_yticklabels()] == [f"t{n}" for n in range(TOKENS)]
    alphas = [row[3] for row in ax.collections[0].get_colors()]
    weights = [weight for *_, weight in graph.edges(data="weight") if weight > 0]
    assert alphas == pytest.approx([0.12 + 0.88 * weight / max(weights) for weight in weights])
    matplotlib.pyplot.close("all")


# ---- errors


def schedule(model=None, **changed):
    return lambda: ThresholdSchedule(model or attention(), **({"initial": 0.1, "final": 0.2, "end": 5} | changed))


LEARNED = {"shrink": True, "learn_threshold": True}


@pytest.mark.parametrize(
    "attempt, error, message",
    [
        (schedule(nn.Linear(2, 2)), ValueError, "model: expected at least one ThresholdAttention, got none"),
        (schedule("x"), TypeError, "model: expected nn.Module, got str"),
        (schedule(attention(**LEARNED)), ValueError, "model: expected thresholds that are not learned"),
        (
            schedule(attention(rule="topk", threshold=2)),
            ValueError,
            "model: expected attention of one rule.*, got topk",
        ),
        (schedule(begin=-1), ValueError, "begin: expected a step of at least 0, got -1"),
        (schedule(end=0), ValueError, "end: expected a step after begin, 0, got 0"),
        (schedule(end=2.5), TypeError, "end: expected an int, got float"),
        (schedule(kind="cubic"), ValueError, "kind: expected 'geometric', 'linear' or None, got 'cubic'"),
        (schedule(initial=0.0), ValueError, "initial: expected a positive number"),
        (schedule(final=math.inf), TypeError, "final: expected a finite number, got inf"),
        (schedule(final=2.0), ValueError, r"threshold: expected a number in \(0, 1\] .*, got 2.0"),
        (lambda: calibrate(attention(), tokens(), density=0), ValueError, r"density: expected a number in \(0, 1\]"),
        (
            lambda: calibrate(attention(), tokens(), density=0.05),
            ValueError,
            "density: expected at least 0.1, a key a query, got 0.05",
        ),
        (lambda: calibrate(attention(), [], density=0.5), ValueError, "data: expected at least one batch, got none"),
        (
            lambda: calibrate(attention(rule="topk", threshold=2), tokens(), density=0.5),
            ValueError,
            "model: expected rules relative or absolute, got 'topk'",
        ),
        (
            lambda: support_graph(torch.compile(attention(), backend="eager"), (tokens(),) * 3),
            ValueError,
            "model: expected one that is not compiled, got a compiled one",
        ),
        (lambda: support_graph(attention(), tokens(), example=3), ValueError, "example: expected one of 3, from 0 on"),
        (lambda: support_graph(attention(), tokens(), head=2), ValueError, "head: expected None, or one of 2, from 0"),
        (lambda: support_graph(attention(), tokens(), head="x"), TypeError, "head: expected an int, got str"),
        (
            lambda: draw_support_graph(support_graph(attention(), tokens()), labels=["a"]),
            ValueError,
            "labels: expected 10, one a token, got 1",
        ),
    ],
)
def test_errors(attempt, error, message):
    with pytest.raises(error, match=message):
        attempt()
