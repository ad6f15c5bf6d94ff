"""Mixtures of experts: each expert has a matrix of its own, and a router decides at run time which rows of the input go through which.

grouped_mm(x, w, ends):   out[s, o] = sum_i  x[s, i] w[e(s), i, o],   e(s) is the first expert whose end lies behind s

labels: the widths are those of a matrix product, one for all experts, as they are stacked; the experts themselves stay, for the router
counts them, and so do the rows, for they are handed out by position.

PyTorch's own kernel wants rows of a multiple of 16 bytes. Where widths that were removed leave others, it says so when it is run: ask for
`round_to=8` or so then.
"""

from __future__ import annotations

from graphprune.ops.labels import Dim
from graphprune.ops.linear import contract, product_is_zero
from graphprune.ops.registry import Labels, Op, Value, aten, rule

EXPERTS = "is an expert, and the router counts them"
HANDED_OUT = "is handed out to experts by position"


@rule(aten._grouped_mm, "transformers::grouped_mm_fallback")
def grouped_product(op: Op) -> Labels:
    """`_grouped_mm(x, w, ends)`: a matrix product per expert, with rows, columns or inner positions divided among them."""
    a: Value = op["self"] if op["self"] is not None else op["input"]
    b: Value = op["mat2"] if op["mat2"] is not None else op["weight"]
    if op["bias"] is not None:
        return op.decline("has a bias")
    if op["offs"] is not None:
        op.freeze_value(op["offs"], "says where the rows of an expert end")
    op.produce(b, len(b.shape) - 1)
    if len(a.shape) == len(b.shape) == 2:
        return _divided_inside(op, a, b)
    contract(op, a, -1, b, -2)
    rows, columns = op.dim(a, -2), op.dim(b, -1)
    if len(a.shape) == len(b.shape):
        experts: Dim = op.equal(op.dim(a, 0), op.dim(b, 0))
        op.zero = product_is_zero(a, b, [experts], [rows], [columns])
        return [experts, rows, columns]
    stacked, divided = (b, rows) if len(b.shape) == 3 else (a, columns)
    op.freeze(op.dim(stacked, 0), EXPERTS)
    op.freeze(divided, HANDED_OUT)
    op.zero = b.zero if stacked is b else a.zero
    return [None, columns] if stacked is b else [rows, None]


def _divided_inside(op: Op, a: Value, b: Value) -> Labels:
    """The inner dimension is divided: out[e] is the product over the positions of expert e."""
    op.freeze(op.dim(a, 1), HANDED_OUT)
    op.freeze(op.dim(b, 0), HANDED_OUT)
    op.zero = a.zero and b.zero
    return [None, op.dim(a, 0), op.dim(b, 1)]
