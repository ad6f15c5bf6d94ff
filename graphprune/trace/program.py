"""What a recording is: a graph of ATen operators, and the tensors, modules and inputs that it was made of."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch
    from torch import fx, nn

    from graphprune.trace.inputs import Inputs


@dataclass(eq=False)
class Program:
    """A recorded forward pass.

    Attributes:
        graph: the operators, as calls of ATen overloads; each node has `meta["shapes"]` (one per output tensor), `meta["dtype"]`,
            `meta["module"]`, `meta["decides"]` (see `decisions.decision`), `meta["delicate"]` (whether rounding or random numbers may
            change that), `meta["value"]` (a number that Python read) and, for integer tensors that depend on nothing, `meta["tensor"]`.
        tensors: qualified name -> parameter or buffer that the program reads.
        parameters: names in `tensors` that may shrink: parameters and floating-point buffers.
        constants: name -> literal tensor that the program reads.
        aliases: other names of tied tensors -> the name used here.
        modules: qualified name -> module, for every module.
        inputs: what was passed.
        unused: parameters that the forward pass did not read.
    """

    graph: fx.Graph
    tensors: dict[str, torch.Tensor]
    parameters: set[str]
    constants: dict[str, torch.Tensor]
    aliases: dict[str, str]
    modules: dict[str, nn.Module]
    inputs: Inputs
    unused: list[str] = field(default_factory=list)
    ran: list[str] = field(default_factory=list)
