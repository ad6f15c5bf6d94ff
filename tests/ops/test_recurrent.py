"""Recurrent layers: units go with their rows in every gate, in all layers and directions; the state that goes round goes with them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import graphprune as gp
from tests.support.operators import Case, check, conv, normal, sequences, table

A, B = "a.bias/0 a.weight/0", "b.weight/1"
ENTERS = f"6 exact: {A} r.weight_ih_l0/1"


def rows(gates: int, *suffixes: str, biases: bool = True, state: bool = True) -> str:
    """Returns the slices of the rows of all gates, and of the columns that read the state."""
    names = [f"r.weight_ih_{s}/0 r.weight_hh_{s}/0" + (f" r.bias_ih_{s}/0 r.bias_hh_{s}/0" if biases else "") for s in suffixes]
    slices = [f"{name}*{gates}" if gates > 1 else name for name in " ".join(names).split()]
    return " ".join([*slices, *(f"r.weight_hh_{s}/1" for s in suffixes if state)])


def through(m: Any, x: torch.Tensor) -> torch.Tensor:
    """Runs a layer, the recurrent one, and another layer."""
    out: torch.Tensor = m.b(m.r(torch.tanh(m.a(x)))[0])
    return out


def layer(name: str, recurrent: nn.Module, groups: list[str], out: int = 8, **options: Any) -> Case:
    """Returns a case of a recurrent layer between two linear ones."""
    run = options.pop("run", through)
    return Case(name, run, {"a": nn.Linear(4, 6), "r": recurrent, "b": nn.Linear(out, 4)}, groups,
                **{"inputs": sequences, "kind": "module", **options})  # fmt: skip


def packed(m: Any, x: torch.Tensor) -> torch.Tensor:
    """Runs the recurrent layer on sequences of unequal lengths."""
    lengths = [x.shape[1] - i % 2 for i in range(x.shape[0])]
    sequence = nn.utils.rnn.pack_padded_sequence(torch.tanh(m.a(x)), torch.tensor(lengths), batch_first=True, enforce_sorted=False)
    y, _ = nn.utils.rnn.pad_packed_sequence(m.r(sequence)[0], batch_first=True)
    out: torch.Tensor = m.b(y)
    return out


def last(m: Any, x: torch.Tensor) -> torch.Tensor:
    """Uses the states that the recurrent layer ends in."""
    _, (h, c) = m.r(torch.tanh(m.a(x)))
    out: torch.Tensor = m.b(torch.relu(h[-1]) + c[-1])
    return out


def started(m: Any, x: torch.Tensor) -> torch.Tensor:
    """Starts the recurrent layer in a state that is a parameter."""
    state = m.h.expand(-1, x.shape[0], -1).contiguous()
    out: torch.Tensor = m.b(m.r(torch.tanh(m.a(x)), (state, torch.tanh(m.c).expand(-1, x.shape[0], -1).contiguous()))[0])
    return out


def cells(m: Any, x: torch.Tensor) -> torch.Tensor:
    """Runs a cell along the sequence."""
    state = None
    for t in range(x.shape[1]):
        state = m.r(torch.tanh(m.a(x[:, t])), state)
    assert state is not None
    out: torch.Tensor = m.b(state[0] if isinstance(state, tuple) else state)
    return out


def by_hand(m: Any, x: torch.Tensor) -> torch.Tensor:
    """Runs a convolutional cell for three steps, from zeros."""
    h, c = x.new_zeros(x.shape[0], 8, 6, 6), x.new_zeros(x.shape[0], 8, 6, 6)
    for _ in range(3):
        i, f, g, o = m.g(torch.cat([x, h], 1)).chunk(4, 1)
        c = f.sigmoid() * c + i.sigmoid() * g.tanh()
        h = o.sigmoid() * c.tanh()
    out: torch.Tensor = m.b(h)
    return out


def cell(name: str, recurrent: nn.Module, gates: int) -> Case:
    """Returns a case of one cell that is run step by step."""
    slices = " ".join(f"{s}*{gates}" if gates > 1 else s for s in ("r.weight_ih/0", "r.weight_hh/0", "r.bias_ih/0", "r.bias_hh/0"))
    return layer(name, recurrent, [f"6 exact: {A} r.weight_ih/1", f"8 exact: {B} r.weight_hh/1 {slices}"], run=cells)


def first(**options: Any) -> dict[str, Any]:
    """Returns options of a recurrent layer whose inputs have the batch in front."""
    return {"batch_first": True, **options}


BOTH = rows(4, "l0", "l0_reverse")
PROJECTED = "r.weight_hr_l0/1 " + rows(4, "l0", state=False)

CASES = [
    layer("lstm", nn.LSTM(6, 8, batch_first=True), [ENTERS, f"8 exact: {B} {rows(4, 'l0')}"]),
    layer("lstm, time first", nn.LSTM(6, 8), [ENTERS, f"8 exact: {B} {rows(4, 'l0')}"]),
    layer("lstm without biases", nn.LSTM(6, 8, **first(bias=False)), [ENTERS, f"8 exact: {B} {rows(4, 'l0', biases=False)}"]),
    layer("lstm of two layers", nn.LSTM(6, 8, num_layers=2, batch_first=True),
          [ENTERS, f"8 exact: {B} {rows(4, 'l0', 'l1')} r.weight_ih_l1/1"]),
    layer("lstm in both directions", nn.LSTM(6, 8, **first(bidirectional=True)),
          [f"{ENTERS} r.weight_ih_l0_reverse/1", f"8 exact: {B}*2 {BOTH}"], 16),
    layer("lstm of two layers in both directions", nn.LSTM(6, 8, 2, **first(bidirectional=True)),
          [f"{ENTERS} r.weight_ih_l0_reverse/1",
           f"8 exact: {B}*2 {BOTH} {rows(4, 'l1', 'l1_reverse')} r.weight_ih_l1/1*2 r.weight_ih_l1_reverse/1*2"], 16),
    layer("lstm with projections", nn.LSTM(6, 8, **first(proj_size=5)),
          [ENTERS, f"8 exact: {PROJECTED}", f"5 exact: {B} r.weight_hh_l0/1 r.weight_hr_l0/0"], 5),
    layer("lstm with projections, without biases, both directions", nn.LSTM(6, 8, **first(proj_size=5, bias=False, bidirectional=True)),
          [f"{ENTERS} r.weight_ih_l0_reverse/1",
           f"8 exact: r.weight_hr_l0/1 r.weight_hr_l0_reverse/1 {rows(4, 'l0', 'l0_reverse', biases=False, state=False)}",
           f"5 exact: {B}*2 r.weight_hh_l0/1 r.weight_hh_l0_reverse/1 r.weight_hr_l0/0 r.weight_hr_l0_reverse/0"], 10),
    layer("lstm of packed sequences", nn.LSTM(6, 8, batch_first=True), [ENTERS, f"8 exact: {B} {rows(4, 'l0')}"],
          run=packed, any_batch=False),
    layer("lstm, last state", nn.LSTM(6, 8, batch_first=True), [ENTERS, f"8 exact: {B} {rows(4, 'l0')}"], run=last),
    Case("lstm from a learnt state", started, {"a": nn.Linear(4, 6), "r": nn.LSTM(6, 8, batch_first=True), "h": table(1, 1, 8),
         "c": table(1, 1, 8), "b": nn.Linear(8, 4)}, [ENTERS, f"8 exact: {B} {rows(4, 'l0')} c/2 h/2"], inputs=sequences),
    Case("lstm from a given state", lambda m, x, h, c: m.b(m.r(torch.tanh(m.a(x)), (h, c))[0]), {"a": nn.Linear(4, 6),
         "r": nn.LSTM(6, 8, batch_first=True), "b": nn.Linear(8, 4)}, [ENTERS], {"r.weight_ih_l0/0": "initial state of a recurrent layer"},
         inputs=lambda n: (normal(n, 5, 4), normal(1, n, 8), normal(1, n, 8)), kind="module"),
    layer("lstm at the end", nn.LSTM(6, 8, batch_first=True), [ENTERS], run=lambda m, x: m.r(torch.tanh(m.a(x)))[0],
          frozen={"r.weight_hh_l0/1": "("}),
    layer("lstm along the channels", nn.LSTM(5, 8, batch_first=True), [f"8 exact: {B} {rows(4, 'l0')}"],
          run=lambda m, x: m.b(m.r(torch.tanh(m.a(x)).transpose(1, 2))[0]), frozen={"a.weight/0": "position in a sequence"}),
    layer("lstm twice", nn.LSTM(6, 6, batch_first=True), [f"6 exact: {A} {B} {rows(4, 'l0')} r.weight_ih_l0/1"], 6,
          run=lambda m, x: m.b(m.r(m.r(torch.tanh(m.a(x)))[0])[0])),
    layer("gru", nn.GRU(6, 8, batch_first=True), [ENTERS, f"8 exact: {B} {rows(3, 'l0')}"]),
    layer("gru of two layers in both directions", nn.GRU(6, 8, 2, **first(bidirectional=True)),
          [f"{ENTERS} r.weight_ih_l0_reverse/1",
           f"8 exact: {B}*2 {rows(3, 'l0', 'l0_reverse', 'l1', 'l1_reverse')} r.weight_ih_l1/1*2 r.weight_ih_l1_reverse/1*2"], 16),
    layer("gru of packed sequences", nn.GRU(6, 8, batch_first=True), [ENTERS, f"8 exact: {B} {rows(3, 'l0')}"],
          run=packed, any_batch=False),
    layer("rnn", nn.RNN(6, 8, batch_first=True), [ENTERS, f"8 exact: {B} {rows(1, 'l0')}"]),
    layer("rnn with relu", nn.RNN(6, 8, **first(nonlinearity="relu")), [ENTERS, f"8 exact: {B} {rows(1, 'l0')}"]),
    layer("rnn of packed sequences", nn.RNN(6, 8, batch_first=True), [ENTERS, f"8 exact: {B} {rows(1, 'l0')}"],
          run=packed, any_batch=False),
    layer("values that are not zero", nn.LSTM(6, 8, batch_first=True), [ENTERS, f"8 exact: {B} {rows(4, 'l0')}"],
          run=lambda m, x: m.b(torch.sigmoid(m.r(torch.sigmoid(m.a(x)))[0]))),
    cell("lstm cell", nn.LSTMCell(6, 8), 4), cell("gru cell", nn.GRUCell(6, 8), 3), cell("rnn cell", nn.RNNCell(6, 8), 1),
    cell("rnn cell with relu", nn.RNNCell(6, 8, nonlinearity="relu"), 1),
    Case("convolutional cell by hand", by_hand, {"g": conv(11, 32), "b": conv(8, 4)}, [f"8 exact: {B} g.bias/0*4 g.weight/0*4 g.weight/1"]),
    Case("rows of an image", lambda m, x: m.b(m.r(torch.relu(m.a(x)).permute(0, 3, 2, 1).flatten(0, 1))[0]), {"a": conv(3, 6),
         "r": nn.GRU(6, 8, batch_first=True), "b": nn.Linear(8, 4)}, [ENTERS, f"8 exact: {B} {rows(3, 'l0')}"]),
]  # fmt: skip


@pytest.mark.parametrize("case", CASES, ids=str)
def test_recurrent(case: Case) -> None:
    """Groups are what the formula of the operator says, and removal is exact."""
    check(case)


def test_attributes() -> None:
    """A layer of the same class says how wide it is now, and its flat list of weights holds the weights that it has."""
    model = layer("", nn.LSTM(6, 8, 2, **first(proj_size=4)), [], 4).build()
    small, _ = gp.prune(model, sequences(2), sparsity=0.5)
    recurrent: Any = small.get_submodule("r")
    assert (recurrent.input_size, recurrent.hidden_size, recurrent.proj_size) == (3, 4, 2)
    assert [id(p) for p in recurrent._flat_weights] == [id(p) for p in recurrent.parameters()]  # noqa: SLF001 (what cuDNN is given)


def test_in_place() -> None:
    """A layer that is shrunk in place says so as well."""
    model = layer("", nn.GRU(6, 8, batch_first=True), []).build()
    gp.prune(model, sequences(2), sparsity=0.5, inplace=True)
    recurrent: Any = model.get_submodule("r")
    assert (recurrent.input_size, recurrent.hidden_size) == (3, 4)
    assert [id(p) for p in recurrent._flat_weights] == [id(p) for p in recurrent.parameters()]  # noqa: SLF001 (as above)
