"""What a recording is: a graph of ATen operators, what is known of each node, and the tensors, modules and inputs that it was made of."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

from torch import fx

if TYPE_CHECKING:
    import torch
    from torch import nn

    from graphprune.trace.inputs import Inputs
    from graphprune.trace.probe import Recorded

Kind: TypeAlias = Literal["", "number", "size", "step", "random"]
"""What a program decides by values at a node, see `graphprune.trace.data_dependent.decision`."""

Where: TypeAlias = tuple[str, str]
"""Module path and attribute name."""

_INFO = "graphprune"


@dataclass(slots=True, eq=False)
class NodeInfo:
    """What a recording knows of one node.

    Attributes:
        module: path of the module that ran it; of a parameter, of the module that holds it.
        shapes: one per output tensor.
        dtype: of the tensor that it is; None where it is none, or several.
        operator: whether it is a recorded operator.
        constant: whether it depends on no input and no parameter.
        placeholder: whether it is a part of an input.
        decides: what kind of decision it takes by values.
        delicate: whether rounding or random numbers may change that.
        reads: whether Python reads a number here, or all values of a tensor.
        whole: whether Python takes the values of a whole tensor here, past all operators.
        value: what Python reads: a number, or the values of a tensor of integers.
        tensor: the tensor itself, of integers that depend on nothing.
        recorded: the call with its tensors, of an operator without a rule.
    """

    module: str = ""
    shapes: list[tuple[int, ...]] = field(default_factory=list)
    dtype: torch.dtype | None = None
    operator: bool = False
    constant: bool = False
    placeholder: bool = False
    decides: Kind = ""
    delicate: bool = False
    reads: bool = False
    whole: bool = False
    value: Any = None
    tensor: torch.Tensor | None = None
    recorded: Recorded | None = None

    @property
    def place(self) -> str:
        """The module that ran it, as messages show it."""
        return self.module or "the model itself"

    @property
    def is_floating(self) -> bool:
        """Whether it is one tensor of floating-point numbers."""
        return self.dtype is not None and self.dtype.is_floating_point


def info(node: fx.Node) -> NodeInfo:
    """Returns what a recording knows of one of its nodes."""
    found: NodeInfo = node.meta[_INFO]
    return found


def set_info(node: fx.Node, known: NodeInfo) -> NodeInfo:
    """Says what is known of a node; returns it."""
    node.meta[_INFO] = known
    return known


@dataclass(eq=False)
class Program:
    """A recorded forward pass.

    Attributes:
        graph: the operators, as calls of ATen overloads; of each node more is known, see `info`.
        tensors: qualified name -> parameter or buffer that the program reads.
        parameters: names in `tensors` that may shrink: parameters and floating-point buffers.
        constants: name -> literal tensor that the program reads.
        aliases: other names of tied tensors -> the name used here.
        modules: qualified name -> module, for every module.
        inputs: what was passed.
        outputs: copies of the tensors that the model returned, in order.
        caches: where the model keeps tensors of earlier runs, which were left out of account.
        unused: parameters that the forward pass did not read.
        ran: paths of the modules that ran, in order.
    """

    graph: fx.Graph
    tensors: dict[str, torch.Tensor]
    parameters: set[str]
    constants: dict[str, torch.Tensor]
    aliases: dict[str, str]
    modules: dict[str, nn.Module]
    inputs: Inputs
    outputs: list[torch.Tensor] = field(default_factory=list)
    caches: list[Where] = field(default_factory=list)
    unused: list[str] = field(default_factory=list)
    ran: list[str] = field(default_factory=list)
