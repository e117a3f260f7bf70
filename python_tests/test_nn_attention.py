"""ThresholdAttention against nn.MultiheadAttention."""

import copy
import io
import math
import pickle

import pytest
import torch
from torch import nn

from compsparse_kernels import AttentionSupport, ThresholdAttention, prune

EMBED, HEADS, BATCH, QUERIES, KEYS = 24, 3, 4, 7, 9
TINY = 1e-30  # a threshold that keeps every key


def pair(dtype=torch.float64, **options):
    """A dense layer with random biases, and ours with the same parameters and a threshold that keeps every key."""
    torch.manual_seed(0)
    dense = nn.MultiheadAttention(EMBED, HEADS, dtype=dtype, **options)
    if dense.in_proj_bias is not None:
        nn.init.normal_(dense.in_proj_bias)
        nn.init.normal_(dense.out_proj.bias)
    return dense, ThresholdAttention.from_multihead_attention(dense, threshold=TINY)


def inputs(batch_first=False, batched=True, kdim=EMBED, vdim=EMBED, dtype=torch.float64):
    torch.manual_seed(1)
    shapes = ((QUERIES, EMBED), (KEYS, kdim), (KEYS, vdim))
    if batched:
        shapes = [(BATCH, *shape) if batch_first else (shape[0], BATCH, shape[1]) for shape in shapes]
    return [torch.randn(shape, dtype=dtype, requires_grad=True) for shape in shapes]


def assert_same(ours, dense, x, **options):
    """Output, weights and every gradient."""
    results = []
    for module in (ours, dense):
        module.zero_grad()
        output, weights = module(*x, **options)
        grads = torch.autograd.grad(output.square().sum(), [*x, *module.parameters()], allow_unused=True)
        results.append((output, weights, *grads))
    for mine, expected in zip(*results, strict=True):
        if expected is None:
            assert mine is None
            continue
        tolerance = {} if expected.dtype == torch.float64 else {"rtol": 1e-4, "atol": 1e-5}
        torch.testing.assert_close(mine, expected, **tolerance)


def masks_of(kind, dtype=torch.float64):
    """No row has every key masked: there torch gives NaN."""
    generator = torch.Generator().manual_seed(2)
    attn = torch.rand(QUERIES, KEYS, generator=generator) < 0.4
    heads = torch.rand(BATCH * HEADS, QUERIES, KEYS, generator=generator) < 0.4
    padding = torch.rand(BATCH, KEYS, generator=generator) < 0.4
    for mask in (attn, heads, padding):
        mask[..., 0] = False

    def added(mask):
        return torch.randn(mask.shape, generator=generator, dtype=dtype).masked_fill(mask, -math.inf)

    return {
        "none": {},
        "bool": {"attn_mask": attn},
        "bool per head": {"attn_mask": heads},
        "float": {"attn_mask": added(attn)},
        "float per head": {"attn_mask": added(heads)},
        "padding": {"key_padding_mask": padding},
        "float padding": {"key_padding_mask": added(padding)},
        "bool, padding": {"attn_mask": attn, "key_padding_mask": padding},
        "float per head, float padding": {"attn_mask": added(heads), "key_padding_mask": added(padding)},
        "causal": {"attn_mask": torch.ones(QUERIES, KEYS, dtype=torch.bool).triu(1), "is_causal": True},
    }[kind]


MASKS = ("none", "bool", "bool per head", "float", "float per head", "padding", "float padding", "bool, padding")
MASKS += ("float per head, float padding", "causal")


# ---- the dense limit


@pytest.mark.parametrize("kind", MASKS)
@pytest.mark.parametrize("batch_first", [False, True])
def test_keeping_every_key_is_multihead_attention(kind, batch_first):
    dense, ours = pair(batch_first=batch_first)
    assert_same(ours, dense, inputs(batch_first), **masks_of(kind))


@pytest.mark.parametrize("kind", ["none", "bool, padding", "float padding"])
def test_float32(kind):
    dense, ours = pair(torch.float32)
    assert_same(ours, dense, inputs(dtype=torch.float32), **masks_of(kind, torch.float32))


@pytest.mark.parametrize("options", [{"kdim": 10}, {"vdim": 11}, {"kdim": 10, "vdim": 11, "bias": False}], ids=str)
def test_separate_widths(options):
    dense, ours = pair(**options)
    assert ours.in_proj_weight is None
    assert_same(ours, dense, inputs(kdim=options.get("kdim", EMBED), vdim=options.get("vdim", EMBED)))


def test_without_bias():
    dense, ours = pair(bias=False)
    assert ours.in_proj_bias is None and ours.out_proj.bias is None
    assert_same(ours, dense, inputs())


@pytest.mark.parametrize("kind", ["none", "bool", "float", "causal"])
@pytest.mark.parametrize("batch_first", [False, True])
def test_unbatched(kind, batch_first):
    dense, ours = pair(batch_first=batch_first)
    assert_same(ours, dense, inputs(batched=False), **masks_of(kind))
    padding = masks_of("padding")["key_padding_mask"][0]
    assert_same(ours, dense, inputs(batched=False), key_padding_mask=padding)
    per_head = masks_of("bool per head")["attn_mask"][:HEADS]
    assert_same(ours, dense, inputs(batched=False), attn_mask=per_head)


@pytest.mark.parametrize("average", [True, False])
@pytest.mark.parametrize("need_weights", [True, False])
@pytest.mark.parametrize("batched", [True, False])
def test_weights(average, need_weights, batched):
    dense, ours = pair()
    options = {"need_weights": need_weights, "average_attn_weights": average}
    x = inputs(batched=batched)
    assert_same(ours, dense, x, **options)
    weights = ours(*x, **options)[1]
    if need_weights:
        assert weights.shape == (BATCH,) * batched + (() if average else (HEADS,)) + (QUERIES, KEYS)
        assert not weights.requires_grad


def test_self_attention_in_one_projection():
    dense, ours = pair()
    x = inputs()[0]
    output, weights = ours(x, x, x)
    expected, expected_weights = dense(x, x, x)
    torch.testing.assert_close((output, weights), (expected, expected_weights.detach()))
    torch.testing.assert_close(ours(x, x.clone(), x.clone())[0], output)


def test_causal_needs_no_mask_and_applies_beside_one():
    dense, ours = pair()
    x = inputs()[0]
    causal = torch.ones(QUERIES, QUERIES, dtype=torch.bool).triu(1)
    window = causal | torch.ones(QUERIES, QUERIES, dtype=torch.bool).tril(-3)
    torch.testing.assert_close(ours(x, x, x, is_causal=True)[0], dense(x, x, x, attn_mask=causal)[0])
    torch.testing.assert_close(
        ours(x, x, x, attn_mask=window, is_causal=True, need_weights=False)[0], dense(x, x, x, attn_mask=window)[0]
    )


def test_gradient_of_a_learned_float_mask():
    dense, ours = pair()
    x, mask = inputs(), torch.randn(QUERIES, KEYS, dtype=torch.float64, requires_grad=True)
    grads = [torch.autograd.grad(module(*x, attn_mask=mask)[0].square().sum(), mask)[0] for module in (ours, dense)]
    torch.testing.assert_close(*grads)


# ---- the threshold


@pytest.mark.parametrize("rule, threshold", [("relative", 0.6), ("relative", 1.0), ("absolute", 0.1)])
def test_weights_are_those_of_the_rule(rule, threshold):
    dense, ours = pair()
    ours.rule, ours.threshold = rule, threshold
    query, key, value = inputs()
    mask = masks_of("bool per head")["attn_mask"]
    output, weights = ours(query, key, value, attn_mask=mask, average_attn_weights=False)
    everything = dense(query, key, value, attn_mask=mask, average_attn_weights=False)[1]
    if rule == "relative":
        kept = everything >= threshold * everything.amax(-1, keepdim=True)
    else:
        q, k = (
            torch.nn.functional.linear(x, w, b).view(-1, BATCH, HEADS, EMBED // HEADS).permute(1, 2, 0, 3)
            for x, w, b in zip((query, key), dense.in_proj_weight.chunk(3), dense.in_proj_bias.chunk(3), strict=False)
        )
        scores = (q @ k.mT / math.sqrt(EMBED // HEADS)).masked_fill(mask.view(BATCH, HEADS, QUERIES, KEYS), -math.inf)
        kept = scores >= threshold
    assert 0 < kept.sum() < mask.logical_not().sum()
    expected = everything * kept
    expected = expected / expected.sum(-1, keepdim=True).clamp(min=1e-300)
    torch.testing.assert_close(weights, expected.detach())
    v = torch.nn.functional.linear(value, dense.in_proj_weight[2 * EMBED :], dense.in_proj_bias[2 * EMBED :])
    v = v.view(KEYS, BATCH, HEADS, EMBED // HEADS).permute(1, 2, 0, 3)
    attended = (expected @ v).permute(2, 0, 1, 3).flatten(2)
    torch.testing.assert_close(output, dense.out_proj(attended))


def test_gradients_by_finite_differences():
    torch.manual_seed(0)
    attn = ThresholdAttention(8, 2, threshold=0.7, dtype=torch.float64)
    x = torch.randn(5, 2, 8, dtype=torch.float64, requires_grad=True)
    assert 0 < attn.support(x).density < 1
    assert torch.autograd.gradcheck(lambda x: attn(x, x, x, need_weights=False)[0], (x,), fast_mode=True)


@pytest.mark.parametrize("need_weights", [True, False])
@pytest.mark.parametrize("kind", ["bool", "float", "bool padding", "float padding"])
def test_rows_with_every_key_masked(kind, need_weights):
    """Attention 0 (torch: NaN), so the output is out_proj's bias, and finite gradients."""
    _, ours = pair()
    x = inputs()
    if "padding" in kind:
        mask = torch.zeros(BATCH, KEYS, dtype=torch.bool)
        mask[2] = True
        name, hidden = "key_padding_mask", (slice(None), 2)
    else:
        mask = torch.zeros(QUERIES, KEYS, dtype=torch.bool)
        mask[3] = True
        name, hidden = "attn_mask", (3, slice(None))
    if "float" in kind:
        mask = torch.zeros(mask.shape, dtype=torch.float64).masked_fill(mask, -math.inf)
    output, weights = ours(*x, **{name: mask}, need_weights=need_weights)
    assert torch.equal(output[hidden], ours.out_proj.bias.expand_as(output[hidden]))
    assert output.isfinite().all() and (weights is None or weights.isfinite().all())
    grads = torch.autograd.grad(output.square().sum(), [*x, *ours.parameters()])
    assert all(grad.isfinite().all() for grad in grads) and not grads[0][hidden].any()


def test_support():
    _, ours = pair()
    ours.threshold = 0.5
    query, key, value = inputs()
    mask, padding = masks_of("bool per head")["attn_mask"], masks_of("padding")["key_padding_mask"]
    support = ours.support(query, key, attn_mask=mask, key_padding_mask=padding)
    weights = ours(query, key, value, attn_mask=mask, key_padding_mask=padding, average_attn_weights=False)[1]
    assert isinstance(support, AttentionSupport) and support.shape == (BATCH, HEADS, QUERIES, KEYS)
    torch.testing.assert_close(support.to_dense(), weights)
    assert not support.weights.requires_grad and 0 < support.density < 0.5
    single = ours.support(query[:, 0])  # unbatched, self-attention
    torch.testing.assert_close(single.to_dense()[0], ours.support(query).to_dense()[0])
    assert ours.support(query, is_causal=True).to_mask().triu(1).sum() == 0


# ---- a module among modules


@pytest.mark.parametrize("options", [{}, {"kdim": 5, "vdim": 6}, {"bias": False}], ids=str)
def test_state_dict_and_initialisation_are_those_of_multihead_attention(options):
    torch.manual_seed(3)
    dense = nn.MultiheadAttention(EMBED, HEADS, **options)
    torch.manual_seed(3)
    ours = ThresholdAttention(EMBED, HEADS, **options)
    state = dense.state_dict()
    assert set(ours.state_dict()) == set(state)
    assert all(torch.equal(value, state[name]) for name, value in ours.state_dict().items())
    assert ours.load_state_dict(state) == ([], []) and dense.load_state_dict(ours.state_dict()) == ([], [])


def test_from_and_to_multihead_attention():
    dense = nn.MultiheadAttention(EMBED, HEADS, kdim=5, batch_first=True, dtype=torch.float64).eval()
    dense.k_proj_weight.requires_grad_(False)
    state = torch.get_rng_state()
    ours = ThresholdAttention.from_multihead_attention(dense, threshold=0.3, rule="absolute")
    assert torch.equal(torch.get_rng_state(), state)
    assert (ours.threshold, ours.rule, ours.batch_first, ours.training) == (0.3, "absolute", True, False)
    assert not ours.k_proj_weight.requires_grad and ours.q_proj_weight.data_ptr() != dense.q_proj_weight.data_ptr()
    back = ours.to_multihead_attention()
    assert type(back) is nn.MultiheadAttention and back.batch_first and not back.training
    assert not back.k_proj_weight.requires_grad and back.q_proj_weight.requires_grad
    assert all(torch.equal(value, dense.state_dict()[name]) for name, value in back.state_dict().items())


def test_copies_files_moves_and_repr():
    _, ours = pair()
    ours.threshold = 0.25
    x = inputs()
    for other in (copy.deepcopy(ours), pickle.loads(pickle.dumps(ours))):
        assert torch.equal(other(*x)[0], ours(*x)[0]) and other.threshold == 0.25
    file = io.BytesIO()
    torch.save(ours.state_dict(), file)
    file.seek(0)
    fresh = ThresholdAttention(EMBED, HEADS, threshold=0.25, device="meta")
    fresh.load_state_dict(torch.load(file, weights_only=True), assign=True)
    assert torch.equal(fresh(*x)[0], ours(*x)[0])
    torch.testing.assert_close(ours.float()(*(t.float() for t in x))[0].double(), fresh(*x)[0], rtol=1e-3, atol=1e-4)
    assert "embed_dim=24, num_heads=3, threshold=0.25, rule=relative" in repr(ours)


def test_compile_fullgraph():
    _, ours = pair()
    ours.threshold = 0.3
    x, mask = inputs(), masks_of("bool")["attn_mask"]
    for need_weights in (False, True):
        compiled = torch.compile(ours, fullgraph=True, backend="aot_eager")
        output, weights = compiled(*x, attn_mask=mask, need_weights=need_weights)
        expected, expected_weights = ours(*x, attn_mask=mask, need_weights=need_weights)
        torch.testing.assert_close((output, weights), (expected, expected_weights))
        grads = [torch.autograd.grad(y.square().sum(), x) for y in (output, expected)]
        torch.testing.assert_close(*grads)


def test_autocast():
    _, ours = pair(torch.float32)
    x = inputs(dtype=torch.float32)
    expected = ours(*x)[0]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        for masks in ("none", "float", "bool, padding", "float padding"):
            output, _ = ours(*x, **masks_of(masks, torch.float32))
            assert output.dtype == torch.bfloat16
        output, _ = ours(*x)
    torch.testing.assert_close(output.float(), expected, rtol=5e-2, atol=5e-2)
    output.float().sum().backward()
    assert x[0].grad.dtype == torch.float32


@pytest.mark.parametrize("grad", [True, False])
def test_encoder_layer_keeps_the_threshold(grad):
    """In eval mode nn.TransformerEncoderLayer has a fused path of its own, which must not be taken."""
    torch.manual_seed(0)
    encoder = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True).eval()
    x = torch.randn(2, 6, 16)
    padding = torch.zeros(2, 6, dtype=torch.bool)
    padding[1, 4:] = True
    with torch.set_grad_enabled(grad):
        expected = encoder(x, src_key_padding_mask=padding)
        encoder.self_attn = ThresholdAttention.from_multihead_attention(encoder.self_attn, threshold=TINY)
        torch.testing.assert_close(encoder(x, src_key_padding_mask=padding)[0], expected[0])
        torch.testing.assert_close(encoder(x, src_key_padding_mask=padding)[1, :4], expected[1, :4])
        encoder.self_attn.threshold = 1.0
        assert (encoder(x) - expected).abs().max() > 1e-3


def test_output_projection_can_be_pruned():
    _, ours = pair()
    x = inputs()
    masks = prune.magnitude_masks(ours, 0.5, include_last=True)
    assert list(masks) == ["out_proj"]
    twin = copy.deepcopy(ours)
    with torch.no_grad():
        twin.out_proj.weight.mul_(masks["out_proj"])
    torch.testing.assert_close(prune.convert(ours, masks)(*x)[0], twin(*x)[0])


# ---- errors


def attend(query=(7, 4, 24), key=(9, 4, 24), value=(9, 4, 24), **options):
    ThresholdAttention(EMBED, HEADS)(torch.zeros(query), torch.zeros(key), torch.zeros(value), **options)


def mha(**options):
    return ThresholdAttention.from_multihead_attention(nn.MultiheadAttention(4, 2, **options))


@pytest.mark.parametrize(
    "call, error, message",
    [
        (lambda: ThresholdAttention(24, 5), ValueError, "embed_dim: expected a multiple of num_heads, 5, got 24"),
        (lambda: ThresholdAttention(24.0, 2), TypeError, "embed_dim: expected a positive int, got float"),
        (lambda: ThresholdAttention(24, 0), ValueError, "num_heads: expected a positive int, got 0"),
        (
            lambda: ThresholdAttention(24, 2, dropout=1.0),
            ValueError,
            r"dropout: expected a number in \[0, 1\), got 1",
        ),
        (lambda: ThresholdAttention(24, 2, add_bias_kv=True), ValueError, "add_bias_kv: expected False"),
        (lambda: ThresholdAttention(24, 2, add_zero_attn=True), ValueError, "add_zero_attn: expected False"),
        (
            lambda: ThresholdAttention(24, 2, rule="top"),
            ValueError,
            "rule: expected one of relative, absolute, topk, topp, entmax, got 'top'",
        ),
        (
            lambda: ThresholdAttention(24, 2, threshold=0),
            ValueError,
            r"threshold: expected a number in \(0, 1\] \(rule 'relative'\), got 0",
        ),
        (lambda: ThresholdAttention(24, 2, threshold=1.5), ValueError, r"threshold: expected a number in \(0, 1\]"),
        (lambda: ThresholdAttention(24, 2, threshold="x"), TypeError, "threshold: expected a number .*, got str"),
        (
            lambda: ThresholdAttention(24, 2, threshold=math.inf, rule="absolute"),
            ValueError,
            "threshold: expected a finite number, got inf",
        ),
        (
            lambda: ThresholdAttention.from_multihead_attention(1),
            TypeError,
            "mha: expected nn.MultiheadAttention, got int",
        ),
        (lambda: mha(add_bias_kv=True), ValueError, "mha: expected one without add_bias_kv"),
        (lambda: mha(add_zero_attn=True), ValueError, "mha: expected one without add_bias_kv"),
        (lambda: attend(query=(7, 4, 23)), ValueError, r"query: expected 2-D or 3-D tensor \[\.\.\., 24\], got 3-D"),
        (lambda: attend(key=(9, 24)), ValueError, "key: expected 3-D, like query, got 2-D"),
        (lambda: attend(key=(9, 3, 24)), ValueError, "key: expected batch 4, like query"),
        (lambda: attend(value=(8, 4, 24)), ValueError, r"value: expected as many tokens as key, \[9, 4\]"),
        (
            lambda: attend(attn_mask=torch.zeros(7, 8)),
            ValueError,
            r"attn_mask: expected bool or float tensor \[7, 9\] or \[12, 7, 9\], got 2-D float32 tensor \[7, 8\]",
        ),
        (lambda: attend(attn_mask=torch.zeros(7, 9).int()), ValueError, "attn_mask: expected bool or float tensor"),
        (lambda: attend(attn_mask="causal"), TypeError, "attn_mask: expected bool or float .*, got str"),
        (
            lambda: attend(key_padding_mask=torch.zeros(9, 4, dtype=torch.bool)),
            ValueError,
            r"key_padding_mask: expected bool or float tensor \[4, 9\], got 2-D bool tensor \[9, 4\]",
        ),
    ],
)
def test_errors(call, error, message):
    with pytest.raises(error, match=message):
        call()
