"""Statistics equal plain loops over the formulas of the papers, on the tensors that the network really computes."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import graphprune as gp
from graphprune.criteria.statistics.activations import Observed, observe_activations
from graphprune.criteria.statistics.curvature import observe_curvature, signs
from graphprune.criteria.statistics.gradients import observe_joint, observe_products
from graphprune.criteria.statistics.inputs import observe_inputs
from graphprune.data.sources import Loader, Trainer
from graphprune.errors import ConfigError, InputError
from tests.support.operators import Network, conv, filled, images, normal, sequences, vectors
from tests.support.untouched import changes, snapshot

Run = Callable[..., Any]


def network(run: Run, **parts: nn.Module | Tensor) -> nn.Module:
    """Returns a network in float64 with random weights and statistics, always the same ones."""
    return filled(Network(run, parts))


# -- activations ---------------------------------------------------------------------------------------------------------------------


def looped(tensors: Sequence[Tensor], dim: int, owned: Sequence[Sequence[int]]) -> tuple[list[int], list[float], list[int]]:
    """Returns zeros, sums and counts per channel, element by element; `owned` are the positions of each channel."""
    zeros, total, elements = [0] * len(owned), [0.0] * len(owned), [0] * len(owned)
    for tensor in tensors:
        for at in itertools.product(*(range(n) for n in tensor.shape)):
            for channel, positions in enumerate(owned):
                if at[dim] in positions:
                    value = float(tensor[at])
                    zeros[channel] += value == 0
                    total[channel] += value
                    elements[channel] += 1
    return zeros, total, elements


def same(found: Observed, tensors: Sequence[Tensor], dim: int, owned: Sequence[Sequence[int]]) -> None:
    """Compares with the loops."""
    zeros, total, elements = looped(tensors, dim, owned)
    assert found.zeros.tolist() == zeros
    assert found.elements.tolist() == elements
    assert all(part.dtype is torch.float64 and part.shape == (len(owned),) for part in (found.zeros, found.total, found.elements))
    torch.testing.assert_close(found.total, torch.tensor(total, dtype=torch.float64), rtol=1e-9, atol=1e-12)


def observed(model: nn.Module, batches: Sequence[Any], example: Any = None) -> dict[str, list[Observed]]:
    """Returns what is seen of every group, traced on a batch of another size than the batches'."""
    graph = gp.trace(model, batches[0] if example is None else example)
    found = observe_activations(model, graph, Loader(batches))
    assert list(found) == [g.name for g in graph.groups]
    return found


BATCHES = [images(3), images(1)]
EACH = [[c] for c in range(4)]


@pytest.mark.parametrize("inplace", [False, True])
def test_conv_norm_relu_is_seen_behind_the_relu(inplace: bool) -> None:
    """Of conv-BN-ReLU the ReLU's output counts, also where it overwrites the norm's and is overwritten in its turn (1607.03250, eq. 1)."""

    def run(m: Any, x: Tensor) -> Tensor:
        y: Tensor = m.b(F.relu(m.norm(m.a(x)), inplace=inplace).mul_(1.0).neg_() if inplace else -F.relu(m.norm(m.a(x))))
        return y

    model = network(run, a=conv(3, 4), norm=nn.BatchNorm2d(4), b=conv(4, 2))
    parts: Any = model
    with torch.no_grad():
        expected = [F.relu(parts.norm(parts.a(x))) for x in BATCHES]
    found = observed(model, BATCHES, images(2))
    assert [o.place for o in found["a"]] == ["relu_ in the model" if inplace else "relu in the model"]
    same(found["a"][0], expected, 1, EACH)
    assert all(0 < int((x == 0).sum()) < x.numel() for x in expected)


def test_residual_addition_is_seen_behind_the_relu_after_it() -> None:
    """Producers that share channels are seen each behind its own nonlinearity; those that meet in an addition share one place."""

    def run(m: Any, x: Tensor) -> Tensor:
        x = F.relu(m.bn1(m.stem(x)))
        y: Tensor = F.relu6(m.bn3(m.second(F.relu(m.bn2(m.first(x))))) + m.short(x))
        return m.head(F.avg_pool2d(F.silu(y), 2).flatten(1))  # type: ignore[no-any-return]

    model = network(
        run,
        stem=conv(3, 4),
        bn1=nn.BatchNorm2d(4),
        first=conv(4, 5),
        bn2=nn.BatchNorm2d(5),
        second=conv(5, 6),
        bn3=nn.BatchNorm2d(6),
        short=conv(4, 6, 1),
        head=nn.Linear(54, 2),
    )
    m: Any = model
    found = observed(model, BATCHES)
    with torch.no_grad():
        stem = [F.relu(m.bn1(m.stem(x))) for x in BATCHES]
        first = [F.relu(m.bn2(m.first(x))) for x in stem]
        after = [F.relu6(m.bn3(m.second(b)) + m.short(a)) for a, b in zip(stem, first, strict=True)]
    assert {name: len(places) for name, places in found.items()} == {"stem": 1, "first": 1, "second": 1}
    same(found["stem"][0], stem, 1, EACH)
    same(found["first"][0], first, 1, [[c] for c in range(5)])
    same(found["second"][0], after, 1, [[c] for c in range(6)])


def test_identity_shortcut_has_a_place_per_producer() -> None:
    """Where the stem's channels pass a ReLU before the addition and another after it, both places count."""

    def run(m: Any, x: Tensor) -> Tensor:
        x = F.relu(m.stem(x))
        y: Tensor = m.head(F.relu(m.block(x) + x))
        return y

    model = network(run, stem=conv(3, 4), block=conv(4, 4), head=conv(4, 2))
    m: Any = model
    found = observed(model, BATCHES)["stem"]
    with torch.no_grad():
        before = [F.relu(m.stem(x)) for x in BATCHES]
        after = [F.relu(m.block(x) + x) for x in before]
    assert len(found) == 2
    same(found[0], before, 1, EACH)
    same(found[1], after, 1, EACH)


def test_tokens_behind_a_linear_layer_and_gelu() -> None:
    """Channels of tokens sit on the last dimension; the residual stream has no nonlinearity and is seen before a weight reads it."""

    def run(m: Any, x: Tensor) -> Tensor:
        x = m.stem(x)
        x = x + m.down(F.gelu(m.up(m.norm(x))))
        return m.head(m.norm2(x))  # type: ignore[no-any-return]

    model = network(
        run,
        stem=nn.Linear(4, 6),
        norm=nn.LayerNorm(6),
        up=nn.Linear(6, 8),
        down=nn.Linear(8, 6),
        norm2=nn.LayerNorm(6),
        head=nn.Linear(6, 2),
    )
    m: Any = model
    batches = [sequences(3), sequences(1)]
    longer = [*batches, normal(2, 9, 4)]
    found = observed(model, longer)
    with torch.no_grad():
        stream = [m.stem(x) for x in longer]
        entering = [m.norm(x) for x in stream]
        hidden = [F.gelu(m.up(x)) for x in entering]
        end = [m.norm2(x + m.down(h)) for x, h in zip(stream, hidden, strict=True)]
    same(found["up"][0], hidden, 2, [[c] for c in range(8)])
    assert [o.place for o in found["stem"]] == ["layer_norm in 'norm'", "layer_norm in 'norm2'"]
    same(found["stem"][0], entering, 2, [[c] for c in range(6)])
    same(found["stem"][1], end, 2, [[c] for c in range(6)])


def test_heads_are_seen_where_their_values_are() -> None:
    """A head of attention owns a block of what the output projection reads; every position of the block counts for it."""

    def run(m: Any, x: Tensor) -> Tensor:
        q, k, v = (p(x).unflatten(-1, (2, 3)).transpose(1, 2) for p in (m.q, m.k, m.v))
        y: Tensor = m.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return y

    model = network(run, q=nn.Linear(4, 6), k=nn.Linear(4, 6), v=nn.Linear(4, 6), out=nn.Linear(6, 4))
    m: Any = model
    graph = gp.trace(model, sequences(2))
    (heads,) = [g for g in graph.groups if g.role == "block"]
    batches = [sequences(3)]
    found = observe_activations(model, graph, Loader(batches))[heads.name]
    with torch.no_grad():
        read = []
        for x in batches:
            q, k, v = (p(x).unflatten(-1, (2, 3)).transpose(1, 2) for p in (m.q, m.k, m.v))
            read.append(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
    assert len(found) == 1
    same(found[0], read, 2, [[0, 1, 2], [3, 4, 5]])


def test_batch_times_heads_in_one_dimension() -> None:
    """Where samples and heads share a dimension, the heads of every batch size are told apart."""

    def run(m: Any, x: Tensor) -> Tensor:
        q, k, v = (p(x).unflatten(-1, (2, 3)).transpose(1, 2).flatten(0, 1) for p in (m.q, m.k, m.v))
        y: Tensor = torch.bmm(torch.bmm(q, k.mT).softmax(-1), F.relu(v))
        return m.out(y.unflatten(0, (-1, 2)).transpose(1, 2).flatten(2))  # type: ignore[no-any-return]

    model = network(run, q=nn.Linear(4, 6), k=nn.Linear(4, 6), v=nn.Linear(4, 6), out=nn.Linear(6, 4))
    m: Any = model
    graph = gp.trace(model, sequences(2))
    (heads,) = [g for g in graph.groups if g.role == "block"]
    x = sequences(3)
    found = observe_activations(model, graph, Loader([x]))[heads.name]
    with torch.no_grad():
        values = F.relu(m.v(x)).unflatten(-1, (2, 3)).transpose(1, 2)
    behind = [o for o in found if o.place.startswith("relu")]
    assert len(behind) == 1
    same(behind[0], [values], 1, [[0], [1]])


def test_positions_of_a_flattened_image_count_for_their_channel() -> None:
    """Behind a flatten each channel owns several positions; without a nonlinearity the last tensor before the next weight is seen."""
    model = network(lambda m, x: m.fc(m.norm(m.a(x)).flatten(1)), a=conv(3, 4), norm=nn.BatchNorm2d(4), fc=nn.Linear(144, 2))
    m: Any = model
    found = observed(model, BATCHES)["a"]
    with torch.no_grad():
        expected = [m.norm(m.a(x)).flatten(1) for x in BATCHES]
    assert [o.place for o in found] == ["view in the model"] or found[0].place.startswith(("flatten", "reshape", "view"))
    same(found[0], expected, 1, [list(range(36 * c, 36 * (c + 1))) for c in range(4)])


def test_concatenated_channels_are_told_apart() -> None:
    """Two groups that a ReLU behind a concatenation holds together have each their own positions of it."""

    def run(m: Any, x: Tensor) -> Tensor:
        y: Tensor = m.c(F.relu(torch.cat([m.a(x), m.b(x)], 1)))
        return y

    model = network(run, a=conv(3, 4), b=conv(3, 2), c=conv(6, 2))
    m: Any = model
    found = observed(model, BATCHES)
    with torch.no_grad():
        expected = [F.relu(torch.cat([m.a(x), m.b(x)], 1)) for x in BATCHES]
    same(found["a"][0], expected, 1, EACH)
    same(found["b"][0], expected, 1, [[4], [5]])


def test_handwritten_swish_counts_at_the_product() -> None:
    """The product x * sigmoid(x) is one nonlinearity: the sigmoid alone, which is never zero, is not what the next layer reads."""
    written: tuple[Run, ...] = (
        lambda y: y * torch.sigmoid(y),
        lambda y: y * F.relu6(y + 3) / 6,
        lambda y: 0.5 * y * (1 + torch.tanh(0.8 * (y + 0.04 * y * y * y))),
    )
    for act in written:
        model = network(lambda m, x, act=act: m.b(act(m.a(x))), a=conv(3, 4), b=conv(4, 2))
        m: Any = model
        found = observed(model, BATCHES)["a"]
        with torch.no_grad():
            products = [act(m.a(x)) for x in BATCHES]
        scale = sum(float(p.sum()) for p in products) / float(found[0].total.sum())
        assert round(scale, 9) in (1.0, round(1 / 6, 9))  # of the second form the product is seen before its constant factor
        assert found[0].place.startswith("mul")


def test_gate_is_seen_at_its_sigmoid() -> None:
    """A squeeze-and-excitation gate scales channels that it does not compute: it is a place of its own, of one value per sample."""

    def run(m: Any, x: Tensor) -> Tensor:
        x = F.relu(m.a(x))
        gate = torch.sigmoid(m.up(F.relu(m.down(x.mean((2, 3), keepdim=True)))))
        return m.b(x * gate)  # type: ignore[no-any-return]

    model = network(run, a=conv(3, 4), down=conv(4, 3, 1), up=conv(3, 4, 1), b=conv(4, 2))
    found = observed(model, BATCHES)
    assert [o.place for o in found["a"]] == ["relu in the model", "sigmoid in the model"]
    assert [o.elements.tolist() for o in found["a"]] == [[144.0] * 4, [4.0] * 4]


def other_operator(m: Any, x: Tensor) -> Tensor:
    """Runs another function on larger batches."""
    y = m.a(x)
    return m.b(F.tanh(y) if x.shape[0] > 2 else F.relu(y))  # type: ignore[no-any-return]


def one_more(m: Any, x: Tensor) -> Tensor:
    """Runs one more function on larger batches."""
    y = F.relu(m.a(x))
    return m.b(y.tanh() if x.shape[0] > 2 else y)  # type: ignore[no-any-return]


def one_less(m: Any, x: Tensor) -> Tensor:
    """Runs one function less on larger batches."""
    y = m.b(F.relu(m.a(x)))
    return y if x.shape[0] > 2 else y.tanh()  # type: ignore[no-any-return]


@pytest.mark.parametrize(
    ("run", "words"),
    [
        (other_operator, "tanh in the model runs where they ran relu in the model"),
        (one_more, "tanh in the model runs where they ran conv2d in 'b'"),
        (one_less, "tanh in the model does not run"),
    ],
)
def test_another_path_is_refused(run: Run, words: str) -> None:
    """A batch on which the model runs other operators than recorded has no labels: the error says which operator, and where."""
    model = network(run, a=conv(3, 4), b=conv(4, 2))
    graph = gp.trace(model, images(1))
    with pytest.raises(InputError, match=f"batch 2 cannot be used: a batch takes another path .* {words}"):
        observe_activations(model, graph, Loader([images(2), images(3)]))


def test_float32_sums_are_exact() -> None:
    """Single precision is added up in double: a million equal values have their exact mean, and zeros are counted exactly."""
    model = nn.Sequential(nn.Conv2d(1, 2, 1), nn.ReLU(), nn.Conv2d(2, 1, 1))
    first: Any = model[0]
    with torch.no_grad():
        first.weight.copy_(torch.tensor([0.1, -0.1]).reshape(2, 1, 1, 1))
        first.bias.zero_()
    found = observed(model, [torch.ones(4, 1, 512, 512)], torch.ones(1, 1, 4, 4))["0"][0]
    value = float(torch.tensor(0.1))
    assert found.elements.tolist() == [2**20, 2**20]
    assert found.zeros.tolist() == [0, 2**20]
    assert abs(float(found.total[0]) / 2**20 / value - 1) < 1e-12


# -- gradients -----------------------------------------------------------------------------------------------------------------------


def classifier() -> nn.Module:
    """Returns a network with an in-place ReLU, a grouped convolution, a norm, a parameter that takes no part and a frozen one."""

    def run(m: Any, x: Tensor) -> Tensor:
        y: Tensor = m.fc(F.relu_(m.b(F.relu_(m.norm(m.a(x))))).mean((2, 3)))
        return y

    model = network(run, a=conv(3, 4), norm=nn.BatchNorm2d(4), b=conv(4, 4, groups=2), fc=nn.Linear(4, 3), idle=nn.Linear(2, 2))
    parts: Any = model
    parts.b.weight.requires_grad_(False)
    return model


LABELLED = [(images(3), torch.tensor([0, 2, 1])), (images(2), torch.tensor([1, 1]))]


def gradient(model: nn.Module, name: str, x: Tensor, y: Tensor) -> Tensor:
    """Returns the gradient of the loss by central differences, entry by entry."""
    weight = dict(model.named_parameters())[name]
    out = torch.zeros_like(weight, requires_grad=False)
    with torch.no_grad():
        for at in itertools.product(*(range(n) for n in weight.shape)):
            kept = weight[at].clone()
            values = []
            for step in (1e-5, -1e-5):
                weight[at] = kept + step
                values.append(F.cross_entropy(model(x), y))
            weight[at] = kept
            out[at] = (values[0] - values[1]) / 2e-5
    return out


def test_products_are_the_papers() -> None:
    """(g_s w_s)^2 per weight, averaged over batches (1906.10771, section 3), with gradients by differences; idle weights count zero."""
    model = classifier()
    names = ["a.weight", "b.weight", "fc.weight", "idle.weight"]
    before = snapshot(model)
    found = observe_products(model, names, Loader(LABELLED, F.cross_entropy))
    assert not changes(before, snapshot(model))
    for name in names:
        weight = dict(model.named_parameters())[name].detach()
        expected = torch.zeros_like(weight)
        for x, y in LABELLED:
            g = gradient(model, name, x, y) if name != "idle.weight" else torch.zeros_like(weight)
            for at in itertools.product(*(range(n) for n in weight.shape)):
                expected[at] += (g[at] * weight[at]) ** 2 / len(LABELLED)
        torch.testing.assert_close(found[name], expected, rtol=1e-6, atol=1e-11)
        assert not found[name].requires_grad
    assert float(found["b.weight"].abs().sum()) > 0
    assert not found["idle.weight"].any()


def test_joint_importance_is_the_square_of_the_sum() -> None:
    """(sum over all of a channel's weights of g_s w_s)^2, averaged over batches, over every slice of the group."""
    model = classifier()
    graph = gp.trace(model, images(2))
    slices = {g.name: g.slices for g in graph.groups}
    assert len(slices) > 1
    found = observe_joint(model, slices, Loader(LABELLED, F.cross_entropy))
    parameters = dict(model.named_parameters())
    for name, owned in slices.items():
        expected = torch.zeros(graph[name].channels, dtype=torch.float64)
        for x, y in LABELLED:
            g = {s.parameter: gradient(model, s.parameter, x, y) for s in owned if s.parameter in parameters}
            for channel in range(graph[name].channels):
                total = 0.0
                for s in owned:
                    if s.parameter in parameters:
                        product = (g[s.parameter] * parameters[s.parameter].detach()).movedim(s.dim, 0)
                        for position in s.index[channel].tolist():
                            total += float(product[position].sum())
                expected[channel] += total**2 / len(LABELLED)
        torch.testing.assert_close(found[name], expected, rtol=1e-6, atol=1e-11)


def test_a_trainer_shows_the_same_gradients() -> None:
    """Through the seeds' trainer the products are those of plain batches, and the model is as it was."""
    model = classifier()

    def trainer(model: nn.Module, optimizer: Any, criterion: Any) -> None:
        model.train()
        for x, y in LABELLED:
            optimizer.zero_grad()
            criterion(model(x), y).backward()
            optimizer.step()

    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5)
    before = snapshot(model)
    found = observe_products(model, ["a.weight", "b.weight"], Trainer(trainer, optimizer, nn.CrossEntropyLoss()))
    seen = observe_activations(model, gp.trace(model, images(2)), Trainer(trainer, optimizer, nn.CrossEntropyLoss()))
    assert not changes(before, snapshot(model))
    expected = observe_products(model, ["a.weight", "b.weight"], Loader(LABELLED, F.cross_entropy))
    plain = observe_activations(model, gp.trace(model, images(2)), Loader(LABELLED))
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert all(torch.equal(a.total, b.total) for n in plain for a, b in zip(plain[n], seen[n], strict=True))


def test_several_losses_of_one_pass_share_its_graph() -> None:
    """A trainer that asks for two losses of one output has both counted."""
    model = classifier()
    x, y = LABELLED[0]

    def trainer(model: nn.Module, _optimizer: Any, criterion: Any) -> None:
        output = model(x)
        (criterion(output, y) + criterion(output.flip(1), y)).backward()

    found = observe_products(model, ["a.weight"], Trainer(trainer, None, F.cross_entropy))["a.weight"]
    one = observe_products(model, ["a.weight"], Loader([(x, y)], F.cross_entropy))["a.weight"]
    other = observe_products(model, ["a.weight"], Loader([(x, y)], lambda o, t: F.cross_entropy(o.flip(1), t)))["a.weight"]
    torch.testing.assert_close(found, (one + other) / 2)


def test_low_precision_is_added_up_in_single() -> None:
    """Statistics of a bfloat16 model are float32."""
    model = classifier().bfloat16()
    batches = [(x.bfloat16(), y) for x, y in LABELLED]
    assert observe_products(model, ["a.weight"], Loader(batches, F.cross_entropy))["a.weight"].dtype is torch.float32


def test_unknown_parameters_are_named() -> None:
    """A parameter that the model does not have is an error with the nearest name."""
    with pytest.raises(ConfigError, match=r"no parameter called 'a\.wieght'; did you mean 'a\.weight'"):
        observe_products(classifier(), ["a.wieght"], Loader(LABELLED, F.cross_entropy))


# -- inputs --------------------------------------------------------------------------------------------------------------------------


def norms(tensors: Sequence[Tensor], dim: int) -> list[float]:
    """Returns the L2 norm of every position of a dimension over all the rest, element by element (2306.11695, eq. 1)."""
    out = [0.0] * tensors[0].shape[dim]
    for tensor in tensors:
        for at in itertools.product(*(range(n) for n in tensor.shape)):
            out[at[dim]] += float(tensor[at]) ** 2
    return [value**0.5 for value in out]


def close(found: Tensor, expected: Any) -> None:
    """Compares to 1e-6."""
    torch.testing.assert_close(found.double(), torch.as_tensor(expected, dtype=torch.float64), rtol=1e-6, atol=1e-9)


def test_input_norms_of_layers() -> None:
    """Linear layers and convolutions, plain, grouped and transposed, have the norm of the channel that each weight multiplies."""

    def run(m: Any, x: Tensor) -> Tensor:
        a = F.relu(m.a(x))
        b = F.relu(m.b(a))
        c = m.c(b)
        return m.fc(c.mean((2, 3)))  # type: ignore[no-any-return]

    model = network(run, a=conv(3, 4), b=conv(4, 6, groups=2), c=nn.ConvTranspose2d(6, 5, 3), fc=nn.Linear(5, 2), idle=nn.Linear(2, 2))
    m: Any = model
    graph = gp.trace(model, images(2))
    found = observe_inputs(model, graph, [n for n, _ in model.named_parameters()], Loader(BATCHES))
    with torch.no_grad():
        a = [F.relu(m.a(x)) for x in BATCHES]
        b = [F.relu(m.b(x)) for x in a]
        c = [m.c(x).mean((2, 3)) for x in b]
    assert sorted(found) == ["a.weight", "b.weight", "c.weight", "fc.weight"]
    close(found["a.weight"], torch.tensor(norms(BATCHES, 1)).reshape(1, 3, 1, 1))
    grouped = norms(a, 1)
    close(found["b.weight"], torch.tensor([[grouped[2 * (o // 3) + i] for i in range(2)] for o in range(6)]).reshape(6, 2, 1, 1))
    close(found["c.weight"], torch.tensor(norms(b, 1)).reshape(6, 1, 1, 1))
    close(found["fc.weight"], torch.tensor(norms(c, 1)).reshape(1, 5))


def test_input_norms_of_matrix_products() -> None:
    """Whichever side the weight stands on, and whatever view of it is multiplied, each position has the norm of what it multiplies."""
    x = vectors(3)
    forms: list[tuple[Run, tuple[int, ...], Tensor]] = [
        (lambda m, x: x @ m.w, (4, 6), torch.tensor(norms([x], 1)).reshape(4, 1).expand(4, 6)),
        (lambda m, x: x @ m.w.t(), (6, 4), torch.tensor(norms([x], 1)).expand(6, 4)),
        (lambda m, x: (m.w @ x.t()).t(), (6, 4), torch.tensor(norms([x], 1)).expand(6, 4)),
        (lambda m, x: torch.addmm(x.new_zeros(6), x, m.w), (4, 6), torch.tensor(norms([x], 1)).reshape(4, 1).expand(4, 6)),
        (lambda m, x: x @ m.w, (4,), torch.tensor(norms([x], 1))),
        (lambda m, x: F.linear(x, m.w.chunk(2)[1]), (12, 4), torch.cat([torch.zeros(6, 4), torch.tensor(norms([x], 1)).expand(6, 4)])),
        (lambda m, x: torch.einsum("bi,eio->beo", x, m.w), (2, 4, 3), torch.tensor(norms([x], 1)).reshape(1, 4, 1).expand(2, 4, 3)),
        (
            lambda m, x: torch.stack([x, 2 * x]) @ m.w,
            (2, 4, 3),
            torch.tensor([norms([k * x], 1) for k in (1, 2)])[..., None].expand(2, 4, 3),
        ),
    ]
    for run, shape, expected in forms:
        model = network(run, w=nn.Parameter(torch.ones(shape)))
        found = observe_inputs(model, gp.trace(model, x[:2]), ["w"], Loader([x[:1], x[1:]]))["w"]
        close(found.expand(shape), expected.expand(shape))


def test_a_weight_used_twice_has_the_norm_of_both_inputs() -> None:
    """Squares add up over uses."""
    x = vectors(3)
    model = network(lambda m, x: m.a(m.a(x)), a=nn.Linear(4, 4, bias=False))
    weight = dict(model.named_parameters())["a.weight"].detach()
    found = observe_inputs(model, gp.trace(model, x), ["a.weight"], Loader([x]))["a.weight"]
    both = zip(norms([x], 1), norms([x @ weight.t()], 1), strict=True)
    close(found, torch.tensor([[(p * p + q * q) ** 0.5 for p, q in both]]))


def test_embeddings_have_no_input_norm() -> None:
    """A weight that is looked up is left out; where a layer shares it, only that layer's input counts."""
    tokens = torch.randint(0, 11, (3, 5), generator=torch.Generator().manual_seed(0))

    def run(m: Any, x: Tensor) -> Tensor:
        y: Tensor = F.linear(m.words(x), m.words.weight) if m.tied else m.out(m.words(x))
        return y

    for tied in (False, True):
        model = network(run, words=nn.Embedding(11, 4), out=nn.Linear(4, 2))
        model.tied = tied  # type: ignore[assignment]
        found = observe_inputs(model, gp.trace(model, tokens), ["words.weight", "out.weight"], Loader([tokens]))
        assert list(found) == (["words.weight"] if tied else ["out.weight"])
        close(found[next(iter(found))], torch.tensor([norms([dict(model.named_parameters())["words.weight"].detach()[tokens]], 2)]))


# -- curvature -----------------------------------------------------------------------------------------------------------------------


def small() -> tuple[nn.Module, list[tuple[Tensor, Tensor]]]:
    """Returns a network with a curved loss, and two batches."""
    model = network(lambda m, x: m.b(torch.tanh(m.a(x))), a=nn.Linear(4, 3), b=nn.Linear(3, 2))
    return model, [(vectors(3), torch.tensor([0, 1, 1])), (vectors(2), torch.tensor([1, 0]))]


def hessian(model: nn.Module, names: Sequence[str], x: Tensor, y: Tensor) -> Tensor:
    """Returns the whole Hessian of the loss with respect to the named parameters, flattened together."""
    parameters = dict(model.named_parameters())
    sizes = [parameters[n].numel() for n in names]

    def loss(flat: Tensor) -> Tensor:
        parts = {n: p.view_as(parameters[n]) for n, p in zip(names, flat.split(sizes), strict=True)}
        return F.cross_entropy(torch.func.functional_call(model, parts, (x,)), y)

    found: Tensor = torch.autograd.functional.hessian(loss, torch.cat([parameters[n].detach().flatten() for n in names]))
    return found


@pytest.mark.parametrize("probes", [1, 5])
def test_curvature_is_hutchinsons_estimate(probes: int) -> None:
    """With the same vectors, mean of v * (H v) by the whole Hessian in double loops is what is found, to 1e-6."""
    model, batches = small()
    names = ["a.weight", "b.weight", "b.bias"]
    before = snapshot(model)
    found = observe_curvature(model, names, Loader(batches, F.cross_entropy), probes, seed=3)
    assert not changes(before, snapshot(model))
    generator = torch.Generator().manual_seed(3)
    parameters = dict(model.named_parameters())
    expected = torch.zeros(sum(parameters[n].numel() for n in names), dtype=torch.float64)
    for x, y in batches:
        h = hessian(model, names, x, y)
        for _ in range(probes):
            v = torch.cat([signs(parameters[n], generator).flatten() for n in names])
            for i in range(v.numel()):
                along = sum(float(h[i, j]) * float(v[j]) for j in range(v.numel()))
                expected[i] += float(v[i]) * along / probes / len(batches)
    torch.testing.assert_close(torch.cat([found[n].flatten() for n in names]), expected, rtol=1e-6, atol=1e-12)


def test_curvature_tends_to_the_diagonal() -> None:
    """With many probes the estimate comes close to the Hessian's true diagonal, closer than with one."""
    model, batches = small()
    truth = sum((hessian(model, ["a.weight"], x, y).diagonal() for x, y in batches), torch.zeros(())) / len(batches)
    errors = []
    for probes in (1, 400):
        found = observe_curvature(model, ["a.weight"], Loader(batches, F.cross_entropy), probes)["a.weight"]
        errors.append(float((found.flatten() - truth).norm() / truth.norm()))
    assert errors[1] < 0.1 < errors[0]


def test_curvature_depends_on_its_seed_alone() -> None:
    """The same seed gives the same bits whatever the global state is, another seed others; a linear loss has none."""
    model, batches = small()
    given = Loader(batches, F.cross_entropy)
    torch.manual_seed(5)
    first = observe_curvature(model, ["a.weight"], given, 2, 7)["a.weight"]
    torch.manual_seed(6)
    assert torch.equal(first, observe_curvature(model, ["a.weight"], given, 2, 7)["a.weight"])
    assert not torch.equal(first, observe_curvature(model, ["a.weight"], given, 2, 8)["a.weight"])
    flat = observe_curvature(model, ["b.weight"], Loader(batches, lambda output, _: output.sum()), 2)["b.weight"]
    assert not flat.any()
    with pytest.raises(ConfigError, match="probes"):
        observe_curvature(model, ["a.weight"], given, 0)


def test_attention_and_recurrent_layers_have_curvature() -> None:
    """Fused kernels without a second derivative are replaced for the time by those that have one."""
    attention = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, dropout=0.1).eval()
    recurrent = nn.LSTM(8, 4, batch_first=True).eval()
    x = normal(2, 5, 8).float()

    def loss(output: Any, target: Tensor) -> Tensor:
        value: Tensor = output[0] if isinstance(output, tuple) else output
        return value.square().mean() + target

    for model, name in ((attention, "self_attn.in_proj_weight"), (recurrent, "weight_hh_l0")):
        flags = (torch.backends.mkldnn.enabled, torch.backends.cudnn.enabled)
        found = observe_curvature(model, [name], Loader([(x, torch.zeros(()))], loss))[name]
        assert found.isfinite().all()
        assert found.any()
        assert flags == (torch.backends.mkldnn.enabled, torch.backends.cudnn.enabled)


class Once(torch.autograd.Function):
    """The square, whose derivative has none."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        """Returns the square."""
        ctx.save_for_backward(x)
        return x * x

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        """Returns the derivative."""
        x: Tensor = ctx.saved_tensors[0]
        return 2 * x * gradient


def test_missing_second_derivatives_are_named() -> None:
    """An operator without a second derivative ends in an error with its own words, the criterion's name and what to do."""
    square: Any = Once.apply
    model = network(lambda m, x: square(m.a(x)), a=nn.Linear(4, 3))
    with pytest.raises(InputError, match=r"HessianDiagonal needs second derivatives.*once_differentiable.*Taylor"):
        observe_curvature(model, ["a.weight"], Loader([(vectors(2), torch.tensor([0, 1]))], F.cross_entropy))


def test_nothing_of_the_model_changes_in_any_statistic() -> None:
    """After all five, with a model in training mode, tensors, gradients, flags and random state are the same bits."""
    model = classifier().train()
    parts: Any = model
    parts.fc.weight.grad = torch.ones_like(parts.fc.weight)
    graph = gp.trace(model, images(2))
    given = Loader(LABELLED, F.cross_entropy)
    before, left_over = snapshot(model), parts.fc.weight.grad.clone()
    observe_activations(model, graph, given)
    observe_inputs(model, graph, ["a.weight"], given)
    observe_products(model, ["b.weight"], given)
    observe_joint(model, {g.name: g.producers for g in graph.groups}, given)
    observe_curvature(model, ["b.weight"], given)
    assert not changes(before, snapshot(model))
    assert torch.equal(parts.fc.weight.grad, left_over)
