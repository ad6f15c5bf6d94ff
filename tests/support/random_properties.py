"""What must hold for a random network, whatever it is and whatever is removed."""

from __future__ import annotations

import json
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Any, Final

import hypothesis
import numpy as np
import torch
from hypothesis import HealthCheck, Phase, Verbosity
from torch import nn

import graphprune as gp
from tests.support import random_blocks, random_networks, random_tokens
from tests.support.invariants import MIN_CONTROL, coverage_faults, evaluate, masked_outputs, permutation_error, train_step
from tests.support.operators import NORMS, check_shapes
from tests.support.outputs import relative_error, shapes
from tests.support.random_draws import draws
from tests.support.random_networks import Drawn, build, inputs_of
from tests.support.untouched import assert_same, changes, snapshot

TOLERANCE: Final = 1e-9
ROUNDING: Final = 1e-12
BATCH, OTHER_BATCH = 2, 3
ROUND_TRIPS: Final = 4  # one draw in so many goes to disk and back


@dataclass
class Tally:
    """What the draws were, and what came of them.

    Attributes:
        draws: how many were checked to the end.
        groups: with at least one group.
        channels: removable ones, over all draws.
        shrunk: removals by the kind of result and what asked for it.
        blind: draws whose permutation control or whose removal changed the outputs by less than `MIN_CONTROL`.
        crossed: draws that no permutation can judge, see `rows_may_cross`.
        unreferenced: removals that only the engine's own verification could judge: a statistic that the oracle cannot take.
        trips: draws that went to disk and back.
        untrained: networks whose own backward pass fails, so that there was nothing to compare a training step with.
        refusals: what was refused by an error of graphprune.
        unknown: operators without a rule.
        blocks: kinds of blocks.
        effects: relative change of the outputs through each removal.
        worst: name of a property -> largest relative error.
    """

    draws: int = 0
    groups: int = 0
    channels: int = 0
    shrunk: Counter[str] = field(default_factory=Counter)
    blind: Counter[str] = field(default_factory=Counter)
    crossed: int = 0
    unreferenced: int = 0
    trips: int = 0
    untrained: int = 0
    refusals: Counter[str] = field(default_factory=Counter)
    unknown: Counter[str] = field(default_factory=Counter)
    blocks: Counter[str] = field(default_factory=Counter)
    effects: list[float] = field(default_factory=list)
    worst: dict[str, float] = field(default_factory=dict)

    def error(self, name: str, value: float) -> None:
        """Notes an error and asserts that it is rounding."""
        self.worst[name] = max(value, self.worst.get(name, 0.0))
        assert value < TOLERANCE, f"{name}: {value:.3g}"

    def add(self, other: Tally) -> None:
        """Adds another tally to this one."""
        for entry in fields(self):
            mine, theirs = getattr(self, entry.name), getattr(other, entry.name)
            if isinstance(mine, Counter):
                mine.update(theirs)
            elif isinstance(mine, dict):
                mine.update({name: max(value, mine.get(name, 0.0)) for name, value in theirs.items()})
            else:
                setattr(self, entry.name, mine + theirs)


# -- running draws -------------------------------------------------------------------------------------------------------------------


def run_draws(seed: int, number: int, check: Callable[[Drawn], None], *, shrink: bool = True) -> None:
    """Checks that many random networks, always the same ones for a seed (and a version of hypothesis).

    Args:
        seed: of hypothesis.
        number: of draws.
        check: raises where something does not hold.
        shrink: whether a failing network is made smaller before it is shown.

    Raises:
        Exception: what the check raised on the smallest failing network, which a note on the exception shows.
    """

    @hypothesis.seed(seed)
    @hypothesis.settings(
        max_examples=number,
        derandomize=True,
        database=None,
        deadline=None,
        phases=(Phase.generate, Phase.shrink) if shrink else (Phase.generate,),
        suppress_health_check=list(HealthCheck),
        report_multiple_bugs=False,
        verbosity=Verbosity.normal,
    )
    @hypothesis.given(draws())
    def keeps_every_invariant(drawn: Drawn) -> None:
        check(drawn)

    keeps_every_invariant()


def again(expression: str) -> Drawn:
    """Returns the draw that an expression describes, as failing tests print it."""
    names = {name: value for room in (random_networks, random_blocks, random_tokens) for name, value in vars(room).items()}
    drawn = eval(expression, names)  # noqa: S307 (what the tests themselves printed)
    assert isinstance(drawn, Drawn), f"{expression!r} describes no draw"
    return drawn


def blocks_in(description: object) -> Iterator[str]:
    """Returns the names of the blocks in a description, with the ways in which they are written."""
    if isinstance(description, tuple):
        for part in description:
            yield from blocks_in(part)
    elif is_dataclass(description):
        how = getattr(description, "how", None)
        yield type(description).__name__ + (f" {how}" if isinstance(how, str) else "")
        for entry in fields(description):
            yield from blocks_in(getattr(description, entry.name))


# -- one draw ------------------------------------------------------------------------------------------------------------------------


def check_draw(drawn: Drawn, tally: Tally) -> None:
    """Asserts for one drawn network all that is always true of tracing and pruning it.

    Raises:
        AssertionError: an invariant does not hold.
        VerificationError: the engine found out itself that its result is wrong.
    """
    model, inputs = build(drawn), inputs_of(drawn, BATCH)
    before, original = snapshot(model), evaluate(model, inputs)
    try:
        graph = gp.trace(model, inputs)
    except gp.GraphPruneError as error:
        tally.refusals[f"{type(error).__name__}: {error.what}"] += 1
        return
    other = gp.trace(build(drawn), inputs)
    assert other.fingerprint == graph.fingerprint, "a second trace finds other groups"
    check_graph(drawn, model, graph, tally)
    check_nothing_removed(model, graph, inputs, original)
    if graph.groups:
        check_removal(drawn, model, graph, random_masks(graph, drawn.seed), tally)
        check_prune(drawn, model, (graph, other), tally)
    differences = changes(before, snapshot(model))
    assert not differences, f"the input model was changed at {', '.join(differences)}"
    tally.draws += 1
    tally.groups += bool(graph.groups)
    tally.channels += sum(group.channels for group in graph.groups)
    tally.blocks.update(set(blocks_in(drawn.network)))
    tally.unknown.update(unknown.operator for unknown in graph.unknown)


def check_graph(drawn: Drawn, model: nn.Module, graph: gp.DependencyGraph, tally: Tally) -> None:
    """Asserts coverage, reasons, permutation, and that the graph can be shown."""
    faults = coverage_faults(model, graph)
    assert not faults, "\n".join(faults)
    assert all(item.reason for item in graph.frozen), "frozen without a reason"
    if graph.groups:
        error, control = permutation_error(model, graph, inputs_of(drawn, BATCH), drawn.seed)
        if error >= TOLERANCE and rows_may_cross(drawn, graph):
            tally.crossed += 1
        else:
            tally.error("permutation", error)
        if control < MIN_CONTROL:
            tally.blind["control"] += 1
    assert all(graph.explain(layer) for layer in graph.modules if layer)
    assert set(graph.layers) <= {*graph.to_networkx().nodes, *graph.shapes}, "a layer is missing in the networkx graph"


def rows_may_cross(drawn: Drawn, graph: gp.DependencyGraph) -> bool:
    """Returns whether copies of a channel may stand in another order for one channel than for the next.

    That happens where channels are repeated and then rolled, reordered or dealt: the channels are coupled, but the rows of a slice, which
    are sorted by position, do not tell which copy is which. Removal needs no more than the set; a permutation does.
    """
    moved = {"Moved roll", "Moved index", "Moved stride"} & set(blocks_in(drawn.network))
    return bool(moved) and any(piece.index.shape[1] > 1 for group in graph.groups for piece in group.slices)


def check_nothing_removed(model: nn.Module, graph: gp.DependencyGraph, inputs: object, original: list[torch.Tensor]) -> None:
    """Asserts that removing nothing changes nothing, bit for bit."""
    same, _ = gp.speedup(model, gp.Masks(graph))
    assert_same(original, evaluate(same, inputs), "removing nothing changes the output")
    as_graph, _ = gp.speedup(model, gp.Masks(graph), result="graph", verify=False)
    error = relative_error(
        original, evaluate(as_graph, inputs)
    )  # not bit for bit: nn.MultiheadAttention has a fast path that is not recorded
    assert error < ROUNDING, f"removing nothing changes the output of the GraphModule by {error:.3g}"


def random_masks(graph: gp.DependencyGraph, seed: int) -> gp.Masks:
    """Returns masks that keep a random share of each group at random, at least one channel; one group in four stays whole."""
    generator = np.random.default_rng(seed)
    kept = {}
    for group in graph.groups:
        keep = generator.random(group.channels) < (1.0 if generator.random() < 0.25 else generator.random())
        keep[generator.integers(group.channels)] = True
        kept[group.name] = keep
    return gp.Masks(graph, kept)


def check_prune(drawn: Drawn, model: nn.Module, graphs: tuple[gp.DependencyGraph, gp.DependencyGraph], tally: Tally) -> None:
    """Asserts that pruning by a random sparsity and random options does what its masks say, and the same for equal networks."""
    generator = np.random.default_rng(drawn.seed + 1)
    sparsity = float(generator.choice([0.0, *generator.uniform(0.1, 0.9, 7)]))
    options: dict[str, Any] = {
        "cut": str(generator.choice(["blocks", "within", "both"])),
        "rounding": str(generator.choice(["floor", "ceil"])),
        "round_to": int(generator.choice([1, 1, 2, 4])),
    }
    small, report = gp.prune(model, inputs_of(drawn, BATCH), sparsity=sparsity, **options)
    entries = [{"sparsity": sparsity, "op_types": ["default"]}]
    first, second = (gp.L1NormPruner(build(drawn), entries, graph=graph, **options).masks() for graph in graphs)
    for name, mask in first.items():
        assert np.array_equal(mask, second[name]), f"the same seed gives other masks of {name}"
        kept = next(entry.kept for entry in report.groups if entry.name == name)
        assert int(mask.sum()) == kept, f"the report says that {kept} channels of {name} are kept, the masks {int(mask.sum())}"
    check_report(model, small, report, first, tally)
    check_against_oracle(drawn, model, small, first, f"prune, {options['cut']}", tally)


def check_removal(drawn: Drawn, model: nn.Module, graph: gp.DependencyGraph, masks: gp.Masks, tally: Tally) -> None:
    """Asserts that the default result, the GraphModule and the model shrunk in place all equal the masked network."""
    small, report = gp.speedup(model, masks)
    as_graph, graph_report = gp.speedup(model, masks, result="graph")
    check_shapes(as_graph, graph, masks)
    for found, said in ((small, report), (as_graph, graph_report)):
        check_report(model, found, said, masks, tally)
        check_against_oracle(drawn, model, found, masks, f"random masks, {said.kind}", tally)
    if drawn.seed % 2:
        check_in_place(drawn, masks, small, report)
    else:
        check_training(drawn, model, (small, as_graph), tally)
    if drawn.seed % ROUND_TRIPS == 0:
        check_round_trip(drawn, masks, small if drawn.seed % (2 * ROUND_TRIPS) else as_graph)
        tally.trips += 1


def check_report(model: nn.Module, small: nn.Module, report: gp.SpeedupReport, masks: gp.Masks, tally: Tally) -> None:
    """Asserts that the report says the truth: verified, and the real numbers of parameters."""
    assert report.verified
    tally.error(f"verification, {report.kind}", report.error)
    tally.shrunk[report.kind] += 1
    if masks.sparsity:
        tally.effects.append(report.effect)
        if report.effect < MIN_CONTROL:
            tally.blind["removal"] += 1
    assert (report.kind == "module") == (type(small) is type(model)), f"the report says {report.kind}, but this is a {type(small).__name__}"
    for module, cost in ((model, report.before), (small, report.after)):
        assert cost is not None
        real = sum(parameter.numel() for parameter in module.parameters())
        assert cost.params == real, f"the report says {cost.params} parameters, there are {real}"
    json.dumps(report.to_dict())


def check_against_oracle(drawn: Drawn, model: nn.Module, small: nn.Module, masks: gp.Masks, what: str, tally: Tally) -> None:
    """Asserts that a shrunk network gives what the masked one gives, at the batch size of the recording and at another one."""
    graph = masks.graph
    touched = [group for group in graph.groups if not np.asarray(masks[group.name]).all()]
    known = {why.partition(" ")[0] for group in touched for why in group.why} <= NORMS
    tally.unreferenced += not known
    for batch in (BATCH, OTHER_BATCH):
        inputs = inputs_of(drawn, batch)
        shrunk = evaluate(small, inputs)
        assert shapes(shrunk) == shapes(evaluate(model, inputs)), f"{what}: the outputs have other shapes"
        if known:
            tally.error(f"oracle, {what}, batch {batch}", relative_error(masked_outputs(model, graph, masks, inputs), shrunk))


def check_in_place(drawn: Drawn, masks: gp.Masks, small: nn.Module, report: gp.SpeedupReport) -> None:
    """Asserts that a model shrunk in place equals the shrunk copy, and that one that cannot be is left as it was."""
    model, inputs = build(drawn), inputs_of(drawn, BATCH)
    before = {**snapshot(model), "configurations": configurations(model)}
    try:
        found, _ = gp.speedup(model, gp.Masks(gp.trace(model, inputs), dict(masks)), inplace=True)
    except gp.VerificationError:
        assert report.kind == "graph", "the class can be kept in a copy, but not in place"
        differences = changes(before, {**snapshot(model), "configurations": configurations(model)})
        assert not differences, f"a failing call left traces at {', '.join(differences)}"
        return
    assert found is model
    assert report.kind == "module", "the class can be kept in place, but not in a copy"
    assert_same(evaluate(small, inputs), evaluate(model, inputs), "the model shrunk in place differs from the shrunk copy")


def configurations(model: nn.Module) -> dict[str, str]:
    """Returns module name -> what its configuration objects say, which `snapshot` does not look into."""
    return {name: repr([value for value in vars(module).values() if is_dataclass(value)]) for name, module in model.named_modules()}


def check_training(drawn: Drawn, model: nn.Module, found: tuple[nn.Module, ...], tally: Tally) -> None:
    """Asserts that a training step runs wherever it runs in the original."""
    inputs = inputs_of(drawn, OTHER_BATCH)
    try:
        train_step(model, inputs)
    except (RuntimeError, ArithmeticError):
        tally.untrained += 1
        return
    for small in found:
        train_step(small, inputs)


def check_round_trip(drawn: Drawn, masks: gp.Masks, small: nn.Module) -> None:
    """Asserts that masks and shrunk model come back from disk, onto a network with other weights, bit for bit."""
    inputs = inputs_of(drawn, BATCH)
    other = build(drawn, weights=drawn.seed + 1)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "saved.safetensors"
        masks.save(path)
        back = gp.Masks.load(path, gp.trace(other, inputs))
        assert list(back) == list(masks)
        assert all(np.array_equal(back[name], masks[name]) for name in masks), "masks differ after the way to disk"
        gp.save(small, path)
        loaded = gp.load(other, path)
        assert type(loaded).__name__ == type(small).__name__
        saved, found = small.state_dict(), loaded.state_dict()
        assert list(saved) == list(found)
        assert_same(list(saved.values()), list(found.values()), "the loaded model has other tensors")
        error = relative_error(evaluate(small, inputs), evaluate(loaded, inputs))  # products of other memory layouts round differently
        assert error < ROUNDING, f"the loaded model computes something else: {error:.3g}"
