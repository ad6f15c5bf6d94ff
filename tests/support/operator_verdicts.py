"""Measures what the engine makes of operators between convolutions, against references that know nothing of it but the slices it reports.

The verdicts: "pruned"; "partly", where some of the channels between the convolutions are frozen, or what goes has no effect; "frozen",
where all of these channels are; "wrong", where an oracle disagrees; "crash", where anything was raised, refusals included.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Final, Literal, TypeAlias

import numpy as np
import torch
from torch import Tensor, nn

import graphprune as gp
from graphprune.groups.graph import Frozen
from tests.support.invariants import MIN_CONTROL, coverage_faults, evaluate, masked_copy, permutation_error, removed_positions
from tests.support.operator_table import OPERATORS, Operator
from tests.support.operators import TOLERANCE, Network, conv, filled
from tests.support.outputs import relative_error, shapes

Verdict: TypeAlias = Literal["pruned", "partly", "frozen", "wrong", "crash"]
Cut: TypeAlias = Literal["blocks", "within", "both"]
WIDTH: Final = 16
PIXELS: Final = 8
EVERYTHING: Final = [{"sparsity": 0.5, "op_types": ["default"]}]


@dataclass(frozen=True)
class Outcome:
    """What was measured of one network.

    Attributes:
        name: of the operator, or of the chain.
        verdict: see the module.
        share: of the channels between the convolutions, how many are in a group.
        error: of the shrunk networks against the references, relative, the largest.
        effect: of the removal on the output of the network, relative.
        reasons: why channels between the convolutions are frozen, each with its operator and its module path.
        fault: what is wrong, or what was raised; "" where nothing is.
    """

    name: str
    verdict: Verdict
    share: float = 0.0
    error: float = 0.0
    effect: float = 0.0
    reasons: tuple[Frozen, ...] = ()
    fault: str = ""

    @property
    def named(self) -> list[str]:
        """The reasons that name an operator which an operator of the table ran, or a layer that would be left empty; each once."""
        by_operator = [f"{f.reason} ({f.operator})" for f in self.reasons if f.operator and f.module.startswith("op")]
        emptied = [f.reason for f in self.reasons if "would be left empty" in f.reason]
        return list(dict.fromkeys([*by_operator, *emptied]))


# -- networks ------------------------------------------------------------------------------------------------------------------------


def images(batch: int = 2) -> Tensor:
    """Returns images with 3 channels in float64, always the same ones."""
    return torch.randn(batch, 3, PIXELS, PIXELS, generator=torch.Generator().manual_seed(batch), dtype=torch.float64)


def chain(steps: Sequence[Operator | None]) -> nn.Sequential:
    """Returns a convolution with BatchNorm, the steps, and a last convolution, in float64, with random weights and statistics.

    Args:
        steps: operators, and None for another convolution with BatchNorm.

    Raises:
        ValueError: an operator cannot take what reaches it (see `fits`).
    """
    layers: OrderedDict[str, nn.Module] = OrderedDict()
    shape = torch.Size((1, 3, PIXELS, PIXELS))
    for number, step in enumerate([None, *steps]):
        if step is None:
            layers[f"conv{number}"], layers[f"norm{number}"] = conv(shape[1], WIDTH), nn.BatchNorm2d(WIDTH)
        elif fits(step, shape):
            layers[f"op{number}"] = step.build(shape[1])
        else:
            message = f"{step} cannot take images of shape {tuple(shape)}"
            raise ValueError(message)
        shape = nn.Sequential(layers).eval()(torch.zeros(1, 3, PIXELS, PIXELS)).shape
    layers["last"] = conv(shape[1], 4)
    model = nn.Sequential(layers)
    filled(model)
    return model


def fits(operator: Operator, shape: torch.Size) -> bool:
    """Returns whether an operator can take images of that shape, and leaves few enough channels."""
    _, channels, height, width = shape
    even = height % 2 == 0 and width % 2 == 0
    return channels % operator.multiple == 0 and channels <= (WIDTH if operator.square else 8 * WIDTH) and (even or not operator.even)


def pair(seed: int) -> list[Operator | None]:
    """Returns two operators of the table, drawn with that seed, that can follow each other; between them a convolution, or nothing."""
    generator = np.random.default_rng(seed)
    while True:
        first, second = (OPERATORS[int(i)] for i in generator.integers(len(OPERATORS), size=2))
        steps: list[Operator | None] = [first, None, second] if generator.random() < 0.5 else [first, second]
        try:
            chain(steps)
        except ValueError:
            continue
        return steps


def name_of(steps: Sequence[Operator | None]) -> str:
    """Returns what a chain is called."""
    return " -> ".join("conv" if step is None else step.name for step in steps)


# -- references ----------------------------------------------------------------------------------------------------------------------


@torch.no_grad()
def reference(model: nn.Sequential, steps: Sequence[Operator | None], graph: gp.DependencyGraph, masks: gp.Masks, x: Tensor) -> Tensor:
    """Returns what the network with zeroed slices gives, where sums and statistics are taken over the channels that are left."""
    masked, removed = masked_copy(model, graph, masks).eval(), removed_positions(graph, masks)
    operators = iter([step for step in steps if step is not None])
    alive = torch.ones(x.shape[1], dtype=torch.bool)
    for name, layer in masked.named_children():
        if isinstance(layer, Network):
            operator = next(operators)
            x = operator.reference(layer, x, alive) if operator.reference else layer(x)
            alive = operator.alive(layer, alive) if operator.alive else (x != 0).transpose(0, 1).flatten(1).any(1)
            x = x * alive.view(1, -1, 1, 1)
        else:
            x = layer(x)
        if isinstance(layer, nn.Conv2d):
            alive = torch.ones(x.shape[1], dtype=torch.bool)
            alive[removed.get((f"{name}.weight", 0), np.zeros(0, dtype=np.int64))] = False
    return x


def promises_exactness(graph: gp.DependencyGraph, masks: gp.Masks) -> bool:
    """Returns whether all groups that lose channels say that the network with zeroed slices is the same, whatever its statistics."""
    return all(group.verdict == "exact" for group in graph.groups if not masks[group.name].all())


def removals(model: nn.Module, graph: gp.DependencyGraph, x: Tensor, *, verify: bool) -> Iterator[tuple[str, gp.Masks, nn.Module, float]]:
    """Prunes half of every group in every way that the network has, and any channels at all.

    Yields:
        What was removed, the masks, the shrunk network, and the error that the engine itself reports.
    """
    cuts: list[Cut] = ["blocks", "within", "both"] if any(group.role for group in graph.groups) else ["blocks"]
    for cut in cuts:
        masks = gp.L1NormPruner(model, EVERYTHING, example_inputs=x, graph=graph, cut=cut).masks()
        small, report = gp.prune(model, x, sparsity=0.5, cut=cut, verify=verify)
        yield f"half by L1, cut={cut!r}", masks, small, report.error
    generator = np.random.default_rng(0)
    kept = {}
    for group in graph.groups:
        kept[group.name] = generator.random(group.channels) < 0.5
        kept[group.name][generator.integers(group.channels)] = True
    masks = gp.Masks(graph, kept)
    small, report = gp.speedup(model, masks, example_inputs=x, verify=verify)
    yield "any channels", masks, small, report.error


# -- measuring -----------------------------------------------------------------------------------------------------------------------


def measure(steps: Sequence[Operator | None], *, verify: bool = True) -> Outcome:
    """Builds the network, prunes it, and compares it with every oracle.

    Args:
        steps: see `chain`.
        verify: whether the engine may refuse a result that it finds wrong; without, only the oracles of the tests judge.
    """
    try:
        return _measured(steps, verify=verify)
    except Exception as error:  # noqa: BLE001 (whatever is raised is the result)
        return Outcome(name_of(steps), "crash", fault=f"{type(error).__name__}: {error}")


def _measured(steps: Sequence[Operator | None], *, verify: bool) -> Outcome:
    model, x = chain(steps), images()
    graph = gp.trace(model, x)
    original, faults = evaluate(model, x), coverage_faults(model, graph)
    errors: dict[str, float] = {}
    effect = 0.0
    for what, masks, small, error in removals(model, graph, x, verify=verify):
        errors[f"{what}, as the engine says"] = error
        for batch in (x, images(3)):
            expected, found = [reference(model, steps, graph, masks, batch)], evaluate(small, batch)
            errors[f"{what}, {len(batch)} images"] = relative_error(expected, found)
            if promises_exactness(graph, masks):
                zeroed = evaluate(masked_copy(model, graph, masks), batch)
                errors[f"{what}, {len(batch)} images, promised to be exact"] = relative_error(zeroed, found)
        effect = effect or relative_error(original, [reference(model, steps, graph, masks, x)])
        if shapes(evaluate(small, x)) != shapes(original):
            faults.append(f"{what}: the output has another shape")
    # Where literals treat channels by position, removal is right and exchanging two is not; in chains that is the rule.
    if len(steps) == 1 and not any(step is not None and step.ordered for step in steps):
        errors["permuting channels"] = permutation_error(model, graph, x)[0]
    faults += [f"{what}: error {error:.2g}" for what, error in errors.items() if not error < TOLERANCE]
    places = between(model)
    reasons = tuple(f for f in graph.frozen if (f.parameter, f.dim) in places)
    share = 1.0 - sum(f.index.size for f in reasons) / sum(places.values())
    prunable: Verdict = "pruned" if share == 1.0 and effect > MIN_CONTROL else "partly" if share > 0.0 else "frozen"
    return Outcome(name_of(steps), "wrong" if faults else prunable, share, max(errors.values()), effect, reasons, "; ".join(faults))


def between(model: nn.Sequential) -> dict[tuple[str, int], int]:
    """Returns the dimensions of the convolutions' weights that count channels between them: (parameter name, dim) -> size."""
    weights = [f"{name}.weight" for name, layer in model.named_children() if isinstance(layer, nn.Conv2d)]
    places = [(name, 0) for name in weights[:-1]] + [(name, 1) for name in weights[1:]]
    return {(name, dim): model.get_parameter(name).shape[dim] for name, dim in places}
