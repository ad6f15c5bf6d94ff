"""Example inputs keep their order and nesting in every form, and a look at a model leaves nothing behind."""

from __future__ import annotations

from collections import OrderedDict, UserDict
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from graphprune.errors import InputError, TraceError
from graphprune.trace.inputs import Inputs, normalise, preserve_state, run
from tests.support.untouched import changes, snapshot

A, B, C = torch.zeros(2, 3), torch.ones(2, 5), torch.arange(2)


class Echo(nn.Module):
    """Returns its arguments as it gets them."""

    def forward(self, *args: Any, **kwargs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Returns the arguments."""
        return args, kwargs


@pytest.mark.parametrize(
    ("given_inputs", "args", "kwargs"),
    [
        (A, (A,), {}),
        ((A, B), (A, B), {}),
        ((A, {"b": B}), (A, {"b": B}), {}),
        ((A, None, 3), (A, None, 3), {}),
        ({"x": A, "y": [B, {"z": C}]}, (), {"x": A, "y": [B, {"z": C}]}),
        (UserDict({"x": A}), (), {"x": A}),
        (((A,), {"y": B}), (A,), {"y": B}),
        (((), {"y": B}), (), {"y": B}),
        (((A, B), {}), (A, B), {}),
        ((((A, B), {"y": C}), {}), ((A, B), {"y": C}), {}),
        (((A, B), {1: C}), ((A, B), {1: C}), {}),
        (([A, B],), ([A, B],), {}),
        (Inputs((A,), {"y": B}), (A,), {"y": B}),
    ],
)
def test_all_forms_reach_the_model_as_they_are_meant(given_inputs: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """A tensor, a tuple, a dict and (args, kwargs) become the arguments of the call, the very tensors."""
    inputs = normalise(given_inputs)
    seen_args, seen_kwargs = inputs.call(Echo())
    assert repr(seen_args) == repr(args)
    assert repr(seen_kwargs) == repr(kwargs)
    assert [id(tensor) for tensor in inputs.tensors()] == [id(tensor) for tensor in normalise((args, kwargs)).tensors()]


@pytest.mark.parametrize(
    ("value", "words"),
    [
        (None, "there are no example inputs"),
        ((), "contain no tensor"),
        ({}, "contain no tensor"),
        (((), {}), "contain no tensor"),
        ((1, "a", [None]), "contain no tensor"),
        ([A], "are a list"),
        ("x.pt", "are a str"),
        ({1: A}, "are a dict"),
    ],
)
def test_missing_and_odd_inputs_are_refused(value: Any, words: str) -> None:
    """Nothing, no tensor and ambiguous forms each raise one error that says what to pass instead."""
    with pytest.raises(InputError, match=words) as caught:
        normalise(value)
    assert caught.value.fix.startswith("Pass a t")


def test_tensors_come_in_order_through_any_nesting() -> None:
    """Positional arguments come first, and nested tensors in the order in which they are written."""
    inputs = normalise(((A, [B, (C, None)]), {"z": {"k": A}, "a": B}))
    assert [id(tensor) for tensor in inputs.tensors()] == [id(tensor) for tensor in (A, B, C, A, B)]


def test_map_returns_new_inputs_and_keeps_the_nesting() -> None:
    """Mapping replaces tensors and nothing else, and leaves the old inputs alone."""
    inputs = normalise(((OrderedDict(x=A), 7), {"y": [B]}))
    mapped = inputs.map(lambda tensor: tensor + 1)
    assert repr(mapped) == repr(Inputs((OrderedDict(x=A + 1), 7), {"y": [B + 1]}))
    assert repr(inputs) == repr(Inputs((OrderedDict(x=A), 7), {"y": [B]}))


def test_to_converts_floating_point_only() -> None:
    """Token ids, masks and complex numbers keep their type."""
    mixed = normalise((A, C, C > 0, torch.zeros(2, dtype=torch.complex64), A.half()))
    assert [t.dtype for t in mixed.to(torch.float64).tensors()] == [torch.float64, torch.int64, torch.bool, torch.complex64, torch.float64]


def test_copies_do_not_reach_the_originals() -> None:
    """What is done in place to a copy leaves the user's tensor as it was."""
    original = torch.zeros(2, requires_grad=True)
    copy = normalise(original).copied().tensors()[0]
    copy.add_(1)
    assert original.tolist() == [0, 0]
    assert not copy.requires_grad


@given(st.integers(1, 5), st.integers(1, 12))
def test_with_batch_repeats_in_turn_or_cuts(before: int, after: int) -> None:
    """Sample i of the new batch is sample i modulo the old batch, in every tensor that has the batch in front."""
    x, ids, scalar, table = torch.rand(before, 2), torch.arange(before), torch.tensor(3.0), torch.rand(77, 2)
    old = normalise(((x, scalar), {"ids": ids, "table": table}))
    new = old.with_batch(after)
    new_x, new_scalar, new_ids, new_table = new.tensors()
    assert torch.equal(new_x, torch.stack([x[i % before] for i in range(after)]))
    assert new_ids.tolist() == [i % before for i in range(after)]
    assert new_scalar is scalar
    assert new_table is table
    assert new.batch == after


def test_the_batch_is_the_most_frequent_size() -> None:
    """The batch is what most tensors have in dimension 0, in doubt the first; scalars have none."""
    assert normalise((torch.zeros(9, 9), A, B)).batch == len(A)
    assert normalise((torch.zeros(9), A)).batch == len(torch.zeros(9))
    scalars = normalise((torch.tensor(1.0),))
    assert scalars.batch is None
    assert scalars.with_batch(3) is scalars


@pytest.mark.parametrize(("value", "size"), [(A, 0), (A, -1), (torch.zeros(0, 3), 2)])
def test_batches_that_cannot_be_made_are_refused(value: Tensor, size: int) -> None:
    """No samples cannot be repeated, and a batch has at least one."""
    with pytest.raises(InputError, match=r"cannot be made into a batch of -?\d"):
        normalise(value).with_batch(size)


class Choosy(nn.Module):
    """Raises in forward, unless it is given a graphprune error to raise."""

    def forward(self, x: Tensor, mask: list[Tensor] | None = None, error: Exception | None = None) -> Tensor:
        """Raises what it is given, else an error of several lines."""
        assert mask is None or len(mask) == 1
        raise error or ValueError(f"no head for\n  {x.ndim} dimensions.\n")


def test_a_failing_forward_is_told_in_one_line() -> None:
    """The error names the model, the shapes, the original error and how to go on, and keeps the original as its cause."""
    with pytest.raises(InputError) as caught:
        run(Choosy(), normalise(((A,), {"mask": [C], "error": None})))
    assert str(caught.value) == (
        "Choosy cannot be run on ([2, 3] float32, mask=list of [2] int64, error=NoneType): ValueError: no head for 2 dimensions. "
        "Pass example inputs of the shapes and types that the model's forward expects."
    )
    assert isinstance(caught.value.__cause__, ValueError)


def test_wrong_shapes_and_arguments_are_told_too() -> None:
    """PyTorch's own complaints arrive as InputError, cut to a readable length."""
    with pytest.raises(InputError, match=r"^Conv2d cannot be run on \(\[2, 3\] float32\): RuntimeError: "):
        run(nn.Conv2d(3, 4, 3), normalise(A))
    with pytest.raises(InputError, match=r"TypeError: .*unexpected keyword argument 'images'"):
        run(nn.ReLU(), normalise({"images": A}))
    with pytest.raises(InputError) as caught:
        run(Choosy(), normalise(((A,), {"error": ValueError("long " * 1000)})))
    assert "long [...]. Pass" in str(caught.value)[-200:]


def test_clear_errors_pass_as_they_are() -> None:
    """An error that is already graphprune's own is not wrapped a second time."""
    with pytest.raises(TraceError, match=r"^no\.$"):
        run(Choosy(), normalise(((A,), {"error": TraceError("no")})))


class Messy(nn.Module):
    """Changes in forward whatever it can reach: buffers, attributes, containers, random numbers, and, in train mode, its result."""

    counts: Tensor
    running: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 2, 1)
        self.norm = nn.BatchNorm2d(2)
        self.drop = nn.Dropout(0.5)
        self.register_buffer("counts", torch.zeros(1))
        self.register_buffer("running", torch.full((1,), torch.nan))
        self.plain = torch.zeros(1)
        self.cache: dict[str, Tensor] = {}
        self.seen: list[int] = []
        self.calls = 0

    def train(self, mode: bool = True) -> Messy:
        """Rewrites weights as low-rank adapters do when they are merged, which cannot be undone by a flag."""
        self.conv.weight.data.add_(1)
        super().train(mode)
        return self

    def forward(self, x: Tensor) -> Tensor:
        """Returns the layers' result after leaving traces everywhere."""
        assert not self.training
        assert not torch.is_grad_enabled()
        self.counts += 1
        self.running = torch.rand(1)
        self.plain += 1
        self.cache["x"] = x
        self.seen.append(1)
        self.calls += 1
        self.extra = x
        result: Tensor = self.drop(self.norm(self.conv(x)))
        return result


def traces(model: Messy) -> tuple[Any, ...]:
    """Returns what Messy changes and a general snapshot does not see."""
    return [*vars(model)], dict(model.cache), list(model.seen), model.calls, model.plain.tolist(), model.training, model.drop.training


@pytest.mark.parametrize("fails", [False, True])
def test_a_model_is_undisturbed_afterwards(fails: bool) -> None:
    """Flags, attributes, containers, buffers and random numbers are as before, also when the block fails."""
    model = Messy()
    model.drop.training = False
    before, own, buffer = snapshot(model), traces(model), model.running

    def use() -> None:
        with preserve_state(model):
            model(torch.rand(2, 1, 4, 4))
            assert model.calls == 1
            if fails:
                raise KeyError

    with pytest.raises(KeyError) if fails else nullcontext():
        use()
    assert not changes(before, snapshot(model))
    assert traces(model) == own
    assert model.running is buffer


def test_a_run_outside_the_block_does_leave_traces() -> None:
    """The checks above can fail: without the block, the same run is seen in every respect."""
    model = Messy()
    before, own = snapshot(model), traces(model)
    for module in model.modules():
        module.training = False
    with torch.no_grad():
        model(torch.rand(2, 1, 4, 4))
    changed = {path.split("/")[1] for path in changes(before, snapshot(model))}
    assert changed >= {"tensors", "identity", "attributes", "random state"}
    assert all(one != two for one, two in zip(traces(model), own, strict=True))


def test_the_sequence_of_random_numbers_goes_on() -> None:
    """Random numbers drawn inside the block do not move PyTorch's sequence outside."""
    model = Messy()
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    with preserve_state(model):
        torch.rand(5)
    assert torch.equal(torch.rand(3), expected)


def test_lazy_modules_are_refused() -> None:
    """A model whose shapes are not known yet would be changed by its first run."""
    model = nn.Sequential(nn.LazyLinear(3))
    with pytest.raises(InputError, match=r"'0\.weight' of Sequential has no shape yet\. Run the model once"), preserve_state(model):
        pass
