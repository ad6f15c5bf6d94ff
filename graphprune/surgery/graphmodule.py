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

from graphprune.errors import GraphPruneError, InputError, VerificationError
from graphprune.groups.build import analyse, gather
from graphprune.surgery.rewriting import Call, Removal, rewrite
from graphprune.torch_private import is_mutable, is_operator, name_of, pytree
from graphprune.trace.data_dependent import decisions_of
from graphprune.trace.program import info
from graphprune.trace.recorder import record

if TYPE_CHECKING:
    from collections.abc import Mapping

    from graphprune.masks.channels import Masks
    from graphprune.trace.program import Program

_REMEDY = "Use result='module', which keeps the model's own code, or exclude the layers named above"
_FLAGS = {"aten::batch_norm": "training", "aten::dropout": "train", "aten::instance_norm": "use_input_stats",
          "aten::alpha_dropout": "train", "aten::feature_dropout": "train"}  # fmt: skip


def rewritten(model: nn.Module, removal: Removal, masks: Masks, sliced: Mapping[str, torch.Tensor]) -> tuple[fx.GraphModule, str]:
    """Returns the shrunk program as a module, and a remark on its batch size ("" when any batch works).

    Args:
        model: the original model (only recorded once more, at another batch size).
        removal: the analysed program and what goes.
        masks: the masks behind it.
        sliced: name -> shrunk tensor, for every parameter and buffer that the program reads.

    Raises:
        VerificationError: the program does what depends on the values of its inputs.
    """
    program = removal.analysis.program
    refusal = why_none(program)
    if refusal:
        raise VerificationError(f"no GraphModule can do what {type(model).__name__} does: {refusal}", _REMEDY)
    other, remark = _at_another_batch(model, removal, masks)
    root = _root(program, sliced)
    graph = fx.Graph()
    writer = _Writer(graph, removal, other, root)
    writer.write()
    if not writer.follows_batch:
        remark = f"it runs only at batch {program.inputs.batch}: a table of positions depends on the batch size"
    module = fx.GraphModule(root, graph, class_name=f"Shrunk{type(model).__name__}")
    _keep_state_names(module, model, sliced, program)
    module.train(model.training)
    return module, remark


def why_none(program: Program) -> str:
    """Returns why a program cannot be repeated on other inputs, or "".

    Truth values and integers that Python reads are read again by the result, which stops where they are others than in the recording.
    """
    for node in decisions_of(program, ("number", "size")):
        target: Any = node.target
        name = name_of(target).removeprefix("aten::")
        where = f"({name} in {info(node).place})"
        if info(node).decides == "size":
            return f"values decide a size, and a graph has the sizes of the example inputs {where}"
        if not isinstance(info(node).value, (bool, int, torch.Tensor)):
            return f"Python reads a number from a tensor, and a graph would repeat the one of the example inputs {where}"
    return ""


def same_as_recorded(value: object, recorded: object, place: str) -> None:
    """Stops a forward pass whose Python code would decide otherwise than in the recording.

    Args:
        value: what was read now: a number, or a tensor of integers or truth values.
        recorded: what was read from the example inputs.
        place: operator and module path.

    Raises:
        InputError: they differ.
    """
    if torch.compiler.is_compiling():
        return
    same = torch.equal(value, recorded) if isinstance(value, torch.Tensor) and isinstance(recorded, torch.Tensor) else value == recorded
    if not same:
        what = f"this GraphModule was recorded with {recorded} where Python read a number at {place}, and now it reads {value}"
        raise InputError(what, "Pass inputs of the recorded kind, or prune with result='module', which keeps the model's own code")


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
    if _numbers(program) != _numbers(removal.analysis.program):
        return None, f"it runs only at batch {batch}: the model computes with other numbers at batch {batch + 1}"
    graph = gather(analysis)
    if graph.fingerprint != masks.graph.fingerprint:
        return None, f"it runs only at batch {batch}: other channels depend on each other at batch {batch + 1}"
    causes = [group.causes[~masks[group.name]] for group in graph.groups]
    gone = np.concatenate(causes) if causes else np.zeros(0, dtype=np.int64)
    return Removal(analysis, analysis.removed(gone)), ""


def _numbers(program: Program) -> list[object]:
    """Returns the numbers but integers among a program's literals, and what Python reads."""
    out: list[object] = []
    for node in program.graph.nodes:
        if node.op == "call_function":
            out += [leaf for leaf in pytree.tree_leaves((node.args, node.kwargs)) if isinstance(leaf, (bool, float, complex))]
            value = info(node).value if info(node).decides == "number" else None
            out.append(value.tolist() if isinstance(value, torch.Tensor) else value)
    return out


class _Writer:
    """Copies a program node by node, with calls rewritten."""

    def __init__(self, graph: fx.Graph, removal: Removal, other: Removal | None, root: nn.Module) -> None:
        self.graph = graph
        self.removal = removal
        self.other = other
        self.root = root
        self.nodes: dict[fx.Node, fx.Node | None] = {}
        self.twins: dict[fx.Node, fx.Node] = {}
        self.batch: fx.Node | None = None
        self.tables = 0
        self.follows_batch = True
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
                self.nodes[node] = self.graph.node_copy(node, self._made)
        self._erase_unused()
        if self.batch is not None and not self.batch.users:
            self.graph.erase_node(self.batch)

    def _made(self, node: fx.Node) -> fx.Node:
        """Returns what a recorded node has become."""
        made = self.nodes[node]
        if made is None:
            raise VerificationError(f"{node} is a number that Python read, and no graph can hold it", _REMEDY)
        return made

    def _erase_unused(self) -> None:
        """Erases calls whose results nothing uses any more (positions that are now looked up by a table, and may be gone)."""
        for node, made in reversed(list(self.nodes.items())):
            writes = is_operator(node.target) and is_mutable(node.target)
            picks = node.target in {operator.getitem, torch.ops.aten.select.int}
            if made is not None and node.op == "call_function" and not made.users and (node.users or picks) and not writes:
                self.graph.erase_node(made)

    def _batch_size(self, nodes: list[fx.Node]) -> None:
        """Makes the node that reads the batch size from the first input tensor that has it."""
        if self.other is None:
            return
        batch = self.removal.analysis.program.inputs.batch
        for node in nodes:
            if (node.op == "placeholder" or info(node).placeholder) and info(node).shapes:
                shape = info(node).shapes[0]
                if node.op != "placeholder":
                    for n in [*node.all_input_nodes, node]:
                        if n not in self.nodes:
                            self.nodes[n] = self.graph.node_copy(n, self._made)
                if shape and shape[0] == batch:
                    self.batch = self.graph.call_function(torch.ops.aten.sym_size.int, (self._made(node), 0))
                    return

    def _call(self, node: fx.Node) -> fx.Node | None:
        if info(node).reads:
            return self._number(node)
        drawn = any(isinstance(leaf, torch.Generator) for leaf in pytree.tree_leaves((node.args, node.kwargs)))
        if drawn and info(node).tensor is not None:
            return self._map(info(node).tensor)  # type: ignore[no-any-return]
        if drawn:
            where = info(node).module or "the model itself"
            raise VerificationError(f"a GraphModule cannot hold the generator of random numbers that {where} draws from", _REMEDY)
        call, _ = rewrite(node, self.removal)
        arguments = call.arguments
        if self.other is not None and node in self.twins and self.batch is not None:
            twin, _ = rewrite(self.twins[node], self.other)
            arguments = {k: self._with_batch(v, twin.arguments.get(k)) for k, v in arguments.items()}
        arguments = {k: self._map(v) for k, v in arguments.items()}
        name = name_of(call.target)
        if name in _FLAGS and _FLAGS[name] in arguments:
            arguments[_FLAGS[name]] = self._training(arguments[_FLAGS[name]], name)
        args, kwargs = Call(call.target, arguments).split()
        made = self.graph.call_function(call.target, args, kwargs)
        made.meta["module"] = info(node).module
        return made

    def _number(self, node: fx.Node) -> fx.Node | None:
        """Writes a number that Python reads: read again, and held against the recording; nothing where it is always the same."""
        if info(node).decides != "number":
            return None
        target: Any = node.target
        args, kwargs = self._map(node.args), self._map(dict(node.kwargs))
        read = args[0] if info(node).whole else self.graph.call_function(target, args, kwargs)
        place = f"{name_of(target).removeprefix('aten::')} in {info(node).place}"
        return self.graph.call_function(same_as_recorded, (read, self._map(info(node).value), place))

    def _training(self, recorded: object, name: str) -> Any:
        """Batch norm and dropout follow the module's own training flag (instance norm: only where it tracks statistics)."""
        if recorded is True or name == "aten::instance_norm":
            return recorded
        if self.training is None:
            self.training = self.graph.create_node("get_attr", "training")
        return self.training

    def _with_batch(self, mine: Any, twin: Any) -> Any:
        """Replaces integers that differ between the recordings by expressions of the batch size; tables cannot follow it."""
        if isinstance(mine, torch.Tensor) and isinstance(twin, torch.Tensor):
            self.follows_batch = self.follows_batch and torch.equal(mine, twin)
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
