"""What must hold for any network: oracles that know nothing of the engine but the slices that it reports.

Only `assert_invariants` calls graphprune; everything else takes any object with `groups` and `slices`, so that hand-made graphs can show
that an oracle fails when it should.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import torch

from tests.support.kept_statistics import KeptStatistics
from tests.support.networks import call
from tests.support.outputs import flatten_outputs, relative_error, shapes
from tests.support.protocols import named_tensors
from tests.support.untouched import assert_same, changes, snapshot

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import nn

    from tests.support.protocols import CoveredGraphLike, GraphLike, GroupLike, IntArray, Keep

MIN_CONTROL: Final = 1e-3  # what a broken permutation and a removal must change, relative


@torch.no_grad()
def evaluate(model: nn.Module, inputs: object) -> list[torch.Tensor]:
    """Returns the tensors that the model gives in eval mode; training flags and the random state stay as they were."""
    training = {module: module.training for module in model.modules()}
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            return flatten_outputs(call(model.eval(), inputs))
    finally:
        for module, flag in training.items():
            module.training = flag


def permutation_error(model: nn.Module, graph: GraphLike, inputs: object, seed: int = 0) -> tuple[float, float]:
    """Permutes the channels of every group in all its slices at once, and compares the outputs.

    Args:
        model: left as it is; copies are permuted, and run in eval mode.
        graph: the groups to permute.
        inputs: in any form that `networks.call` takes.
        seed: of the permutations and of what the control leaves out.

    Returns:
        The relative error of the permuted network, and a control: the same with one slice of each group left as it was. The error
        means nothing unless the control is clearly larger.

    A group whose channels share positions with each other (the products of all pairs of channels, say) is left as it is: where position
    (i, j) goes depends on two channels at once, which slices cannot say. Removal is checked on such groups like on all others.
    """
    generator = np.random.default_rng(seed)
    alone = [group for group in graph.groups if not shares_positions(group)]
    orders = {group.name: _shuffle(group.channels, generator) for group in alone}
    left_out = {group.name: int(generator.integers(len(group.slices))) for group in alone if len(group.slices) > 1}
    expected = evaluate(model, inputs)
    error = relative_error(expected, evaluate(_permuted(model, graph, orders, {}), inputs))
    control = relative_error(expected, evaluate(_permuted(model, graph, orders, left_out), inputs))
    return error, control


def shares_positions(group: GroupLike) -> bool:
    """Returns whether some position of a parameter belongs to two channels of this group."""
    return any(np.unique(piece.index).size < piece.index.size for piece in group.slices)


def _shuffle(count: int, generator: np.random.Generator) -> IntArray:
    """Returns a random permutation that is not the identity, where there is one."""
    order = generator.permutation(count)
    return np.roll(order, 1) if bool((order == np.arange(count)).all()) else order


@torch.no_grad()
def _permuted(model: nn.Module, graph: GraphLike, orders: Mapping[str, IntArray], left_out: Mapping[str, int]) -> nn.Module:
    changed = copy.deepcopy(model)
    tensors = named_tensors(changed)
    for group in graph.groups:
        for number, piece in enumerate(group.slices if group.name in orders else ()):
            if left_out.get(group.name) == number:
                continue
            tensor = tensors[piece.parameter]
            source = np.arange(tensor.shape[piece.dim])
            source[piece.index] = piece.index[orders[group.name]]
            tensor.copy_(tensor.index_select(piece.dim, torch.from_numpy(source).to(tensor.device)))
    return changed


def removed_positions(graph: GraphLike, masks: Keep) -> dict[tuple[str, int], IntArray]:
    """Returns for each (tensor name, dim) the sorted positions that the masks remove."""
    removed: dict[tuple[str, int], list[IntArray]] = {}
    for group in graph.groups:
        drop = ~np.asarray(masks[group.name], dtype=bool)
        for piece in group.slices:
            removed.setdefault((piece.parameter, piece.dim), []).append(piece.index[drop].ravel())
    return {place: np.unique(np.concatenate(indices)) for place, indices in removed.items()}


@torch.no_grad()
def masked_copy(model: nn.Module, graph: GraphLike, masks: Keep) -> nn.Module:
    """Returns a deep copy with every slice of every removed channel set to zero.

    Running variances become 1 instead, so that a removed channel leaves its BatchNorm as exactly 0 (weight, bias and mean are 0).
    Run it inside `KeptStatistics` where norms take statistics across channels.
    """
    masked = copy.deepcopy(model)
    tensors = named_tensors(masked)
    for (name, dim), positions in removed_positions(graph, masks).items():
        value = 1.0 if name.rpartition(".")[2] == "running_var" else 0.0
        tensors[name].index_fill_(dim, torch.from_numpy(positions).to(tensors[name].device), value)
    return masked


def masked_outputs(model: nn.Module, graph: GraphLike, masks: Keep, inputs: object) -> list[torch.Tensor]:
    """Returns what the masked network gives when its norms take their statistics over the kept channels only."""
    masked = masked_copy(model, graph, masks)
    tensors = named_tensors(masked)
    kept: dict[str, torch.Tensor] = {}
    for (name, dim), positions in removed_positions(graph, masks).items():
        keep = kept.setdefault(name, torch.ones(tensors[name].shape, dtype=torch.bool))
        keep.index_fill_(dim, torch.from_numpy(positions), value=False)
    with KeptStatistics([(tensors[name], keep) for name, keep in kept.items()]):
        return evaluate(masked, inputs)


def coverage_faults(model: nn.Module, graph: CoveredGraphLike) -> list[str]:
    """Returns one line for each parameter dimension with positions that are neither in a group nor frozen, or both."""
    tensors = named_tensors(model)
    grouped = {(id(t), dim): np.zeros(size, dtype=bool) for t in tensors.values() for dim, size in enumerate(t.shape)}
    frozen = {place: flags.copy() for place, flags in grouped.items()}
    for group in graph.groups:
        for piece in group.slices:
            grouped[id(tensors[piece.parameter]), piece.dim][piece.index.ravel()] = True
    for item in graph.frozen:
        frozen[id(tensors[item.parameter]), item.dim][item.index] = True
    faults = []
    for name, parameter in model.named_parameters():
        for dim in range(parameter.ndim):
            place = (id(parameter), dim)
            missing = int((~(grouped[place] | frozen[place])).sum())
            twice = int((grouped[place] & frozen[place]).sum())
            if missing:
                faults.append(f"{name} dim {dim}: {missing} of {parameter.shape[dim]} positions are in no group and not frozen")
            if twice:
                faults.append(f"{name} dim {dim}: {twice} of {parameter.shape[dim]} positions are in a group and frozen as well")
    return faults


def train_step(model: nn.Module, inputs: object, seed: int = 0) -> list[str]:
    """Runs forward and backward of a copy in train mode.

    Args:
        model: left as it is.
        inputs: in any form that `networks.call` takes.
        seed: of dropout and of the random projection of the outputs that serves as loss.

    Returns:
        The names of the parameters that want a gradient and received none.

    Raises:
        ArithmeticError: a gradient is not finite, or all are zero.
    """
    trained = copy.deepcopy(model).train()
    trained.zero_grad(set_to_none=True)
    with torch.random.fork_rng(devices=[]), torch.enable_grad():
        torch.manual_seed(seed)
        outputs = [t for t in flatten_outputs(call(trained, inputs)) if t.is_floating_point() and t.requires_grad]
        torch.stack([(t * torch.randn_like(t)).sum() for t in outputs]).sum().backward()
    wanting = [(name, p.grad) for name, p in trained.named_parameters() if p.requires_grad]
    received = [(name, gradient) for name, gradient in wanting if gradient is not None]
    for name, gradient in received:
        if not bool(gradient.isfinite().all()):
            message = f"the gradient of {name} is not finite"
            raise ArithmeticError(message)
    if not any(bool(gradient.any()) for _, gradient in received):
        message = "no parameter received a gradient other than zero"
        raise ArithmeticError(message)
    return [name for name, gradient in wanting if gradient is None]


@dataclass(frozen=True)
class Findings:
    """What `assert_invariants` measured (all relative), and what it worked with."""

    permutation_error: float
    control: float
    error: float
    effect: float
    reference_error: float
    graph: Any
    small: nn.Module
    report: Any


def assert_invariants(
    model: nn.Module, inputs: object, *, sparsity: float = 0.5, tolerance: float = 1e-9, seed: int = 0, reference: bool = True
) -> Findings:
    """Asserts for one network all that is always true of tracing and pruning it.

    Args:
        model: in float64, with non-degenerate values (`networks.randomise`); left as it is, which is asserted as well.
        inputs: at least two examples, in any form that `networks.call` takes.
        sparsity: share of every group's channels to remove.
        tolerance: largest relative error.
        seed: of the permutations.
        reference: whether to compare with `masked_outputs` besides the engine's own verification. Switch it off for networks that
            take statistics across channels other than through layer_norm, group_norm or rms_norm with a weight.

    Raises:
        AssertionError: an invariant does not hold.
    """
    import graphprune as gp  # noqa: PLC0415 (the oracles above must work without the engine)

    before, original = snapshot(model), evaluate(model, inputs)
    graph = gp.trace(model, inputs)
    error, control = permutation_error(model, graph, inputs, seed)
    assert error < tolerance, f"permuting channels within their groups changes the output by {error:.3g}"
    assert control > MIN_CONTROL, f"the permutation test is blind: leaving a slice out changes the output by {control:.3g} only"
    faults = coverage_faults(model, graph)
    assert not faults, "\n".join(faults)

    unpruned, _ = gp.prune(model, inputs, sparsity=0.0)
    assert_same(original, evaluate(unpruned, inputs), "removing nothing changes the output")

    small, report = gp.prune(model, inputs, sparsity=sparsity)
    assert report.error < tolerance, f"the shrunk network differs from the masked one by {report.error:.3g}"
    assert report.effect > MIN_CONTROL, f"the removal had no effect to speak of: {report.effect:.3g}"
    shrunk = evaluate(small, inputs)
    assert shapes(shrunk) == shapes(original), f"the output shapes {shapes(original)} became {shapes(shrunk)}"
    reference_error = float("nan")
    if reference:
        masks = gp.L1NormPruner(model, [{"sparsity": sparsity, "op_types": ["default"]}], example_inputs=inputs).masks()
        reference_error = relative_error(masked_outputs(model, graph, masks, inputs), shrunk)
        assert reference_error < tolerance, f"the shrunk network differs from the reference by {reference_error:.3g}"
    train_step(small, inputs)
    differences = changes(before, snapshot(model))
    assert not differences, f"the input model was changed at {', '.join(differences)}"
    return Findings(error, control, report.error, report.effect, reference_error, graph, small, report)
