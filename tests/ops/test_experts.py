"""Mixtures of experts: widths are pruned in all experts at once, experts stay."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional

import graphprune as gp
from graphprune.ops import RULES, rule
from tests.support.invariants import MIN_CONTROL, assert_invariants, coverage_faults, evaluate, masked_copy, permutation_error, train_step
from tests.support.operators import Case, check, described, normal, ordered, sequences, table, vectors

A = "a.bias/0 a.weight/0"
EXPERTS = "is an expert, and the router counts them"
torch.library.define("graphprune_tests::grouped_mm", "(Tensor input, Tensor weight, Tensor offs) -> Tensor")
rule("graphprune_tests::grouped_mm")(RULES["transformers::grouped_mm_fallback"])  # which has this schema,


@torch.library.impl("graphprune_tests::grouped_mm", "CompositeImplicitAutograd")
def grouped(input: torch.Tensor, weight: torch.Tensor, offs: torch.Tensor) -> torch.Tensor:  # noqa: A002 (the name in the schema)
    """Multiplies the rows up to each end with the next matrix, in any floating dtype."""
    rows = torch.arange(input.shape[0])
    expert = torch.searchsorted(offs.long(), rows, right=True).clamp(max=len(offs) - 1)
    return torch.einsum("si,sio->so", input, weight[expert])


def product(x: torch.Tensor, weight: torch.Tensor, ends: torch.Tensor) -> torch.Tensor:
    """Returns a matrix product per expert, in float64."""
    out: torch.Tensor = torch.ops.graphprune_tests.grouped_mm(x, weight, ends)
    return out


def routed(m: Any, x: torch.Tensor) -> torch.Tensor:
    """Sends every row through the two experts that the router likes best, as rows sorted by expert."""
    y = torch.relu(m.a(x))
    best, chosen = m.router(y).softmax(-1).topk(2)
    expert, order = chosen.flatten().sort()
    ends = torch.histc(expert.double(), 3, 0, 2).cumsum(0).int()
    hidden = functional.silu(product(y[order // 2], m.up.transpose(1, 2), ends))
    back = product(hidden, m.down.transpose(1, 2), ends) * best.flatten()[order].unsqueeze(-1)
    out: torch.Tensor = m.b(back[order.argsort()].unflatten(0, (-1, 2)).sum(1))
    return out


def one_by_one(m: Any, x: torch.Tensor) -> torch.Tensor:
    """Sends every row through the two experts that the router likes best, expert by expert."""
    y = torch.relu(m.a(x))
    best, chosen = m.router(y).softmax(-1).topk(2)
    total = torch.zeros_like(y)
    mask = functional.one_hot(chosen, 3).permute(2, 1, 0)
    for e in range(3):
        place, row = torch.where(mask[e])
        hidden = functional.silu(functional.linear(y[row], m.up[e]))
        total.index_add_(0, row, functional.linear(hidden, m.down[e]) * best[row, place, None])
    out: torch.Tensor = m.b(total)
    return out


def looked_up(m: Any, x: torch.Tensor) -> torch.Tensor:
    """Looks up the matrices of the experts that the router likes best."""
    y = torch.relu(m.a(x))
    best, chosen = m.router(y).softmax(-1).topk(2)
    hidden = functional.silu(torch.bmm(m.up[chosen.flatten()], y.repeat_interleave(2, 0).unsqueeze(-1)))
    back = torch.bmm(m.down[chosen.flatten()], hidden).squeeze(-1) * best.flatten().unsqueeze(-1)
    out: torch.Tensor = m.b(back.unflatten(0, (-1, 2)).sum(1))
    return out


PARTS: dict[str, nn.Module | torch.Tensor] = {
    "a": nn.Linear(4, 8),
    "router": nn.Linear(8, 3),
    "up": table(3, 6, 8),
    "down": table(3, 8, 6),
    "b": nn.Linear(8, 4),
}
GROUPS = [f"8 exact: {A} router.weight/1 up/2", "8 exact: b.weight/1 down/1", "6 exact: down/2 up/1"]
ENDS = torch.tensor([1, 3, 4], dtype=torch.int32)


def form(name: str, run: Any, parts: dict[str, nn.Module | torch.Tensor], groups: list[str], **options: Any) -> Case:
    """Returns a case of four rows, divided among three experts."""
    return Case(name, run, parts, groups, **{"inputs": lambda _: normal(4, 4), "any_batch": False, **options})


CASES = [
    Case("sorted by expert", routed, PARTS, GROUPS, {"up/0": EXPERTS, "down/0": EXPERTS, "router.weight/0": "sorted along (aten::topk"},
         inputs=vectors, batch=4),
    Case("matrices looked up", looked_up, PARTS, GROUPS, {"up/0": "looked up", "down/0": "looked up"}, inputs=vectors, batch=4,
         any_batch=False),
    form("weights that are not zero", lambda m, x: m.b(product(torch.sigmoid(m.a(x)), torch.exp(m.up), ENDS)), {"a": nn.Linear(4, 8),
         "up": table(3, 8, 6), "b": nn.Linear(6, 4)}, [f"8 changed: {A} up/1", "6 exact: b.weight/1 up/2"]),
]  # fmt: skip


@pytest.mark.parametrize("case", CASES, ids=str)
def test_experts(case: Case) -> None:
    """Groups are what the formula of the operator says, and removal is exact."""
    check(case)


def test_expert_by_expert() -> None:
    """A loop over the experts keeps its class (how many rows an expert gets is no literal); its sum starts like the input, which ties."""
    model = Case("", one_by_one, PARTS, []).build()
    found = assert_invariants(model, vectors(4))
    assert described(found.graph) == [ordered("6 exact: down/2 up/1"), ordered(f"8 exact: {A} b.weight/1 down/1 router.weight/1 up/2")]
    assert found.report.kind == "module"


class Single(nn.Module):
    """A matrix product per expert by PyTorch's own operator, which knows no float64."""

    def __init__(self, run: Any, **parameters: tuple[int, ...]) -> None:
        """Registers two linear layers and parameters of the given shapes."""
        super().__init__()
        self.run = run
        self.a, self.b = nn.Linear(8, 16), nn.Linear(16, 8)
        generator = torch.Generator().manual_seed(0)
        for name, shape in parameters.items():
            self.register_parameter(name, nn.Parameter(torch.randn(shape, generator=generator) / 4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Runs the function."""
        out: torch.Tensor = self.run(self, x)
        return out


divided: Any = getattr(torch, "_grouped_mm", None)  # no public spelling before PyTorch 2.10


def multiplies() -> bool:
    """Returns whether this PyTorch has the operator, and a kernel of it for this processor."""
    try:
        divided(torch.ones(8, 16), torch.ones(1, 16, 16), offs=torch.tensor([8]).int())
    except (TypeError, RuntimeError):  # NotImplementedError is one of the latter
        return False
    return True


MULTIPLIES = pytest.mark.skipif(not multiplies(), reason=f"PyTorch {torch.__version__} has no grouped matrix product on the CPU")
SINGLE = [
    ("rows divided", Single(lambda m, x: m.b(divided(torch.relu(m.a(x)), m.w, offs=torch.tensor([2, 5, 8]).int())),
     w=(3, 16, 16)), [f"16 exact: {A} w/1", "16 exact: b.weight/1 w/2"], {"w/0": EXPERTS}),
    ("experts in the batch", Single(lambda m, x: m.b(divided(torch.relu(m.a(x)).expand(3, 8, 16), m.w).sum(0)), w=(3, 16, 16)),
     [f"16 exact: {A} w/1", "16 exact: b.weight/1 w/2"], {"w/0": "repeats one value"}),
    ("columns divided", Single(lambda m, x: m.b(torch.relu(divided(m.w, m.a(x).t(), offs=torch.tensor([2, 5, 8]).int())).t()),
     w=(3, 16, 16)), [f"16 exact: {A} w/2", "16 exact: b.weight/1 w/1"], {"w/0": EXPERTS}),
    ("inner positions divided", Single(lambda m, x: m.b(divided(m.w, torch.relu(m.a(x)), offs=torch.tensor([2, 5, 8]).int())
     .sum(0)), w=(8, 8)), [f"16 exact: {A} b.weight/1"], {"w/1": "handed out to experts"}),
]  # fmt: skip


@MULTIPLIES
@pytest.mark.parametrize(("name", "model", "groups", "frozen"), SINGLE, ids=lambda v: v if isinstance(v, str) else "")
def test_own_operator(name: str, model: Single, groups: list[str], frozen: dict[str, str]) -> None:
    """All forms of PyTorch's operator, in float32: groups, permutation, removal, training."""
    del name
    inputs = torch.randn(8, 8, generator=torch.Generator().manual_seed(1))
    graph = gp.trace(model, inputs)
    assert described(graph) == sorted(ordered(line) for line in groups)
    assert coverage_faults(model, graph) == []
    for place, text in frozen.items():
        assert any(text in str(f) for f in graph.frozen if f"{f.parameter}/{f.dim}" == place), place
    error, control = permutation_error(model, graph, inputs)
    assert error < 1e-5
    assert control > MIN_CONTROL
    masks = gp.L1NormPruner(model, [{"sparsity": 0.5, "op_types": ["default"]}], example_inputs=inputs, graph=graph).masks()
    expected = evaluate(masked_copy(model, graph, masks), inputs)[0]
    for result in ("auto", "graph"):
        small, report = gp.speedup(model, masks, result=result)
        assert report.verified
        assert torch.allclose(evaluate(small, inputs)[0], expected, atol=1e-5)
        train_step(small, inputs)


@MULTIPLIES
def test_widths_that_the_kernel_refuses() -> None:
    """Widths of 5 are refused by PyTorch's own operator; that is an error, not a wrong result."""
    model, inputs = SINGLE[0][1], torch.randn(8, 8, generator=torch.Generator().manual_seed(1))
    with pytest.raises(gp.GraphPruneError, match="multiple of 16 bytes"):
        gp.prune(model, inputs, sparsity=0.6)
    _, report = gp.prune(model, inputs, sparsity=0.6, round_to=4)
    assert report.verified


def test_sequences_are_rows() -> None:
    """Positions of a sequence are rows like any others, and the widths of their experts are pruned."""
    model = Case("", lambda m, x: routed(m, x.flatten(0, 1)), PARTS, [], inputs=sequences).build()
    assert described(gp.trace(model, sequences(2))) == sorted(ordered(line) for line in GROUPS)
