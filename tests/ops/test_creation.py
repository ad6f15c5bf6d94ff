"""Tensors made of nothing couple nothing; values that leave the program freeze what they are read from; unknown operators freeze."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import graphprune as gp
from tests.support.invariants import evaluate
from tests.support.operators import TOLERANCE, Case, check, conv, images, sequences, table
from tests.support.outputs import relative_error

A = "a.bias/0 a.weight/0"
PLAIN = [f"8 exact: {A} c.weight/1"]
torch.library.define("graphprune_tests::mix", "(Tensor x) -> Tensor")


@torch.library.impl("graphprune_tests::mix", "CompositeExplicitAutograd")
def mix(x: torch.Tensor) -> torch.Tensor:
    """Makes every channel depend on all of them: an operator that nobody has written a rule for."""
    return x + 0.1 * x.sum(1, keepdim=True)


def gram_inverse(x: torch.Tensor, invert: Any) -> Any:
    """Returns the inverses of the matrices of products of channels."""
    flat = x.flatten(2)
    return invert(flat @ flat.mT)


class Unknown(nn.Module):
    """A layer that runs an operator without a rule."""

    def __init__(self, operator: Any) -> None:
        """Remembers the operator."""
        super().__init__()
        self.operator = operator

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Runs it."""
        out: torch.Tensor = self.operator(x)
        return out


def with_(name: str, op: Any, groups: list[str] = PLAIN, **options: Any) -> Case:
    """Returns a case in which 8 channels pass `op` on their way into the next convolution."""
    parts = {"a": conv(3, 8), "c": conv(8, 4), **options.pop("extra", {})}
    return Case(name, lambda m, x: m.c(op(torch.relu(m.a(x)))), parts, groups, **{"kind": "module", **options})


def unknown(name: str, op: Any, operator: str, channels: int = 8, **options: Any) -> Case:
    """Returns a case with two groups, one of which meets an operator without a rule."""
    parts = {"a": conv(3, 8), "u": Unknown(op), "b": conv(8, 6), "c": conv(6, 4)}
    return Case(name, lambda m, x: m.c(torch.relu(m.b(m.u(torch.relu(m.a(x)))))), parts, ["6 exact: b.bias/0 b.weight/0 c.weight/1"],
                {"a.weight/0": f"enters {operator}, which has no rule"}, [(operator, "u", channels)],
                **{"kind": "module", **options})  # fmt: skip


def read(x: torch.Tensor) -> torch.Tensor:
    """Returns x, scaled by a Python number that was read from it."""
    return x * float(x.amax())


def listed(x: torch.Tensor) -> torch.Tensor:
    """Returns x, scaled by one of the numbers that were read from it."""
    means: list[float] = x.mean((0, 2, 3)).tolist()
    return x * means[3]


def decided(x: torch.Tensor) -> torch.Tensor:
    """Returns x or twice x."""
    return x * 2 if bool(x.sum() > 1) else x


def noisy(x: torch.Tensor) -> torch.Tensor:
    """Returns x with noise, always the same where the state of the generator is."""
    noise = torch.rand(6, 1) + torch.randn(6) + torch.randint(0, 3, (6,)) + torch.randperm(6) + torch.bernoulli(torch.full((6,), 0.5))
    return x + noise.to(x) + torch.rand_like(x) + torch.randn_like(x)


def in_the_middle(x: torch.Tensor) -> torch.Tensor:
    """Returns x between two channels of zeros on either side."""
    out = x.new_zeros(x.shape[0], x.shape[1] + 4, *x.shape[2:])
    out[:, 2:-2] = x
    return out


def in_place(write: Any) -> Any:
    """Returns an operator that makes zeros of the size of a tensor and writes the tensor into them."""

    def operator(x: torch.Tensor) -> torch.Tensor:
        y = x.new_zeros(x.shape)
        write(y, x)
        return y

    return operator


READ = {"a.weight/0": "read as a Python number"}
DECIDES = "decides a size or a position at run time"

CASES = [
    with_("literals", lambda x: x + torch.zeros(6, 6, dtype=x.dtype) + torch.ones(1) * torch.full((6, 1), 0.2)),
    with_("ranges", lambda x: x * torch.arange(6) + torch.linspace(0, 1, 6) + torch.eye(6) + torch.scalar_tensor(0.3)),
    with_("windows", lambda x: x * torch.hann_window(6) + torch.hamming_window(6)),
    with_("empty", lambda x: x + torch.empty(6, dtype=x.dtype).fill_(0.1)),
    with_("triangles", lambda x: x + torch.tril_indices(3, 3).sum() + torch.triu_indices(3, 3)[0].sum()),
    with_("made like another", lambda x: x + x.new_zeros(6) + x.new_ones(6, 1) + x.new_full((6, 6), 0.3) + x.new_empty(6).fill_(0.2)),
    with_("made with its number of channels", lambda x: x + x.new_zeros(x.shape[1], 1, 1)),
    with_("made with a literal number of channels", lambda x: x * torch.full((8, 1, 1), 0.5, dtype=x.dtype), kind="graph"),
    with_("ones of its size", lambda x: x + torch.ones(x.shape[0], x.shape[1], 1, 1, dtype=x.dtype)),
    with_("filled and flattened", lambda x: (x.flatten(1) * x.new_ones(288)).view_as(x), kind="graph"),
    with_("filled, then summed with the channels", lambda x: x * (x + x.new_ones(8, 1, 1)).sum(1, keepdim=True),
          [f"8 changed: {A} c.weight/1"], kind="graph"),
    with_("filled with zeros, then summed with the channels", lambda x: x * (x + x.new_zeros(8, 1, 1)).sum(1, keepdim=True), kind="graph"),
    with_("identity of its size", lambda x: ((x.flatten(2) @ x.flatten(2).mT + torch.eye(x.shape[1])) @ x.flatten(2)).view_as(x)),
    with_("identity of a stated size", lambda x: ((x.flatten(2) @ x.flatten(2).mT + torch.eye(8, 8)) @ x.flatten(2)).view_as(x),
          kind="graph"),
    with_("identity that is not square", lambda x: x * (torch.eye(8, 6, dtype=x.dtype) @ x.mean(1)).unsqueeze(1).sum(3).view(-1, 8, 1, 1),
          [], kind=None, frozen={"a.weight/0": "cannot shrink"}),
    with_("filled in place", in_place(lambda y, x: y.copy_(x))),
    with_("filled in place in halves", in_place(lambda y, x: [y[:, :4].copy_(x[:, :4]), y[:, 4:].add_(x[:, 4:])]),
          [f"4 exact: {A} c.weight/1"] * 2, kind=None),
    with_("written into zeros that are wider", in_the_middle, extra={"c": conv(12, 4)}, frozen={"c.weight/1": "(aten::new_zeros)"}),
    with_("numbers that differ", lambda x: x * torch.arange(8).view(8, 1, 1), [], frozen={"a.weight/0": "cannot shrink"}, kind=None),
    with_("tensor of numbers", lambda x: x * torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0, 6.0], dtype=x.dtype)),
    with_("comparison of tensors", lambda x: x if torch.equal(x, x * 2) else x + 1, [], frozen={"a.weight/0": "aten::equal"}, kind=None),
    with_("number of positions", lambda x: x * x.nonzero().shape[1], [], frozen={"a.weight/0": DECIDES}, kind=None),
    with_("values by mask", lambda x: x + x.masked_select(x > 0.1).mean(), [], frozen={"a.weight/0": DECIDES}, kind=None, any_batch=False),
    with_("histogram", lambda x: x + x.histc(4)[0], [], frozen={"a.weight/0": "aten::histc"}, kind=None, trainable=False),
    with_("counts", lambda x: x + x.argmax(2).flatten().bincount()[0], [], frozen={"a.weight/0": "aten::bincount"}, kind=None),
    with_("distinct values", lambda x: x + x.unique().shape[0] * 0, [], frozen={"a.weight/0": "aten::_unique2"}, kind=None,
         any_batch=False),
    Case("one_hot", lambda m, x: m.c(torch.relu(m.a(x)) + m.p(nn.functional.one_hot(x.argmax(2), 4).double())), {"a": nn.Linear(4, 8),
         "p": nn.Linear(4, 8), "c": nn.Linear(8, 4)}, [f"8 exact: {A} c.weight/1 p.bias/0 p.weight/0"], inputs=sequences, kind="module"),
    unknown("custom operator", torch.ops.graphprune_tests.mix, "graphprune_tests::mix", trainable=False),
    unknown("Fourier transform", lambda x: torch.fft.fft(x, dim=1).abs(), "aten::_fft_r2c"),
    unknown("matrix inverse", lambda x: (gram_inverse(x, torch.linalg.inv_ex)[0] @ x.flatten(2)).view_as(x), "aten::linalg_inv_ex"),
    Case("custom operator on a parameter", lambda m, x: m.c(torch.relu(m.a(x)) + torch.ops.graphprune_tests.mix(m.p)), {"a": conv(3, 8),
         "c": conv(8, 4), "p": table(1, 8, 1, 1)}, [], {"p/1": "graphprune_tests::mix"},
         trainable=False),
]  # fmt: skip

NOISE = with_("noise", noisy, kind=None, reference="never", interchangeable=False)
NUMBERS = [with_(run.__name__, run, [], frozen=READ, kind=None) for run in (read, listed)]
DECIDED = with_("decided", decided)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_creation(case: Case) -> None:
    """Groups are what the formula of the operator says, and removal is exact."""
    check(case)


def test_inverse_with_its_check() -> None:
    """The matrix inverse is named as the operator without a rule that freezes the 8 channels."""
    case = next(c for c in CASES if c.name == "matrix inverse")
    model = case.build()
    model.get_submodule("u").operator = lambda x: (gram_inverse(x, torch.linalg.inv) @ x.flatten(2)).view_as(x)  # type: ignore[assignment]
    found = gp.trace(model, case.inputs(2)).unknown
    assert ("aten::linalg_inv_ex", "u", 8) in {(u.operator, u.module, u.channels) for u in found}


def test_noise_for_every_channel() -> None:
    """Random numbers differ from channel to channel, so what meets them stays, unlike what meets a tensor of one number."""
    model = with_("noise", lambda x: x + torch.rand(8, 1, 1, dtype=x.dtype)).build()
    assert gp.trace(model, images(2)).groups == ()


def test_random_numbers() -> None:
    """A model that draws random numbers in eval mode is compared with the same numbers, and the generator is put back."""
    check(NOISE)


@pytest.mark.parametrize("case", NUMBERS, ids=str)
def test_number_made_of_all_channels(case: Case) -> None:
    """What a Python number is computed from cannot be followed, so it stays."""
    check(case)


def test_decision_made_of_all_channels() -> None:
    """What a branch is chosen by may be summed up over channels that go: they add nothing to it."""
    check(DECIDED)


def test_number_is_no_constant_of_the_graph() -> None:
    """A GraphModule that would repeat a number read from the example inputs is refused, or reads it anew."""
    model = with_("number of the input", lambda x: x).build()
    model.run = lambda m, x: m.c(torch.relu(m.a(x)) * float(x.amax()))  # type: ignore[assignment]
    inputs, others = images(2), 3 * images(4)
    masks = gp.L1NormPruner(model, [{"sparsity": 0.5, "op_types": ["default"]}], example_inputs=inputs).masks()
    try:
        small, _ = gp.speedup(model, masks, result="graph")
    except gp.GraphPruneError:
        return
    module, _ = gp.speedup(model, masks, result="module")
    assert relative_error(evaluate(module, others), evaluate(small, others)) < TOLERANCE
