"""Recurrent layers: every gate has one row per unit, and units of all layers and directions go together.

lstm:  i, f, g, o = gates(W x + b + V h + c),   c = f c + i g,   h = o tanh(c)      W is (4 units, inputs), V is (4 units, units)
gru:   r, z, n likewise with 3 blocks of rows;   rnn: one block
with projections, h = R o tanh(c):  R is (projected, units), V is (4 units, projected)

labels: the rows of W, V and their biases are the labels of the units, once per gate; the columns of W are those of what enters, the
columns of V those of the state that goes round. Layers and directions share one number of units, so they share its labels.

A unit whose rows and whose part of the initial state are zero stays zero at all times: every gate multiplies it.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from graphprune.ops.joining import side_by_side
from graphprune.ops.labels import Dim
from graphprune.ops.registry import Labels, Op, Value, aten, rule

GATES = {"lstm": 4, "gru": 3, "rnn_tanh": 1, "rnn_relu": 1}
IN_TIME = "is a position in a sequence, or in the batch, of a recurrent layer"


@dataclass(frozen=True)
class _Shared:
    """Labels that all layers and directions have in common.

    Attributes:
        units: of the cells.
        state: of the state that goes round: those of the units, or of their projection.
    """

    units: Dim
    state: Dim


@rule(aten.lstm, aten.gru, aten.rnn_tanh, aten.rnn_relu)
def recurrent(op: Op) -> list[Labels]:
    """`lstm(input, hx, params, has_biases, num_layers, dropout, train, bidirectional, batch_first)`, its packed form, and its relatives."""
    x: Value = op["input"] if op["input"] is not None else op["data"]
    gates = GATES[op.name.removeprefix("aten::")]
    params: list[Value] = op["params"]
    states: list[Value] = op["hx"] if isinstance(op["hx"], list) else [op["hx"]]
    directions = 2 if op["bidirectional"] else 1
    if not all(p.zero for p in params):
        op.decline("has computed weights that are not zero in the place of what is removed")
        return [[None] * len(s) for s in op.outputs]
    per_cell = len(params) // (op["num_layers"] * directions)
    projected = per_cell % 2 == 1
    count, width = params[0].shape[0] // gates, params[1].shape[1]
    units = _fresh(op, count)
    state = _fresh(op, width) if projected else units
    shared = _Shared(units, state)
    op.freeze_value(x, IN_TIME, keep=(-1,))
    if op["batch_sizes"] is not None:
        op.freeze_value(op["batch_sizes"], IN_TIME)
    entering = op.dim(x, -1)
    for layer in range(op["num_layers"]):
        for direction in range(directions):
            at = (layer * directions + direction) * per_cell
            _cell(op, params[at : at + per_cell], gates, entering, shared, projected=projected)
        entering = side_by_side([state] * directions, [width] * directions)
    for value, labels in zip(states, (state, units), strict=False):
        op.freeze_value(value, IN_TIME, keep=(-1,))
        op.bind(value, -1, labels, "is the initial state of a recurrent layer, and meets a dimension that cannot shrink")
    op.zero = states[-1].zero
    single = [[*[None] * (len(s) - 1), labels] for s, labels in zip(op.outputs[1:], (state, units), strict=False)]
    return [[*[None] * (len(op.shape) - 1), entering], *single]


@rule(aten.lstm_cell, aten.gru_cell, aten.rnn_tanh_cell, aten.rnn_relu_cell)
def cell(op: Op) -> Labels | list[Labels]:
    """`lstm_cell(input, hx, w_ih, w_hh, b_ih, b_hh)` and its relatives: one step of one layer."""
    x: Value = op["input"]
    gates = GATES[op.name.removeprefix("aten::").removesuffix("_cell")]
    states: list[Value] = op["hx"] if isinstance(op["hx"], list) else [op["hx"]]
    params: list[Value] = [op[name] for name in ("w_ih", "w_hh", "b_ih", "b_hh") if op[name] is not None]
    if not all(p.zero for p in params):
        op.decline("has computed weights that are not zero in the place of what is removed")
        return [[None] * len(s) for s in op.outputs] if len(op.outputs) > 1 else [None] * len(op.shape)
    units = _fresh(op, params[1].shape[1])
    op.freeze_value(x, IN_TIME, keep=(-1,))
    _cell(op, params, gates, op.dim(x, -1), _Shared(units, units), projected=False)
    for value in states:
        op.freeze_value(value, IN_TIME, keep=(-1,))
        op.bind(value, -1, units, "is the initial state of a recurrent layer, and meets a dimension that cannot shrink")
    op.zero = states[-1].zero
    out = [[*[None] * (len(s) - 1), units] for s in op.outputs]
    return out if len(out) > 1 else out[0]


@rule(aten._pack_padded_sequence, aten._pad_packed_sequence)
def packing(op: Op) -> list[Labels]:
    """Sequences of unequal lengths, put end to end without their padding, or given it back."""
    x, lengths = op.values()[:2]
    keep = range(2 if op["batch_sizes"] is None else 1, len(x.shape))
    op.freeze_value(x, IN_TIME, keep=keep)
    op.freeze_value(lengths, "is the length of a sequence")
    op.zero = x.zero and not op.get("padding_value", 0)
    kept = [op.dim(x, d) for d in keep]
    return [[*[None] * (len(op.shape) - len(kept)), *kept], [None]]


def _fresh(op: Op, size: int) -> Dim:
    return op.table.fresh(size) if size > 1 else None


def _cell(op: Op, params: list[Value], gates: int, entering: Dim, shared: _Shared, *, projected: bool) -> None:
    """Couples the parameters of one layer in one direction."""
    rows = np.tile(shared.units, gates) if shared.units is not None else None
    op.bind(params[0], 1, entering)
    op.bind(params[1], 1, shared.state)
    for parameter in params[: len(params) - projected]:
        op.bind(parameter, 0, rows)
        if not projected:
            op.produce(parameter, 0)
    if projected:
        op.bind(params[-1], 0, shared.state)
        op.bind(params[-1], 1, shared.units)
        op.produce(params[-1], 0)
