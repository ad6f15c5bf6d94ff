"""Networks that decide by values: every path is pruned alike, decisions are verified, ties do no harm, and no graph repeats a decision."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import graphprune as gp
from graphprune.groups import build as groups_of
from graphprune.speedup import speedup as surgery
from graphprune.trace.data_dependent import decision
from graphprune.trace.program import info
from graphprune.trace.recorder import record
from tests.support.invariants import evaluate, permutation_error, train_step
from tests.support.operators import Network, conv, described, filled, images, normal, vectors
from tests.support.outputs import relative_error
from tests.support.untouched import changes, snapshot

EXACT = 1e-9


class EarlyExit(nn.Module):
    """Answers early where it is sure enough."""

    def __init__(self, threshold: float) -> None:
        super().__init__()
        self.first, self.early = nn.Linear(4, 8), nn.Linear(8, 3)
        self.second, self.late = nn.Linear(8, 6), nn.Linear(6, 3)
        self.threshold = threshold

    def forward(self, x: Tensor) -> Tensor:
        """Returns three logits."""
        x = torch.relu(self.first(x))
        logits: Tensor = self.early(x)
        if logits.softmax(-1).amax() > self.threshold:
            return logits
        out: Tensor = self.late(torch.relu(self.second(x)))
        return out


class Experts(nn.Module):
    """Sends every row to two of four experts; experts that get none do not run."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.gate, self.head = nn.Linear(4, 8), nn.Linear(8, 4), nn.Linear(8, 3)
        self.experts = nn.ModuleList(nn.Sequential(nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 8)) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        """Returns three logits per row."""
        x = torch.relu(self.stem(x))
        weights, chosen = self.gate(x).softmax(-1).topk(2, -1)
        out = torch.zeros_like(x)
        for number, expert in enumerate(self.experts):
            rows, places = torch.where(chosen == number)
            if rows.numel():
                out = out.index_add(0, rows, expert(x[rows]) * weights[rows, places][:, None])
        logits: Tensor = self.head(x + out)
        return logits


class Detector(nn.Module):
    """Scores every pixel, keeps the best ones above a threshold, sorted, and refines them with a second head."""

    def __init__(self, threshold: float = 0.6) -> None:
        super().__init__()
        self.stem, self.norm, self.neck = conv(3, 8), nn.BatchNorm2d(8), conv(8, 8)
        self.scores, self.boxes = conv(8, 2), conv(8, 4)
        self.hidden, self.classes = nn.Linear(8, 6), nn.Linear(6, 5)
        self.threshold = threshold

    def forward(self, x: Tensor) -> list[dict[str, Tensor]]:
        """Returns boxes, scores and classes per image, as many as there are."""
        maps = torch.relu(self.neck(torch.relu(self.norm(self.stem(x)))))
        found = []
        for features, scores, boxes in zip(maps, self.scores(maps).sigmoid().amax(1), self.boxes(maps), strict=True):
            kept = torch.where(scores.flatten() > self.threshold)[0]
            best = scores.flatten()[kept].topk(min(int(kept.numel()), 9)).indices
            kept = kept[best]
            rows = torch.relu(self.hidden(features.flatten(1).mT[kept]))
            found.append({"boxes": boxes.flatten(1).mT[kept], "scores": scores.flatten()[kept], "classes": self.classes(rows)})
        return found


# -- every path ----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("threshold", [0.0, 2.0], ids=["early", "late"])
def test_whichever_exit_the_example_takes_the_other_is_pruned_with_it(threshold: float) -> None:
    """An exit that the example inputs do not reach runs after pruning, and computes what the masked model computes there."""
    model, inputs = filled(EarlyExit(threshold)), vectors(2)
    graph = gp.trace(model, inputs)
    assert described(graph) == [
        "6 exact: late.weight/1 second.bias/0 second.weight/0",
        "8 exact: early.weight/1 first.bias/0 first.weight/0 second.weight/1",
    ]
    masks = gp.L1NormPruner(model, [{"sparsity": 0.5, "op_types": ["default"]}], example_inputs=inputs, graph=graph).masks()
    small, report = gp.speedup(model, masks)
    assert (report.kind, report.error < EXACT, report.effect > 1e-3) == ("module", True, True)
    masked = zeroed(model, masks)
    for other in (0.0, 2.0):
        masked.threshold = small.threshold = other  # type: ignore[assignment]
        assert relative_error(evaluate(masked, vectors(5)), evaluate(small, vectors(5))) < EXACT


def zeroed(model: nn.Module, masks: gp.Masks) -> nn.Module:
    """Returns a copy of the model with zeros in the removed positions."""
    out = copy.deepcopy(model)
    tensors = dict(out.named_parameters())
    with torch.no_grad():
        for name, dims in masks.positions().items():
            for dim, kept in dims.items():
                gone = np.setdiff1d(np.arange(tensors[name].shape[dim]), kept)
                tensors[name].index_fill_(dim, torch.from_numpy(gone), 0)
    return out


@pytest.mark.parametrize("rows", [1, 16])
def test_experts_that_get_no_row_of_the_example_are_pruned_like_the_others(rows: int) -> None:
    """Every expert reads the channels that are left, whichever of them the example inputs were sent to."""
    model, inputs = filled(Experts()), normal(rows, 4)
    graph = gp.trace(model, inputs)
    assert not any("takes no part" in f.reason for f in graph.frozen)
    assert [g.channels for g in graph.groups] == [8, 6, 6, 6, 6]
    error, control = permutation_error(model, graph, inputs)
    assert (error < EXACT, control > 1e-3) == (True, True)
    masks = gp.L1NormPruner(model, [{"sparsity": 0.5, "op_types": ["default"]}], example_inputs=inputs, graph=graph).masks()
    small, report = gp.speedup(model, masks)
    assert (report.kind, report.error < EXACT, report.effect > 1e-3) == ("module", True, True)
    others = normal(40, 4)
    assert relative_error(evaluate(zeroed(model, masks), others), evaluate(small, others)) < EXACT
    train_step(small, others)


class Turned(nn.Module):
    """Turns the channels round where they sum up to little."""

    def __init__(self, limit: float) -> None:
        super().__init__()
        self.a, self.c = conv(3, 8), conv(8, 4)
        self.limit = limit

    def forward(self, x: Tensor) -> Tensor:
        """Returns four maps."""
        x = torch.relu(self.a(x))
        out: Tensor = self.c(x if float(x.sum()) > self.limit else x.flip(1))
        return out


def test_both_branches_couple_channels() -> None:
    """A branch that the example does not take couples channels all the same, for other inputs may take it."""
    for limit in (-1e5, 1e5):
        groups = described(gp.trace(filled(Turned(limit)), images(2)))
        assert groups == ["4 exact: a.bias/0*2 a.weight/0*2 c.weight/1*2"], limit


def test_a_path_that_needs_removed_channels_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where masks make the model take a path that was never seen and ties channels in another way, the error says so."""
    monkeypatch.setattr(groups_of, "_other_passes", lambda _: iter(()))
    model, inputs = filled(Turned(0.0)), images(2)
    sums = torch.relu(evaluate(model.get_submodule("a"), inputs)[0]).sum((0, 2, 3))
    for limit, raises in ((0.0, False), (float(sums[:5].sum() + sums.sum()) / 2, True)):
        model.limit = limit  # type: ignore[assignment]
        masks = gp.Masks(gp.trace(model, inputs), {"a": np.arange(8) < 5})
        if raises:
            with pytest.raises(gp.InputError, match=r"a path that was not recorded, on which '[ac]\..*' has other channels"):
                gp.speedup(model, masks)
        else:
            assert gp.speedup(model, masks)[1].error < EXACT


# -- detectors -----------------------------------------------------------------------------------------------------------------------


def test_a_detector_keeps_its_class_and_only_what_decides_stays() -> None:
    """Boxes and scores stay, everything before them is pruned; the number of boxes depends on the image as before."""
    model, inputs = filled(Detector()), images(2)
    graph = gp.trace(model, inputs)
    assert [(g.name, g.channels) for g in graph.groups] == [("stem", 8), ("neck", 8), ("hidden", 6)]
    assert "stays" in graph.explain("scores") or "frozen" in graph.explain("scores")
    small, report = gp.prune(model, inputs, sparsity=0.5)
    assert (report.kind, report.error < EXACT) == ("module", True)
    assert 1e-3 < report.effect < math.inf
    counts = {len(image["scores"]) for image in small(images(9))}
    assert len(counts) > 1


def test_an_empty_result_is_not_taken_for_a_proof() -> None:
    """A detector that finds nothing is compared by what it decides by: the mask has an effect there, and a spoilt weight is noticed."""
    model, inputs = filled(Detector(threshold=2.0)), images(2)
    assert all(t.numel() == 0 for t in evaluate(model, inputs))
    _, report = gp.prune(model, inputs, sparsity=0.5)
    assert (report.error < EXACT, report.effect > 1e-3) == (True, True)
    assert report.remarks == (
        "The model gives nothing for the example inputs, so what it does with results that it finds was not compared",
    )
    assert report.remarks[0] in str(report)


@pytest.mark.parametrize("parameter", ["neck.weight", "scores.bias", "boxes.weight", "hidden.weight"])
def test_a_spoilt_detector_is_noticed(parameter: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A wrong weight is found before and after decisions, and the operator that reads it is named."""
    original = vars(surgery)["set_attributes"]

    def spoil(small: nn.Module, removal: Any) -> None:
        original(small, removal)
        with torch.no_grad():
            small.get_parameter(parameter).mul_(1.01)

    monkeypatch.setattr(surgery, "set_attributes", spoil)
    model, inputs = filled(Detector(threshold=0.5)), images(2)
    before = snapshot(model)
    with pytest.raises(gp.VerificationError, match=rf"in {parameter.partition('.')[0]}: relative difference"):
        gp.prune(model, inputs, sparsity=0.5)
    assert changes(before, snapshot(model)) == []


def test_ties_that_rounding_breaks_otherwise_do_no_harm(monkeypatch: pytest.MonkeyPatch) -> None:
    """Scores that differ by rounding alone are sorted in another order by the shrunk model: it is right all the same."""

    class Ties(nn.Module):
        """Ten equal columns up to rounding, of which the first three in order are taken with what belongs to them."""

        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.value = nn.Linear(4, 8), nn.Linear(8, 1), nn.Linear(8, 10)
            self.shift = nn.Parameter(torch.zeros(10))

        def forward(self, x: Tensor) -> Tensor:
            """Returns the values of the three best of ten."""
            hidden = torch.relu(self.a(x))
            best = (self.b(hidden).expand(-1, 10) + self.shift).topk(3).indices
            out: Tensor = self.value(hidden).gather(1, best)
            return out

    model, inputs = filled(Ties()), vectors(2)
    with torch.no_grad():
        model.get_parameter("shift").zero_()
    original = vars(surgery)["set_attributes"]

    def tilt(small: nn.Module, removal: Any) -> None:
        original(small, removal)
        with torch.no_grad():
            small.get_parameter("shift").copy_(torch.arange(10) * 1e-14)

    monkeypatch.setattr(surgery, "set_attributes", tilt)
    small, report = gp.prune(model, inputs, sparsity=0.5)
    assert (report.kind, report.error < EXACT) == ("module", True)
    assert report.remarks == ("1 decisions by value fell otherwise than in the masked model, on values that are equal up to rounding",)
    assert relative_error(evaluate(small, inputs), evaluate(untilted(small), inputs)) > 1e-3


def untilted(small: nn.Module) -> nn.Module:
    """Returns the network without what breaks its ties."""
    out = copy.deepcopy(small)
    with torch.no_grad():
        out.get_parameter("shift").zero_()
    return out


# -- graphs --------------------------------------------------------------------------------------------------------------------------


def between(op: Callable[[Tensor], Tensor]) -> nn.Module:
    """Returns a network with an operator between two convolutions."""
    return filled(Network(lambda m, x: m.c(op(torch.relu(m.a(x)))), {"a": conv(3, 8), "c": conv(8, 4)}))


@pytest.mark.parametrize(
    ("op", "why"),
    [
        (lambda x: x * float(x.sum()), r"Python reads a number.*item"),
        (lambda x: x * sum(x.sum((1, 2, 3)).tolist()), r"Python reads a number.*item"),
        (lambda x: x * float(x.sum((1, 2, 3)).numpy()[0]), r"Python reads a number.*item"),
        (lambda x: x + x[:, :, x[0].sum((0, 1)) > 0.1].mean(), r"values decide a size.*index"),
        (lambda x: x * len(x.sum(1).nonzero()), r"values decide a size.*nonzero"),
        (lambda x: x * x.sum((1, 2, 3)).unique().numel(), r"values decide a size.*unique"),
    ],
    ids=["float", "list", "array", "mask", "nonzero", "unique"],
)
def test_a_graph_that_would_repeat_a_value_is_refused(op: Callable[[Tensor], Tensor], why: str) -> None:
    """Only the model's own class reads numbers and sizes anew; the error for a graph names what reads them."""
    model, inputs = between(op), images(2)
    masks = gp.L1NormPruner(model, [{"sparsity": 0.5, "op_types": ["default"]}], example_inputs=inputs).masks()
    with pytest.raises(gp.VerificationError, match=rf"no GraphModule can do what Network does: {why}"):
        gp.speedup(model, masks, result="graph")
    small, report = gp.speedup(model, masks)
    assert (report.kind, report.error < EXACT) == ("module", True)
    evaluate(small, images(4))


def test_a_graph_stops_where_python_would_have_decided_otherwise() -> None:
    """Truth values are read again: the graph runs where they are as recorded, and says which one is not."""
    model, inputs = between(lambda x: x * 2 if bool(x.sum() > 1) else x), images(2)
    masks = gp.L1NormPruner(model, [{"sparsity": 0.5, "op_types": ["default"]}], example_inputs=inputs).masks()
    small, report = gp.speedup(model, masks, result="graph")
    assert report.error < EXACT
    module, _ = gp.speedup(model, masks, result="module")
    assert relative_error(evaluate(module, images(6)), evaluate(small, images(6))) < EXACT
    with torch.no_grad():
        for network in (module, small):
            network.get_parameter("a.bias").fill_(-100.0)
    evaluate(module, inputs)
    with pytest.raises(gp.InputError, match=r"recorded with True where Python read a number at is_nonzero"):
        evaluate(small, inputs)


def test_constants_that_python_reads_are_no_obstacle() -> None:
    """Numbers that depend on no input and no weight are the same in every run."""
    model, inputs = between(lambda x: x * float(torch.linspace(0, 1, 5)[2]) + sum(torch.ones(3).tolist())), images(2)
    masks = gp.L1NormPruner(model, [{"sparsity": 0.5, "op_types": ["default"]}], example_inputs=inputs).masks()
    small, _ = gp.speedup(model, masks, result="graph")
    module, _ = gp.speedup(model, masks)
    assert relative_error(evaluate(module, images(5)), evaluate(small, images(5))) < EXACT


# -- random numbers ------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "op",
    [
        lambda x: functional.dropout(x, 0.5, training=True),
        lambda x: functional.dropout2d(x, 0.5, training=True),
        lambda x: x + torch.randn_like(x),
        lambda x: x * torch.bernoulli(torch.sigmoid(x)),
        lambda x: x + torch.randn(6),
    ],
    ids=["dropout", "dropout2d", "noise", "bernoulli", "fixed shape"],
)
@pytest.mark.parametrize("result", ["module", "graph"])
def test_random_numbers_are_the_same_in_both_models(op: Callable[[Tensor], Tensor], result: Any) -> None:
    """The shrunk model is verified with the noise of the kept channels, and the generator is left as it was."""
    model, inputs = between(op), images(2)
    masks = gp.L1NormPruner(model, [{"sparsity": 0.5, "op_types": ["default"]}], example_inputs=inputs).masks()
    state = torch.get_rng_state()
    small, report = gp.speedup(model, masks, result=result)
    assert torch.equal(state, torch.get_rng_state())
    assert (report.error < EXACT, report.effect > 1e-3) == (True, True)
    assert relative_error([small(inputs)], [small(inputs)]) > 1e-3


# -- values that are none ------------------------------------------------------------------------------------------------------------


def test_values_that_are_missing_in_both_models_alike_are_no_obstacle() -> None:
    """Rows that are NaN in the model and in the masked model are equal, as long as there are other values to compare."""
    gap = torch.ones(4, 1, 1, dtype=torch.float64)
    gap[1] = math.nan
    model = filled(Network(lambda m, x: m.c(torch.relu(m.a(x))) * gap, {"a": conv(3, 8), "c": conv(8, 4)}))
    _, report = gp.prune(model, images(2))
    assert (report.error < EXACT, report.effect > 1e-3) == (True, True)


def test_a_model_that_overflows_is_named_with_the_place() -> None:
    """Where the model gives NaN, the error names the first operator that does, and its module."""
    for decide in (False, True):
        model = filled(
            Network(lambda m, x, decide=decide: overflowing(m, x, decide=decide), {"a": conv(3, 8), "log": Log(), "c": conv(8, 4)})
        )
        with pytest.raises(gp.InputError, match=r"the output of the model .* not finite, so nothing can be verified, first at log in log"):
            gp.prune(model, images(2))


def overflowing(model: nn.Module, x: Tensor, *, decide: bool) -> Tensor:
    """Returns the logarithm of values of which half are negative."""
    x = model.get_submodule("a")(x)
    if decide:
        x = x * (x.flatten(2).argmax(2) >= 0)[..., None, None]
    out: Tensor = model.get_submodule("c")(model.get_submodule("log")(x))
    return out


class Log(nn.Module):
    """The logarithm."""

    def forward(self, x: Tensor) -> Tensor:
        """Returns log x."""
        return x.log()


# -- what is a decision --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("op", "kind"),
    [
        (lambda x: x.amax().item(), "number"),
        (lambda x: bool(x.sum() > 1), "number"),
        (lambda x: x.flatten().tolist(), "number"),
        (lambda x: torch.equal(x, x * 2), "number"),
        (lambda x: x.nonzero(), "size"),
        (lambda x: torch.where(x > 0), "size"),
        (lambda x: x[x > 0], "size"),
        (lambda x: x.masked_select(x > 0), "size"),
        (lambda x: x.unique(), "size"),
        (lambda x: x.argmax(1), "step"),
        (lambda x: x.topk(2, 1), "step"),
        (lambda x: x.round(), "step"),
        (lambda x: x > 0, "step"),
        (lambda x: x.long(), "step"),
        (torch.rand_like, "random"),
        (lambda x: functional.dropout(x, 0.5, training=True), "random"),
        (lambda x: functional.dropout(x, 0.5, training=False), ""),
        (lambda x: torch.relu(x).softmax(1), ""),
        (lambda _: torch.arange(3)[torch.tensor([True, False, True])], ""),
        (lambda _: torch.ones(3).tolist(), ""),
    ],
)
def test_operators_are_known_by_what_they_decide(op: Callable[[Tensor], Any], kind: str) -> None:
    """A recording says of every operator whether it gives Python a number, decides a size, chooses, or draws."""

    def run(_: nn.Module, x: Tensor) -> Tensor:
        op(x)
        return x + 1

    program = record(Network(run, {}), images(2))
    found = {info(node).decides for node in program.graph.nodes if info(node).decides}
    assert (kind in found) if kind else not found


def test_dropout_that_is_off_draws_nothing() -> None:
    """Attention without dropout is no random operator, with dropout it is one."""
    attention = torch.ops.aten.scaled_dot_product_attention.default
    x = normal(1, 2, 3, 4)
    assert decision(attention, (x, x, x), {}, x, constant=False) == ""
    assert decision(attention, (x, x, x), {"dropout_p": 0.5}, x, constant=False) in {"random", ""}


class Kept:
    """A plain object that holds tensors."""

    def __init__(self, tensors: list[Tensor]) -> None:
        self.tensors = tensors


def test_what_a_training_pass_left_in_attributes_is_no_obstacle() -> None:
    """A model that keeps results of its last pass, with their gradients, in an object of its own can be copied and pruned."""

    def run(model: Any, x: Tensor) -> Tensor:
        hidden = torch.relu(model.a(x))
        model.kept = Kept([hidden, hidden[:1]])
        out: Tensor = model.c(sum(model.kept.tensors[:1]))
        return out

    model = filled(Network(run, {"a": conv(3, 8), "c": conv(8, 4)}))
    model(images(2))
    _, report = gp.prune(model, images(2))
    assert (report.kind, report.error < EXACT) == ("module", True)


def test_whole_numbers_drawn_from_a_seed_are_a_table() -> None:
    """An order drawn from a seeded generator in every forward is the same each time: the GraphModule holds it, and is compared."""

    def shuffled(m: Any, x: Tensor) -> Tensor:
        y = torch.relu(m.a(x))
        result: Tensor = m.b(y[:, torch.randperm(8, generator=torch.Generator().manual_seed(3))])
        return result

    model = filled(Network(shuffled, {"a": conv(3, 8), "b": conv(8, 4)}))
    small, report = gp.prune(model, images(2), sparsity=0.5)
    assert report.kind == "graph"
    assert report.error < 1e-12
    assert report.effect > 1e-3
    assert small.get_parameter("b.weight").shape[1] == 4
