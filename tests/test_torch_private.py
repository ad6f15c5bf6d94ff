"""Every private name of PyTorch works as the package needs it, and no other module of the package touches one.

Each test says in its docstring what breaks without the name that it is about.
"""

from __future__ import annotations

import ast
import operator
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from torch.overrides import TorchFunctionMode

from graphprune import torch_private
from graphprune.torch_private import (
    OWN_DICTS,
    AutoDispatchBelowAutograd,
    BatchNorm,
    ConvNd,
    ConvTransposeNd,
    DisableTorchFunction,
    NormBase,
    OpOverload,
    TorchDispatchMode,
    add_hooks,
    append_node,
    argument_names,
    disable_current_modes,
    forward_hooks,
    graph_printers,
    is_composite,
    is_mutable,
    is_operator,
    name_of,
    own_buffers,
    own_modules,
    own_parameters,
    pytree,
    schema_of,
    storage_key,
    version_of,
)
from graphprune.trace.threads import patched

PACKAGE = Path(torch_private.__file__).parent
HOME = "torch_private.py"
OTHERS = {"_storage", "_trial_id", "_fields", "_exit"}  # of optuna, of named tuples, of the standard library

aten = torch.ops.aten


class Seen(TorchDispatchMode):
    """Notes the names of the operators that run."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Notes one, and runs it."""
        self.names.append(name_of(func))
        return func(*args, **(kwargs or {}))


# -- operators ---------------------------------------------------------------------------------------------------------------------


def test_dispatch_mode() -> None:
    """Without `TorchDispatchMode` nothing is recorded: there is no graph, and no group."""
    with Seen() as seen:
        torch.ones(2).relu()
    assert seen.names == ["aten::ones", "aten::relu"]


def test_below_autograd() -> None:
    """Without `AutoDispatchBelowAutograd` a linear layer is recorded as a transposition and a product: no rule for it is called."""
    layer, x = nn.Linear(2, 2), torch.ones(1, 2)
    with torch.no_grad(), Seen() as above:
        layer(x)
    with torch.no_grad(), AutoDispatchBelowAutograd(), Seen() as below:
        layer(x)
    assert "aten::linear" not in above.names
    assert below.names == ["aten::linear"]


def test_modes_are_switched_off() -> None:
    """Without `disable_current_modes` the copies that a recording makes of tensors would be part of the recorded program."""
    with Seen() as seen:
        with disable_current_modes():
            torch.ones(2).clone()
        torch.ones(2)
    assert seen.names == ["aten::ones"]


def test_torch_function_is_switched_off() -> None:
    """Without `DisableTorchFunction` a method that stands in for `tolist` would be called by a mode again, without end."""
    called: list[str] = []

    class Listening(TorchFunctionMode):
        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            called.append(func.__name__)
            return func(*args, **(kwargs or {}))

    x = torch.ones(2)
    with Listening():
        x.tolist()
        with DisableTorchFunction():
            x.tolist()
    assert called == ["tolist"]


def test_overloads_are_told_from_functions() -> None:
    """Without `is_operator` and `OpOverload`, `getitem` and the classes of outputs in a graph would be taken for operators."""
    assert is_operator(aten.relu.default)
    assert type(aten.relu.default) is OpOverload
    assert not any(map(is_operator, (torch.relu, aten.relu, dict.__getitem__, "relu")))


def test_names() -> None:
    """Without `name_of` no rule is found for any operator."""
    overloads = (aten.add.Tensor, aten.add_.Tensor, aten.conv2d.default, aten.conv2d.padding, aten._softmax.default)  # noqa: SLF001
    assert [name_of(o) for o in overloads] == ["aten::add", "aten::add_", "aten::conv2d", "aten::conv2d", "aten::_softmax"]
    assert all(name_of(o) == schema_of(o).name for o in overloads)


def test_signatures() -> None:
    """Without `schema_of` and `argument_names` rules could not ask for an argument by its name, nor dropout know that it is off."""
    arguments = schema_of(aten.clamp_.default).arguments
    assert argument_names(aten.clamp_.default) == argument_names(aten.clamp_.default) == ("self", "min", "max")
    assert [a.name for a in arguments if a.alias_info is not None and a.alias_info.is_write] == ["self"]
    assert [a.name for a in arguments if a.has_default_value()] == ["min", "max"]
    assert [a.kwarg_only for a in schema_of(aten.add.Tensor).arguments] == [False, False, True]
    assert [str(a.type) for a in schema_of(aten.zeros.default).arguments][-2] == "Optional[Device]"
    assert len(schema_of(aten.topk.default).returns) == 2


def test_what_stands_in_an_overloads_place_is_not_remembered() -> None:
    """An object that forwards to an overload has its names, and is let go."""

    class Forwarding:
        def __getattr__(self, name: str) -> Any:
            return getattr(aten.tril.default, name)

    stand_in: Any = Forwarding()
    assert argument_names(stand_in) == ("self", "diagonal")
    assert stand_in not in vars(torch_private)["_ARGUMENTS"]


def test_writing_operators() -> None:
    """Without `is_mutable` a pass would hand on tensors that a later operator overwrites."""
    assert is_mutable(aten.relu_.default)
    assert is_mutable(aten.add.out)
    assert not is_mutable(aten.relu.default)


def test_composite_operators() -> None:
    """Without `is_composite` operators that PyTorch can take apart would be frozen for want of a rule."""
    assert is_composite(aten.linear.default)
    assert not is_composite(aten.relu.default)
    assert torch.equal(aten.square.default.decompose(torch.tensor(3.0)), torch.tensor(9.0)) == is_composite(aten.square.default)


# -- graphs ------------------------------------------------------------------------------------------------------------------------


def built(*, by_hand: bool) -> fx.Graph:
    """Returns one small graph, its nodes appended by us or created by PyTorch."""
    graph = fx.Graph()
    x = graph.placeholder("x")

    def node(op: str, target: object, args: tuple[object, ...] = (), kwargs: dict[str, object] | None = None) -> fx.Node:
        make = append_node if by_hand else fx.Graph.create_node
        made: fx.Node = make(graph, op, target, args, kwargs)  # type: ignore[arg-type]
        return made

    weight = node("get_attr", "layer.weight")
    rows = node("call_function", aten.linear.default, (x, weight))
    halves = node("call_function", aten.chunk.default, (rows, 2), {"dim": 1})
    parts = [node("call_function", operator.getitem, (halves, i)) for i in range(2)]
    graph.output(node("call_function", aten.cat.default, (parts, 1)))
    return graph


def test_appended_nodes_are_those_that_the_graph_would_create() -> None:
    """Without `append_node` a recording takes twice as long. Names, users, order, length, look-up and code are the same; erasing works."""
    mine, theirs = built(by_hand=True), built(by_hand=False)
    assert [(n.op, n.target, n.name, str(n.args), str(n.kwargs), len(n.users)) for n in mine.nodes] == [
        (n.op, n.target, n.name, str(n.args), str(n.kwargs), len(n.users)) for n in theirs.nodes
    ]
    assert len(mine.nodes) == len(theirs.nodes) == 8
    mine.lint()
    assert len(mine.find_nodes(op="call_function", target=operator.getitem)) == 2
    assert mine.python_code("self").src == theirs.python_code("self").src
    unused = append_node(mine, "call_function", aten.relu.default, (next(iter(mine.nodes)),))
    mine.erase_node(unused)
    assert len(mine.nodes) == 8


def test_a_node_can_be_put_behind_another() -> None:
    """It stands there, and the graph goes on at its end."""
    graph = fx.Graph()
    x = graph.placeholder("x")
    last = append_node(graph, "call_function", aten.relu.default, (x,))
    weight = append_node(graph, "get_attr", "weight", after=x)
    assert list(graph.nodes) == [x, weight, last]
    assert len(graph.nodes) == 3
    assert graph.output(last).prev is last


# -- containers --------------------------------------------------------------------------------------------------------------------


def test_containers() -> None:
    """Without `pytree` tensors within tuples, dicts and registered classes would be no inputs, no outputs, and go unverified."""
    a, b = torch.zeros(1), torch.ones(1)
    nested = {"second": [a, (1, None)], "first": b}
    leaves, structure = pytree.tree_flatten(nested)
    assert leaves == pytree.tree_leaves(nested) == [a, 1, None, b]
    assert pytree.tree_unflatten(leaves, structure) == nested
    assert pytree.tree_map_only(Tensor, lambda t: t + 1, nested) == {"second": [a + 1, (1, None)], "first": b + 1}
    assert pytree.arg_tree_leaves(a, key=(b,)) == [a, b]
    assert next(pytree.keystr(path) for path, _ in pytree.tree_flatten_with_path(nested)[0]) == "['second'][0]"


# -- modules and tensors -----------------------------------------------------------------------------------------------------------


def test_base_classes() -> None:
    """Without `BatchNorm`, `NormBase`, `ConvNd` and `ConvTransposeNd` attributes such as `out_channels` would keep their old numbers."""
    assert all(issubclass(kind, BatchNorm) for kind in (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm))
    assert issubclass(BatchNorm, NormBase)
    assert issubclass(nn.InstanceNorm2d, NormBase)
    assert all(issubclass(kind, ConvNd) for kind in (nn.Conv1d, nn.Conv3d, nn.ConvTranspose2d))
    assert issubclass(nn.ConvTranspose2d, ConvTransposeNd)
    assert not issubclass(nn.Conv2d, ConvTransposeNd)


def test_own_parameters() -> None:
    """Without `own_parameters` a weight that is computed would be taken for one, and training would leave the weights in another order."""
    layer = nn.Linear(2, 2)
    own_parameters(layer)["weight"] = own_parameters(layer).pop("weight")
    assert [name for name, _ in layer.named_parameters()] == ["bias", "weight"]
    assert list(own_parameters(nn.utils.parametrizations.weight_norm(layer))) == ["bias"]
    assert own_parameters(nn.Linear(2, 2, bias=False))["bias"] is None


def test_own_modules() -> None:
    """Without `own_modules` what stands in two places of a model would have one name, and its tensors would be missed under the other."""
    layer = nn.Linear(2, 2)
    twice = nn.Sequential(layer, layer)
    assert list(own_modules(twice)) == ["0", "1"]
    assert [name for name, _ in twice.named_children()] == ["0"]


def test_own_buffers() -> None:
    """Without `own_buffers` a run that goes on could not restore a buffer that had no value yet, or another shape."""
    layer = nn.BatchNorm1d(2)
    own_buffers(layer)["running_mean"] = torch.ones(3)
    assert torch.equal(layer.get_buffer("running_mean"), torch.ones(3))
    assert own_buffers(nn.BatchNorm1d(2, track_running_stats=False))["running_mean"] is None


def test_own_dicts() -> None:
    """Without `OWN_DICTS` the parameters of a model would be taken for a cache, and emptied."""
    layer = nn.BatchNorm1d(2)
    assert [vars(layer)[name] for name in OWN_DICTS] == [own_parameters(layer), own_buffers(layer)]
    others = [held for name, held in vars(layer).items() if name not in OWN_DICTS and isinstance(held, dict)]
    assert not any(isinstance(value, Tensor) for held in others for value in held.values())


def test_forward_hooks() -> None:
    """Without `forward_hooks` the user's hooks would run twice while a trainer is tried out."""
    layer, called = nn.Linear(2, 2), []
    layer.register_forward_hook(lambda *_: called.append("after"))
    layer.register_forward_pre_hook(lambda *_: called.append("before"))
    layer(torch.ones(1, 2))
    for hooks in forward_hooks(layer):
        hooks.clear()
    layer(torch.ones(1, 2))
    assert called == ["before", "after"]


def test_storages() -> None:
    """Without `storage_key` a write into one tensor without values would make all others lose theirs."""
    a, b = torch.empty(2, 2, device="meta"), torch.empty(2, 2, device="meta")
    assert a.untyped_storage().data_ptr() == b.untyped_storage().data_ptr() == 0
    assert storage_key(a.untyped_storage()) == storage_key(a[0].untyped_storage()) != storage_key(b.untyped_storage())


def test_printer() -> None:
    """Without `graph_printers` an export that fails fills the console with its graph."""
    said: list[Any] = []
    found = graph_printers()
    if not found:
        pytest.skip(f"PyTorch {torch.__version__} does not print the graph of an export that fails")
    (owner, name) = found[0]
    with patched(owner, name, lambda _, *words: said.append(words)):
        torch._C._jit_onnx_log("graph", 1)  # noqa: SLF001
    assert said == [("graph", 1)]
    assert graph_printers() == found


def test_added_hooks() -> None:
    """Without `add_hooks` nobody would know which module runs: around its own hooks, also where it raises or is scripted."""
    said: list[str] = []
    model = nn.Sequential(nn.Linear(2, 2))
    model.register_forward_pre_hook(lambda *_: said.append("own before"))
    model.register_forward_hook(lambda *_: said.append("own after"))
    remove = add_hooks([model], lambda *_: said.append("before"), lambda *_: said.append("after"))
    model(torch.zeros(1, 2))
    with pytest.raises(RuntimeError):
        model(torch.zeros(1, 3))
    remove()
    model(torch.zeros(1, 2))
    assert said == ["before", "own before", "after", "own after", "before", "own before", "after", "own before", "own after"]


def test_versions() -> None:
    """Without `version_of` nobody would notice that another thread writes to a model while it is pruned."""
    tensor = torch.zeros(2)
    before = version_of(tensor)
    tensor.detach().add_(1)
    assert version_of(tensor) > before
    with torch.inference_mode():
        assert version_of(torch.zeros(2)) == 0


# -- one home for all --------------------------------------------------------------------------------------------------------------


def test_every_name_has_a_test() -> None:
    """A name that is promised to the rest of the package stands in a test of this file."""
    tests = Path(__file__).read_text(encoding="utf-8").partition("# -- operators")[2]
    assert [name for name in torch_private.__all__ if not re.search(rf"\b{name}\b", tests)] == []


def private_names() -> set[str]:
    """Returns the private attributes that objects of PyTorch have."""
    model = nn.Linear(1, 1)
    traced = fx.symbolic_trace(model)
    optimizer = torch.optim.Adam(model.parameters())
    objects = [
        torch, torch.Tensor, torch.distributed, torch.export, torch.jit.ScriptModule, torch.onnx, torch.ops, torch.optim, torch.utils,
        model, model.weight, model.weight.untyped_storage(), nn.ParameterList(), traced, traced.graph, next(iter(traced.graph.nodes)),
        optimizer, torch.optim.lr_scheduler.StepLR(optimizer, 1), torch.Generator(), Seen(),
        TorchFunctionMode(), aten.relu, aten.relu.default, schema_of(aten.relu.default), torch.autograd.Function,
    ]  # fmt: skip
    found = {name for held in objects for name in (*dir(held), *getattr(held, "__dict__", ()))}
    return {name for name in found if name.startswith("_") and not name.startswith("__")}


def touched(source: str, private: set[str]) -> Iterator[tuple[int, str]]:
    """Yields (line, name) of what is private to PyTorch in a module: imports, attributes, and names in strings.

    Attributes of `self` that the module sets or defines are its own; names of operators (`aten._softmax`) are not private.
    """
    tree = ast.parse(source)
    own = {n.attr for n in ast.walk(tree) if isinstance(n, ast.Attribute) and isinstance(n.ctx, ast.Store)}
    own |= {n.name for n in ast.walk(tree) if isinstance(n, (ast.FunctionDef, ast.ClassDef))}
    own |= {n.target.id for n in ast.walk(tree) if isinstance(n, ast.AnnAssign) and isinstance(n.target, ast.Name)}
    for node in ast.walk(tree):
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            module = getattr(node, "module", None) or ""
            for name in (f"{module}.{alias.name}".strip(".") for alias in node.names):
                if name.split(".")[0] == "torch" and any(part.startswith("_") and part != "__future__" for part in name.split(".")):
                    yield node.lineno, name
        elif isinstance(node, ast.Attribute) and node.attr.startswith("_") and not node.attr.startswith("__"):
            base = ast.unparse(node.value)
            mine = base in ("self", "cls", "super()") and (node.attr in own or node.attr not in private)
            if not mine and base not in ("aten", "_aten", "torch.ops.aten") and (base.split(".")[0] == "torch" or node.attr in private):
                yield node.lineno, ast.unparse(node)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and node.value in private and not hasattr(aten, node.value):
            yield node.lineno, repr(node.value)


def test_private_names_are_seen() -> None:
    """What the next test looks for is found in all of its forms."""
    source = """
import torch._C
from torch._ops import OpOverload
from torch.nn.modules.conv import _ConvNd
from torch.utils import _pytree as pytree
torch._C._dispatch_keys(x)
module._parameters["weight"]
hasattr(target, "_schema")
self._backward_hooks.clear()
class Mine:
    def __init__(self):
        self._parameters = aten._softmax
"""
    found = [name for _, name in sorted(touched(source, private_names()))]
    assert found == [
        "torch._C", "torch._ops.OpOverload", "torch.nn.modules.conv._ConvNd", "torch.utils._pytree", "torch._C", "torch._C._dispatch_keys",
        "module._parameters", "'_schema'", "self._backward_hooks",
    ]  # fmt: skip


@pytest.mark.parametrize("path", [p.relative_to(PACKAGE).as_posix() for p in sorted(PACKAGE.rglob("*.py")) if p.name != HOME])
def test_no_other_module_touches_a_private_name(path: str, private: set[str]) -> None:
    """Whatever is private to PyTorch is imported from `graphprune.torch_private`; add it there, with a test above."""
    found = [f"{path}:{line}: {name}" for line, name in touched((PACKAGE / path).read_text(encoding="utf-8"), private)]
    assert [line for line in found if line.rpartition(".")[2] not in OTHERS] == []


@pytest.fixture(scope="module")
def private() -> set[str]:
    """The private attributes of PyTorch's objects."""
    return private_names()
