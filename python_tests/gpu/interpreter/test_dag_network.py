"""The Triton kernels of dag_network, strictly interpreted, against the float64 reference."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from compsparse_kernels.ops.dag_network import reference
from compsparse_kernels.ops.dag_network import triton as kernels
from python_tests.gpu.dag_networks import GRAPHS, Case, network
from python_tests.gpu.interpreter.cases import PRECISIONS
from python_tests.gpu.interpreter.dag_cases import check_backward, check_forward
from python_tests.gpu.interpreter.dag_far_cases import FAR_CASES
from python_tests.gpu.interpreter.mutants import Mutant, load, mutants
from python_tests.gpu.interpreter.strict import strict

pytestmark = pytest.mark.usefixtures("unwritten_is_nan")

ACTIVATIONS = ("none", "relu", "gelu", "silu")


def check(case: Case) -> None:
    check_forward(case)
    check_backward(case)


@st.composite
def cases(draw):
    return Case(
        graph=draw(st.sampled_from(list(GRAPHS))),
        width=draw(st.sampled_from([1, 3, 7, 16, 20, 32, 33])),
        hidden=draw(st.sampled_from([None, None, 5, 16])),
        in_channels=draw(st.sampled_from([1, 3, 16])),
        out_channels=draw(st.sampled_from([1, 2, 16])),
        batch=draw(st.sampled_from([1, 2, 15, 16, 17, 33, 70])),
        precision=draw(st.sampled_from(list(PRECISIONS))),
        activation=draw(st.sampled_from(ACTIVATIONS)),
        with_bias=draw(st.booleans()),
        memory=draw(st.sampled_from(["contiguous", "transposed", "strided"])),
        fewest_programs=draw(st.sampled_from([0, 30])),
        seed=draw(st.integers(0, 100)),
    )


@given(case=cases())
@settings(max_examples=3)
def test_any_network(case):
    check(case)


@pytest.mark.long
@given(case=cases())
@settings(max_examples=200)
def test_many_networks(case):
    check(case)


# Each graph in one precision, the others in the long run.
PAIRS = [(graph, number) for graph in range(len(GRAPHS)) for number in range(len(PRECISIONS))]
PAIRS = [pytest.param(*pair, marks=[] if pair[0] % 4 == pair[1] else pytest.mark.long) for pair in PAIRS]


@pytest.mark.parametrize(("graph", "number"), PAIRS)
def test_graphs(graph, number):
    options = {"precision": list(PRECISIONS)[number], "activation": ACTIVATIONS[number]}
    check(Case(list(GRAPHS)[graph], width=(16, 20)[graph % 2], with_bias=graph % 3 > 0, **options))


@pytest.mark.parametrize("precision", [pytest.param("ieee", marks=pytest.mark.long), "bfloat16"])
def test_tiles_of_nodes_weights_and_batch(precision):
    """Outputs and inputs in several ragged tiles, a batch of several tiles, sums of several steps."""
    check(Case("two levels", 133, in_channels=3, out_channels=5, batch=130, precision=precision, fewest_programs=0))


def test_sums_of_several_whole_steps():
    check(Case("two levels", 48, in_channels=48, out_channels=48, batch=17, precision="float16", activation="relu"))


@pytest.mark.parametrize("hidden", [5, 32])
def test_hidden_units(hidden):
    check(Case("read sink", width=7, hidden=hidden, in_channels=7, out_channels=3, batch=17, activation="silu"))


@pytest.mark.parametrize("parts", [1, 7])
@pytest.mark.parametrize("precision", ["tf32", pytest.param("float16", marks=pytest.mark.long)])
def test_shared_weights_in_one_part_and_in_many(precision, parts):
    check_backward(Case("shared, padded", in_channels=16, batch=70, precision=precision, fewest_programs=parts))


def test_only_what_is_asked_for():
    net = network(Case("two levels"))
    with strict():
        whole = net.backward(kernels.dag_network_backward)
        for needs_x, needs_parameters in ((True, False), (False, True), (False, False)):
            asked = net.backward(kernels.dag_network_backward, needs_x, needs_parameters)
            assert len(asked) == (len(whole) if needs_parameters else 1)
            assert torch.equal(asked[0], whole[0] if needs_x else torch.empty(0))
            assert all(torch.equal(*pair) for pair in zip(asked[1:], whole[1:], strict=False))


def test_an_empty_batch():
    case = Case("skip edges", batch=0)
    assert check_forward(case).shape == (0, 3)
    grad_x, *others = check_backward(case)
    assert grad_x.shape == (0, 6) and all((grad == 0).all() for grad in others)


def test_no_order_of_programs_and_no_tile_of_the_batch_changes_a_result():
    results = []
    for fewest_programs, seed in ((0, 1), (20, 2)):
        case = Case("two levels", batch=128, fewest_programs=fewest_programs)
        net = network(case)
        with case.settings(), strict(seed):
            results.append([net.forward(kernels.dag_network), net.backward(kernels.dag_network_backward)[0]])
    assert all(torch.equal(*pair) for pair in zip(*results, strict=True))


@pytest.mark.parametrize("activation", ["relu", "silu"])
def test_nan_reaches_what_it_should_and_rows_of_the_batch_do_not_mix(activation):
    net = network(Case("read sink", batch=20, activation=activation))
    with strict():
        clean = net.forward(kernels.dag_network), net.backward(kernels.dag_network_backward)[0]
        net.x[7, 1] = float("nan")
        spoilt = net.forward(kernels.dag_network), net.backward(kernels.dag_network_backward)[0]
    exact = net.forward(reference.dag_network), net.backward(reference.dag_network_backward)[0]
    others = torch.arange(20) != 7
    for before, after, expected in zip(clean, spoilt, exact, strict=True):
        assert torch.equal(before[others], after[others])
        assert torch.equal(after.isnan(), expected.isnan())
    assert spoilt[0].isnan().any()


def test_a_weight_that_is_infinite_spoils_no_padding():
    """What lies between the batch and the end of a row is added to gradients: it is 0, not 0 times infinity."""
    net = network(Case("tree", batch=5, activation="relu"))
    net.weights[0][0, 3] = -float("inf")
    net.x[:, :2] = 1  # so that relu of its sum is 0
    with strict():
        ours = net.backward(kernels.dag_network_backward)
    for mine, theirs in zip(ours, net.backward(reference.dag_network_backward), strict=True):
        torch.testing.assert_close(mine, theirs, equal_nan=True)


@pytest.mark.parametrize("far_case", FAR_CASES, ids=lambda case: case.__name__)
def test_offsets_past_32_bits(far_case):
    result, exact = far_case()
    assert torch.equal(result, exact)
    assert (result != 0).any()


# Few, small and ragged in every way: what kernels damaged in one place are tried on.
PROBES = (
    Case("read sink", 20, in_channels=20, out_channels=3, batch=17),
    Case("two levels", 133, in_channels=3, batch=130, precision="float16", activation="relu", fewest_programs=0),
    Case("ternary", 48, None, 48, 48, 33, precision="tf32", activation="silu", fewest_programs=0, with_bias=False),
)


def damage_seen(mutant: Mutant, folder) -> bool:
    damaged = load(mutant, folder)
    try:
        for case in PROBES:
            check_forward(case, damaged)
            check_backward(case, damaged)
        for far_case in FAR_CASES:
            assert torch.equal(*far_case(damaged))
    except Exception:
        return True
    return False


def test_undamaged_kernels_pass(tmp_path):
    with open(kernels.__file__) as file:
        assert not damage_seen(Mutant("none", 0, "", file.read()), tmp_path)


def check_damage_is_seen(damaged, folder):
    """At least four of five: some changes have no effect, such as a row that is read and not stored."""
    survivors = [mutant for mutant in damaged if not damage_seen(mutant, folder)]
    print(f"\ninterpreter: {len(damaged) - len(survivors)} of {len(damaged)} damaged kernels caught")
    for mutant in survivors:
        print(f"interpreter: survives: line {mutant.line}, {mutant.kind}: {mutant.changed}")
    assert len(survivors) <= 0.2 * len(damaged)


def test_some_damage_is_seen(tmp_path):
    check_damage_is_seen(mutants(kernels.__file__)[::18], tmp_path)


@pytest.mark.long
def test_any_damage_is_seen(tmp_path):
    check_damage_is_seen(mutants(kernels.__file__), tmp_path)
