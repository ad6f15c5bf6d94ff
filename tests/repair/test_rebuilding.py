"""Reconstruction: fitted weights are those of NumPy's least squares on the pruned network's inputs, and nothing else changes."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from dataclasses import FrozenInstanceError
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import graphprune as gp
from graphprune.cli import demo
from graphprune.data.sources import Loader, Trainer
from graphprune.errors import ConfigError, FileError, InputError, MaskError
from graphprune.repair import readers
from graphprune.repair.report import LeftAlone
from graphprune.trace.inputs import normalise
from tests.support.operators import Network, conv, filled, images, normal, sequences, table, words
from tests.support.random_networks import Drawn, build, inputs_of
from tests.support.random_properties import random_masks, run_draws
from tests.support.untouched import changes, snapshot

EVERYWHERE = 10**6  # more points than any layer here has positions


def network(run: Callable[..., Any], **parts: nn.Module | Tensor) -> Any:
    """Returns a network in float64 with random weights and statistics, always the same ones."""
    return filled(Network(run, parts))


def chain(first: nn.Module, second: nn.Module) -> Any:
    """Returns two layers with a ReLU between them."""
    return network(lambda m, x: m.b(F.relu(m.a(x))), a=first, b=second)


def halved(model: nn.Module, example: Any, *, only: str | None = None) -> gp.Masks:
    """Returns masks that take every second channel of every group, or of one."""
    graph = gp.trace(model, example)
    return gp.Masks(graph, {g.name: np.arange(g.channels) % 2 == 0 for g in graph.groups if only in (None, g.name)})


def reconstructed(model: nn.Module, masks: gp.Masks, data: Any, **options: Any) -> tuple[Any, gp.ReconstructionReport]:
    """Returns the fitted copy and the report."""
    return gp.reconstruct(model, masks, data, **options)


def masked(masks: gp.Masks, model: nn.Module) -> Any:
    """Returns the masked copy."""
    return masks.masked(model)


def error(found: Tensor, wanted: Tensor) -> float:
    """Returns the relative distance of two tensors."""
    return float(((found - wanted).norm() / wanted.norm()).detach())


# -- an oracle -----------------------------------------------------------------------------------------------------------------------


def best_weights(layer: Any, pairs: Iterable[tuple[Tensor, Tensor]], kept: Tensor) -> tuple[Tensor, Tensor | None]:
    """Returns weight and bias of a layer that come closest to outputs, all positions counted, by NumPy's least squares per output.

    What a weight does is found by running the layer with this weight alone, so that no layout of windows is assumed.

    Args:
        layer: has `weight` and maybe `bias`.
        pairs: input and wanted output, with outputs in dimension 1 where the layer is a convolution, else in the last.
        kept: of the weight's shape, which weights may differ from 0.
    """
    dim = -1 if isinstance(layer, nn.Linear) else 1
    probe = copy.deepcopy(layer)
    weight, bias = torch.zeros_like(layer.weight), None if layer.bias is None else torch.zeros_like(layer.bias)
    whole = list(pairs)
    columns: dict[int, list[tuple[int, np.ndarray[Any, Any]]]] = {}
    with torch.no_grad():
        if probe.bias is not None:
            probe.bias.zero_()
        for at in kept.flatten().nonzero().squeeze(1).tolist():
            probe.weight.zero_()
            probe.weight.view(-1)[at] = 1.0
            effect = torch.cat([probe(x).movedim(dim, -1).flatten(0, -2) for x, _ in whole])
            for out in effect.abs().sum(0).nonzero().squeeze(1).tolist():
                columns.setdefault(out, []).append((at, effect[:, out].numpy()))
        wanted = torch.cat([y.movedim(dim, -1).flatten(0, -2) for _, y in whole]).numpy()
        for out, found in columns.items():
            ones = [np.ones(len(wanted))] if bias is not None else []
            solution = np.linalg.lstsq(np.stack([*(c for _, c in found), *ones], 1), wanted[:, out], rcond=None)[0]
            for (at, _), value in zip(found, solution, strict=False):
                weight.view(-1)[at] = float(value)
            if bias is not None:
                bias[out] = float(solution[-1])
    return weight, bias


def check_layer(model: Any, masks: gp.Masks, fitted: Any, batches: list[Tensor], inside: Callable[[Any, Tensor], Tensor]) -> None:
    """Compares layer `b` of a fitted network with the oracle; `inside` gives the input of `b`."""
    pruned, kept = masked(masks, model), masks.for_module("b")
    with torch.no_grad():
        pairs = [(inside(pruned, x), model.b(inside(model, x))) for x in batches]
    weight, bias = best_weights(model.b, pairs, kept["weight"])
    assert error(fitted.b.weight, weight) < 1e-6
    assert error(fitted.b.weight, masked(masks, model).b.weight) > 1e-2, "the fit changes the weights"
    assert not fitted.b.weight[~kept["weight"]].any()
    if bias is not None:
        torch.testing.assert_close(fitted.b.bias, bias, rtol=1e-6, atol=1e-8)


# -- weights -------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bias", [True, False])
def test_the_second_of_two_linear_layers_is_the_least_squares_solution(bias: bool) -> None:
    """Weight and bias are those of numpy.linalg.lstsq of the original output on the inputs that are left (1707.06168, eq. 1)."""
    model = chain(nn.Linear(4, 10), nn.Linear(10, 3, bias=bias))
    batches = [normal(20, 4), normal(31, 4)]
    masks = halved(model, batches[0])
    fitted, report = reconstructed(model, masks, batches, ridge=0)
    with torch.no_grad():
        x = torch.cat([F.relu(model.a(b)) for b in batches])[:, ::2].numpy()
        y = torch.cat([model(b) for b in batches]).numpy()
    design = np.concatenate([x, np.ones((51, 1))], 1) if bias else x
    solution, residual, *_ = np.linalg.lstsq(design, y, rcond=None)
    np.testing.assert_allclose(fitted.b.weight.detach()[:, ::2].T, solution[:5], rtol=1e-6)
    assert not fitted.b.weight[:, 1::2].any()
    if bias:
        np.testing.assert_allclose(fitted.b.bias.detach(), solution[5], rtol=1e-6)
    (layer,) = report.layers
    old = masked(masks, model)
    with torch.no_grad():
        before = torch.cat([old(b) for b in batches]).numpy() - y
    assert (layer.layer, layer.operators, layer.features, layer.points) == ("b", 1, 5 + bias, 51)
    assert layer.before == pytest.approx(np.linalg.norm(before) / np.linalg.norm(y), rel=1e-9)
    assert layer.after == pytest.approx(np.sqrt(residual.sum()) / np.linalg.norm(y), rel=1e-6)
    assert layer.after < layer.before
    assert (report.left, report.samples) == ((), 51)


LAYERS: dict[str, tuple[nn.Module, nn.Module, tuple[int, ...]]] = {
    "plain": (conv(3, 6), conv(6, 4), (6, 6)),
    "strided, dilated, padded": (conv(3, 6), nn.Conv2d(6, 4, (3, 2), (2, 1), (2, 1), (1, 2)), (7, 6)),
    "padded to the same size": (conv(3, 6), nn.Conv2d(6, 4, (4, 3), padding="same", dilation=(1, 2)), (6, 7)),
    "without padding": (conv(3, 6), nn.Conv2d(6, 4, 3, padding="valid", bias=False), (6, 6)),
    "grouped": (conv(3, 8), conv(8, 6, groups=2), (6, 6)),
    "1-D": (nn.Conv1d(3, 6, 3), nn.Conv1d(6, 4, 3, stride=2, padding=1), (14,)),
    "3-D": (nn.Conv3d(3, 6, 1), nn.Conv3d(6, 2, 2, padding=1), (3, 4, 3)),
    "transposed": (conv(3, 6), nn.ConvTranspose2d(6, 4, (3, 2), (2, 3), (1, 0), (1, 2)), (5, 4)),
    "transposed, dilated, 1-D": (nn.Conv1d(3, 6, 3), nn.ConvTranspose1d(6, 2, 3, stride=2, dilation=2, bias=False), (12,)),
    "transposed, grouped": (conv(3, 8), nn.ConvTranspose2d(8, 6, 3, 2, groups=2), (5, 4)),
}


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")
@pytest.mark.parametrize("kind", list(LAYERS))
def test_convolutions_of_every_kind_are_fitted_on_all_positions(kind: str) -> None:
    """Stride, dilation, padding, conv groups and transposition: as least squares over what every single weight does."""
    first, second, size = LAYERS[kind]
    model = chain(first, second)
    batches = [normal(4, 3, *size), normal(3, 3, *size)]
    masks = halved(model, batches[0], only="a")
    fitted, report = reconstructed(model, masks, batches, points=EVERYWHERE, ridge=0)
    with torch.no_grad():
        assert report.layers[0].points == sum(model(x)[:, 0].numel() for x in batches)
    check_layer(model, masks, fitted, batches, lambda m, x: F.relu(m.a(x)))


def test_only_outputs_that_are_left_are_fitted() -> None:
    """A layer in the middle gives up outputs and inputs; rows that go stay zero, those that stay are fitted."""
    model = network(lambda m, x: m.c(F.relu(m.b(F.relu(m.a(x))))), a=conv(3, 6), b=conv(6, 4), c=conv(4, 2))
    masks, batches = halved(model, images(1)), [images(5)]
    fitted, report = reconstructed(model, masks, batches, points=EVERYWHERE, ridge=0)
    assert [layer.layer for layer in report.layers] == ["b", "c"]
    assert not fitted.b.weight[1::2].any()
    assert not fitted.b.bias[1::2].any()
    check_layer(model, masks, fitted, batches, lambda m, x: F.relu(m.a(x)))


def test_later_layers_make_up_for_the_errors_of_earlier_ones() -> None:
    """The third layer is fitted on what the fitted second gives, against what the third gave originally (1707.06168, section 3.2)."""
    model = network(lambda m, x: m.c(torch.tanh(m.b(torch.tanh(m.a(x))))), a=nn.Linear(4, 9), b=nn.Linear(9, 8), c=nn.Linear(8, 2))
    masks, x = halved(model, normal(60, 4)), normal(60, 4)
    fitted, _ = reconstructed(model, masks, [x], ridge=0)
    with torch.no_grad():
        inside = torch.tanh(fitted.b(torch.tanh(fitted.a(x))))[:, ::2].numpy()
        wanted = model(x).numpy()
    solution = np.linalg.lstsq(np.concatenate([inside, np.ones((60, 1))], 1), wanted, rcond=None)[0]
    np.testing.assert_allclose(fitted.c.weight.detach()[:, ::2].T, solution[:-1], rtol=1e-6)


def test_linear_layers_take_any_number_of_leading_dimensions() -> None:
    """Every vector of every sequence is a point."""
    model = chain(nn.Linear(4, 6), nn.Linear(6, 3))
    batches = [sequences(7), sequences(4)]
    masks = halved(model, batches[0])
    fitted, report = reconstructed(model, masks, batches, points=EVERYWHERE, ridge=0)
    assert report.layers[0].points == 11 * 5
    check_layer(model, masks, fitted, batches, lambda m, x: F.relu(m.a(x)))


@pytest.mark.parametrize(
    "multiply",
    [
        lambda x, m: x @ m.w,
        lambda x, m: x.flatten(0, 1).mm(m.w).unflatten(0, x.shape[:2]),
        lambda x, m: torch.addmm(m.bias, x.flatten(0, 1), m.w).unflatten(0, x.shape[:2]),
        lambda x, m: F.linear(x, m.turned, m.bias),
        lambda x, m: x @ m.turned.t(),
    ],
)
def test_products_with_parameters_are_layers(multiply: Callable[[Tensor, Any], Tensor]) -> None:
    """Matrices written out, in both orientations, are fitted as linear layers are."""
    parts: dict[str, Any] = {"a": nn.Linear(4, 6), "w": table(6, 3), "turned": table(3, 6), "bias": table(3)}
    model = network(lambda m, x: multiply(F.relu(m.a(x)), m), **parts)
    x = sequences(9)
    masks = halved(model, x, only="a")
    fitted, report = reconstructed(model, masks, [x], points=EVERYWHERE, ridge=0)
    (layer,) = report.layers
    with torch.no_grad():
        design = F.relu(model.a(x))[..., ::2].flatten(0, 1).numpy()
        wanted = model(x).flatten(0, 1)
        if layer.features == 4:
            design = np.concatenate([design, np.ones((45, 1))], 1)
        solution = np.linalg.lstsq(design, wanted.numpy(), rcond=None)[0]
        found = fitted(x).flatten(0, 1)
    np.testing.assert_allclose(found, design @ solution, rtol=1e-6, atol=1e-9)
    assert layer.after < layer.before


def test_channels_that_are_combinations_of_others_cost_nothing() -> None:
    """Where what goes can be computed from what stays, the pruned network equals the original; masked alone it is far off."""
    model = network(lambda m, x: m.b(m.a(x)), a=conv(3, 8), b=conv(8, 4))
    with torch.no_grad():
        mix = normal(4, 4)
        model.a.weight[1::2] = torch.einsum("ij,jckl->ickl", mix, model.a.weight[::2])
        model.a.bias.zero_()
    masks, x = halved(model, images(1)), normal(9, 3, 6, 6)
    fitted, report = reconstructed(model, masks, [images(6)], points=EVERYWHERE, ridge=1e-12)
    small, _ = gp.speedup(fitted, masks)
    with torch.no_grad():
        assert error(masked(masks, model)(x), model(x)) > 0.1
        assert error(fitted(x), model(x)) < 1e-6
        assert error(small(x), model(x)) < 1e-6
    assert report.layers[0].before > 0.1
    assert report.layers[0].after < 1e-6


def test_a_batch_norm_behind_the_layer_does_not_matter() -> None:
    """What is fitted is the output of the convolution, not that of the norm; one in front belongs to the input."""

    def run(m: Any, x: Tensor) -> Tensor:
        return F.relu(m.after(m.b(F.relu(m.before(m.a(x))))))

    model = network(run, a=conv(3, 6), before=nn.BatchNorm2d(6), b=conv(6, 4), after=nn.BatchNorm2d(4))
    masks, batches = halved(model, images(1), only="a"), [images(8)]
    fitted, _ = reconstructed(model, masks, batches, points=EVERYWHERE, ridge=0)
    check_layer(model, masks, fitted, batches, lambda m, x: F.relu(m.before(m.a(x))))


def test_norms_take_their_statistics_over_what_is_left() -> None:
    """Behind a LayerNorm the inputs are those of the shrunk network, not those of the masked one."""
    model = network(lambda m, x: m.b(m.norm(m.a(x))), a=nn.Linear(4, 8), norm=nn.LayerNorm(8), b=nn.Linear(8, 3))
    x = normal(50, 4)
    masks = halved(model, x)
    fitted, _ = reconstructed(model, masks, [x], ridge=0)
    small: Any = gp.speedup(fitted, masks)[0]
    with torch.no_grad():
        inside = small.norm(small.a(x)).numpy()
        solution = np.linalg.lstsq(np.concatenate([inside, np.ones((50, 1))], 1), model(x).numpy(), rcond=None)[0]
        np.testing.assert_allclose(small(x), np.concatenate([inside, np.ones((50, 1))], 1) @ solution, rtol=1e-6, atol=1e-8)


def test_a_layer_called_twice_is_fitted_to_both_calls() -> None:
    """One weight, one fit, over the points of all calls."""

    def run(m: Any, x: Tensor) -> Tensor:
        h = F.relu(m.a(x))
        y: Tensor = m.b(h) + m.b(torch.tanh(h))
        return y

    model = network(run, a=nn.Linear(4, 8), b=nn.Linear(8, 3))
    x = normal(40, 4)
    masks = halved(model, x, only="a")
    fitted, report = reconstructed(model, masks, [x], ridge=0)
    assert (report.layers[0].operators, report.layers[0].points) == (2, 80)
    kept = masks.for_module("b")["weight"]
    with torch.no_grad():
        whole, left = F.relu(model.a(x)), F.relu(masked(masks, model).a(x))
        pairs = [(left, model.b(whole)), (torch.tanh(left), model.b(torch.tanh(whole)))]
    weight, bias = best_weights(model.b, pairs, kept)
    torch.testing.assert_close((fitted.b.weight, fitted.b.bias), (weight, bias), rtol=1e-6, atol=1e-8)


def test_a_bias_that_others_read_stays() -> None:
    """Only the weight is fitted then, with the bias where it was."""
    model = network(lambda m, x: F.linear(F.relu(m.a(x)), m.w, m.c) * m.c, a=nn.Linear(4, 8), w=table(3, 8), c=table(3))
    x = normal(40, 4)
    masks = halved(model, x, only="a")
    fitted, _ = reconstructed(model, masks, [x], ridge=0)
    with torch.no_grad():
        inside, wanted = F.relu(model.a(x))[:, ::2].numpy(), F.linear(F.relu(model.a(x)), model.w).numpy()
    assert torch.equal(fitted.c, model.c)
    np.testing.assert_allclose(fitted.w.detach()[:, ::2].T, np.linalg.lstsq(inside, wanted, rcond=None)[0], rtol=1e-6)


# -- points --------------------------------------------------------------------------------------------------------------------------


def test_a_few_positions_are_looked_at() -> None:
    """So many points per sample, drawn by the seed: the same ones again, others with another seed."""
    model, batches = chain(conv(3, 6), conv(6, 4)), [images(4), images(2)]
    masks = halved(model, images(1))
    first, report = reconstructed(model, masks, batches, points=12)
    torch.manual_seed(5)
    again, _ = reconstructed(model, masks, iter(batches), points=12)
    other, _ = reconstructed(model, masks, batches, points=12, seed=1)
    assert report.layers[0].points == 6 * 12
    assert torch.equal(first.b.weight, again.b.weight)
    assert 1e-9 < error(other.b.weight, first.b.weight) < 1
    assert reconstructed(model, masks, batches, points=12, batches=1)[1].samples == 4
    assert reconstructed(model, masks, Loader(batches, limit=1))[1].samples == 4


def test_loaders_that_shuffle_and_trainers_give_batches_as_well() -> None:
    """The order that a loader draws follows from the seed, whatever the global random state, which stays."""
    model = network(lambda m, x: m.c(F.relu(m.b(F.relu(m.a(x))))), a=conv(3, 6), b=conv(6, 5), c=conv(5, 2))
    masks, samples = halved(model, images(1)), [(x, 0) for x in images(12)]
    loader: Any = torch.utils.data.DataLoader(samples, batch_size=4, shuffle=True)  # type: ignore[arg-type]  # a list is a data set
    results = []
    for state in (1, 2):
        torch.manual_seed(state)
        before = torch.get_rng_state()
        results.append(reconstructed(model, masks, loader, points=5, batches=2)[0])
        assert torch.equal(before, torch.get_rng_state())
    assert torch.equal(results[0].c.weight, results[1].c.weight)
    assert not torch.equal(results[0].c.weight, reconstructed(model, masks, loader, points=5, batches=2, seed=1)[0].c.weight)

    def trainer(net: nn.Module, _: Any, criterion: Any) -> None:
        for x in images(8).split(4):
            criterion(net(x), x)

    by_trainer, report = reconstructed(model, masks, Trainer(trainer, None, lambda out, _: out.sum()), points=EVERYWHERE)
    by_batches, _ = reconstructed(model, masks, images(8).split(4), points=EVERYWHERE)
    assert report.samples == 8
    torch.testing.assert_close(by_trainer.c.weight, by_batches.c.weight)
    assert reconstructed(model, masks, Trainer(trainer, None, lambda out, _: out.sum()), batches=1)[1].samples == 4


@pytest.mark.parametrize("ridge", [0, 1e-3])
def test_too_few_points_determine_what_they_can(ridge: float) -> None:
    """With fewer points than weights the points are met, and the weights move no further than the least that this takes."""
    model, x = chain(nn.Linear(4, 20), nn.Linear(20, 3, bias=False)), normal(5, 4)
    masks = halved(model, x)
    fitted, report = reconstructed(model, masks, [x], ridge=ridge)
    with torch.no_grad():
        inside = F.relu(model.a(x))[:, ::2]
        old = model.b.weight.detach()[:, ::2]
        step = torch.linalg.pinv(inside) @ (model(x) - inside @ old.T)
    moved = fitted.b.weight.detach()[:, ::2] - old
    if ridge:
        assert report.layers[0].after < 0.1 * report.layers[0].before
        assert float(moved.norm()) < float(step.norm())
    else:
        torch.testing.assert_close(moved, step.T, rtol=1e-6, atol=1e-9)
        assert report.layers[0].after < 1e-6


def test_a_ridge_holds_weights_where_they_are() -> None:
    """The solution of (X'X + ridge mean(diag)) D = X'E per weight; a large one changes nothing."""
    model, x = chain(nn.Linear(4, 8), nn.Linear(8, 3, bias=False)), normal(30, 4)
    masks = halved(model, x)
    with torch.no_grad():
        inside = F.relu(model.a(x))[:, ::2]
        missing = model(x) - inside @ model.b.weight[:, ::2].T
        gram = inside.T @ inside
        step = torch.linalg.solve(gram + 0.3 * gram.diagonal().mean() * torch.eye(4, dtype=torch.float64), inside.T @ missing)
    fitted, report = reconstructed(model, masks, [x], ridge=0.3)
    torch.testing.assert_close(fitted.b.weight[:, ::2] - model.b.weight[:, ::2], step.T, rtol=1e-8, atol=1e-12)
    assert report.layers[0].after == pytest.approx(float((missing - inside @ step).norm() / model(x).detach().norm()), rel=1e-6)
    held, _ = reconstructed(model, masks, [x], ridge=1e12)
    torch.testing.assert_close(held.b.weight, masked(masks, model).b.weight, rtol=1e-6, atol=1e-9)


def test_inputs_that_are_always_zero_leave_the_weights_alone() -> None:
    """Nothing is divided by nothing where a layer sees zeros only; the bias takes what there is to take."""
    model = network(lambda m, x: m.b(F.relu(m.a(x)) * 0), a=nn.Linear(4, 8), b=nn.Linear(8, 3))
    masks = halved(model, normal(6, 4))
    fitted, report = reconstructed(model, masks, [normal(6, 4)])
    assert torch.equal(fitted.b.weight, masked(masks, model).b.weight)
    assert report.layers[0].after == 0


def test_points_that_are_not_finite_do_not_count() -> None:
    """A sample with infinities is left out; without any other, the layer is left alone."""
    model, x = chain(nn.Linear(4, 8), nn.Linear(8, 3)), normal(30, 4)
    masks = halved(model, x)
    broken = torch.cat([x, torch.full((1, 4), torch.inf, dtype=torch.float64)])
    fitted, report = reconstructed(model, masks, [broken], ridge=0)
    assert report.layers[0].points == 30
    torch.testing.assert_close(fitted.b.weight, reconstructed(model, masks, [x], ridge=0)[0].b.weight)
    _, report = reconstructed(model, masks, [broken[30:]])
    assert (report.layers, report.left) == ((), (LeftAlone("b", "has no finite outputs on the data"),))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_keep_their_type(dtype: torch.dtype) -> None:
    """Sums are in double precision whatever the network computes in."""
    model, x = chain(nn.Linear(4, 8), nn.Linear(8, 3)).to(dtype), normal(64, 4).to(dtype)
    masks = halved(model, x)
    fitted, report = reconstructed(model, masks, [x])
    assert fitted.b.weight.dtype is dtype
    assert report.layers[0].after < report.layers[0].before
    with torch.no_grad():
        assert error(fitted(x).double(), model(x).double()) == pytest.approx(report.layers[0].after, rel=0.05)


# -- what stays ----------------------------------------------------------------------------------------------------------------------


def test_the_model_is_left_as_it_was_and_the_result_can_be_shrunk() -> None:
    """Bit-identical tensors, flags, hooks and random state; the shrunk result computes what the fitted masked one does."""
    model = network(
        lambda m, x: m.fc(F.relu(m.b(F.dropout(F.relu(m.norm(m.a(x))), 0.5, m.training))).mean((2, 3))),
        a=conv(3, 6),
        norm=nn.BatchNorm2d(6),
        b=conv(6, 4),
        fc=nn.Linear(4, 2),
    ).train()
    masks = halved(model, images(1))
    before = snapshot(model)
    fitted, _ = reconstructed(model, masks, [(images(3), torch.zeros(3)), (images(2), torch.zeros(2))])
    assert not changes(before, snapshot(model))
    assert fitted.training
    small, report = gp.speedup(fitted, masks)
    assert report.error < 1e-9
    with torch.no_grad():
        torch.testing.assert_close(small.eval()(images(5)), fitted.eval()(images(5)), rtol=1e-9, atol=1e-12)
    assert {n for n, t in fitted.named_parameters() if not torch.equal(t, masked(masks, model).get_parameter(n))} == {
        "b.weight",
        "b.bias",
        "fc.weight",
        "fc.bias",
    }


def test_a_graph_module_is_reconstructed_like_any_model() -> None:
    """What a first speedup returned as a graph can lose more, and is fitted by its operators."""
    model = network(lambda m, x: m.c(F.relu(m.b(F.relu(m.a(x))))), a=conv(3, 8), b=conv(8, 6), c=conv(6, 2))
    graph, _ = gp.speedup(model, halved(model, images(1)), images(1), result="graph")
    assert isinstance(graph, torch.fx.GraphModule)
    masks = halved(graph, images(1))
    fitted, report = reconstructed(graph, masks, [images(6)])
    assert [each.layer for each in report.layers] == ["b", "c"]
    assert all(each.after < each.before for each in report.layers)
    small, verified = gp.speedup(fitted, masks)
    assert verified.error < 1e-9
    assert error(small(images(6)), graph(images(6))) == pytest.approx(report.layers[-1].after, rel=0.2)


class Scaled(nn.Module):
    """A parametrization that computes a weight from what is stored."""

    def forward(self, weight: Tensor) -> Tensor:
        """Returns the weight."""
        return weight * 2


def parametrized() -> nn.Module:
    """Returns a linear layer with a weight that is computed."""
    layer = nn.Linear(8, 3)
    torch.nn.utils.parametrize.register_parametrization(layer, "weight", Scaled())
    return layer


def tied(m: Any, x: Tensor) -> Tensor:
    """Reads and writes words by the same table."""
    return F.linear(F.relu(m.a(F.embedding(x, m.b))), m.b)


ALONE: dict[str, tuple[Callable[[], Any], str, str]] = {
    "parametrized": (lambda: chain(nn.Linear(4, 8), parametrized()), "b.parametrizations.weight", "computed from its parameters, by mul"),
    "recurrent": (
        lambda: network(lambda m, x: m.b(F.relu(m.a(x)))[0], a=nn.Linear(4, 8), b=nn.LSTM(8, 3)),
        "b",
        "is read by lstm in 'b', which is not fitted",
    ),
    "in parts": (
        lambda: network(lambda m, x: F.linear(F.relu(m.a(x)), m.w.chunk(2)[0]), a=nn.Linear(4, 8), w=table(6, 8)),
        "w",
        "gives linear in the model a weight that is computed from its parameters, by",
    ),
    "first factor": (
        lambda: network(lambda m, x: m.w @ F.relu(m.a(x)).mT, a=nn.Linear(4, 8), w=table(3, 8)),
        "w",
        "has its weight as the first factor of matmul",
    ),
    "scaled": (
        lambda: network(lambda m, x: m.c.addmm(F.relu(m.a(x[:, 0])), m.w, alpha=2), a=nn.Linear(4, 8), w=table(8, 3), c=table(3)),
        "w",
        "is scaled in addmm",
    ),
    "two ways": (
        lambda: network(lambda m, x: two_ways(F.relu(m.a(x)), m.w), a=nn.Linear(4, 8), w=table(8, 8)),
        "w",
        "is called in several ways",
    ),
}


def two_ways(x: Tensor, w: Tensor) -> Tensor:
    """Multiplies by a matrix and by its transpose."""
    return F.linear(x, w).mean(-1) + (x @ w).mean(-1)


@pytest.mark.parametrize("kind", list(ALONE))
def test_layers_that_cannot_be_fitted_are_named(kind: str) -> None:
    """They keep their weights, masked, and the report says which they are and why."""
    make, layer, words_of = ALONE[kind]
    model = make()
    masks = halved(model, sequences(2), only="a")
    fitted, report = reconstructed(model, masks, [sequences(6)])
    assert [each.layer for each in report.left] == [layer]
    assert words_of in report.left[0].reason
    assert not report.layers
    assert not changes(snapshot(masked(masks, model))["tensors"], snapshot(fitted)["tensors"])
    assert f"Left alone: {layer}, as it" in str(report)


def test_tied_weights_are_left_alone() -> None:
    """A table that words are also looked up in would change its other use."""
    model = network(tied, a=nn.Linear(6, 6, bias=False), b=table(11, 6))
    masks = halved(model, words(2))
    _, report = reconstructed(model, masks, [words(5)])
    assert [layer.layer for layer in report.layers] == ["a"]
    assert report.left == (LeftAlone("b", "is read by embedding in the model as well"),)


def test_what_is_too_wide_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """The normal equations are never larger than the limit."""
    monkeypatch.setattr(readers, "WIDEST", 26)
    model = network(lambda m, x: m.c(m.b(m.a(x))), a=conv(3, 6), b=conv(6, 4), c=conv(4, 2, 1))
    _, report = reconstructed(model, halved(model, images(1)), [images(3)])
    assert report.left == (LeftAlone("b", "has 28 features per output, more than 26"),)
    assert [layer.layer for layer in report.layers] == ["c"]


def test_depthwise_layers_read_nothing_that_goes() -> None:
    """What is left of them sees all of its inputs, so they are not fitted; nor is anything where nothing goes."""
    model = network(lambda m, x: m.c(m.b(m.a(x))), a=conv(3, 6), b=conv(6, 6, groups=6), c=conv(6, 2, 1))
    masks = halved(model, images(1))
    _, report = reconstructed(model, masks, [images(3)])
    assert ([layer.layer for layer in report.layers], report.left) == (["c"], ())
    fitted, report = reconstructed(model, gp.Masks(masks.graph), [images(3)])
    assert (report.layers, report.left) == ((), ())
    assert torch.equal(fitted.c.weight, model.c.weight)


def test_outputs_whose_number_depends_on_values_are_left_alone() -> None:
    """The two networks find different positions, which cannot be compared."""

    def run(m: Any, x: Tensor) -> Tensor:
        h = F.relu(m.a(x))
        y: Tensor = m.b(h[h.sum(1) > 1.0])
        return y

    model = network(run, a=nn.Linear(4, 8), b=nn.Linear(8, 3))
    _, report = reconstructed(model, halved(model, normal(40, 4)), [normal(40, 4)])
    assert report.left == (LeftAlone("b", "has outputs whose number depends on values"),)


# -- reports, errors -----------------------------------------------------------------------------------------------------------------


def test_the_report_prints_and_is_frozen() -> None:
    """A table of errors, plain values for JSON, and records that cannot be changed."""
    model = chain(conv(3, 6), conv(6, 4))
    _, report = reconstructed(model, halved(model, images(1)), [images(3)])
    text = str(report)
    assert "Reconstruction (3 samples" in text
    assert f"{report.layers[0].before:.2%}" in text
    assert report.to_dict()["layers"][0]["layer"] == "b"
    with pytest.raises(FrozenInstanceError):
        report.samples = 0  # type: ignore[misc]


@pytest.mark.parametrize(
    ("options", "words_of"),
    [
        ({"points": 0}, "points of a reconstruction is 0"),
        ({"batches": True}, "batches of a reconstruction is True.*None for all"),
        ({"seed": -1}, "seed of a reconstruction is -1"),
        ({"ridge": -1.0}, "ridge of a reconstruction is -1.0"),
        ({"ridge": float("nan")}, "ridge of a reconstruction is nan"),
        ({"data": None}, "reconstruct looks at data, and there is none"),
        ({"data": images(2)}, "data is a Tensor, not several batches"),
    ],
)
def test_impossible_options_are_refused(options: dict[str, Any], words_of: str) -> None:
    """Errors name the argument and what to pass."""
    model = chain(conv(3, 6), conv(6, 4))
    with pytest.raises(ConfigError, match=words_of):
        reconstructed(model, halved(model, images(1)), **{"data": [images(2)], **options})


def test_masks_and_batches_that_do_not_fit_are_refused() -> None:
    """Masks of elements, of another model, no batches, and batches of another shape or path."""
    model = chain(conv(3, 6), conv(6, 4))
    masks = halved(model, images(1))
    elements: Any = gp.ElementMasks(model, {"a.weight": torch.ones(6, 3, 3, 3, dtype=torch.bool)})
    with pytest.raises(ConfigError, match=r"the masks are ElementMasks.*masks\.channels\(graph\)"):
        reconstructed(model, elements, [images(1)])
    with pytest.raises(MaskError, match="Use masks made for this model"):
        reconstructed(chain(conv(3, 6), conv(6, 5)), masks, [images(1)])
    with pytest.raises(InputError, match="the data has no batches"):
        reconstructed(model, masks, [])
    with pytest.raises(InputError, match="batch 2 cannot be used"):
        reconstructed(model, masks, [images(1), normal(1, 2, 6, 6)])
    turning = network(lambda m, x: m.b(F.relu(m.a(x)) if x.shape[0] < 3 else F.silu(m.a(x))), a=conv(3, 6), b=conv(6, 4))
    with pytest.raises(InputError, match="takes another path"):
        reconstructed(turning, halved(turning, images(1)), [images(4)])


# -- networks drawn at random --------------------------------------------------------------------------------------------------------


def test_random_networks_are_fitted_exactly_as_they_are_shrunk() -> None:
    """Whatever the network: errors never grow, what goes stays zero, the model is untouched, and the result shrinks exactly."""
    fitted_layers = 0

    def check(drawn: Drawn) -> None:
        nonlocal fitted_layers
        model = build(drawn)
        masks = random_masks(gp.trace(model, inputs_of(drawn, 2)), drawn.seed)
        before = snapshot(model)
        fitted, report = reconstructed(model, masks, [normalise(inputs_of(drawn, n)) for n in (4, 6)])
        assert not changes(before, snapshot(model))
        assert all(each.after <= each.before * (1 + 1e-6) + 1e-9 for each in report.layers)
        again = masks.masked(fitted)
        assert all(torch.equal(t, again.get_parameter(n)) for n, t in fitted.named_parameters())
        gp.speedup(fitted, masks)
        fitted_layers += len(report.layers)

    run_draws(1, 12, check, shrink=False)
    assert fitted_layers > 20


# -- searches ------------------------------------------------------------------------------------------------------------------------


def closeness(model: nn.Module, batch: Tensor) -> Callable[[nn.Module], float]:
    """Returns an evaluator: how close a pruned model's output is to that of the original."""
    with torch.no_grad():
        wanted = model(batch)
    return lambda small: 1.0 - error(small(batch), wanted)


@pytest.mark.parametrize("physical", [True, False])
def test_an_objective_evaluates_reconstructed_models(physical: bool) -> None:
    """Trials score what `reconstruct` and then `speedup` give, and the run's settings say how it was fitted."""
    model, batches = chain(conv(3, 6), conv(6, 4)), [images(30)]
    options: dict[str, Any] = {"evaluator": closeness(model, images(5)), "physical": physical}
    plain = gp.Objective(model, images(1), **options)
    fitting = gp.Objective(model, images(1), **options, reconstruct=gp.Reconstruction(batches, points=20))
    point = {"a": 0.5}
    masks = fitting.masks(point)
    fitted, _ = reconstructed(model, masks, batches, points=20)
    small = gp.speedup(fitted, masks)[0] if physical else fitted
    before = snapshot(model)
    torch.testing.assert_close(fitting.small(point)(images(2)), small(images(2)))
    assert fitting(point).score == pytest.approx(options["evaluator"](small.eval()))
    assert fitting(point).score > plain(point).score
    assert not changes(before, snapshot(model))
    assert fitting.settings()["reconstruct"] == {"data": "list", "points": 20, "batches": 60, "ridge": 1e-3, "seed": 0}
    assert "reconstruct" not in plain.settings()
    assert gp.Objective(model, images(1), **options, reconstruct=batches).settings()["reconstruct"]["points"] == 10
    with pytest.raises(ConfigError, match="data is a Tensor"):
        gp.Objective(model, images(1), **options, reconstruct=images(3))


@pytest.mark.parametrize("kind", ["amc", "annealing"])
def test_searches_reconstruct_where_they_are_told_to(kind: str, tmp_path: Path) -> None:
    """Rewards are those of reconstructed models, the result is one, and a run is continued with the same reconstruction only."""
    model = network(lambda m, x: m.c(F.relu(m.b(F.relu(m.a(x))))), a=conv(3, 8), b=conv(8, 8), c=conv(8, 2))
    evaluate = closeness(model, images(6))

    def searching(data: Any, folder: Path | None = None) -> gp.AMCPruner | gp.SimulatedAnnealingPruner:
        options: dict[str, Any] = {"example_inputs": images(1), "reconstruct": data, "budget": gp.Budget(macs=0.5), "folder": folder}
        if kind == "annealing":
            return gp.SimulatedAnnealingPruner(model, [{"op_types": ["Conv2d"]}], evaluate, trials=3, **options)
        return gp.AMCPruner(3, model, [{"op_types": ["Conv2d"]}], evaluate, ddpg_params={"hidden": 8, "warm_up": 2}, **options)

    pruner = searching(gp.Reconstruction([images(4)], points=36), tmp_path)
    fitted, masks = pruner.compress()
    assert evaluate(fitted.eval()) == pytest.approx(pruner.best.score, rel=1e-9)
    assert evaluate(masks.masked(model).eval()) < pruner.best.score
    assert torch.equal(fitted.get_parameter("b.weight"), reconstructed(model, masks, [images(4)], points=36)[0].b.weight)
    assert max(trial.score for trial in searching(None).search().history) < pruner.best.score
    with pytest.raises(FileError, match="reconstruct was"):
        searching([images(4)], tmp_path).search()


# -- digits --------------------------------------------------------------------------------------------------------------------------


@cache
def digits() -> demo.Digits:
    """Returns the digits at their own size."""
    pytest.importorskip("sklearn.datasets")
    return demo.load_digits(8)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(3))
def test_a_residual_network_keeps_its_accuracy_without_training(seed: int) -> None:
    """Half of all channels gone: reconstruction keeps far more of the accuracy than masking and re-estimated statistics do."""
    data = digits()
    model = demo.build(8, seed)
    demo.train(model, data, epochs=8, lr=0.1, seed=seed)
    masks = gp.Pruner(model, [{"op_types": ["default"], "sparsity": 0.5}], gp.L1(), data.train_images[:2]).masks()
    fitted, report = reconstructed(model, masks, [(batch, None) for batch in data.train_images.split(100)])
    before = snapshot(model)
    accuracies = {"dense": demo.accuracy(model, data)}
    for name, full in (("masked", model), ("fitted", fitted)):
        small, _ = gp.speedup(full, masks)
        accuracies[name] = demo.accuracy(small, data)
        gp.recalibrate(small, data.train_images.split(100))
        accuracies[f"{name}, recalibrated"] = demo.accuracy(small, data)
    assert not changes(before, snapshot(model))
    assert all(layer.after < layer.before for layer in report.layers)
    assert accuracies["fitted"] > accuracies["masked, recalibrated"] + 0.2 > accuracies["masked"] + 0.4, accuracies
    assert accuracies["fitted"] > accuracies["dense"] - 0.03, accuracies
