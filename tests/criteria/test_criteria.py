"""Criteria against plain loops written from the papers' formulas: equal scores, equal rankings."""

from __future__ import annotations

import itertools
import math
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

import graphprune as gp
from graphprune.criteria import CRITERIA, criterion_named
from graphprune.criteria.base import Criterion, is_comparable, seen_by
from graphprune.criteria.relative import lamp

Index = NDArray[np.int64]
Values = list[list[float]]
Layout = tuple[tuple[int, ...], int, Index]

SEEDS = (0, 1)


def one_each(channels: int) -> Index:
    """Returns an index with one row per channel."""
    return np.arange(channels)[:, None]


LAYOUTS: dict[str, Layout] = {
    "conv filters": ((6, 4, 3, 3), 0, one_each(6)),
    "conv inputs": ((3, 7, 2, 3), 1, one_each(7)),
    "linear rows": ((9, 5), 0, one_each(9)),
    "linear columns": ((4, 8), 1, one_each(8)),
    "conv3d filters": ((4, 2, 2, 1, 3), 0, one_each(4)),
    "whole heads": ((12, 5), 0, np.arange(12).reshape(4, 3)),
    "positions in every head": ((12, 5), 0, np.arange(12).reshape(3, 4).T.copy()),
    "columns of a flattened map": ((3, 20), 1, np.arange(20).reshape(5, 4)),
    "some rows, in no order": ((10, 2, 3), 0, np.array([[7], [0], [4], [9]])),
}


def draw(shape: Sequence[int], seed: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Returns normal values."""
    return torch.randn(tuple(shape), generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def part(tensor: torch.Tensor, dim: int, index: Index, **extra: torch.Tensor) -> gp.Part:
    """Returns what a criterion is shown of one slice."""
    return gp.Part(tensor, gp.Slice("layer.weight", dim, index, produces=True), extra)


def owned(tensor: torch.Tensor, dim: int, index: Index) -> Values:
    """Returns the elements that each channel owns, one by one."""
    out = []
    for rows in index.tolist():
        places = itertools.product(*(rows if d == dim else range(size) for d, size in enumerate(tensor.shape)))
        out.append([float(tensor[place]) for place in places])
    return out


def ranking(scores: Sequence[float]) -> list[int]:
    """Returns the channels by rising score."""
    return sorted(range(len(scores)), key=lambda channel: scores[channel])


def agree(criterion: Criterion, given: gp.Part, expected: list[float]) -> None:
    """Asserts that scores are within 1e-6 of the reference, relative to the largest, and in the same order."""
    found = criterion(given)
    assert found.shape == (len(expected),)
    scores = found.double().tolist()
    assert len(set(expected)) == len(expected)
    assert max(abs(a - b) for a, b in zip(scores, expected, strict=True)) <= 1e-6 * max(1.0, *map(abs, expected))
    assert ranking(scores) == ranking(expected)


# -- weights -------------------------------------------------------------------------------------------------------------------------


def l1(values: Values) -> list[float]:
    """Li et al., section 3.1: s_j = sum |K_j|."""
    return [sum(abs(w) for w in channel) for channel in values]


def l2(values: Values) -> list[float]:
    """He et al., Soft Filter Pruning, equation 2 with p = 2: the square root of the sum of squares."""
    return [math.sqrt(sum(w * w for w in channel)) for channel in values]


def fpgm(values: Values) -> list[float]:
    """He et al., FPGM, section 3.2: g(x) = sum over all filters k of |x - W_k|_2."""
    return [sum(math.sqrt(sum((a - b) ** 2 for a, b in zip(one, other, strict=True))) for other in values) for one in values]


def lamp_score(values: Values) -> list[float]:
    """Lee et al., equation 4, of squared norms: W_u^2 over the sum of W_v^2 of v = u and all that follow it in rising order."""
    squares = [sum(w * w for w in channel) for channel in values]
    order = ranking(squares)
    out = [0.0] * len(squares)
    for place, channel in enumerate(order):
        out[channel] = squares[channel] / sum(squares[other] for other in order[place:])
    return out


WEIGHTS: dict[str, tuple[Criterion, Callable[[Values], list[float]]]] = {
    "l1": (gp.L1(), l1),
    "l2": (gp.L2(), l2),
    "fpgm": (gp.FPGM(), fpgm),
    "lamp": (gp.LAMP(), lamp_score),
}


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", WEIGHTS)
def test_weights_are_scored_as_in_the_paper(name: str, layout: str, seed: int) -> None:
    """L1, L2, FPGM and LAMP equal plain loops on filters, columns, heads and chosen rows, in single and double precision."""
    criterion, reference = WEIGHTS[name]
    shape, dim, index = LAYOUTS[layout]
    for dtype in (torch.float32, torch.float64):
        weight = draw(shape, seed, dtype)
        agree(criterion, part(weight, dim, index), reference(owned(weight, dim, index)))


@pytest.mark.parametrize("name", WEIGHTS)
def test_half_precision_is_ranked_as_exactly(name: str) -> None:
    """Sums of many half-precision weights, tiny or huge, neither overflow, vanish nor tie."""
    criterion, reference = WEIGHTS[name]
    for dtype, scale in ((torch.float16, 1e-3), (torch.float16, 3e3), (torch.bfloat16, 1.0)):
        weight = (draw((8, 900), 3) * scale).to(dtype)
        expected = reference(owned(weight, 0, one_each(8)))
        scores = criterion(part(weight, 0, one_each(8))).double().tolist()
        assert scores == pytest.approx(expected, rel=1e-6)
        assert ranking(scores) == ranking(expected)


def test_norms_of_a_vector() -> None:
    """A learnt vector has one number per channel, or several."""
    vector = draw((6,), 0)
    agree(gp.L1(), part(vector, 0, one_each(6)), [abs(float(v)) for v in vector])
    agree(gp.L2(), part(vector, 0, np.arange(6).reshape(3, 2)), l2(owned(vector, 0, np.arange(6).reshape(3, 2))))


# -- FPGM ----------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scale", [1e-3, 1.0, 10.0])
def test_equal_filters_have_no_distance(scale: float) -> None:
    """Where all filters are the same, their sums of distances are zero to within 1e-6, however wide the filters are."""
    weight = (draw((1, 512, 3, 3), 0) * scale).repeat(16, 1, 1, 1)
    assert float(gp.FPGM()(part(weight, 0, one_each(16))).abs().max()) < 1e-6


def test_a_duplicate_adds_nothing_to_its_twin() -> None:
    """Of two equal pairs every filter is twice the distance of the pairs away from the others, and not a rounding error more."""
    one, two = draw((2, 512 * 9), 1)
    distance = math.sqrt(sum((a - b) ** 2 for a, b in zip(one.tolist(), two.tolist(), strict=True)))
    found = gp.FPGM()(part(torch.stack([one, two, one, two]), 0, one_each(4)))
    assert found.tolist() == pytest.approx([2 * distance] * 4, abs=1e-6)


def test_distances_of_near_filters_far_from_the_origin() -> None:
    """Small differences are not lost in large common values: distances do not change when all filters are moved."""
    weight = draw((12, 30), 2, torch.float64)
    moved = weight + 1e4
    expected = fpgm(owned(weight, 0, one_each(12)))
    assert gp.FPGM()(part(moved, 0, one_each(12))).tolist() == pytest.approx(expected, rel=1e-6)


def test_distances_in_blocks_are_distances(monkeypatch: pytest.MonkeyPatch) -> None:
    """Working through the rows and columns in small blocks changes nothing."""
    weight = draw((13, 50), 4)
    whole = gp.FPGM()(part(weight, 0, one_each(13))).tolist()
    monkeypatch.setattr("graphprune.criteria.distances._BLOCK", 40)
    agree(gp.FPGM(), part(weight, 0, one_each(13)), fpgm(owned(weight, 0, one_each(13))))
    assert gp.FPGM()(part(weight, 0, one_each(13))).tolist() == pytest.approx(whole, rel=1e-12)


_MEMORY = """
import numpy, torch
import graphprune as gp
from tests.support.memory import peak_bytes

def part(weight):
    return gp.Part(weight, gp.Slice("w", 0, numpy.arange(weight.shape[0])[:, None], produces=True))

gp.FPGM()(part(torch.randn(64, 8)))
weight = torch.randn(2048, 2048, 3, 3)
before = peak_bytes()
scores = gp.FPGM()(part(weight))
above = peak_bytes() - before
some = [0, 2047]
loops = [sum(float((weight[i : i + 64] - weight[j]).flatten(1).norm(dim=1).sum()) for i in range(0, 2048, 64)) for j in some]
assert torch.allclose(scores[some], torch.tensor(loops, dtype=torch.float64), rtol=1e-6), (scores[some], loops)
print(above)
"""


def test_fpgm_of_2048_filters_stays_below_one_gibibyte() -> None:
    """2048 filters of 2048 x 3 x 3 are scored in less than 1 GiB above what the weights themselves take, and rightly."""
    ran = subprocess.run([sys.executable, "-c", _MEMORY], cwd=Path(__file__).parents[2], capture_output=True, text=True, check=False)  # noqa: S603 (our own text)
    assert ran.returncode == 0, ran.stderr
    assert 0 < int(ran.stdout) < 2**30


# -- scales --------------------------------------------------------------------------------------------------------------------------


def test_scales_are_absolute() -> None:
    """Liu et al.: channels are ranked by |gamma|; a channel that is spread over several positions by their mean."""
    gamma = draw((12,), 5)
    agree(gp.BNScale(), part(gamma, 0, one_each(12)), [abs(g) for g in gamma.tolist()])
    triples = owned(gamma, 0, np.arange(12).reshape(4, 3))
    agree(gp.BNScale(), part(gamma, 0, np.arange(12).reshape(4, 3)), [sum(map(abs, triple)) / 3 for triple in triples])


# -- LAMP ----------------------------------------------------------------------------------------------------------------------------


def test_lamp_of_the_largest_is_one_and_of_zeros_zero() -> None:
    """Every layer has a channel that scores 1, so no global ranking empties a layer; dead channels score 0, and none is NaN."""
    assert lamp(torch.tensor([4.0, 1.0, 3.0, 0.0], dtype=torch.float64)).tolist() == [1.0, 1 / 8, 3 / 7, 0.0]
    assert lamp(torch.zeros(3)).tolist() == [0.0, 0.0, 0.0]
    assert lamp(torch.tensor([2.0, 6.0, 2.0])).tolist() == [0.25, 1.0, pytest.approx(0.2)]  # of equal ones the last goes first
    for scale in (1e-12, 1.0, 1e12):
        scores = gp.LAMP()(part(draw((5, 4), 6) * scale, 0, one_each(5)))
        assert float(scores.max()) == 1.0


# -- gradients and curvature ---------------------------------------------------------------------------------------------------------


def mean_products(weight: torch.Tensor, gradients: Sequence[torch.Tensor]) -> torch.Tensor:
    """Returns the mean over mini-batches of (g w)^2, element by element."""
    flat = [[(float(g) * float(w)) ** 2 for g, w in zip(one.flatten(), weight.flatten(), strict=True)] for one in gradients]
    return torch.tensor([sum(column) / len(flat) for column in zip(*flat, strict=True)], dtype=torch.float64).reshape(weight.shape)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_taylor_sums_squares(layout: str) -> None:
    """Molchanov et al. 2019, equation 8 per weight: I_S = sum over s in S of (g_s w_s)^2, averaged over mini-batches."""
    shape, dim, index = LAYOUTS[layout]
    weight, gradients = draw(shape, 0), [draw(shape, seed) for seed in (1, 2, 3)]
    expected = [0.0] * len(index)
    for gradient in gradients:
        pairs = zip(owned(gradient, dim, index), owned(weight, dim, index), strict=True)
        for channel, (g, w) in enumerate(pairs):
            expected[channel] += sum((a * b) ** 2 for a, b in zip(g, w, strict=True)) / len(gradients)
    agree(gp.Taylor(), part(weight, dim, index, products=mean_products(weight, gradients)), expected)


def test_the_group_form_of_taylor_lets_terms_cancel() -> None:
    """The joint form is (sum of g w)^2 averaged over mini-batches, as observed: opposite terms cancel, which squares do not."""
    weight, gradient = torch.tensor([[1.0, 2.0], [3.0, 1.0]]), torch.tensor([[2.0, -1.0], [1.0, 1.0]])
    joint = [sum(g * w for g, w in zip(*rows, strict=True)) ** 2 for rows in zip(gradient.tolist(), weight.tolist(), strict=True)]
    assert joint == [0.0, 16.0]
    assert gp.TaylorGroup()(part(weight, 0, one_each(2), joint=torch.tensor(joint))).tolist() == joint
    assert gp.Taylor()(part(weight, 0, one_each(2), products=(weight * gradient) ** 2)).tolist() == [8.0, 10.0]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_curvature_is_the_diagonal_of_optimal_brain_damage(layout: str) -> None:
    """LeCun et al., equation 5: s_k = h_kk w_k^2 / 2, summed over a channel; negative curvature counts as it is."""
    shape, dim, index = LAYOUTS[layout]
    weight, diagonal = draw(shape, 0), draw(shape, 1)
    pairs = zip(owned(diagonal, dim, index), owned(weight, dim, index), strict=True)
    expected = [sum(h * w * w / 2 for h, w in zip(hs, ws, strict=True)) for hs, ws in pairs]
    agree(gp.HessianDiagonal(), part(weight, dim, index, curvature=diagonal), expected)


# -- inputs --------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", LAYOUTS)
def test_wanda_multiplies_weights_with_norms_of_inputs(layout: str) -> None:
    """Sun et al., equation 1: S_ij = |W_ij| |X_j|_2, with X_j all values of input j; a channel's score is the sum of its S."""
    shape, dim, index = LAYOUTS[layout]
    weight, samples = draw(shape, 0), draw((6, shape[1]), 1)
    norms = torch.tensor([math.sqrt(sum(x * x for x in column)) for column in samples.T.tolist()])
    inputs = norms.reshape(1, -1, *[1] * (len(shape) - 2))
    spread = owned(inputs.expand(shape), dim, index)
    expected = [sum(abs(w) * x for w, x in zip(ws, xs, strict=True)) for ws, xs in zip(owned(weight, dim, index), spread, strict=True)]
    agree(gp.Wanda(), part(weight, dim, index, inputs=inputs), expected)


def test_wanda_of_a_table_is_its_magnitude() -> None:
    """A table that is looked up multiplies no input: its weights count as they are."""
    weight = draw((5, 4), 0)
    agree(gp.Wanda(), part(weight, 1, one_each(4)), l1(owned(weight, 1, one_each(4))))


# -- activations ---------------------------------------------------------------------------------------------------------------------


def observed(activations: torch.Tensor) -> gp.Part:
    """Returns the part of activations (samples, channels, positions): how many are zero, their sum, their number."""
    channels = activations.shape[1]
    zeros, total, elements = ([0.0] * channels for _ in range(3))
    for sample in activations.tolist():
        for channel, positions in enumerate(sample):
            for value in positions:
                zeros[channel] += value == 0.0
                total[channel] += value
                elements[channel] += 1
    counts = {n: torch.tensor(v, dtype=torch.float64) for n, v in (("zeros", zeros), ("total", total), ("elements", elements))}
    return part(counts["elements"], 0, one_each(channels), **counts)


@pytest.mark.parametrize("seed", SEEDS)
def test_apoz_is_the_average_percentage_of_zeros(seed: int) -> None:
    """Hu et al., equation 1: APoZ_c = sum over k, j of [O_c,j(k) = 0] / (N M); the highest APoZ has the lowest score."""
    shift = torch.linspace(-2.2, 2.0, 7)[None, :, None]
    activations = (draw((8, 7, 50), seed) + shift).relu()
    flat = activations.transpose(0, 1).flatten(1).tolist()
    apoz = [sum(value == 0 for value in channel) / len(channel) for channel in flat]
    agree(gp.APoZ(), observed(activations), [1 - share for share in apoz])
    assert ranking(gp.APoZ()(observed(activations)).tolist())[0] == apoz.index(max(apoz))


@pytest.mark.parametrize("seed", SEEDS)
def test_the_mean_activation_is_a_mean(seed: int) -> None:
    """Molchanov et al. 2017, section 2.2: the mean over samples and positions of what the nonlinearity lets pass."""
    activations = draw((8, 7, 9), seed).relu()
    flat = activations.transpose(0, 1).flatten(1).tolist()
    agree(gp.MeanActivation(), observed(activations), [math.fsum(channel) / len(channel) for channel in flat])


# -- random --------------------------------------------------------------------------------------------------------------------------


def random_scores(seed: int, name: str = "layer.weight", channels: int = 500, dim: int = 0) -> list[float]:
    """Returns what `Random` makes of a layer of that name."""
    shape = (channels, 1) if dim == 0 else (1, channels)
    scores: list[float] = gp.Random(seed)(gp.Part(torch.zeros(shape), gp.Slice(name, dim, one_each(channels)))).tolist()
    return scores


def test_random_scores_are_those_of_the_seed() -> None:
    """Equal seeds give equal scores whatever the global random state; seeds, layers and dimensions have scores of their own."""
    torch.manual_seed(1)
    first = random_scores(0)
    torch.manual_seed(2)
    np.random.default_rng(3).random()
    assert random_scores(0) == first
    others = [random_scores(1), random_scores(0, "other.weight"), random_scores(0, dim=1)]
    for other in others:
        assert abs(np.corrcoef(first, other)[0, 1]) < 0.2


def test_random_scores_are_uniform() -> None:
    """Scores lie in [0, 1) and fill it evenly."""
    scores = random_scores(0, channels=4000)
    assert 0 <= min(scores) < max(scores) < 1
    assert np.histogram(scores, bins=4, range=(0, 1))[0].tolist() == pytest.approx([1000] * 4, rel=0.15)


def test_random_scores_leave_the_callers_random_state_alone() -> None:
    """Nothing is drawn from the global generators."""
    before = torch.get_rng_state()
    random_scores(0)
    assert torch.equal(torch.get_rng_state(), before)


# -- in general ----------------------------------------------------------------------------------------------------------------------


def test_what_each_criterion_sees() -> None:
    """Names lead to criteria; each says what it is to be shown; what needs no layer's own scale is compared as it is."""
    sees = {name: seen_by(criterion_named(name)) for name in CRITERIA}
    assert {name for name, seen in sees.items() if seen == "weights"} == {"l1", "l2", "fpgm", "lamp", "random"}
    others = {"bn_scale": "scales", "apoz": "activations", "mean_activation": "activations", "taylor": "products"}
    others |= {"taylor_group": "joint", "hessian": "curvature", "wanda": "inputs"}
    assert {name: seen for name, seen in sees.items() if seen != "weights"} == others
    scaled = {name for name in CRITERIA if not is_comparable(criterion_named(name))}
    assert scaled == {"l1", "l2", "fpgm", "wanda", "mean_activation"}


@pytest.mark.parametrize("name", [*WEIGHTS, "bn_scale", "random"])
def test_criteria_are_records_that_change_nothing(name: str) -> None:
    """Equal criteria are equal, and neither the weights nor their gradients are touched."""
    criterion: Any = criterion_named(name)
    assert criterion == criterion_named(name)
    weight = torch.nn.Parameter(draw((6, 3), 0))
    before = weight.detach().clone()
    scores = criterion(part(weight.detach(), 0, one_each(6)))
    assert not scores.requires_grad
    assert torch.equal(weight.detach(), before)
    assert weight.grad is None
