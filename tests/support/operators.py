"""Tiny networks around one operator, and the one check that every rule has to pass."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, Literal, TypeAlias

import numpy as np
import torch
from torch import nn

import graphprune as gp
from tests.support.invariants import (
    MIN_CONTROL,
    coverage_faults,
    evaluate,
    masked_copy,
    masked_outputs,
    permutation_error,
    train_step,
)
from tests.support.networks import call
from tests.support.outputs import relative_error, shapes
from tests.support.untouched import assert_same, changes, snapshot

MakeInputs: TypeAlias = Callable[[int], Any]
TOLERANCE: Final = 1e-9
NORMS: Final = {"layer_norm", "rms_norm", "group_norm"}  # whose statistics the reference of the tests knows how to take


# -- networks ------------------------------------------------------------------------------------------------------------------------


class Network(nn.Module):
    """Layers, parameters and buffers by keyword; the forward pass is a function of the network and its inputs."""

    def __init__(self, run: Callable[..., Any], parts: Mapping[str, nn.Module | torch.Tensor]) -> None:
        """Registers the parts under their names."""
        super().__init__()
        self.run = run
        for name, part in parts.items():
            if isinstance(part, torch.Tensor) and not isinstance(part, nn.Parameter):
                self.register_buffer(name, part)
            else:
                setattr(self, name, part)

    def forward(self, *inputs: Any, **keywords: Any) -> Any:
        """Runs the function."""
        return self.run(self, *inputs, **keywords)


def conv(inputs: int, outputs: int, size: int = 3, **options: Any) -> nn.Conv2d:
    """Returns a convolution that keeps the height and the width."""
    return nn.Conv2d(inputs, outputs, size, **{"padding": size // 2, **options})


def table(*shape: int) -> nn.Parameter:
    """Returns a parameter of that shape, to be given values by `build`."""
    return nn.Parameter(torch.ones(shape))


def let(value: Any, function: Callable[[Any], Any]) -> Any:
    """Returns a function of a value, which so gets a name within a lambda."""
    return function(value)


def images(batch: int) -> torch.Tensor:
    """Returns images with 3 channels of 6 x 6 pixels."""
    return normal(batch, 3, 6, 6)


def sequences(batch: int) -> torch.Tensor:
    """Returns sequences of 5 vectors of width 4."""
    return normal(batch, 5, 4)


def vectors(batch: int) -> torch.Tensor:
    """Returns vectors of width 4."""
    return normal(batch, 4)


def words(batch: int) -> torch.Tensor:
    """Returns sentences of 5 words out of 11."""
    return torch.randint(0, 11, (batch, 5), generator=torch.Generator().manual_seed(batch))


def normal(*shape: int) -> torch.Tensor:
    """Returns normal values in float64, always the same ones for a shape."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)), dtype=torch.float64)


# -- cases ---------------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Case:
    """A network around one operator, and what theory says of it.

    Attributes:
        name: of the test.
        run: the forward pass, a function of the network and its inputs.
        parts: layers, parameters and buffers by name.
        groups: one line per group, see `described`.
        frozen: pairs of "parameter/dim" and what its reason and operator must contain.
        unknown: operators without a rule, with the module path and the channels that they freeze.
        inputs: from a batch size to inputs.
        kind: what the default result must be: the model's own class, or a GraphModule.
        interchangeable: whether channels of a group may be permuted (not where a literal treats them by position).
        reference: whether zeroing the slices by hand gives the masked network ("auto" asks the verdicts).
        any_batch: whether the GraphModule runs at other batch sizes.
        trainable: whether the operator has a derivative.
        batch: the batch size that is traced.
        trainable: whether the operator has a derivative.
    """

    name: str
    run: Callable[..., Any]
    parts: Mapping[str, nn.Module | torch.Tensor]
    groups: Sequence[str]
    frozen: Mapping[str, str] = field(default_factory=dict)
    unknown: Sequence[tuple[str, str, int]] = ()
    inputs: MakeInputs = images
    kind: Literal["module", "graph"] | None = None
    interchangeable: bool = True
    reference: Literal["auto", "never"] = "auto"
    any_batch: bool = True
    trainable: bool = True
    batch: int = 2

    def __str__(self) -> str:
        """The name, for pytest."""
        return self.name

    def build(self) -> nn.Module:
        """Returns a new network in float64 whose parameters and statistics are all random, always the same ones."""
        return filled(Network(self.run, copy.deepcopy(dict(self.parts))))


@torch.no_grad()
def filled(model: nn.Module, seed: int = 1) -> nn.Module:
    """Gives every parameter random values of a size that neither explodes nor vanishes, and every statistic a plausible one."""
    model = model.double().eval()
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        values = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        fan_in = parameter[0].numel() if parameter.ndim > 1 else 4
        parameter.copy_(values / max(fan_in, 1) ** 0.5 + (0.5 if "norm" in name else 0.0))
    for name, buffer in model.named_buffers():
        if name.endswith("running_mean"):
            buffer.copy_(torch.randn(buffer.shape, generator=generator, dtype=torch.float64) / 4)
        elif name.endswith("running_var"):
            buffer.copy_(torch.rand(buffer.shape, generator=generator, dtype=torch.float64) + 0.5)
    return model


def described(graph: gp.DependencyGraph) -> list[str]:
    """Returns one line per group: channels, verdict, role, and its slices, as parameter/dim or parameter/dim*rows per channel."""
    lines = []
    for group in graph.groups:
        rows = [f"{s.parameter}/{s.dim}" + (f"*{s.index.shape[1]}" if s.index.shape[1] > 1 else "") for s in group.slices]
        role = f" {group.role}" if group.role else ""
        lines.append(f"{group.channels} {group.verdict}{role}: {' '.join(sorted(rows))}")
    return sorted(lines)


def ordered(line: str) -> str:
    """Returns a line of `described` with its slices in order."""
    head, _, slices = line.partition(": ")
    return f"{head}: {' '.join(sorted(slices.split()))}"


# -- the check -----------------------------------------------------------------------------------------------------------------------


def check(case: Case) -> gp.DependencyGraph:
    """Asserts that the groups are what theory says, and that removing half of their channels is exact in every form of result.

    Returns:
        The graph, for what a test wants to say besides.

    Raises:
        AssertionError: something does not hold.
    """
    model, inputs = case.build(), case.inputs(case.batch)
    before = snapshot(model)
    graph = gp.trace(model, inputs)
    assert described(graph) == sorted(ordered(line) for line in case.groups)
    check_frozen(graph, case)
    assert coverage_faults(model, graph) == []
    check_permutation(model, graph, inputs, case)
    if graph.groups:
        cuts: list[Literal["blocks", "within", "both"]] = ["blocks", "within", "both"] if any(g.role for g in graph.groups) else ["blocks"]
        for cut in cuts:
            check_removal(model, graph, case, cut)
    else:
        small, report = gp.prune(model, inputs, sparsity=0.5)
        assert report.verified
        assert_same(evaluate(model, inputs), evaluate(small, inputs), "something was removed from a network without groups")
    assert changes(before, snapshot(model)) == []
    return graph


def check_frozen(graph: gp.DependencyGraph, case: Case) -> None:
    """Asserts that reasons, operators and unknown operators are named as expected."""
    for place, text in case.frozen.items():
        found = [str(f) for f in graph.frozen if f"{f.parameter}/{f.dim}" == place]
        assert any(text in line for line in found), f"{place}: {found} nowhere says {text!r}"
    assert [(u.operator, u.module, u.channels) for u in graph.unknown] == list(case.unknown)


def check_permutation(model: nn.Module, graph: gp.DependencyGraph, inputs: object, case: Case) -> None:
    """Asserts that permuting channels changes nothing, and that the test would notice a slice left out."""
    if not graph.groups or not case.interchangeable:
        return
    error, control = permutation_error(model, graph, inputs)
    assert error < TOLERANCE, f"permuting channels changes the output by {error:.2g}"
    assert control > MIN_CONTROL, f"the permutation test is blind: {control:.2g}"


def check_removal(model: nn.Module, graph: gp.DependencyGraph, case: Case, cut: Literal["blocks", "within", "both"]) -> None:
    """Asserts that the default result and the GraphModule equal the masked network, also at another batch size, and can be trained."""
    inputs, others = case.inputs(case.batch), case.inputs(case.batch + 2)
    small, report = gp.prune(model, inputs, sparsity=0.5, cut=cut)
    masks = gp.L1NormPruner(model, [{"sparsity": 0.5, "op_types": ["default"]}], example_inputs=inputs, cut=cut, graph=graph).masks()
    as_graph, graph_report = gp.speedup(model, masks, result="graph")
    for found in (report, graph_report):
        assert found.verified
        assert found.error < TOLERANCE, f"{found.kind}, cut={cut!r}: error {found.error:.2g}"
        assert found.effect > MIN_CONTROL, f"{found.kind}, cut={cut!r}: effect {found.effect:.2g}"
        assert found.after is not None
        assert found.before is not None
        assert found.after.params < found.before.params
    if case.kind is not None:
        assert report.kind == case.kind, f"cut={cut!r}: {report.reason}"
    check_shapes(as_graph, graph, masks)
    for batch in (inputs, others) if case.any_batch else (inputs,):
        expected = reference(model, graph, masks, batch, case)
        made = evaluate(as_graph, batch)
        assert shapes(made) == shapes(evaluate(model, batch))
        assert relative_error(evaluate(small, batch), made) < TOLERANCE
        if expected is not None:
            assert relative_error(expected, made) < TOLERANCE, f"cut={cut!r}: differs from the network with zeroed slices"
    if case.trainable:
        train_step(small, others if case.any_batch else inputs)
        train_step(as_graph, others if case.any_batch else inputs)


def check_shapes(small: nn.Module, graph: gp.DependencyGraph, masks: gp.Masks) -> None:
    """Asserts that every tensor of a shrunk network has exactly the positions that the masks keep."""
    tensors = {**dict(small.named_parameters(remove_duplicate=False)), **dict(small.named_buffers(remove_duplicate=False))}
    for name, dims in masks.positions().items():
        for dim, kept in dims.items():
            assert tensors[name].shape[dim] == kept.size < graph.shapes[name][dim], f"{name} dim {dim}"


def reference(model: nn.Module, graph: gp.DependencyGraph, masks: gp.Masks, inputs: object, case: Case) -> list[torch.Tensor] | None:
    """Returns what the network with zeroed slices gives, found without the engine; None where a statistic of unknown kind changes."""
    touched = [g for g in graph.groups if not np.asarray(masks[g.name]).all()]
    statistics = {why.partition(" ")[0] for g in touched for why in g.why}
    if case.reference == "never" or not statistics <= NORMS:
        return None
    if statistics:
        return masked_outputs(model, graph, masks, inputs)
    return evaluate(masked_copy(model, graph, masks), inputs)


def operators(model: nn.Module, inputs: object) -> set[str]:
    """Returns the names of the operators that a recording of one forward pass holds."""
    nodes = gp.trace(model, inputs).engine.program.graph.nodes
    return {n.target._schema.name for n in nodes if hasattr(n.target, "_schema")}  # noqa: SLF001 (documented)


def outputs(model: nn.Module, inputs: object) -> object:
    """Returns what a model gives for inputs in any form, without gradients."""
    with torch.no_grad():
        return call(model, inputs)
