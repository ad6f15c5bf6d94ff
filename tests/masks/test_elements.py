"""Element masks zero single weights, fit one model only, survive a round trip to disk, and say which channels have no weight left."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy
import torch
from torch import nn
from torch.nn import functional

import graphprune as gp
from tests.support.handmade import Residual, residual
from tests.support.invariants import evaluate
from tests.support.operators import Network
from tests.support.untouched import assert_same, changes, snapshot


def random_masks(model: nn.Module, *names: str) -> gp.ElementMasks:
    """Returns masks that keep about half of the elements of the named parameters."""
    generator = torch.Generator().manual_seed(3)
    shapes = {name: tensor.shape for name, tensor in model.named_parameters()}
    return gp.ElementMasks(model, {name: torch.rand(shapes[name], generator=generator) > 0.5 for name in names})


def tied() -> Network:
    """Returns a network whose two embeddings are one tensor."""
    table = nn.Parameter(torch.arange(1.0, 13.0).reshape(4, 3))
    model = Network(
        lambda m, x: functional.linear(m.first(x), m.second.weight), {"first": nn.Embedding(4, 3), "second": nn.Embedding(4, 3)}
    )
    model.get_submodule("first").weight = table
    model.get_submodule("second").weight = table
    return model


# -- a mapping -----------------------------------------------------------------------------------------------------------------------


def test_element_masks_are_a_mapping_from_parameters_to_flags() -> None:
    """The listed parameters are the keys, in the order given; the rest is what mappings do."""
    model, _ = residual()
    masks = random_masks(model, "head.weight", "stem.bias")
    assert list(masks) == ["head.weight", "stem.bias"]
    assert len(masks) == 2
    assert "stem.bias" in masks
    assert "stem.weight" not in masks
    assert masks.get("stem.weight") is None
    assert masks.get("nothing", 7) == 7
    assert {mask.dtype for mask in masks.values()} == {torch.bool}
    assert {name: tuple(mask.shape) for name, mask in masks.items()} == {"head.weight": (5, 96), "stem.bias": (6,)}


def test_the_sparsity_is_the_share_of_listed_elements_that_go() -> None:
    """Two of five and one of six elements are three of eleven; parameters that are not listed do not count."""
    model, _ = residual()
    bias, head = torch.ones(6, dtype=torch.bool), torch.ones(5, dtype=torch.bool)
    bias[1], head[2:4] = False, False
    assert gp.ElementMasks(model, {"stem.bias": bias, "head.bias": head}).sparsity == pytest.approx(3 / 11)
    assert gp.ElementMasks(model, {}).sparsity == 0


@pytest.mark.parametrize("convert", [torch.clone, lambda tensor: tensor.numpy()])
def test_flags_come_as_tensors_or_arrays_and_share_no_memory(convert: Any) -> None:
    """Tensors and NumPy arrays are taken alike, and changing them afterwards does not change the masks."""
    model, _ = residual()
    flags = convert(torch.ones(6, dtype=torch.bool))
    masks = gp.ElementMasks(model, {"stem.bias": flags})
    flags[:] = False
    assert masks["stem.bias"].all()


@pytest.mark.parametrize(
    ("kept", "words"),
    [
        ({"stem.wight": torch.ones(6, dtype=torch.bool)}, "Residual has no parameter called 'stem.wight'.*did you mean 'stem.weight'"),
        ({"zzz": torch.ones(6, dtype=torch.bool)}, "no parameter called 'zzz'.*Use masks made for this model"),
        ({"stem_norm.running_mean": torch.ones(6, dtype=torch.bool)}, "no parameter called 'stem_norm.running_mean'"),
        ({"stem.bias": torch.ones(6)}, r"'stem.bias' is torch.float32 of shape \(6,\), not torch.bool of shape \(6,\)"),
        ({"stem.bias": torch.ones(6, dtype=torch.uint8)}, "is torch.uint8"),
        ({"stem.bias": torch.ones(5, dtype=torch.bool)}, r"of shape \(5,\), not torch.bool of shape \(6,\)"),
        ({"stem.bias": torch.ones(6, 1, dtype=torch.bool)}, r"of shape \(6, 1\)"),
    ],
)
def test_masks_that_do_not_fit_are_refused(kept: Any, words: str) -> None:
    """Unknown parameters, other shapes and other types are each one clear error."""
    with pytest.raises(gp.MaskError, match=words):
        gp.ElementMasks(residual()[0], kept)


def test_parameters_without_a_mask_are_answered_with_the_nearest() -> None:
    """Asking for a parameter that is not listed suggests one that is."""
    masks = random_masks(residual()[0], "head.weight")
    with pytest.raises(gp.MaskError, match=r"no element mask is listed for 'head.wieght'.*did you mean 'head.weight'"):
        masks["head.wieght"]
    with pytest.raises(gp.MaskError, match=r"no element mask is listed for 'stem.bias'"):
        masks["stem.bias"]


def test_tied_parameters_are_one() -> None:
    """A tensor with two names is listed under the first, found under both, and cannot have two masks."""
    model = tied()
    flags = torch.tensor([[True, False, True]]).expand(4, 3)
    masks = gp.ElementMasks(model, {"second.weight": flags})
    assert list(masks) == ["first.weight"]
    assert torch.equal(masks["second.weight"], flags)
    assert torch.equal(masks.for_module("second")["weight"], flags)
    assert masks.masked(model).get_parameter("second.weight")[:, 1].abs().sum() == 0
    with pytest.raises(gp.MaskError, match=r"'second.weight' and 'first.weight' are one parameter with two masks"):
        gp.ElementMasks(model, {"first.weight": flags, "second.weight": flags})


# -- modules and models --------------------------------------------------------------------------------------------------------------


def test_masks_of_one_module() -> None:
    """`for_module` gives a boolean tensor per parameter of the module, of its shape; what is not listed is kept whole."""
    model, _ = residual()
    masks = random_masks(model, "stem.weight")
    found = masks.for_module("stem")
    assert found.keys() == {"weight", "bias"}
    assert torch.equal(found["weight"], masks["stem.weight"])
    assert found["bias"].shape == (6,)
    assert found["bias"].all()
    linear = nn.Linear(2, 2)
    assert gp.ElementMasks(linear, {"bias": torch.tensor([True, False])}).for_module("")["bias"].tolist() == [True, False]


def test_masks_of_an_unknown_module_suggest_the_nearest() -> None:
    """A module that does not exist, or that has no parameters, is refused."""
    masks = random_masks(residual()[0], "stem.weight")
    with pytest.raises(gp.MaskError, match=r"no module with parameters is called 'steem'.*did you mean 'stem'"):
        masks.for_module("steem")
    with pytest.raises(gp.MaskError, match="no module with parameters is called ''"):
        masks.for_module("")


def test_the_masked_copy_has_zeros_exactly_where_the_masks_say_so() -> None:
    """Masked elements are zero (also those that were NaN), all others are what they were, and the model itself is left alone."""
    model, _ = residual()
    with torch.no_grad():
        model.head.weight[0, 0] = torch.nan
    masks = random_masks(model, "stem.weight", "head.weight")
    flags = masks["head.weight"].clone()
    flags[0, 0] = False
    masks = gp.ElementMasks(model, {"stem.weight": masks["stem.weight"], "head.weight": flags})
    before = snapshot(model)
    clone = masks.masked(model)
    assert changes(before, snapshot(model)) == []
    for name, tensor in clone.named_parameters():
        expected = model.get_parameter(name).detach().clone()
        for position in np.ndindex(*expected.shape):
            if name in masks and not masks[name][position]:
                expected[position] = 0
        assert torch.equal(tensor, expected), name


def test_masks_are_applied_in_place() -> None:
    """`apply` zeroes the model's own parameters, which stay the same objects."""
    model, _ = residual()
    weight = model.stem.weight
    masks = random_masks(model, "stem.weight")
    masks.apply(model)
    assert model.stem.weight is weight
    assert weight[~masks["stem.weight"]].abs().sum() == 0
    assert (weight[masks["stem.weight"]] != 0).all()


def test_masks_of_another_model_are_not_applied() -> None:
    """A listed parameter that is missing or of another shape is refused before anything is zeroed; others may differ."""
    model, _ = residual()
    masks = random_masks(model, "stem.bias", "inner.weight")
    wider = Residual(6, 8).double().eval()
    before = snapshot(wider)
    with pytest.raises(gp.MaskError, match=r"'inner.weight' is \(8, 6, 3, 3\) in Residual, but \(4, 6, 3, 3\) where the masks were made"):
        masks.apply(wider)
    assert changes(before, snapshot(wider)) == []
    with pytest.raises(gp.MaskError, match=r"'stem.bias' is missing in Linear"):
        masks.apply(nn.Linear(2, 2))
    random_masks(model, "stem.bias").apply(wider)
    with pytest.raises(gp.InputError, match="meta device"):
        masks.apply(Residual().to("meta"))


# -- channels ------------------------------------------------------------------------------------------------------------------------


def test_channels_without_weights_are_found_and_removed() -> None:
    """A channel goes when all its producing weights are masked, in every layer that produces it; `speedup` then removes it."""
    model, inputs = residual()
    graph = gp.trace(model, inputs)
    flags = {
        name: torch.ones(model.get_parameter(name).shape, dtype=torch.bool) for name in ("stem.weight", "outer.weight", "inner.weight")
    }
    flags["stem.weight"][[1, 2, 4]] = False
    flags["outer.weight"][[1, 4]] = False
    flags["outer.weight"][2, 0] = False  # channel 2 has weights left here
    flags["inner.weight"][0] = False
    flags["inner.weight"][2] = False
    flags["inner.weight"][2, 5, 1, 1] = True  # one weight is left of channel 2
    masks = gp.ElementMasks(model, flags)
    channels = masks.channels(graph)
    assert channels["stem"].tolist() == [True, False, True, True, False, True]
    assert channels["inner"].tolist() == [False, True, True, True]
    small, report = gp.speedup(model, channels, example_inputs=inputs)
    assert report.error < 1e-9
    assert small.get_parameter("stem.weight").shape[0] == 4
    assert small.get_parameter("inner.weight").shape[0] == 3


def test_a_group_keeps_its_first_channel() -> None:
    """Where no channel has a weight left, the first stays; a producing layer without a mask keeps all channels."""
    model, inputs = residual()
    graph = gp.trace(model, inputs)
    none = {name: torch.zeros(model.get_parameter(name).shape, dtype=torch.bool) for name in ("stem.weight", "inner.weight")}
    channels = gp.ElementMasks(model, none).channels(graph)
    assert channels["inner"].tolist() == [True, False, False, False]
    assert channels["stem"].all()  # "outer" produces these channels too


def test_channels_of_another_graph_are_refused() -> None:
    """A graph whose parameters have other shapes is refused."""
    masks = random_masks(residual()[0], "inner.weight")
    wider = Residual(6, 8).double().eval()
    with pytest.raises(gp.MaskError, match=r"'inner.weight' is \(8, 6, 3, 3\) in the graph, but \(4, 6, 3, 3\)"):
        masks.channels(gp.trace(wider, residual()[1]))


# -- files ---------------------------------------------------------------------------------------------------------------------------


def test_masks_survive_a_round_trip(tmp_path: Path) -> None:
    """What is loaded equals what was saved, and masks a model alike; the file is plain safetensors and nothing else is left."""
    model, inputs = residual()
    masks = random_masks(model, "stem.weight", "head.weight", "stem.bias")
    masks.save(str(tmp_path / "elements.safetensors"))
    loaded = gp.ElementMasks.load(tmp_path / "elements.safetensors", residual()[0])
    assert loaded.keys() == masks.keys()
    assert all(torch.equal(loaded[name], mask) for name, mask in masks.items())
    assert_same(evaluate(masks.masked(model), inputs), evaluate(loaded.masked(model), inputs), "the loaded masks give another model")
    assert [path.name for path in tmp_path.iterdir()] == ["elements.safetensors"]
    assert safetensors.numpy.load_file(tmp_path / "elements.safetensors")["stem.bias"].tolist() == masks["stem.bias"].int().tolist()


def test_other_files_are_refused(tmp_path: Path) -> None:
    """Missing files, files of another kind, masks of channels and masks of another model are each one clear error."""
    model, inputs = residual()
    (tmp_path / "text").write_text("no masks")
    for name in ("missing", "text", "."):
        with pytest.raises(gp.FileError, match=r"cannot read masks from .*Pass a file written by ElementMasks\.save"):
            gp.ElementMasks.load(tmp_path / name, model)
    path = tmp_path / "channels"
    gp.Masks(gp.trace(model, inputs)).save(path)
    with pytest.raises(gp.MaskError, match=r"holds no element masks.*Masks\.load"):
        gp.ElementMasks.load(path, model)
    random_masks(model, "inner.weight").save(path)
    with pytest.raises(gp.MaskError, match=r"of shape \(4, 6, 3, 3\), not torch.bool of shape \(8, 6, 3, 3\)"):
        gp.ElementMasks.load(path, Residual(6, 8))
    with pytest.raises(gp.MaskError, match="were made for another model"):
        gp.Masks.load(path, gp.trace(model, inputs))
    with pytest.raises(gp.FileError, match=r"cannot write masks to .*Choose a folder that exists"):
        random_masks(model, "inner.weight").save(tmp_path / "missing" / "file")
