"""Statistics of inputs: how large what a weight is multiplied by is.

Sun et al., A Simple and Effective Pruning Approach for Large Language Models (Wanda), arXiv 2306.11695, equation 1: the score of W_ij is
|W_ij| ||X_j||_2, with the norm of input feature j over all samples and positions.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from graphprune.criteria.statistics.following import follow, name
from graphprune.criteria.statistics.gradients import named, precise
from graphprune.data.distributed import all_reduce_sum
from graphprune.groups.propagate import operators
from graphprune.ops.registry import named_arguments
from graphprune.torch_private import is_operator

if TYPE_CHECKING:
    from torch import fx, nn

    from graphprune.data.sources import Source
    from graphprune.groups.graph import DependencyGraph
    from graphprune.trace.inputs import Inputs

_PRODUCTS = {
    "aten::linear": ("input", "weight"),
    "aten::mm": ("self", "mat2"),
    "aten::bmm": ("self", "mat2"),
    "aten::mv": ("self", "vec"),
    "aten::matmul": ("self", "other"),
    "aten::addmm": ("mat1", "mat2"),
    "aten::baddbmm": ("batch1", "batch2"),
    "aten::einsum": ("first", "second"),
    **{f"aten::{n}": ("input", "weight") for n in ("conv1d", "conv2d", "conv3d", "convolution", "_convolution")},
    **{f"aten::conv_transpose{d}d": ("input", "weight") for d in (1, 2, 3)},
}
"""Operator -> its two factors."""

_VIEWS = frozenset(
    f"aten::{n}"
    for n in ("t", "transpose", "numpy_T", "mT", "permute", "view", "reshape", "unsqueeze", "squeeze", "flatten", "unflatten", "expand",
              "slice", "narrow", "select", "chunk", "split", "split_with_sizes", "unbind", "tensor_split", "detach", "alias", "contiguous",
              "clone", "_to_copy", "to", "_unsafe_view", "_reshape_alias")
)  # fmt: skip


@dataclass(frozen=True, eq=False)
class _Product:
    """One operator that multiplies an input by a weight.

    Attributes:
        node: the operator, as recorded.
        parameter: the weight.
        views: what is done to the parameter on its way to the operator, in order.
        factors: argument names of the input and of the weight.
        left: whether the weight is the first factor of a matrix product.
    """

    node: fx.Node
    parameter: str
    views: tuple[fx.Node, ...]
    factors: tuple[str, str]
    left: bool


def observe_inputs(model: nn.Module, graph: DependencyGraph, parameters: Iterable[str], source: Source) -> dict[str, Tensor]:
    """Returns parameter name -> the L2 norm, over all samples and positions, of the input that each weight position multiplies.

    The norms broadcast against the parameter: (1, in) for a linear layer, (1, in, 1, 1) for a convolution, (out, in / conv groups, 1, 1)
    for one with conv groups, the parameter's own shape where it is cut or reshaped on its way to the operator. A weight that is used
    several times has the norm of all its inputs together. Weights that no matrix product or convolution of the recorded pass reads
    (embeddings, norms, recurrent layers) are left out. Under `torch.distributed` the batches of all processes count.

    Args:
        model: the model of the graph, left as it was.
        graph: as `trace` returned it.
        parameters: qualified names.
        source: the batches.

    Raises:
        ConfigError: the model has no parameter of a name.
        InputError: there are no batches, or a batch takes another path through the model than the example inputs did.
    """
    tensors = named(model, parameters)
    program = graph.engine.program
    products = {node: p for node in operators(program) for p in [_product(node)] if p is not None and p.parameter in tensors}
    squares: dict[fx.Node, Tensor] = {}

    def look(node: fx.Node, args: tuple[Any, ...], kwargs: dict[str, Any], _result: Any) -> None:
        if node in products:
            found = _squares(products[node], _factors(node.target, args, kwargs) or {})
            squares[node] = squares[node] + found if node in squares else found

    def visit(inputs: Inputs) -> None:
        follow(model, inputs, program, look)

    source.inputs(model, visit)
    totals = dict(zip(products, all_reduce_sum([squares[node] for node in products]), strict=True))
    out: dict[str, Tensor] = {}
    for node, product in products.items():
        tensor = tensors[product.parameter]
        found = _at_parameter(totals[node], product, tensor)
        out[product.parameter] = out[product.parameter] + found if product.parameter in out else found
    return {parameter: total.sqrt().to(precise(tensors[parameter])) for parameter, total in out.items()}


def _product(node: fx.Node) -> _Product | None:
    """Returns what a recorded operator multiplies, if one of its factors is a parameter."""
    names = _PRODUCTS.get(name(node))
    if names is None:
        return None
    given = _factors(node.target, node.args, node.kwargs)
    for left, (other, weight) in enumerate((names, names[::-1])):
        found = _origin(given[weight]) if given is not None else None
        if found is not None and (not left or "conv" not in name(node)):
            return _Product(node, found[0], found[1], (other, weight), bool(left))
    return None


def _factors(target: Any, args: Any, kwargs: Any) -> dict[str, Any] | None:
    """Returns the arguments of a product by name; None where it is no product of two tensors."""
    given = named_arguments(target, args, kwargs)
    if "equation" not in given:
        return given
    plain = len(given["tensors"]) == 2 and "." not in given["equation"]
    return {**given, "first": given["tensors"][0], "second": given["tensors"][1]} if plain else None


def _origin(node: fx.Node) -> tuple[str, tuple[fx.Node, ...]] | None:
    """Returns the parameter that a tensor is a view or a part of, and the views in between."""
    views: list[fx.Node] = []
    while node.op == "call_function" and (not is_operator(node.target) or name(node) in _VIEWS) and len(node.all_input_nodes) == 1:
        views.insert(0, node)
        node = node.all_input_nodes[0]
    return (str(node.target), tuple(views)) if node.op == "get_attr" else None


def _squares(product: _Product, given: dict[str, Any]) -> Tensor:
    """Returns the sum of squares of what each position of the factor is multiplied by, in one batch; it broadcasts against the factor."""
    x, weight = (given[factor] for factor in product.factors)
    kind = name(product.node)
    if "conv" in kind:
        return _of_convolution(x, weight, given, transposed="transpose" in kind or bool(given.get("transposed")))
    if kind == "aten::linear":
        return _power(x, [-1]) if weight.ndim == 1 else _power(x, [-1]).reshape(1, -1)
    if kind == "aten::einsum":
        return _of_einsum(x, given["equation"], left=product.left)
    if not product.left:
        return _of_matrix(x, weight.ndim, weight.shape)
    turned = weight.mT if weight.ndim > 1 else weight
    found = _of_matrix(x.mT if x.ndim > 1 else x, turned.ndim, turned.shape)
    return found.mT if found.ndim > 1 else found


def _of_matrix(x: Tensor, ndim: int, shape: torch.Size) -> Tensor:
    """Returns the sums for x (.., rows, in) times a matrix (.., in, out), or times a vector (in,)."""
    if ndim <= 2:
        squares = _power(x, [-1])
        return squares if ndim == 1 else squares.unsqueeze(-1)
    kept = [d for d in range(-x.ndim, 0) if d != -2 or x.ndim == 1]
    squares = _power(x, kept)  # (.., in): the dimensions before it meet those of the matrices
    while squares.ndim > ndim - 1:
        squares = squares.sum(0)
    for d in range(squares.ndim - 1):
        if shape[d - squares.ndim - 1] == 1:
            squares = squares.sum(d, keepdim=True)
    return squares.unsqueeze(-1)


def _of_einsum(x: Tensor, equation: str, *, left: bool) -> Tensor:
    """Returns the sums for a product of two tensors by their subscripts: those that the weight does not have are summed over."""
    subscripts = equation.replace(" ", "").partition("->")[0].split(",")
    of_weight, of_input = subscripts if left else subscripts[::-1]
    shared = [s for s in dict.fromkeys(of_weight) if s in of_input]
    squares = torch.einsum(f"{of_input}->{''.join(shared)}", x.double().square())
    sizes = iter(squares.shape)
    return squares.reshape([next(sizes) if s in shared else 1 for s in of_weight])


def _of_convolution(x: Tensor, weight: Tensor, given: dict[str, Any], *, transposed: bool) -> Tensor:
    kernel = [1] * (weight.ndim - 2)
    squares = _power(x, [-weight.ndim + 1])
    if transposed:
        return squares.reshape(-1, 1, *kernel)
    groups = given.get("groups", 1)
    per_row = squares.reshape(groups, 1, -1)
    if groups > 1:
        per_row = per_row.expand(groups, weight.shape[0] // groups, -1)
    return per_row.reshape(-1, per_row.shape[-1], *kernel)


def _power(x: Tensor, kept: list[int]) -> Tensor:
    """Returns the sum of squares over all dimensions but those kept (given from the end), in double precision."""
    others = [d for d in range(-x.ndim, 0) if d not in kept]
    values = x if x.is_floating_point() else x.double()
    if not others:
        return values.double().square()
    norms: Tensor = torch.linalg.vector_norm(values, dim=others, dtype=torch.float64)
    return norms.square()


def _at_parameter(squares: Tensor, product: _Product, parameter: Tensor) -> Tensor:
    """Returns sums that broadcast against the parameter, of those that broadcast against what the operator is given of it.

    Views are linear, so that their transpose (what backward computes) takes every position back to where it came from.
    """
    if not product.views:
        return squares
    with torch.enable_grad():
        origin = torch.zeros_like(parameter, dtype=torch.float64, requires_grad=True)
        values: dict[Any, Any] = {product.views[0].all_input_nodes[0]: origin}
        for view in product.views:
            target: Any = view.target
            options = {key: value for key, value in view.kwargs.items() if key != "dtype"}
            values[view] = target(*(values[a] if hasattr(a, "all_input_nodes") else a for a in view.args), **options)
        factor: Tensor = values[product.views[-1]]
        (found,) = torch.autograd.grad(factor, origin, squares.expand_as(factor).to(factor.device))
        return found
