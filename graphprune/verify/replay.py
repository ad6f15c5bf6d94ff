"""Checking that the shrunk model computes what the masked model computes, on every run.

The masked model is the original one with the removed channels' slices zeroed. Where an operator takes a statistic across channels
(LayerNorm, softmax, mean), the reference takes it over the kept channels only; everything else runs at full width on zeros.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn

from graphprune.errors import GraphPruneError, VerificationError
from graphprune.masks.channels import checked_tensors
from graphprune.ops.registry import UNBOUND, Value
from graphprune.surgery.rewriting import Removal, rewrite
from graphprune.torch_private import is_operator, name_of
from graphprune.trace.data_dependent import is_delicate
from graphprune.trace.outline import Calls, calls_of
from graphprune.trace.outputs import output_tensors
from graphprune.trace.program import Program, info
from graphprune.trace.recorder import record

if TYPE_CHECKING:
    from torch import fx

    from graphprune.masks.channels import Masks

TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4, torch.float16: 5e-2, torch.bfloat16: 1e-1}


@dataclass(frozen=True)
class Check:
    """What a verification found.

    Attributes:
        error: largest difference between shrunk and masked outputs, relative to the largest masked output.
        effect: largest difference between masked and original outputs, relative to the largest original output.
        tolerance: what the error is held against.
        ties: how many decisions (positions, sizes, Python numbers) fell otherwise in the shrunk model though what went into them was equal
            up to rounding; it was given the masked model's, so that everything after them could be compared.
        empty: whether the outputs have no elements.
        calls: the operators that the shrunk model ran; None where it cannot be run.
        macs: its multiply-accumulates; None where they must be counted.
    """

    error: float
    effect: float
    tolerance: float
    ties: int = 0
    empty: bool = False
    calls: Calls | None = field(default=None, repr=False, compare=False)
    macs: int | None = None

    @property
    def passed(self) -> bool:
        """Whether the error is within tolerance."""
        return self.error <= self.tolerance

    @property
    def remarks(self) -> tuple[str, ...]:
        """What somebody who relies on the comparison should know."""
        ties = f"{self.ties} decisions by value fell otherwise than in the masked model, on values that are equal up to rounding"
        empty = "The model gives nothing for the example inputs, so what it does with results that it finds was not compared"
        return (*([ties] if self.ties else []), *([empty] if self.empty else []))


def difference(a: list[torch.Tensor], b: list[torch.Tensor]) -> float:
    """Returns the largest difference between two outputs, relative to the largest value of the first; inf where shapes differ.

    Infinities of one sign are equal, and so is NaN to NaN.
    """
    if len(a) != len(b):
        return float("inf")
    worst = 0.0
    for x, y in zip(a, b, strict=True):
        if x.shape != y.shape:
            return float("inf")
        if x.numel():
            x64, y64 = _plain(x), _plain(y)
            scale = float(torch.where(x64.isfinite(), x64, 0.0).abs().max())
            gap = float(torch.where((x64 == y64) | (x64.isnan() & y64.isnan()), 0.0, x64 - y64).abs().max())
            relative = gap / scale if scale > 0 else gap
            worst = max(worst, relative if relative == relative else float("inf"))  # noqa: PLR0124 (NaN is not itself)
    return worst


def _plain(x: torch.Tensor) -> torch.Tensor:
    return torch.view_as_real(x).double() if x.is_complex() else x.double()


def tolerance_for(program: Program) -> float:
    """Returns the tolerance of the coarsest floating dtype that the program computes in."""
    computed = (info(n).dtype for n in program.graph.nodes if n.op == "call_function" and not info(n).constant)
    return max((TOLERANCE.get(dtype, 0.0) for dtype in computed if dtype is not None), default=0.0) or TOLERANCE[torch.float64]


# -- the masked reference ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class MaskedModel:
    """What a model computes with masks: the one thing that shrunk and repaired models are held against.

    Attributes:
        model: the original model, left as it is.
        masks: which channels stay.
        removal: the recording of the model, and what goes.
        tensors: the model's parameters and buffers by all their names, detached: the model may be shrunk in place meanwhile.
    """

    model: nn.Module
    masks: Masks
    removal: Removal
    tensors: Mapping[str, torch.Tensor]

    @staticmethod
    def of(model: nn.Module, masks: Masks) -> MaskedModel:
        """Puts masks on a model.

        Raises:
            MaskError: the masks were made for another model.
        """
        analysis = masks.graph.engine
        removal = Removal(analysis, analysis.removed(masks.removed_causes))
        return MaskedModel(model, masks, removal, {n: t.detach() for n, t in checked_tensors(model, masks.graph).items()})

    @property
    def program(self) -> Program:
        """The recording of the original model."""
        return self.removal.analysis.program

    def module(self) -> nn.Module:
        """Returns a copy of the model in which the removed channels' slices are zero (statistics are taken by who runs it)."""
        return self.masks.masked(self.model)

    def outputs(self, on_value: Callable[[fx.Node, Any], None] | None = None) -> list[torch.Tensor]:
        """Returns what the masked model returns on the recorded inputs, run from the recording at full width.

        Args:
            on_value: called with every node and what it gave.
        """
        positions = self.masks.positions()
        env: dict[fx.Node, Any] = {}
        last = _last_uses(self.program.graph)
        inputs = self.program.inputs.copied()
        arguments = iter([*inputs.args, *inputs.kwargs.values()])
        with torch.inference_mode():
            for node in self.program.graph.nodes:
                if node.op == "placeholder":
                    env[node] = next(arguments)
                elif node.op == "get_attr":
                    env[node] = masked_tensor(str(node.target), self.program, positions, self.tensors)
                elif node.op == "output":
                    return output_tensors(_loaded(node.args[0], env))
                else:
                    env[node] = _masked_call(node, env, self.removal)
                    if on_value is not None and not info(node).placeholder:
                        on_value(node, env[node])
                for done in last.get(node, ()):
                    env.pop(done, None)
        return []


def _last_uses(graph: fx.Graph) -> dict[fx.Node, list[fx.Node]]:
    seen: set[fx.Node] = set()
    out: dict[fx.Node, list[fx.Node]] = {}
    for node in reversed(graph.nodes):
        for source in node.all_input_nodes:
            if source not in seen:
                seen.add(source)
                out.setdefault(node, []).append(source)
    return out


def masked_tensor(
    name: str, program: Program, positions: Mapping[str, Mapping[int, Any]], tensors: Mapping[str, torch.Tensor]
) -> torch.Tensor:
    """Returns a tensor of the model with zeros in the removed positions (its own memory where it has none)."""
    tensor = tensors[name] if name in tensors else program.constants[name]
    dims = positions.get(name)
    if not dims or name.endswith("running_var"):
        return tensor if isinstance(program.tensors.get(name), nn.Parameter) else tensor.clone()  # operators in place write to buffers
    for dim, keep in dims.items():
        gone = np.setdiff1d(np.arange(tensor.shape[dim]), keep)
        tensor = tensor.index_fill(dim, torch.from_numpy(gone).to(tensor.device), 0)
    return tensor


def _loaded(value: Any, env: dict[fx.Node, Any]) -> Any:
    if hasattr(value, "all_input_nodes"):
        return env[value]
    if isinstance(value, (list, tuple)):
        return type(value)(_loaded(v, env) for v in value) if type(value) in (list, tuple) else [_loaded(v, env) for v in value]
    if isinstance(value, dict):
        return {k: _loaded(v, env) for k, v in value.items()}
    return value


def _masked_call(node: fx.Node, env: dict[fx.Node, Any], removal: Removal) -> Any:
    target: Any = node.target
    notes = removal.analysis.notes.get(node)
    if notes is not None and any(removal.loses(labels) for labels in (*notes.statistics, *notes.kept_only)):
        return over_kept(node, env, removal)
    args, kwargs = _loaded(node.args, env), _loaded(dict(node.kwargs), env)
    if info(node).whole:  # Python took out the values of a tensor
        return None
    if target is operator.getitem and not hasattr(args[0], "__getitem__"):
        return None
    return target(*args, **kwargs)


def over_kept(node: fx.Node, env: dict[fx.Node, Any], removal: Removal) -> Any:
    """Runs one operator on kept channels only, and puts its result back at full width with zeros elsewhere."""
    call, _ = rewrite(node, removal)
    small = {n: gathered(env[n], removal.analysis.values[n], removal) for n in node.all_input_nodes}
    args, kwargs = call.split()
    result = call.target(*_loaded(args, small), **_loaded(kwargs, small))
    values = removal.analysis.values[node]
    if isinstance(values, list):
        return type(result)(_scattered(r, v, removal) for r, v in zip(result, values, strict=True))
    return _scattered(result, values, removal)


def gathered(tensor: Any, value: Value | list[Value] | None, removal: Removal) -> Any:
    """Returns the kept positions of a tensor, given its labels."""
    if not isinstance(value, Value):
        return tensor
    for d, labels in enumerate(value.labels):
        if labels is not None and labels is not UNBOUND and removal.loses(labels):
            tensor = tensor.index_select(d, torch.from_numpy(removal.kept(value, d)).to(tensor.device))
    return tensor


def _scattered(tensor: torch.Tensor, value: Value, removal: Removal) -> torch.Tensor:
    for d, labels in enumerate(value.labels):
        if labels is not None and labels is not UNBOUND and removal.loses(labels):
            wide = list(tensor.shape)
            wide[d] = value.shape[d]
            index = torch.from_numpy(removal.kept(value, d)).to(tensor.device)
            tensor = tensor.new_zeros(wide).index_copy(d, index, tensor)
    return tensor


# -- finding where ---------------------------------------------------------------------------------------------------------------


def first_difference(small: nn.Module, masked: MaskedModel, tolerance: float) -> str:
    """Returns where the shrunk model first departs from the masked one: operator and module path, in the order of execution."""
    wanted: list[tuple[fx.Node, torch.Tensor]] = []
    removal = masked.removal
    masked.outputs(lambda n, v: wanted.append((n, v.clone())) if isinstance(v, torch.Tensor) else None)
    found: list[tuple[fx.Node, torch.Tensor]] = []
    failure = ""
    try:
        record(small, removal.analysis.program.inputs, on_value=lambda n, v: found.append((n, v.clone())))
    except GraphPruneError as error:
        failure = error.what
    for (node, full), (other, actual) in zip(wanted, found, strict=False):
        place = f"{_name(node)} in {info(node).place}"
        if node.target != other.target:
            return f"{place}, where the shrunk model runs {_name(other)} instead"
        expected = gathered(full, removal.analysis.values[node], removal)
        if tuple(expected.shape) != tuple(actual.shape):
            return f"{place}: shape {tuple(actual.shape)} instead of {tuple(expected.shape)}"
        if expected.is_floating_point() and difference([expected], [actual]) > tolerance:
            return f"{place}: relative difference {difference([expected], [actual]):.1e}"
    if failure and len(found) < len(wanted):
        node = wanted[len(found)][0]
        return f"{_name(node)} in {info(node).place}: {failure}"
    return failure or "no single operator: the programs agree node by node"


def runs_as_recorded(calls: Calls | None, removal: Removal) -> bool:
    """Returns whether a shrunk model runs the recorded operators with the recorded fractions, stated or left to their defaults.

    Where it does not, its forward decides or computes something by the sizes that it meets, as a scale of 1 / sqrt(width). What that
    changes may be too little to be seen in the outputs for these inputs, and much for others. Where values decide what runs, only the
    defaults are compared.

    Args:
        calls: the operators that the shrunk model runs, or None where it cannot be run.
        removal: the recording of the original, and what goes.
    """
    program = removal.analysis.program
    if relies_on_defaults(removal):
        return False
    return is_delicate(program) or (calls is not None and calls == calls_of(program))


def relies_on_defaults(removal: Removal) -> bool:
    """Returns whether some operator leaves a number to a default that depends on a width that changes."""
    return any(removal.loses(labels) for notes in removal.analysis.notes.values() for _, labels in notes.constants.values())


def _name(node: fx.Node) -> str:
    if node.target is operator.getitem:
        return _name(node.all_input_nodes[0])
    target: Any = node.target
    return name_of(target).removeprefix("aten::") if is_operator(target) else str(target)


def require(check: Check, where: str) -> None:
    """Raises when a check failed.

    Raises:
        VerificationError: naming error, tolerance and the first operator that differs.
    """
    if not check.passed:
        raise VerificationError(
            f"the shrunk model departs from the masked model by {check.error:.1e} (relative; at most {check.tolerance:.0e}), at {where}",
            "This is a defect in graphprune or in a custom rule: keep the layers named above whole with exclude, and report it",
        )
