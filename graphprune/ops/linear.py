"""Linear layers and matrix products: contracted dimensions meet, the others pass.

linear(x, w, b):   out[.., o] = sum_i w[o, i] x[.., i] + b[o]
matmul(a, b):      out[.., n, m] = sum_k a[.., n, k] b[.., k, m]
"""

from __future__ import annotations

from graphprune.ops.labels import Dim
from graphprune.ops.pointwise import alone, broadcast, covers
from graphprune.ops.registry import UNBOUND, Labels, Op, Value, aten, rule


@rule(aten.linear)
def linear(op: Op) -> Labels:
    """`linear(x, w, b)`."""
    x, weight, bias = op["input"], op["weight"], op["bias"]
    labels = op.dims(x)
    op.bind(weight, -1, labels[-1])
    if len(weight.shape) == 1:
        return labels[:-1]
    out = op.dim(weight, 0)
    if bias is not None:
        out = op.bind(bias, -1, out) if bias.shape and bias.shape[-1] != 1 else out
    op.produce(weight, 0)
    op.zero = weight.zero and (alone(labels, -1) or (x.zero and bias is None))
    return [*labels[:-1], out]


@rule(aten.bilinear)
def bilinear(op: Op) -> Labels:
    """`bilinear(x1, x2, w, b)`: w is (out, in1, in2)."""
    a, b, weight, bias = op["input1"], op["input2"], op["weight"], op["bias"]
    labels = op.dims(a)
    op.bind(weight, 1, labels[-1])
    op.bind(weight, 2, op.dim(b, -1))
    leading = [op.equal(p, q) for p, q in zip(labels[:-1], op.dims(b)[:-1], strict=True)]
    out = op.dim(weight, 0)
    if bias is not None:
        out = op.bind(bias, 0, out)
    op.produce(weight, 0)
    op.zero = alone([*leading, out], -1)
    return [*leading, out]


@rule(aten.matmul, aten.mm, aten.bmm, aten.mv, aten.dot, aten.vdot)
def matmul(op: Op) -> Labels:
    """Matrix product with broadcast batch dimensions."""
    a: Value = op["self"]
    b: Value = next(v for k, v in op.arguments.items() if k != "self" and isinstance(v, Value))
    contract(op, a, -1, b, -2 if len(b.shape) > 1 else -1)
    rows = [op.dim(a, -2)] if len(a.shape) > 1 else []
    columns = [op.dim(b, -1)] if len(b.shape) > 1 else []
    if len(b.shape) > 1 and not rows:
        op.produce(b, len(b.shape) - 1)
    batch = op.shape[: len(op.shape) - len(rows) - len(columns)]
    leading = broadcast(op, [_leading(op, a), _leading(op, b)], batch)
    if b.parameter:
        op.produce(b, len(b.shape) - 1)
    elif a.parameter:
        op.produce(a, len(a.shape) - 2)
    op.zero = product_is_zero(a, b, leading, rows, columns)
    return [*leading, *rows, *columns]


@rule(aten.addmm, aten.baddbmm, aten.addmv)
def addmm(op: Op) -> Labels:
    """`addmm(c, a, b)` = c + a b."""
    names = [k for k, v in op.arguments.items() if isinstance(v, Value) and k != "self"]
    a, b, c = op[names[0]], op[names[1]], op["self"]
    contract(op, a, -1, b, -2 if len(b.shape) > 1 else -1)
    product = Value(op.shape, [*op.dims(a)[:-1], *([op.dim(b, -1)] if len(b.shape) > 1 else [])], op.name)
    if len(a.shape) == 3:
        product.labels[0] = op.equal(product.labels[0], op.dim(b, 0))
    if b.parameter:
        op.produce(b, len(b.shape) - 1)
    labels = broadcast(op, [product, c], op.shape)
    op.zero = a.zero and b.zero and c.zero and covers(c, labels)
    return labels


@rule(aten.addbmm)
def addbmm(op: Op) -> Labels:
    """`addbmm(c, a, b)` = c + the sum of the products of all pairs in the batch."""
    a, b, c = op["batch1"], op["batch2"], op["self"]
    contract(op, a, -1, b, -2)
    contract(op, a, 0, b, 0)
    product = Value(op.shape, [op.dim(a, 1), op.dim(b, 2)], op.name)
    labels = broadcast(op, [product, c], op.shape)
    op.zero = a.zero and b.zero and c.zero and covers(c, labels)
    return labels


@rule(aten._cdist_forward, aten._euclidean_dist)
def distances(op: Op) -> Labels:
    """`cdist(a, b)`: norms of the differences of all pairs of rows; what is zero on both sides adds nothing."""
    a, b = op["x1"], op["x2"]
    labels = op.bind(b, -1, op.dim(a, -1)) if a.labels[-1] is not UNBOUND or b.labels[-1] is UNBOUND else op.bind(a, -1, op.dim(b, -1))
    if not (a.zero and b.zero):
        op.statistic(labels)
    op.zero = False
    leading = broadcast(op, [_leading(op, a), _leading(op, b)], op.shape[:-2])
    return [*leading, op.dim(a, -2), op.dim(b, -2)]


@rule(aten.einsum)
def einsum(op: Op) -> Labels:
    """`einsum(equation, operands)`: dimensions with one letter live and die together."""
    operands: list[Value] = op["tensors"]
    terms, output = _terms(op["equation"].replace(" ", ""), [len(v.shape) for v in operands])
    letters: dict[str, Dim] = {}
    zeros: dict[str, bool] = {}
    for letter in dict.fromkeys(c for term in terms for c in term):
        where = [(v, d) for v, t in zip(operands, terms, strict=True) for d, c in enumerate(t) if c == letter]
        size = max(v.shape[d] for v, d in where)
        where = [(v, d) for v, d in where if v.shape[d] == size]
        letters[letter] = _letter(op, where)
        zeros[letter] = any(v.zero for v, _ in where)
        if letter not in output and not zeros[letter]:
            op.statistic(letters[letter])
        if letter in output and len(where) == 1:
            op.produce(*where[0])
    op.zero = any(v.zero for v in operands) and all(zeros[c] or letters[c] is None for c in output)
    return [letters[letter] for letter in output]


def _terms(equation: str, ranks: list[int]) -> tuple[list[list[str]], list[str]]:
    """Returns the letters of each operand and of the output, with names for the dimensions that an ellipsis stands for.

    >>> _terms("...c,cd->...d", [3, 2])
    ([['.1', '.0', 'c'], ['c', 'd']], ['.1', '.0', 'd'])
    """
    inputs, arrow, output = equation.partition("->")
    terms: list[list[str]] = []
    widest = 0
    for term, rank in zip(inputs.split(","), ranks, strict=True):
        before, dots, after = term.partition("...")
        width = rank - len(before) - len(after) if dots else 0
        widest = max(widest, width)
        terms.append([*before, *_dots(width), *after])
    if not arrow:
        written = [c for term in terms for c in term if not c.startswith(".")]
        return terms, [*_dots(widest), *sorted(c for c in set(written) if written.count(c) == 1)]
    before, dots, after = output.partition("...")
    return terms, [*before, *(_dots(widest) if dots else []), *after]


def _dots(width: int) -> list[str]:
    """Returns names for the dimensions of an ellipsis, counted from the right, as broadcasting does."""
    return [f".{k}" for k in reversed(range(width))]


def _letter(op: Op, where: list[tuple[Value, int]]) -> Dim:
    """Couples the dimensions that share a letter."""
    first, dim = next(((v, d) for v, d in where if v.labels[d] is not UNBOUND), where[0])
    labels = op.dim(first, dim)
    for value, d in where:
        if value is not first or d != dim:
            labels = op.bind(value, d, labels)
    return labels


def product_is_zero(a: Value, b: Value, leading: Labels, rows: Labels, columns: Labels) -> bool:
    """Returns whether each index of a matrix product that may go is zero in a factor: rows in the first, columns in the second."""
    if (not a.zero and not alone(rows)) or (not b.zero and not alone(columns)):
        return False
    for d, labels in enumerate(leading):
        back = d - len(leading) - 2
        there = any(v.zero and len(v.shape) >= -back and v.shape[back] != 1 for v in (a, b))
        if labels is not None and not there:
            return False
    return a.zero or b.zero


def contract(op: Op, a: Value, dim_a: int, b: Value, dim_b: int) -> Dim:
    """Couples two contracted dimensions; a sum over channels that are not zero when removed is a statistic across them."""
    if a.labels[dim_a] is UNBOUND and b.labels[dim_b] is not UNBOUND:
        labels = op.bind(a, dim_a, op.dim(b, dim_b))
    else:
        labels = op.bind(b, dim_b, op.dim(a, dim_a))
    if not (a.zero or b.zero):
        op.statistic(labels)
    return labels


def _leading(op: Op, value: Value) -> Value:
    """Returns the batch dimensions of a matrix; those of a parameter get their labels here, for the parameter itself must have them."""
    return Value(value.shape[:-2], op.dims(value)[:-2], value.name)
