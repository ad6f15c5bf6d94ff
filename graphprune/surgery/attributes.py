"""Setting the attributes of layers to the truth after their tensors were sliced.

Attributes that restate a tensor's shape (`out_channels`, `num_features`, ...) follow from the table below. Attributes that are arguments
of the recorded operator (`groups`, `num_groups`, `normalized_shape`) follow from what that argument counts.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import nn

from graphprune.ops.registry import Value
from graphprune.torch_private import BatchNorm, ConvNd, ConvTransposeNd, NormBase
from graphprune.trace.members import Members
from graphprune.trace.program import info

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from graphprune.surgery.rewriting import Removal

Shape = tuple[int, ...]


def _conv(module: Any) -> dict[str, int]:
    rows, columns = module.weight.shape[:2]
    if isinstance(module, ConvTransposeNd):
        return {"in_channels": rows, "out_channels": columns * module.groups}
    return {"out_channels": rows, "in_channels": columns * module.groups}


def _bilinear(module: Any) -> dict[str, int]:
    out, in1, in2 = module.weight.shape
    return {"out_features": out, "in1_features": in1, "in2_features": in2}


def _multihead(module: Any) -> dict[str, int]:
    embed = module.out_proj.weight.shape[0]
    if module.in_proj_weight is not None:
        return {"embed_dim": embed, "kdim": embed, "vdim": embed}
    return {"embed_dim": embed, "kdim": module.k_proj_weight.shape[1], "vdim": module.v_proj_weight.shape[1]}


def _recurrent(module: Any) -> dict[str, int]:
    columns = module.weight_ih_l0.shape[1]
    if module.proj_size:
        return {"input_size": columns, "proj_size": module.weight_hr_l0.shape[0], "hidden_size": module.weight_hr_l0.shape[1]}
    return {"input_size": columns, "hidden_size": module.weight_hh_l0.shape[1]}


def _per_channel(name: str, source: str = "weight", dim: int = 0) -> Callable[[Any], dict[str, int]]:
    """Returns a reader of one attribute that restates one size of one tensor."""

    def read(module: Any) -> dict[str, int]:
        tensor = getattr(module, source, None)
        if tensor is None and source == "weight":
            tensor = getattr(module, "running_mean", None)
        return {} if tensor is None else {name: tensor.shape[dim]}

    return read


SHAPES: list[tuple[type[nn.Module], Callable[[Any], dict[str, int]]]] = [
    (ConvNd, _conv),
    (nn.Linear, lambda m: {"out_features": m.weight.shape[0], "in_features": m.weight.shape[1]}),
    (nn.Bilinear, _bilinear),
    (BatchNorm, _per_channel("num_features")),
    (NormBase, _per_channel("num_features")),
    (nn.GroupNorm, _per_channel("num_channels")),
    (nn.Embedding, lambda m: {"num_embeddings": m.weight.shape[0], "embedding_dim": m.weight.shape[1]}),
    (nn.EmbeddingBag, lambda m: {"num_embeddings": m.weight.shape[0], "embedding_dim": m.weight.shape[1]}),
    (nn.PReLU, _per_channel("num_parameters")),
    (nn.MultiheadAttention, _multihead),
    (nn.RNNBase, _recurrent),
    (nn.RNNCellBase, lambda m: {"input_size": m.weight_ih.shape[1], "hidden_size": m.weight_hh.shape[1]}),
]

ARGUMENTS = ("groups", "num_groups", "normalized_shape")


def set_attributes(model: nn.Module, removal: Removal) -> None:
    """Sets every attribute that restates a size or an argument, on all layers of a shrunk model."""
    modules = Members.of(model).first_names
    for path, values in argument_values(removal).items():
        for name, value in values.items():
            current = getattr(modules[path], name, None)
            if current is not None:
                setattr(modules[path], name, type(current)(value) if isinstance(current, (tuple, list)) else value)
    for path in dict.fromkeys(n.rpartition(".")[0] for n in removal.analysis.parameters):
        if path in modules:
            _set_shapes(modules[path])
    for module in modules.values():
        if isinstance(module, nn.MultiheadAttention):
            _set_shapes(module)
    _set_without_tensors(modules, removal)


def _set_without_tensors(modules: Mapping[str, nn.Module], removal: Removal) -> None:
    """Tells norms that have no tensors of their own how many channels enter them now."""
    for node, values in removal.analysis.values.items():
        module: Any = modules.get(info(node).module)
        name = "num_features" if isinstance(module, NormBase) else "num_channels" if isinstance(module, nn.GroupNorm) else ""
        value = values[0] if isinstance(values, list) and values else values
        if name and isinstance(value, Value) and len(value.shape) > 1 and value.shape[1] == getattr(module, name):
            setattr(module, name, removal.kept(value, 1).size)


def _set_shapes(module: nn.Module) -> None:
    for kind, read in SHAPES:
        if isinstance(module, kind):
            for name, value in read(module).items():
                if hasattr(module, name):
                    setattr(module, name, value)
            return


def argument_values(removal: Removal) -> dict[str, dict[str, Any]]:
    """Returns module path -> attribute -> new value, for operator arguments that modules hold under the argument's name."""
    out: dict[str, dict[str, Any]] = {}
    analysis = removal.analysis
    for node, notes in analysis.notes.items():
        for path, labels in notes.extents.items():
            if path[0] in ARGUMENTS and removal.loses(labels):
                new = removal.count(labels)
                values = out.setdefault(info(node).module, {})
                if len(path) == 1:
                    values[str(path[0])] = new
                else:
                    stated: Any = node.args[1]
                    shape = values.get(str(path[0])) or list(stated)
                    shape[int(path[1])] = new
                    values[str(path[0])] = shape
    return out


def explained(removal: Removal, path: Mapping[str, nn.Module]) -> bool:
    """Returns whether every integer that must change belongs to a layer's own attributes (no size literal anywhere else)."""
    for node, notes in removal.analysis.notes.items():
        own = isinstance(path.get(info(node).module), (*(kind for kind, _ in SHAPES), nn.LayerNorm, nn.RMSNorm))
        for where, labels in notes.extents.items():
            if removal.loses(labels) and not (own and where[0] in ARGUMENTS):
                return False
        if any(removal.loses(labels) for labels in (*notes.remaps.values(), *notes.crops.values())):
            return False
        if any(removal.loses(labels) for _, labels in notes.constants.values()):
            return False
    return True
