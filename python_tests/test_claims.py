"""The claims: that each runs from end to end, that verdicts follow from numbers, that the data are what they say."""

import dataclasses
import io
import json
import math

import pytest
import torch
from rich.console import Console

from benchmarks.claims import __main__ as command
from benchmarks.claims import c06_end_to_end as end_to_end
from benchmarks.claims import c07_attention_parents as parents_found
from benchmarks.claims import characters, ring
from benchmarks.claims.common import Claim, Criterion, SeedResult, results_table, run_claim
from compsparse_kernels import theory

KEYS = list(command.MODULES)


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def run_command(monkeypatch, tmp_path, claim, *options):
    monkeypatch.setattr(command, "load", lambda key: claim)
    code = command.main(["C3", "--json", str(tmp_path), "--plot", str(tmp_path), *options])
    return code, {path.name: path for path in tmp_path.iterdir()}


# ---- every claim, tiny


@pytest.mark.parametrize("key", KEYS)
def test_a_claim_runs_from_end_to_end(key, tmp_path, monkeypatch):
    claim = command.load(key)
    assert claim.key == key
    ticks = []
    monkeypatch.setattr(command, "SEEDS", (0,))
    counted = dataclasses.replace(
        claim, run=lambda seed, size, tick: claim.run(seed, size, lambda: ticks.append(tick()))
    )
    code, files = run_command(monkeypatch, tmp_path, counted, "--quick")
    assert code == 0 and len(ticks) == claim.parts(claim.quick)
    assert set(files) == {f"{claim.stem}_quick.json", f"{claim.stem}_quick.png"}
    assert files[f"{claim.stem}_quick.png"].stat().st_size > 10_000
    result = json.loads(files[f"{claim.stem}_quick.json"].read_text())
    assert result["quick"] and result["verdict"] in ("PASS", "FAIL") and result["machine"]["versions"]["torch"]
    assert {criterion["measure"] for criterion in result["criteria"]} <= set(result["medians"])


def test_every_lift_starts_at_chance():
    """A dense layer keeps all pairs, so round 0 has lift 1 in every arm; then the density falls as planned."""
    claim = command.load("C3")
    details = claim.run(0, claim.quick, lambda: None).details
    keep = 1 - claim.quick.fraction
    for name, arm in details.items():
        assert arm["density"][0] == 1 and arm["lift_1"][0] == 1
        cells = claim.quick.ring * claim.quick.hidden
        planned = [keep**claim.quick.rounds] if name == "one-shot" else [keep, keep**2]
        assert arm["density"][1:] == [(cells - round((1 - density) * cells)) / cells for density in planned]


def test_both_sides_of_the_end_to_end_run_prune_alike():
    """Bit for bit the same masks in float64: the peer is IMP with W * M, and nothing else differs."""
    size = end_to_end.QUICK
    digits = end_to_end._digits(size.digits_per_class)
    sides = [end_to_end._imp(side, digits, 3, size, torch.float64, lambda: None) for side in end_to_end.SIDES]
    ours, peer = (side.masks for side in sides)
    assert end_to_end._same_masks(ours, peer) == size.rounds
    weights = 784 * size.hidden + size.hidden**2
    planned = [weights - round((1 - (1 - size.fraction) ** number) * weights) for number in range(size.rounds + 1)]
    assert [end_to_end._density(masks) for masks in ours] == [count / weights for count in planned]
    assert sides[0].accuracies == sides[1].accuracies
    weights = [model.get_submodule("2").weight.detach() for model in (sides[0].model, sides[1].model)]
    # 36 steps of Adam at 1e-3 move weights by some 1e-2; rounding in float64 leaves them equal to many digits.
    torch.testing.assert_close(weights[0], weights[1] * peer[-1]["2"], rtol=1e-9, atol=1e-12)
    changed = [masks | {"0": ~masks["0"]} for masks in peer]
    assert end_to_end._same_masks(ours, changed) == 0
    assert end_to_end._in_common(ours[-1], peer[-1]) == 1 > end_to_end._in_common(ours[-1], changed[-1])


# ---- verdicts


@dataclasses.dataclass(frozen=True)
class Size:
    parts: int = 1


def fake_claim(criteria, numbers):
    """``numbers[seed]`` is what that seed measures."""

    def run(seed, size, tick):
        tick()
        return SeedResult({"x": numbers[seed], "y": math.inf}, {"curve": [math.nan]})

    def draw(figure, results):
        figure.subplots().plot([result.measures["x"] for result in results])

    return Claim("C0", "c00", "a title", "a source", "a text", criteria, Size(), Size(), lambda size: 1, run, draw)


@pytest.mark.parametrize(
    ("relation", "bound", "numbers", "verdict"),
    [
        (">=", 2, (1.0, 2.0, 9.0), "PASS"),
        (">=", 2.1, (1.0, 2.0, 9.0), "FAIL"),
        ("<=", 2, (1.0, 2.0, 9.0), "PASS"),
        ("<=", 1.9, (1.0, 2.0, 9.0), "FAIL"),
        (">=", 2, (9.0, math.nan, 9.0), "FAIL"),
        ("<=", 2, (1.0, 1.0, math.nan), "FAIL"),
    ],
)
def test_the_median_is_judged(relation, bound, numbers, verdict):
    result, seeds = run_claim(fake_claim([Criterion("x", relation, bound)], numbers))
    assert result["verdict"] == verdict
    assert [seed.measures["x"] for seed in seeds] == list(numbers)


def test_one_missed_criterion_fails_a_claim():
    criteria = [Criterion("x", ">=", 1), Criterion("x", "<=", 1.5)]
    result, _ = run_claim(fake_claim(criteria, (2.0, 2.0, 2.0)))
    assert [criterion["ok"] for criterion in result["criteria"]] == [True, False]
    assert result["verdict"] == "FAIL"


def test_the_table_shows_every_number():
    result, _ = run_claim(fake_claim([Criterion("x", ">=", 2.5)], (1.0, 2.0, 9.0)))
    console = Console(width=120, record=True, file=io.StringIO())
    console.print(results_table(result))
    rows = [line.split() for line in console.export_text().splitlines()]
    assert ["x", "1", "2", "9", "2", ">=", "2.5", "FAIL"] in rows
    assert ["y", "inf", "inf", "inf", "inf"] in rows


def test_a_fail_is_told_and_is_no_error(tmp_path, monkeypatch, capsys):
    code, files = run_command(monkeypatch, tmp_path, fake_claim([Criterion("x", ">=", 3)], (1.0, 2.0, 9.0)))
    assert code == 0 and "C0 FAIL" in capsys.readouterr().out
    text = files["c00.json"].read_text()
    result = json.loads(text, parse_constant=lambda constant: pytest.fail(f"{constant} is no JSON"))
    assert result["verdict"] == "FAIL" and result["criteria"][0]["median"] == 2
    assert result["medians"]["y"] is None and result["seeds"][0]["details"] == {"curve": [None]}
    assert [seed["measures"]["x"] for seed in result["seeds"]] == [1, 2, 9]


def test_an_interrupted_run_writes_nothing(tmp_path, monkeypatch):
    def interrupt(seed, size, tick):
        raise KeyboardInterrupt

    claim = dataclasses.replace(fake_claim([], (1.0,)), run=interrupt)
    code, files = run_command(monkeypatch, tmp_path, claim)
    assert code == 130 and not files


def test_an_unknown_claim_is_refused(capsys):
    with pytest.raises(SystemExit):
        command.main(["C4711"])
    assert f"expected one of {', '.join(KEYS)}, got 'C4711'" in capsys.readouterr().err


# ---- the ring


@pytest.mark.parametrize("gaussian", [False, True])
@pytest.mark.parametrize("length", ring.LENGTHS)
def test_patterns_have_the_covariance_they_should(length, gaussian):
    """The same for the Gaussian control as for the data; the other moments differ."""
    count, n = 20_000, 12
    x = ring.patterns(count, n, length, gaussian, torch.Generator().manual_seed(0))
    expected = ring.saturated(torch.exp(-((theory.ring_distance(n).double() / length) ** 2)), ring.GAIN)
    # A sample covariance of n draws has standard error at most sqrt(kurtosis / n), and the kurtosis is at most 3 here;
    # six of them, for 144 entries.
    torch.testing.assert_close(x.T @ x / count, expected, rtol=0, atol=6 * (3 / count) ** 0.5)
    kurtosis = (x**4).mean() / (x**2).mean() ** 2
    assert (2.8 < kurtosis < 3.2) if gaussian else kurtosis < 1.6


def test_both_classes_come_equally_often_and_shuffled_labels_keep_them():
    plain = ring.ring_data(12, 100, 50, seed=1)
    shuffled = ring.ring_data(12, 100, 50, seed=1, shuffle=True)
    assert plain.train_y.bincount().tolist() == shuffled.train_y.bincount().tolist() == [50, 50]
    assert torch.equal(plain.train_x, shuffled.train_x) and not torch.equal(plain.train_y, shuffled.train_y)
    assert torch.equal(plain.test_y, shuffled.test_y)
    rough = (plain.train_x - plain.train_x.roll(1, 1)).square().mean(1)
    assert rough[plain.train_y == 0].mean() > 2 * rough[plain.train_y == 1].mean()


# ---- attention and its parents


def test_the_target_depends_on_its_parents_alone():
    values, parents, y = parents_found.problem(500, 6, torch.Generator().manual_seed(0))
    assert (parents[:, 0] != parents[:, 1]).all() and set(parents.unique().tolist()) == set(range(6))
    first, second = values.gather(1, parents).T
    torch.testing.assert_close(y, torch.sin(2 * first) + first * second)


def test_parents_among_the_kept_are_counted_right():
    """A model whose heads are made to look at one named key each: with queries aligned to keys nothing else is kept,
    and with queries of 0 everything is."""
    size = dataclasses.replace(parents_found.QUICK, dim=16, tokens=4)
    model = parents_found.Retrieval(4, size)
    with torch.no_grad():
        attention = model.attention
        model.named.weight.copy_(torch.eye(4, 8) * 50)
        model.key.weight.copy_(torch.cat((torch.eye(4, 8), torch.eye(4, 8)), 1))
        attention.in_proj_weight[:32].copy_(torch.eye(16).repeat(2, 1))
        attention.in_proj_bias.zero_()
        model.value.weight.zero_()
        model.value.bias.zero_()
        test = parents_found.problem(100, 4, torch.Generator().manual_seed(0))
        found = parents_found._at(model, 0.1, test)
        assert (found["recall"], found["precision"], found["kept"]) == (1, 1, 2)
        assert model.attention is attention
        model.named.weight.zero_()
        found = parents_found._at(model, 0.1, test)
        assert (found["recall"], found["precision"], found["kept"]) == (1, 0.5, 4)


def test_the_text_is_the_librarys():
    text = characters.library_text(5000)
    assert len(text) == 5000 and text.min() >= 0 and text.max() < characters.CHARACTERS
    assert "import" in "".join(map(chr, text.tolist()))


def test_every_arm_of_the_character_model_begins_alike():
    """The same weights, and softmax is what a threshold near 0 gives; nothing in them looks ahead."""
    size = characters.QUICK
    models = []
    for arm in characters.ARMS:
        torch.manual_seed(0)
        models.append(characters.CharacterModel(size, arm).double())
    softmax, fixed, learned = models
    states = [model.state_dict() for model in models]
    assert set(states[0]) == set(states[1]) == {name for name in states[2] if "threshold" not in name}
    assert all(torch.equal(states[0][name], state[name]) for state in states[1:] for name in states[0])
    for block in learned.blocks:
        threshold = block.attention.threshold
        torch.testing.assert_close(threshold, torch.full_like(threshold, size.threshold))
    text = characters.library_text(200)
    x = torch.stack((text[100 : 100 + size.context], text[100 : 100 + size.context]))
    x[1, 8:] = 0
    for model in models:
        out = model(x)
        torch.testing.assert_close(out[0, :8], out[1, :8])
    assert (fixed(x) - softmax(x)).abs().max() < 1  # not the same, but near
    for block in fixed.blocks:
        block.attention.threshold = 1e-30
    torch.testing.assert_close(fixed(x), softmax(x))
