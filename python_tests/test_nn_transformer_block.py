"""TransformerBlock and KVCache: against torch's own block, and against recomputing the whole prefix."""

import copy
import pickle

import pytest
import torch
from torch import nn

from compsparse_kernels import KVCache, ThresholdAttention, TransformerBlock
from python_tests.attention import CHOICE_NAMES, CHOICES, choice_options

DIM, HEADS, BATCH, TOKENS = 16, 2, 2, 11
TINY = 1e-30  # a threshold that keeps every key


def block(dtype=torch.float64, **options):
    torch.manual_seed(0)
    made = TransformerBlock(DIM, HEADS, 2, dtype=dtype, **options)
    for parameter in made.parameters():
        if parameter.dim() == 1:
            nn.init.normal_(parameter)  # biases and norms that could not be left out unseen
    return made


def tokens(count=TOKENS, dtype=torch.float64, seed=1):
    x = torch.randn(BATCH, count, DIM, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    return x.to(dtype).requires_grad_()


# ---- the block


@pytest.mark.parametrize("causal", [False, True])
def test_serial_is_torchs_pre_norm_layer(causal):
    ours, x = block(threshold=TINY), tokens()
    options = {"norm_first": True, "batch_first": True, "dropout": 0.0, "activation": "gelu"}
    theirs = nn.TransformerEncoderLayer(DIM, HEADS, 2 * DIM, dtype=torch.float64, **options)
    names = {"norm": "norm1", "attention": "self_attn", "mlp_norm": "norm2", "mlp.0": "linear1", "mlp.2": "linear2"}
    for mine, other in names.items():
        theirs.get_submodule(other).load_state_dict(ours.get_submodule(mine).state_dict())
    mask = torch.ones(TOKENS, TOKENS, dtype=torch.bool).triu(1) if causal else None
    outputs = ours(x, is_causal=causal), theirs(x, src_mask=mask)
    torch.testing.assert_close(*outputs)
    torch.testing.assert_close(*(torch.autograd.grad(y.square().sum(), x) for y in outputs))


def test_parallel_adds_both_to_one_norm():
    ours, x = block(parallel=True, threshold=0.3), tokens()
    assert ours.mlp_norm is None
    normed = ours.norm(x)
    expected = x + ours.attention(normed, normed, normed, is_causal=True)[0] + ours.mlp(normed)
    output = ours(x, is_causal=True)
    torch.testing.assert_close(output, expected)
    wanted = [x, *ours.parameters()]
    torch.testing.assert_close(*(torch.autograd.grad(y.square().sum(), wanted) for y in (output, expected)))
    serial = block(threshold=0.3)
    assert sum(p.numel() for p in serial.parameters()) - sum(p.numel() for p in ours.parameters()) == 2 * DIM


@pytest.mark.parametrize("parallel", [False, True])
def test_gradients_by_finite_differences(parallel):
    ours, x = block(parallel=parallel, threshold=0.3, shrink=True, learn_threshold=True), tokens(5)
    names, values = zip(*ours.named_parameters(), strict=True)

    def output(x, *values):
        return torch.func.functional_call(ours, dict(zip(names, values, strict=True)), (x,))

    assert torch.autograd.gradcheck(output, (x, *values), fast_mode=True)


@pytest.mark.parametrize("parallel", [False, True])
def test_masks_options_and_copies(parallel):
    ours, x = block(parallel=parallel, threshold=0.1, rule="topp", window=3, bias=False), tokens()
    assert ours.attention.rule == "topp" and ours.attention.in_proj_bias is None and ours.norm.bias is None
    padding = torch.zeros(BATCH, TOKENS, dtype=torch.bool)
    padding[1, 7:] = True
    changed = x.detach().clone()
    changed[1, 7:] *= -1
    seen = ours(x, key_padding_mask=padding)[1, :7]
    torch.testing.assert_close(ours(changed, key_padding_mask=padding)[1, :7], seen)
    assert not torch.allclose(ours(changed)[1, :7], ours(x)[1, :7])
    for other in (copy.deepcopy(ours), pickle.loads(pickle.dumps(ours))):
        assert torch.equal(other(x), ours(x))
    assert f"parallel={parallel}" in repr(ours)
    single = ours(x[0])
    torch.testing.assert_close(single, ours(x)[0])


def test_dropout_is_everywhere_and_only_in_training():
    ours, x = block(dropout=0.5, threshold=TINY), tokens()
    assert ours.attention.dropout == 0.5 and not torch.equal(ours(x), ours(x))
    plain = block(threshold=TINY)
    assert torch.equal(ours.eval()(x), plain(x))


@pytest.mark.parametrize("parallel", [False, True])
def test_compile_fullgraph(parallel):
    ours, x = block(parallel=parallel, threshold=0.2), tokens()
    compiled = torch.compile(ours, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x, is_causal=True), ours(x, is_causal=True))


# ---- decoding


def attention(dtype=torch.float64, **options):
    torch.manual_seed(0)
    module = ThresholdAttention(DIM, HEADS, batch_first=True, dtype=dtype, **options)
    nn.init.normal_(module.in_proj_bias)
    return module.eval()


EXTRAS = {"plain": {}, "window": {"window": 4}, "alibi": {"alibi": True}, "distances": {"score": "mahalanobis"}}


@pytest.mark.parametrize("choice", CHOICES, ids=CHOICE_NAMES)
@pytest.mark.parametrize("extra", EXTRAS)
def test_decoding_equals_the_whole_prefix(choice, extra):
    module, x = attention(**choice_options(choice), **EXTRAS[extra]), tokens(dtype=torch.float64)
    cache = module.make_cache(BATCH, TOKENS)
    with torch.no_grad():
        whole, weights = module(x, x, x, is_causal=True)
        for first, end in ((0, 5), (5, 6), (6, 7), (7, 10), (10, 11)):
            new = x[:, first:end]
            output, rows = module(new, new, new, is_causal=True, cache=cache)
            torch.testing.assert_close(output, whole[:, first:end])
            torch.testing.assert_close(rows, weights[:, first:end, :end])
            assert cache.length == end
            kept = module.support(x, is_causal=True).degree[:, :, first:end]
            assert module.stats().keys_kept == pytest.approx(kept.double().mean().item())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("long", [False, True])
def test_decoding_in_other_dtypes(dtype, long):
    """Within twice the error of the whole prefix in the same dtype. Queries and keys are whole numbers, so that they
    are the same alone and among others; past 64 keys the cache's index has more than a panel."""
    count = 150 if long else TOKENS
    module, x = attention(dtype, threshold=0.2), tokens(count, dtype).detach().round()
    for parameter in (module.in_proj_weight, module.in_proj_bias):
        parameter.data = parameter.data.mul(4).round()
    exact = copy.deepcopy(module).double()(*[x.double()] * 3, is_causal=True)[0].detach()
    cache, rows = module.make_cache(BATCH, count + 30), []
    with torch.no_grad():
        whole = module(x, x, x, is_causal=True, need_weights=False)[0]
        for new in x.split([count - 5, *[1] * 5], dim=1):
            rows.append(module(new, new, new, is_causal=True, cache=cache, need_weights=False)[0])
    assert module.in_proj_weight.abs().max() > 0 and module.support(x, is_causal=True).share_kept < 0.7
    budget = 2 * (whole.double() - exact).abs().max() + torch.finfo(dtype).eps * exact.abs().max()
    assert (torch.cat(rows, 1).double() - exact).abs().max() <= budget


def test_masks_with_a_cache_are_over_all_keys():
    module, x = attention(threshold=0.2), tokens()
    padding = torch.zeros(BATCH, TOKENS, dtype=torch.bool)
    padding[0, :3] = True  # a prompt padded on the left
    cache = module.make_cache(BATCH, TOKENS)
    with torch.no_grad():
        whole = module(x, x, x, key_padding_mask=padding, is_causal=True)[0]
        for end in range(1, TOKENS + 1):
            new = x[:, end - 1 : end]
            output = module(new, new, new, key_padding_mask=padding[:, :end], is_causal=True, cache=cache)[0]
            torch.testing.assert_close(output, whole[:, end - 1 : end])


@pytest.mark.parametrize("parallel", [False, True])
def test_blocks_decode(parallel):
    blocks, x = [block(parallel=parallel, threshold=0.2).eval() for _ in range(2)], tokens()
    blocks[1].mlp[0].weight.data.mul_(2)
    caches = [each.make_cache(BATCH, TOKENS) for each in blocks]
    with torch.no_grad():
        whole, rows = x, []
        for each in blocks:
            whole = each(whole, is_causal=True)
        for new in x.split(1, dim=1):
            for each, cache in zip(blocks, caches, strict=True):
                new = each(new, is_causal=True, cache=cache)
            rows.append(new)
    torch.testing.assert_close(torch.cat(rows, 1), whole)


def test_a_cache_is_filled_in_place_and_cut_back():
    cache = KVCache(BATCH, HEADS, 100, 8, value_dim=5)
    generator = torch.Generator().manual_seed(0)
    keys = torch.randn(BATCH, HEADS, 100, 8, generator=generator)
    values = torch.randn(BATCH, HEADS, 100, 5, generator=generator)
    for first, end in ((0, 60), (60, 61), (61, 100)):
        key, value, index = cache.append(keys[:, :, first:end], values[:, :, first:end])
        assert torch.equal(key, keys[:, :, :end]) and torch.equal(value, values[:, :, :end])
        assert key.data_ptr() == cache._keys.data_ptr() and index.shape[2] == -(-end // 64)
    assert torch.equal(cache.index, torch.ops.compsparse.threshold_attention_index(cache.key))
    cache.truncate(10)
    assert cache.length == 10 and cache.index.shape[2] == 1 and torch.equal(cache.key, keys[:, :, :10])
    cache.append(keys[:, :, 90:], values[:, :, 90:])
    assert torch.equal(cache.key, keys[:, :, [*range(10), *range(90, 100)]])
    assert repr(cache) == "KVCache(2 x 2 x 8, 20 of 100 tokens)"


# ---- errors


def append(key=(2, 2, 3, 8), value=(2, 2, 3, 8), grad=False, **options):
    def attempt():
        cache = KVCache(2, 2, 4, 8)
        tensors = [torch.zeros(shape, **options) if isinstance(shape, tuple) else shape for shape in (key, value)]
        cache.append(tensors[0].requires_grad_() if grad else tensors[0], tensors[1])

    return attempt


@pytest.mark.parametrize(
    "attempt, error, message",
    [
        (lambda: TransformerBlock(15, 2), ValueError, "dim: expected a multiple of heads, 2, got 15"),
        (lambda: TransformerBlock(16, 2, 0), ValueError, "mlp_ratio: expected a positive number, got 0"),
        (lambda: TransformerBlock(16, 2, "4"), TypeError, "mlp_ratio: expected a positive number, got str"),
        (lambda: TransformerBlock(16, 2, parallel=1), TypeError, "parallel: expected a bool, got int"),
        (lambda: TransformerBlock(16, 2, activation="gelu"), TypeError, "activation: expected what makes a module"),
        (lambda: TransformerBlock(16, 2, kdim=3), ValueError, "attention: expected no batch_first.*, got kdim"),
        (lambda: TransformerBlock(16, 2, rule="top"), ValueError, "rule: expected one of"),
        (lambda: KVCache(0, 1, 1, 1), ValueError, "batch: expected a positive int, got 0"),
        (append(key=(2, 2, 3, 7)), ValueError, r"key: expected 4-D float32 tensor \[2, 2, new, 8\], got 4-D float32"),
        (append(value=(2, 2, 2, 8)), ValueError, r"value: expected 4-D float32 tensor \[2, 2, 3, 8\], got 4-D"),
        (append(dtype=torch.float64), ValueError, "key: expected 4-D float32 tensor .*, got 4-D float64"),
        (append(value="x"), TypeError, "value: expected 4-D float32 tensor .*, got str"),
        (append((2, 2, 5, 8), (2, 2, 5, 8)), ValueError, r"key: expected at most 4 more tokens .*, got 5"),
        (append(grad=True), ValueError, r"key: expected a tensor without gradient .*torch.no_grad\(\).*, got one with"),
        (lambda: KVCache(1, 1, 4, 2).truncate(1), ValueError, "length: expected at most the 0 tokens there are, got 1"),
        (lambda: KVCache(1, 1, 4, 2).truncate(0.5), TypeError, "length: expected an int, got float"),
    ],
)
def test_errors(attempt, error, message):
    with pytest.raises(error, match=message):
        attempt()


def test_nothing_is_kept_of_a_refused_append():
    cache = KVCache(1, 1, 4, 2)
    with pytest.raises(ValueError, match="value: expected"):
        cache.append(torch.zeros(1, 1, 2, 2), torch.zeros(1, 1, 3, 2))
    assert cache.length == 0
