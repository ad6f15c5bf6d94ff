"""The recorded program with rewritten integers, as a `torch.fx.GraphModule` that runs at any batch size and can be trained.

The forward pass is recorded at two batch sizes. Integers that differ between the two recordings are linear in the batch, `a * batch + b`,
and are computed from the input's size at run time.
"""

from __future__ import annotations

import operator
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import fx, nn

from graphprune.errors import GraphPruneError
from graphprune.groups import analyse, gather
from graphprune.surgery.rewriting import Call, Removal, rewrite
from graphprune.tracing import record

if TYPE_CHECKING:
    from collections.abc import Mapping

    from graphprune.masks import Masks

_FLAGS = {"aten::batch_norm": "training", "aten::dropout": "train", "aten::instance_norm": "use_input_stats",
          "aten::alpha_dropout": "train", "aten::feature_dropout": "train"}  # fmt: skip


def rewritten(model: nn.Module, removal: Removal, masks: Masks, sliced: Mapping[str, torch.Tensor]) -> tuple[fx.GraphModule, str]:
    """Returns the shrunk program as a module, and a remark on its batch size ("" when any batch works).

    Args:
        model: the original model (only recorded once more, at another batch size).
        removal: the analysed program and what goes.
        masks: the masks behind it.
        sliced: name -> shrunk tensor, for every parameter and buffer that the program reads.
    """
    program = removal.analysis.program
    other, remark = _at_another_batch(model, removal, masks)
    root = _root(program, sliced)
    graph = fx.Graph()
    _Writer(graph, removal, other, root).write()
    module = fx.GraphModule(root, graph, class_name=f"Shrunk{type(model).__name__}")
    _keep_state_names(module, model, sliced, program)
    module.train(model.training)
    return module, remark


def _keep_state_names(module: fx.GraphModule, model: nn.Module, sliced: Mapping[str, torch.Tensor], program: Any) -> None:
    """Adds what the program does not read (step counters, auxiliary heads), so that state dicts have the model's own names."""
    have = {*dict(module.named_parameters()), *dict(module.named_buffers()), *program.aliases}
    for name in model.state_dict():
        if name not in have and name in sliced:
            _attach(module, name, sliced[name])


def _attach(root: nn.Module, name: str, tensor: torch.Tensor, *, persistent: bool = True) -> None:
    """Puts a tensor into a module tree under its qualified name."""
    path, _, last = name.rpartition(".")
    owner = root
    for part in path.split(".") if path else []:
        if not hasattr(owner, part):
            owner.add_module(part, nn.Module())
        owner = getattr(owner, part)
    if isinstance(tensor, nn.Parameter):
        owner.register_parameter(last, tensor)
    else:
        owner.register_buffer(last, tensor.detach().clone() if tensor.is_inference() else tensor, persistent=persistent)


def _root(program: Any, sliced: Mapping[str, torch.Tensor]) -> nn.Module:
    """Returns an empty module tree that holds the tensors under their qualified names."""
    root = nn.Module()
    for name in [*program.tensors, *program.constants]:
        _attach(root, name, sliced[name] if name in sliced else program.constants[name], persistent=name not in program.constants)
    return root


def _at_another_batch(model: nn.Module, removal: Removal, masks: Masks) -> tuple[Removal | None, str]:
    """Returns the same removal in a recording at batch + 1, or why there is none."""
    inputs = removal.analysis.program.inputs
    batch = inputs.batch
    if batch is None:
        return None, "its inputs have no batch dimension"
    try:
        program = record(model, inputs.with_batch(batch + 1))
    except GraphPruneError as error:
        return None, f"it runs only at batch {batch}: another batch size fails ({error.what})"
    analysis = analyse(model, program)
    same = [n.target for n in program.graph.nodes if n.op == "call_function"]
    if same != [n.target for n in removal.analysis.program.graph.nodes if n.op == "call_function"]:
        return None, f"it runs only at batch {batch}: the model runs other operators at batch {batch + 1}"
    graph = gather(analysis)
    if graph.fingerprint != masks.graph.fingerprint:
        return None, f"it runs only at batch {batch}: other channels depend on each other at batch {batch + 1}"
    causes = [group.causes[~masks[group.name]] for group in graph.groups]
    gone = np.concatenate(causes) if causes else np.zeros(0, dtype=np.int64)
    return Removal(analysis, analysis.removed(gone)), ""


class _Writer:
    """Copies a program node by node, with calls rewritten."""

    def __init__(self, graph: fx.Graph, removal: Removal, other: Removal | None, root: nn.Module) -> None:
        self.graph = graph
        self.removal = removal
        self.other = other
        self.root = root
        self.nodes: dict[fx.Node, fx.Node] = {}
        self.twins: dict[fx.Node, fx.Node] = {}
        self.batch: fx.Node | None = None
        self.tables = 0
        self.training: fx.Node | None = None
        self.sums: dict[tuple[int, int], fx.Node] = {}
        if other is not None:
            pairs = zip(_calls(removal), _calls(other), strict=True)
            self.twins = dict(pairs)

    def write(self) -> None:
        """Writes all nodes: inputs first."""
        nodes = list(self.removal.analysis.program.graph.nodes)
        for node in (n for n in nodes if n.op == "placeholder"):
            self.nodes[node] = self.graph.node_copy(node, lambda n: n)
        self._batch_size(nodes)
        for node in (n for n in nodes if n.op != "placeholder"):
            if node.op == "call_function" and node in self.removal.analysis.notes:
                self.nodes[node] = self._call(node)
            elif node.op == "output":
                self.graph.output(self._map(node.args[0]))
            else:
                self.nodes[node] = self.graph.node_copy(node, lambda n: self.nodes[n])
        if self.batch is not None and not self.batch.users:
            self.graph.erase_node(self.batch)

    def _batch_size(self, nodes: list[fx.Node]) -> None:
        """Makes the node that reads the batch size from the first input tensor that has it."""
        if self.other is None:
            return
        batch = self.removal.analysis.program.inputs.batch
        for node in nodes:
            if (node.op == "placeholder" or node.meta.get("placeholder")) and node.meta["shapes"]:
                shape = node.meta["shapes"][0]
                if node.op != "placeholder":
                    for n in [*node.all_input_nodes, node]:
                        if n not in self.nodes:
                            self.nodes[n] = self.graph.node_copy(n, lambda m: self.nodes[m])
                if shape and shape[0] == batch:
                    self.batch = self.graph.call_function(torch.ops.aten.sym_size.int, (self.nodes[node], 0))
                    return

    def _call(self, node: fx.Node) -> fx.Node:
        call, _ = rewrite(node, self.removal)
        arguments = call.arguments
        if self.other is not None and node in self.twins and self.batch is not None:
            twin, _ = rewrite(self.twins[node], self.other)
            arguments = {k: self._with_batch(v, twin.arguments.get(k)) for k, v in arguments.items()}
        arguments = {k: self._map(v) for k, v in arguments.items()}
        name = call.target._schema.name  # noqa: SLF001 (the schema is documented)
        if name in _FLAGS and _FLAGS[name] in arguments:
            arguments[_FLAGS[name]] = self._training(arguments[_FLAGS[name]], name)
        args, kwargs = Call(call.target, arguments).split()
        made = self.graph.call_function(call.target, args, kwargs)
        made.meta["module"] = node.meta["module"]
        return made

    def _training(self, recorded: object, name: str) -> Any:
        """Batch norm and dropout follow the module's own training flag (instance norm: only where it tracks statistics)."""
        if recorded is True or name == "aten::instance_norm":
            return recorded
        if self.training is None:
            self.training = self.graph.create_node("get_attr", "training")
        return self.training

    def _with_batch(self, mine: Any, twin: Any) -> Any:
        """Replaces integers that differ between the recordings by expressions of the batch size."""
        if isinstance(mine, (list, tuple)) and isinstance(twin, (list, tuple)) and len(mine) == len(twin):
            return [self._with_batch(a, b) for a, b in zip(mine, twin, strict=True)]
        if isinstance(mine, int) and isinstance(twin, int) and not isinstance(mine, bool) and mine != twin:
            return self._linear(mine, twin - mine)
        return mine

    def _linear(self, value: int, slope: int) -> fx.Node:
        """Returns the node `slope * batch + offset` that gives `value` at the recorded batch size."""
        batch = self.removal.analysis.program.inputs.batch or 0
        offset = value - slope * batch
        key = (slope, offset)
        if key not in self.sums and self.batch is not None:
            node = self.batch if slope == 1 else self.graph.call_function(operator.mul, (self.batch, slope))
            self.sums[key] = node if offset == 0 else self.graph.call_function(operator.add, (node, offset))
        return self.sums[key]

    def _map(self, value: Any) -> Any:
        if isinstance(value, fx.Node):
            return self.nodes.get(value, value)
        if isinstance(value, torch.Tensor):
            while hasattr(self.root, f"table_{self.tables}"):
                self.tables += 1
            name = f"table_{self.tables}"
            self.root.register_buffer(name, value, persistent=True)
            return self.graph.create_node("get_attr", name)
        if isinstance(value, (list, tuple)):
            return type(value)(self._map(v) for v in value) if type(value) in (list, tuple) else [self._map(v) for v in value]
        if isinstance(value, dict):
            return {k: self._map(v) for k, v in value.items()}
        return value


def _calls(removal: Removal) -> list[fx.Node]:
    return [n for n in removal.analysis.program.graph.nodes if n.op == "call_function"]
