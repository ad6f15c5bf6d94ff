"""Networks drawn at random keep every invariant, and the test notices when a rule is wrong."""

from __future__ import annotations

import copy
import random
from dataclasses import replace

import pytest
import random_networks as tool
import torch
from torch import nn

import graphprune as gp
from graphprune.ops.registry import RULES, Labels, Op, Rule
from tests.support.invariants import coverage_faults, evaluate, masked_outputs
from tests.support.outputs import relative_error
from tests.support.random_blocks import Bare, Branches, Conv, Dense, Fork, Moved, Shuffle, Written
from tests.support.random_networks import Drawn, Head, Images, Sequences, build, inputs_of
from tests.support.random_properties import Tally, again, blocks_in, check_draw, check_in_place, random_masks, run_draws
from tests.support.random_tokens import Attention, MultiHead
from tests.support.untouched import assert_same

SEEDS = range(4)
EACH = 50  # draws per seed
LONG = 2000
FIRM = 1e-11  # largest error of the fixed draws: between rounding (1e-13) and the smallest that a wrong result was seen to have (1e-10)
BLIND = 0.1  # share of draws whose weights may leave nothing to see: a channel that no input activates, a norm of one channel
DENSE = Drawn(Images((Conv(5, 3),), (Dense((3, 7)),)))

# Networks that once failed, as small as they went, with what was wrong.
ONCE = {
    "a scale from a shape": Drawn(Sequences(3, blocks=(Attention(1, 2, core="einsum", spell="unflatten"),))),
    "a decision from a shape": Drawn(Images((Conv(5, 3),), (Fork(4),))),
    "blocks cut in two ways": Drawn(Images((Conv(3, 3),), (Branches(((Written(5, 1), Shuffle(2, 4, "function")), ())),))),
    "configurations left changed": Drawn(Sequences(11, blocks=(Attention(4, 5, shared=2, fused=True, core="einsum"),)), seed=821),
    "configurations not saved": Drawn(
        Sequences(7, blocks=(Attention(3, 3, shared=3, core="matmul", inner="rms", spell="chunk"),)), seed=140
    ),
    "copies that cross": Drawn(Images((Conv(17, 3),), (Moved("repeat"), Bare("position"), Moved("roll")), (Head(how="flatten"),))),
    "a fast path": Drawn(Sequences(3, blocks=(MultiHead(2, 2),))),
}


def assert_telling(tally: Tally) -> None:
    """Asserts that the draws had something to say: groups, effects, own classes and GraphModules, and no refusal."""
    assert not tally.refusals
    assert tally.groups >= 0.9 * tally.draws
    assert tally.blind["control"] <= BLIND * tally.draws
    assert tally.blind["removal"] <= BLIND * len(tally.effects)
    assert tally.crossed <= 0.05 * tally.draws
    assert {"module", "graph"} <= set(tally.shrunk)
    assert tally.unreferenced <= 0.25 * sum(tally.shrunk.values())
    assert tally.trips


@pytest.mark.timeout(900)
@pytest.mark.parametrize("seed", SEEDS)
def test_random_networks_keep_every_invariant(seed: int) -> None:
    """The same fifty networks on every run: whatever is removed, the result is exact and everything else is left as it was."""
    tally = Tally()
    run_draws(seed, EACH, lambda drawn: check_draw(drawn, tally))
    assert tally.draws >= EACH
    assert max(tally.worst.values()) < FIRM
    assert_telling(tally)


@pytest.mark.parametrize("name", ONCE)
def test_network_that_once_failed(name: str) -> None:
    """Networks on which an invariant once did not hold keep them all, with two masks each."""
    for seed in (ONCE[name].seed, 5):
        check_draw(replace(ONCE[name], seed=seed), Tally())


@pytest.mark.parametrize("core", ["fused", "einsum"])
def test_result_that_is_wrong_by_too_little_to_be_seen_is_no_module(core: str) -> None:
    """A scale that follows the pruned width is wrong even where the attention adds next to nothing: the class is not kept."""
    drawn = Drawn(Sequences(5, blocks=(Attention(2, 4, core=core, spell="unflatten"),)))
    model, inputs = build(drawn), inputs_of(drawn, 2)
    with torch.no_grad():
        model.get_parameter("blocks.0.out.weight").mul_(1e-12)
    small, report = gp.prune(model, inputs, 0.5, cut="within")
    assert report.kind == "graph"
    with torch.no_grad():
        small.get_parameter("blocks.0.out.weight").mul_(1e12)
        model.get_parameter("blocks.0.out.weight").mul_(1e12)
    masks = gp.L1NormPruner(model, [{"sparsity": 0.5, "op_types": ["default"]}], example_inputs=inputs, cut="within").masks()
    assert relative_error(masked_outputs(model, masks.graph, masks, inputs), evaluate(small, inputs)) < FIRM


@pytest.mark.slow
@pytest.mark.timeout(7200)
def test_many_random_networks_keep_every_invariant(capsys: pytest.CaptureFixture[str]) -> None:
    """Two thousand networks, others on every run; the seed is shown, `tools/random_networks.py --seed` runs them again."""
    seed, tally = random.SystemRandom().randrange(2**32), Tally()
    with capsys.disabled():
        print(f"\nseed of the random networks: {seed}")  # noqa: T201 (needed to run the same networks again)
    run_draws(seed, LONG, lambda drawn: check_draw(drawn, tally))
    assert_telling(tally)


# -- the test of the test ------------------------------------------------------------------------------------------------------------


def turned(found: Labels) -> Labels:
    """Returns the labels of a joined dimension in the wrong order."""
    return [labels if labels is None else labels[::-1] for labels in found]


def forgotten(found: Labels) -> Labels:
    """Returns labels without the channel dimension, though nothing froze it."""
    return [None if d == 1 else labels for d, labels in enumerate(found)]


def broken(rule: Rule, spoil: object) -> Rule:
    """Returns a rule whose result is spoilt."""

    def wrong(op: Op) -> Labels | list[Labels]:
        found: Labels = rule(op)
        return spoil(found)  # type: ignore[no-any-return,operator]

    return wrong


@pytest.mark.parametrize(
    ("operator", "spoil"),
    [("aten::cat", turned), ("aten::cat", forgotten), ("aten::add", forgotten), ("aten::conv2d", turned), ("aten::permute", turned)],
)
def test_broken_rule_is_found_within_few_draws(operator: str, spoil: object, monkeypatch: pytest.MonkeyPatch) -> None:
    """A rule that couples the wrong channels, or forgets to couple them, fails the same check within fifty draws."""
    monkeypatch.setitem(RULES, operator, broken(RULES.get(operator, RULES["pointwise"]), spoil))
    with pytest.raises((AssertionError, gp.GraphPruneError)):
        run_draws(0, EACH, lambda drawn: check_draw(drawn, Tally()), shrink=False)


def test_failing_draw_shrinks_to_the_block_at_fault() -> None:
    """What a check dislikes is found, made as small as it goes, and shown as an expression that builds the network again."""

    def dislikes_dense(drawn: Drawn) -> None:
        shown = repr(drawn)
        assert not any(name.startswith("Dense") for name in blocks_in(drawn.network)), shown

    with pytest.raises(AssertionError) as caught:
        run_draws(0, 400, dislikes_dense)
    shown = str(caught.value).partition("\n")[0]
    smallest = again(shown)
    assert repr(smallest) == shown
    assert [name for name in blocks_in(smallest.network) if not name.startswith(("Images", "Head"))] in (["Conv", "Dense"], ["Dense"])


def test_check_fails_on_a_result_that_is_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    """A speedup that claims an error of zero but returns other weights does not pass the oracle."""
    speedup = gp.speedup

    def spoilt(*arguments: object, **options: object) -> object:
        small, report = speedup(*arguments, **options)  # type: ignore[arg-type]
        with torch.no_grad():
            next(iter(small.parameters())).mul_(1.001)
        return small, report

    monkeypatch.setattr(gp, "speedup", spoilt)
    with pytest.raises(AssertionError):
        check_draw(DENSE, Tally())


def test_check_fails_on_an_input_that_was_touched(monkeypatch: pytest.MonkeyPatch) -> None:
    """A trace that leaves another value behind in the model does not pass."""
    trace = gp.trace

    def touching(model: nn.Module, inputs: object) -> gp.DependencyGraph:
        graph = trace(model, inputs)
        next(iter(model.parameters())).data.view(-1)[0] += 1e-6
        return graph

    monkeypatch.setattr(gp, "trace", touching)
    with pytest.raises(AssertionError):
        check_draw(DENSE, Tally())


# -- drawn networks ------------------------------------------------------------------------------------------------------------------


def test_draw_builds_the_same_network_each_time() -> None:
    """Weights and inputs follow from the draw, the global random state stays, and another seed gives other weights."""
    state = torch.get_rng_state()
    one, two, other = build(DENSE), build(DENSE), build(DENSE, weights=1)
    inputs = inputs_of(DENSE, 2)
    assert_same(evaluate(one, inputs), evaluate(two, inputs_of(DENSE, 2)), "the same draw gives other outputs")
    assert not torch.equal(evaluate(one, inputs)[0], evaluate(other, inputs)[0])
    assert torch.equal(state, torch.get_rng_state())


def test_same_seed_draws_the_same_networks() -> None:
    """Twenty networks of one seed are the same twice, and those of another seed differ."""
    drawn: list[list[Drawn]] = [[], [], []]
    for found, seed in zip(drawn, (0, 0, 1), strict=True):
        run_draws(seed, 20, found.append)
    assert drawn[0] == drawn[1]
    assert drawn[0] != drawn[2]


def test_random_masks_keep_one_channel_at_least() -> None:
    """Masks are random, reproducible, and leave no group empty."""
    drawn = Drawn(Images((Conv(7, 3),), (Shuffle(2, 5), Dense((3, 9))), (Head(how="flatten"),)))
    model = build(drawn)
    graph = gp.trace(model, inputs_of(drawn, 2))
    assert coverage_faults(model, graph) == []
    for seed in range(20):
        masks, same = random_masks(graph, seed), random_masks(graph, seed)
        assert all(mask.any() and (mask == same[name]).all() for name, mask in masks.items())
    check_in_place(drawn, random_masks(graph, 3), *gp.speedup(model, random_masks(graph, 3)))
    assert copy.copy(drawn) == drawn


# -- the tool ------------------------------------------------------------------------------------------------------------------------


def test_tool_counts_a_batch() -> None:
    """A batch gives its tally, the same as the tests', and adds up with others."""
    tally, failure = tool.batch(0, 5, shrink=True)
    expected = Tally()
    run_draws(0, 5, lambda drawn: check_draw(drawn, expected))
    assert not failure
    assert tally == expected
    tally.add(expected)
    assert (tally.draws, tally.worst) == (2 * expected.draws, expected.worst)
    assert len(tally.effects) == 2 * len(expected.effects)


def test_tool_shows_the_network_that_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    """The failure of a batch says what does not hold and of which network."""
    monkeypatch.setitem(RULES, "aten::cat", broken(RULES["aten::cat"], turned))
    _, failure = tool.batch(0, EACH, shrink=False)
    assert "Error" in failure.partition("\n")[0]
    assert "Drawn(" in failure


def test_tool_checks_one_network(capsys: pytest.CaptureFixture[str]) -> None:
    """An expression is checked and counted; one that describes nothing is an error in one line."""
    assert tool.one(repr(DENSE)) == 0
    assert "Dense" in capsys.readouterr().out
    assert tool.one("1 + 1") == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_tool_draws_another_seed_each_time() -> None:
    """Without --seed every run has a seed of its own; numbers out of range are refused."""
    assert tool.parse([]).seed != tool.parse([]).seed
    assert tool.parse(["--seed", "7"]).seed == 7
    with pytest.raises(SystemExit):
        tool.parse(["--draws", "0"])
