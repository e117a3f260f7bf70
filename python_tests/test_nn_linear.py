"""SparseDAGLinear and MaskedLinear against nn.Linear and F.linear(x, W * M)."""

import copy
import io
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from compsparse_kernels import BlockLayout, MaskLayout
from compsparse_kernels.nn import MaskedLinear, SparseDAGLinear
from python_tests.nm import nm_mask

IN, OUT = 24, 40
DTYPES = (torch.float32, torch.float64)


def random_mask(rows, columns, density=0.4, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(rows, columns, generator=generator) < density


def tied_layout():
    """Blocks 8 x 8 with ragged edges (OUT + 3 x IN - 4), two entries sharing a value."""
    rows, columns = torch.tensor([0, 1, 2, 3, 5]), torch.tensor([0, 1, 2, 0, 2])
    slot = torch.tensor([0, 0, 1, 2, 3], dtype=torch.int32)
    return BlockLayout.from_entries(rows, columns, (8, 8), OUT + 3, IN - 4, slot=slot)


def dag(seed=0, **options):
    return SparseDAGLinear(IN, OUT, random_mask(5, 3, seed=seed), **options)


def dag_tied(seed=0, **options):
    return SparseDAGLinear(IN - 4, OUT + 3, tied_layout(), **options)


def masked(seed=0, **options):
    return MaskedLinear(IN, OUT, random_mask(OUT, IN, seed=seed), kind="csr", **options)


def masked_block(seed=0, **options):
    mask = random_mask(5, 3, seed=seed).repeat_interleave(8, 0).repeat_interleave(8, 1)
    return MaskedLinear(IN, OUT, mask & random_mask(OUT, IN, 0.9), kind="block", **options)


def masked_dense(seed=0, **options):
    return MaskedLinear(IN, OUT, random_mask(OUT, IN, 0.8, seed=seed), kind="dense", **options)


def masked_nm(seed=0, **options):
    """Ragged groups, which hold less than 3 here and there."""
    mask = nm_mask(OUT, IN, 3, 7, missing=0.2, seed=seed)
    return MaskedLinear(IN, OUT, MaskLayout.from_mask(mask, "nm", nm=(3, 7)), **options)


FACTORIES = (dag, dag_tied, masked, masked_block, masked_nm, masked_dense)
every_layer = pytest.mark.parametrize("make", FACTORIES, ids=lambda f: f.__name__)
# A tied weight has no dense twin that trains alike, and there is one such layout here.
untied_layer = pytest.mark.parametrize("make", [f for f in FACTORIES if f is not dag_tied], ids=lambda f: f.__name__)


def same_state(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


# ---- values and gradients


@every_layer
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("lead", [(7,), (), (2, 3)], ids=str)
def test_equals_linear_forward_and_backward(make, dtype, lead):
    torch.manual_seed(0)
    layer = make(dtype=dtype)
    dense, mask = layer.to_linear(), layer.layout.to_mask()
    assert not dense.weight[~mask].any()
    x = torch.randn(*lead, layer.in_features, dtype=dtype, requires_grad=True)
    x_dense = x.detach().clone().requires_grad_()
    y, expected = layer(x), dense(x_dense)
    grad = torch.randn_like(expected)
    y.backward(grad)
    expected.backward(grad)
    torch.testing.assert_close(y, expected)
    torch.testing.assert_close(x.grad, x_dense.grad)
    torch.testing.assert_close(layer.bias.grad, dense.bias.grad)
    values = layer.values.detach().clone().requires_grad_()  # the dense gradient, gathered as values are
    layer.layout.unpack(values).backward(dense.weight.grad * mask)
    torch.testing.assert_close(layer.values.grad, values.grad)


@every_layer
def test_without_bias(make):
    layer = make(bias=False)
    assert layer.bias is None and "bias" not in layer.state_dict()
    x = torch.randn(3, layer.in_features)
    torch.testing.assert_close(layer(x), F.linear(x, layer.weight))
    assert layer.to_linear().bias is None


@pytest.mark.parametrize("name, function", [("relu", F.relu), ("gelu", F.gelu), ("silu", F.silu)])
def test_activation(name, function):
    layer = dag(activation=name)
    x = torch.randn(3, IN)
    torch.testing.assert_close(layer(x), function(layer.to_linear()(x)))
    assert f"activation={name}" in repr(layer)


@every_layer
def test_initialisation_uses_the_real_fan_in(make):
    torch.manual_seed(0)
    layer = make()
    mask = layer.layout.to_mask()
    bound = torch.where(mask.any(1), mask.sum(1).clamp(min=1).rsqrt(), 0)
    weight, largest = layer.weight.detach().abs(), bound.max()
    limit = largest if make is dag_tied else bound[:, None]  # shared blocks take the mean bound of their rows
    assert (weight <= limit * 1.0001).all() and (layer.bias.abs() <= bound * 1.0001).all()
    assert weight[mask].std() > 0.25 * bound[mask.any(1)].min()


def test_initialisation_is_that_of_linear_where_every_weight_exists():
    layer = MaskedLinear(300, 200, torch.ones(200, 300, dtype=torch.bool))
    expected = nn.Linear(300, 200)
    for ours, theirs in ((layer.weight, expected.weight), (layer.bias, expected.bias)):
        torch.testing.assert_close(ours.std(), theirs.std(), rtol=0.15, atol=0)
        assert ours.abs().max() <= 300**-0.5


def test_padding_of_ragged_blocks_starts_at_zero():
    layer = dag_tied()
    layout = layer.layout
    torch.testing.assert_close(layout.pack(layer.weight), layer.values)


def test_empty_pattern_gives_the_bias():
    for layer in (
        SparseDAGLinear(IN, OUT, torch.zeros(5, 3, dtype=torch.bool)),
        MaskedLinear(IN, OUT, torch.zeros(OUT, IN, dtype=torch.bool)),
    ):
        x = torch.randn(3, IN, requires_grad=True)
        y = layer(x)
        y.sum().backward()
        assert torch.equal(y, layer.bias.expand(3, OUT)) and not x.grad.any()


@untied_layer
@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_trains_in_lockstep_with_masked_dense(make, optimizer):
    torch.manual_seed(0)
    layer = make(dtype=torch.float64)
    dense, mask = layer.to_linear(), layer.layout.to_mask()
    x, target = torch.randn(32, IN, dtype=torch.float64), torch.randn(32, OUT, dtype=torch.float64)
    options = {"sgd": {"lr": 0.5, "momentum": 0.9}, "adamw": {"lr": 1e-2, "weight_decay": 0.1}}[optimizer]
    kind = {"sgd": torch.optim.SGD, "adamw": torch.optim.AdamW}[optimizer]
    ours, theirs = (kind(module.parameters(), **options) for module in (layer, dense))
    for _ in range(50):
        losses = F.mse_loss(layer(x), target), F.mse_loss(F.linear(x, dense.weight * mask, dense.bias), target)
        torch.testing.assert_close(*losses, rtol=1e-9, atol=0)
        for loss, opt in zip(losses, (ours, theirs), strict=True):
            opt.zero_grad()
            loss.backward()
            opt.step()
    torch.testing.assert_close(layer.weight, dense.weight * mask, rtol=1e-7, atol=1e-10)


# ---- to and from nn.Linear


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("bias", [True, False])
def test_from_linear_and_back(dtype, bias):
    linear = nn.Linear(IN, OUT, bias=bias, dtype=dtype).eval()
    linear.weight.requires_grad_(False)
    mask, blocks = random_mask(OUT, IN), random_mask(5, 3)
    state = torch.get_rng_state()
    for layer, kept in (
        (MaskedLinear.from_linear(linear, mask), mask),
        (MaskedLinear.from_linear(linear, MaskLayout.from_mask(mask, "csr")), mask),
        (SparseDAGLinear.from_linear(linear, blocks), blocks.repeat_interleave(8, 0).repeat_interleave(8, 1)),
    ):
        back = layer.to_linear()
        assert torch.equal(back.weight, linear.weight * kept) and back.weight.dtype == dtype
        assert (back.bias is None) if not bias else torch.equal(back.bias, linear.bias)
        assert not (layer.training or back.training or layer.values.requires_grad or back.weight.requires_grad)
        assert layer.values.data_ptr() != linear.weight.data_ptr()
    assert torch.equal(torch.get_rng_state(), state)  # no random numbers were drawn


def test_transposed_layout_is_stored_in_the_layers_own_order():
    layout = BlockLayout.from_mask(random_mask(3, 5), block_shape=(8, 4))
    linear = nn.Linear(24, 20)
    layer = SparseDAGLinear.from_linear(linear, layout.T)
    assert layer.values.shape[1:] == (4, 8) and not layer.layout.transposed
    assert torch.equal(layer.weight, linear.weight * layout.to_mask().T)


# ---- state dicts


@every_layer
def test_own_state_dict(make):
    layer, other = make(), make()
    state = layer.state_dict()
    assert all(isinstance(value, torch.Tensor) and value.is_contiguous() for value in state.values())
    assert state["values"].data_ptr() == layer.values.data_ptr()
    assert other.load_state_dict(state) == ([], [])
    assert same_state(other.state_dict(), state)


@untied_layer
def test_own_state_dict_with_another_pattern_is_adopted(make):
    layer, other = make(seed=0), make(seed=1)
    values = other.values
    other(torch.randn(2, IN)).sum().backward()
    assert other.load_state_dict(layer.state_dict()) == ([], [])
    assert other.values is values and values.grad is None
    x = torch.randn(3, IN)
    assert torch.equal(other(x), layer(x)) and torch.equal(other.layout.to_mask(), layer.layout.to_mask())
    other(x).sum().backward()


@pytest.mark.parametrize("seed", [0, 1], ids=["the same pattern", "another pattern"])
def test_a_checkpoint_with_int32_columns_is_read(seed):
    layer, other = masked(seed=0), masked(seed=seed)
    state = layer.state_dict()
    assert state["col_idx"].dtype == torch.int16
    assert other.load_state_dict(state | {"col_idx": state["col_idx"].int()}) == ([], [])
    assert other.layout.index_dtype == torch.int16 and same_state(other.state_dict(), state)


def test_columns_of_a_checkpoint_do_not_wrap():
    """2^16 more is the same number to int16."""
    layer = masked()
    state = layer.state_dict()
    with pytest.raises(RuntimeError, match=f"col_idx: expected values in 0..{IN - 1}"):
        layer.load_state_dict(state | {"col_idx": state["col_idx"].int() + 2**16})


def test_kind_of_the_checkpoint_is_adopted():
    mask = nm_mask(OUT, IN, 2, 4)
    layers = [MaskedLinear(IN, OUT, mask, kind=kind) for kind in ("csr", "block", "nm", "dense")]
    x = torch.randn(3, IN)
    for source in layers:
        for target in layers:
            target = copy.deepcopy(target)
            target.load_state_dict(source.state_dict())
            assert target.layout.kind == source.layout.kind
            torch.testing.assert_close(target(x), source(x))


@every_layer
def test_state_dict_of_linear(make):
    layer = make()
    linear = nn.Linear(layer.in_features, layer.out_features)
    if make is dag_tied:
        linear.load_state_dict(make().to_linear().state_dict())
    mask = layer.layout.to_mask()
    assert layer.load_state_dict(linear.state_dict()) == ([], [])
    assert torch.equal(layer.weight, linear.weight * mask) and torch.equal(layer.bias, linear.bias)
    assert linear.load_state_dict(layer.to_linear().state_dict()) == ([], [])
    assert torch.equal(linear.weight, layer.weight)


def nested(first, second):
    return nn.Sequential(nn.ModuleDict({"weight": first, "b": nn.Linear(OUT, IN)}), nn.Sequential(second))


def test_state_dicts_of_nested_models():
    sparse, dense = nested(dag(), masked()), nested(nn.Linear(IN, OUT), nn.Linear(IN, OUT))
    keys = set(sparse.state_dict())
    assert {"0.weight.values", "0.weight.row_ptr", "1.0.values", "0.b.weight"} <= keys
    assert sparse.load_state_dict(dense.state_dict()) == ([], [])
    assert torch.equal(sparse[1][0].weight, dense[1][0].weight * sparse[1][0].layout.to_mask())
    other = nested(dag(seed=1), masked(seed=1))
    assert other.load_state_dict(sparse.state_dict()) == ([], [])
    assert same_state(other.state_dict(), sparse.state_dict())


def test_missing_and_unexpected_keys_are_told():
    layer = masked()
    state = layer.state_dict()
    del state["values"], state["bias"]
    assert set(layer.load_state_dict(state, strict=False).missing_keys) == {"values", "bias"}
    with pytest.raises(RuntimeError, match="Missing key"):
        nn.Sequential(layer).load_state_dict({})
    bad = nn.Linear(IN, OUT).state_dict() | {"extra": torch.zeros(1)}
    with pytest.raises(RuntimeError, match=r"Unexpected key.*extra"):
        layer.load_state_dict(bad)
    with pytest.raises(RuntimeError, match=r"Unexpected key.*bias"):
        masked(bias=False).load_state_dict(nn.Linear(IN, OUT).state_dict())
    other = masked(seed=1)
    without_values = {name: value for name, value in layer.state_dict().items() if name != "values"}
    with pytest.raises(RuntimeError, match="values: expected a tensor, since the pattern is another one, got NoneType"):
        other.load_state_dict(without_values, strict=False)
    only_values = {"values": layer.values.detach() + 1, "bias": layer.bias.detach()}
    assert layer.load_state_dict(only_values, strict=False).unexpected_keys == []
    assert torch.equal(layer.values, only_values["values"])


@every_layer
def test_malformed_checkpoints_are_refused_and_change_nothing(make):
    layer = make()
    before = copy.deepcopy(layer.state_dict())
    wrong_values = before | {"values": torch.zeros(2, 3, 4, 5)}
    wrong_weight = {"weight": torch.zeros(3, 5), "bias": torch.zeros(layer.out_features)}
    for state, message in ((wrong_values, "values: expected"), (wrong_weight, "weight: expected tensor")):
        with pytest.raises(RuntimeError, match=message):
            layer.load_state_dict(state)
    wrong = before | {name: before[name][:-1] for name in layer._pattern()}
    with pytest.raises(RuntimeError, match=r"While loading inner: .*expected"):
        nn.ModuleDict({"inner": layer}).load_state_dict({f"inner.{name}": value for name, value in wrong.items()})
    assert same_state(layer.state_dict(), before)


def test_tensors_of_layers_that_share_a_layout_do_not_share_memory():
    layout = BlockLayout.from_mask(random_mask(3, 3), block_shape=(8, 8))
    model = nn.Sequential(SparseDAGLinear(IN, IN, layout), SparseDAGLinear(IN, IN, layout))
    assert model[0].layout is model[1].layout
    pointers = [value.data_ptr() for value in model.state_dict().values()]
    assert len(set(pointers)) == len(pointers)


# ---- a module among modules


@every_layer
def test_copies_and_files(make):
    layer = make()
    x = torch.randn(3, layer.in_features)
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert other.values is not layer.values and torch.equal(other(x), layer(x)) and repr(other) == repr(layer)
    file = io.BytesIO()
    torch.save(layer.state_dict(), file)
    file.seek(0)
    other = make(seed=1)
    other.load_state_dict(torch.load(file, weights_only=True))
    assert torch.equal(other(x), layer(x))


@every_layer
def test_dtype_moves(make):
    layer = make()
    x = torch.randn(3, layer.in_features)
    y = layer(x)
    torch.testing.assert_close(layer.double()(x.double()).float(), y)
    assert layer.to(torch.float32).values.dtype == torch.float32 and torch.equal(layer(x), y)
    indices = (value for name, value in layer.half().state_dict().items() if name in layer.PATTERN)
    assert not any(value.is_floating_point() for value in indices)
    torch.testing.assert_close(layer(x.half()).float(), y, rtol=1e-2, atol=1e-2)


@every_layer
def test_meta_device(make):
    layer = make()
    empty = make(device="meta")
    assert empty.values.is_meta and empty.bias.is_meta
    empty.load_state_dict(layer.state_dict(), assign=True)
    x = torch.randn(3, layer.in_features)
    assert torch.equal(empty(x), layer(x))
    back = copy.deepcopy(layer).to("meta").to_empty(device="cpu")
    back.load_state_dict(layer.state_dict())
    assert torch.equal(back(x), layer(x))


@pytest.mark.parametrize("kind", ["auto", "csr", "block", "nm", "dense"])
def test_meta_as_default_device(kind):
    """The pattern stays where the mask is: it could not be initialised again."""
    mask = (torch.arange(36) % 4 < 2).expand(20, 36).clone()
    with torch.device("meta"):
        empty = MaskedLinear(36, 20, mask, kind=kind)
    assert empty.values.is_meta and empty.layout.device.type != "meta"
    layer = MaskedLinear(36, 20, mask, kind=kind)
    empty.to_empty(device="cpu").load_state_dict(layer.state_dict())
    x = torch.randn(3, 36)
    assert torch.equal(empty(x), layer(x))


@every_layer
def test_compile_fullgraph(make):
    layer = make()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    x = torch.randn(3, layer.in_features, requires_grad=True)
    y = compiled(x)
    torch.testing.assert_close(y, layer(x))
    (compiled_grad,) = torch.autograd.grad(y.square().sum(), layer.values)
    (grad,) = torch.autograd.grad(layer(x).square().sum(), layer.values)
    torch.testing.assert_close(compiled_grad, grad)


@every_layer
def test_export(make):
    layer = make().eval()
    batch = torch.export.Dim("batch", min=2, max=64)
    program = torch.export.export(layer, (torch.randn(4, layer.in_features),), dynamic_shapes=({0: batch},))
    x = torch.randn(9, layer.in_features)
    torch.testing.assert_close(program.module()(x), layer(x))


@every_layer
def test_autocast_gives_the_dtype_of_linear(make):
    layer = make()
    x = torch.randn(3, layer.in_features, requires_grad=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y, expected = layer(x), layer.to_linear()(x)
        made = make()
    assert y.dtype == expected.dtype == torch.bfloat16 and made.values.dtype == torch.float32
    torch.testing.assert_close(y, expected, rtol=2e-2, atol=2e-2)
    y.float().sum().backward()
    assert layer.values.grad.dtype == x.grad.dtype == torch.float32


@every_layer
def test_gradcheck_through_functional_call(make):
    layer = make(dtype=torch.float64)
    x = torch.randn(2, layer.in_features, dtype=torch.float64)

    def function(values):
        return torch.func.functional_call(layer, {"values": values}, (x,))

    assert torch.autograd.gradcheck(function, (layer.values.detach().clone().requires_grad_(),), fast_mode=True)


def test_repr():
    blocks = torch.eye(4, dtype=torch.bool)
    wanted = "SparseDAGLinear(in_features=32, out_features=64, bias=True, density=0.250, block=(16, 8))"
    assert repr(SparseDAGLinear(32, 64, blocks)) == wanted
    assert "slots=4" in repr(dag_tied())
    wanted = "MaskedLinear(in_features=4, out_features=4, bias=False, density=0.250, kind=csr)"
    assert repr(MaskedLinear(4, 4, blocks, bias=False, kind="csr")) == wanted


# ---- errors


BLOCKS = torch.ones(4, 4, dtype=torch.bool)


@pytest.mark.parametrize(
    "call, error, message",
    [
        (lambda: SparseDAGLinear(0, 64, BLOCKS), ValueError, "in_features: expected a positive int, got 0"),
        (lambda: SparseDAGLinear(32, 6.5, BLOCKS), TypeError, "out_features: expected a positive int, got float"),
        (
            lambda: SparseDAGLinear(32, 63, BLOCKS),
            ValueError,
            r"layout: expected a mask or graph level over equal blocks .*\[63, 32\]",
        ),
        (lambda: SparseDAGLinear(1024, 64, BLOCKS), ValueError, r"layout: expected .*, got blocks of 16 by 256"),
        (
            lambda: SparseDAGLinear(32, 64, BLOCKS.float()),
            ValueError,
            "layout: expected 2-D bool tensor, got 2-D float32",
        ),
        (lambda: SparseDAGLinear(32, 64, "all"), TypeError, "layout: expected 2-D bool tensor, got str"),
        (
            lambda: SparseDAGLinear(IN, OUT, tied_layout()),
            ValueError,
            "in_features: expected 20, as in the layout, got 24",
        ),
        (lambda: dag(activation="tanh"), ValueError, "activation: expected None, 'relu', 'gelu' or 'silu', got 'tanh'"),
        (lambda: SparseDAGLinear.from_linear(BLOCKS, BLOCKS), TypeError, "linear: expected nn.Linear, got Tensor"),
        (lambda: MaskedLinear(4, 5, BLOCKS), ValueError, "out_features: expected 4, as in the layout, got 5"),
        (lambda: MaskedLinear(4, 4, BLOCKS.int()), ValueError, "mask: expected 2-D bool tensor, got 2-D int32"),
        (lambda: MaskedLinear(4, 4, BLOCKS, kind="coo"), ValueError, "kind: expected"),
        (lambda: MaskedLinear(4, 4, BLOCKS, bias="x"), TypeError, "bias: expected True or False, got 'x'"),
        (lambda: SparseDAGLinear(4, 4, BLOCKS, bias=None), TypeError, "bias: expected True or False, got None"),
        (
            lambda: MaskedLinear(4, 4, BLOCKS, dtype=torch.int32),
            TypeError,
            "dtype: expected one of float32, float64, float16, bfloat16, or None, got torch.int32",
        ),
        (
            lambda: MaskedLinear.from_linear(nn.Conv1d(1, 1, 1), BLOCKS),
            TypeError,
            "linear: expected nn.Linear, got Conv1d",
        ),
        (lambda: dag()(torch.randn(3, IN + 1)), ValueError, r"x: expected tensor \[\.\.\., 24\]"),
        (lambda: masked()(torch.randn(3, IN + 1)), ValueError, r"x: expected"),
    ],
)
def test_errors(call, error, message):
    with pytest.raises(error, match=message):
        call()


def test_half_precision_as_default_dtype():
    torch.set_default_dtype(torch.bfloat16)
    try:
        layer = MaskedLinear(8, 8, torch.eye(8) > 0)
    finally:
        torch.set_default_dtype(torch.float32)
    assert layer.values.dtype == torch.bfloat16 and bool(layer.values.isfinite().all())


def test_activation_is_checked_by_the_constructor():
    with pytest.raises(ValueError, match="activation: expected None, 'relu', 'gelu' or 'silu', got 'none'"):
        SparseDAGLinear(4, 4, torch.ones(2, 2, dtype=torch.bool), activation="none")
