"""Masks say which channels stay, fit one structure only, and survive a round trip to disk."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import graphprune as gp
from graphprune.masks import channels as masks_module
from tests.support.handmade import Residual, residual
from tests.support.invariants import evaluate, removed_positions
from tests.support.operators import Network, conv, filled, words
from tests.support.untouched import assert_same, changes, same_bits, snapshot

KEPT = {"stem": [True, False, True, True, False, True], "inner": [False, True, True, False]}


@functools.cache
def traced() -> gp.DependencyGraph:
    """Returns the graph of a residual network: "stem" with six channels and "inner" with four."""
    return gp.trace(*residual())


def masks() -> gp.Masks:
    """Returns masks that keep four of the six channels of "stem" and two of the four of "inner"."""
    return gp.Masks(traced(), {name: np.array(kept) for name, kept in KEPT.items()})


# -- a mapping -----------------------------------------------------------------------------------------------------------------------


def test_masks_are_a_mapping_from_groups_to_flags() -> None:
    """Every group has an entry, in the order of the graph, as a boolean array; the rest is what mappings do."""
    made = masks()
    assert list(made) == ["stem", "inner"]
    assert len(made) == 2
    assert "stem" in made
    assert "head" not in made
    assert {name: mask.tolist() for name, mask in made.items()} == KEPT
    assert {mask.dtype for mask in made.values()} == {np.dtype(np.bool_)}


def test_groups_left_out_are_kept_whole() -> None:
    """Without an entry a group loses nothing; without any, nothing is removed at all."""
    assert gp.Masks(traced(), {"inner": np.array(KEPT["inner"])})["stem"].all()
    assert gp.Masks(traced()).sparsity == 0
    assert gp.Masks(traced()).positions() == {}


def test_the_sparsity_is_the_share_of_channels_that_go() -> None:
    """Four of ten channels go."""
    assert masks().sparsity == pytest.approx(0.4)


@pytest.mark.parametrize("convert", [np.array, torch.tensor, list])
def test_flags_come_as_arrays_tensors_or_lists(convert: Any) -> None:
    """NumPy arrays, tensors and lists of booleans are taken alike."""
    assert gp.Masks(traced(), {"inner": convert(KEPT["inner"])})["inner"].tolist() == KEPT["inner"]


def test_masks_do_not_share_memory_with_what_they_were_made_of() -> None:
    """Changing the given array afterwards does not change the masks."""
    given_array = np.array(KEPT["inner"])
    made = gp.Masks(traced(), {"inner": given_array})
    given_array[:] = True
    assert made["inner"].tolist() == KEPT["inner"]


@pytest.mark.parametrize(
    ("kept", "words_of_error"),
    [
        ({"stme": np.ones(6, bool)}, "no group is called 'stme'.*did you mean 'stem'"),
        ({"zzz": np.ones(6, bool)}, "no group is called 'zzz'.*Use masks made for this model"),
        ({"stem": np.ones(5, bool)}, r"group 'stem' is bool of shape \(5,\), not bool of shape \(6,\)"),
        ({"stem": np.ones((6, 1), bool)}, r"shape \(6, 1\)"),
        ({"stem": np.ones(6)}, r"is float64 of shape \(6,\)"),
        ({"stem": torch.ones(6)}, "is float32"),
        ({"stem": np.arange(6)}, "is int64"),
        ({"stem": np.zeros(6, bool)}, "removes all its 6 channels.*Keep at least one"),
        ({"stem": True}, r"shape \(\)"),
    ],
)
def test_masks_that_do_not_fit_are_refused(kept: Any, words_of_error: str) -> None:
    """Unknown groups, other lengths, other types and empty layers are each one clear error."""
    with pytest.raises(gp.MaskError, match=words_of_error):
        gp.Masks(traced(), kept)


def test_unknown_groups_are_answered_with_the_nearest() -> None:
    """Asking for a group that does not exist suggests the right name."""
    with pytest.raises(gp.MaskError, match=r"no group is called 'iner'.*did you mean 'inner'"):
        masks()["iner"]


# -- positions -----------------------------------------------------------------------------------------------------------------------


def test_positions_of_every_tensor() -> None:
    """What stays of each dimension follows from the slices: channels, and sixteen columns per channel after flattening."""
    positions = masks().positions()
    stem, inner = np.array([0, 2, 3, 5]), np.array([1, 2])
    assert positions["stem.weight"].keys() == {0}
    assert np.array_equal(positions["stem.weight"][0], stem)
    assert np.array_equal(positions["inner.weight"][0], inner)
    assert np.array_equal(positions["inner.weight"][1], stem)
    assert np.array_equal(positions["inner_norm.running_var"][0], inner)
    assert np.array_equal(positions["head.weight"][1], (stem[:, None] * 16 + np.arange(16)).ravel())
    assert "head.bias" not in positions


@given(st.lists(st.booleans(), min_size=6, max_size=6).filter(any), st.lists(st.booleans(), min_size=4, max_size=4).filter(any))
def test_positions_are_the_complement_of_what_the_slices_remove(stem: list[bool], inner: list[bool]) -> None:
    """For any masks, kept and removed positions of every tensor divide its dimension between them."""
    made = gp.Masks(traced(), {"stem": np.array(stem), "inner": np.array(inner)})
    positions = made.positions()
    for (name, dim), removed in removed_positions(traced(), made).items():
        kept = positions.get(name, {}).get(dim, np.arange(traced().shapes[name][dim]))
        assert sorted([*kept.tolist(), *removed.tolist()]) == list(range(traced().shapes[name][dim]))
    assert made.sparsity == pytest.approx(1 - (sum(stem) + sum(inner)) / 10)
    assert made.removed_causes.size == 10 - sum(stem) - sum(inner)


def test_masks_of_one_module() -> None:
    """`for_module` gives a boolean tensor per tensor of the module, of its shape, True = kept."""
    found = masks().for_module("inner")
    expected = torch.tensor(KEPT["inner"])[:, None, None, None] & torch.tensor(KEPT["stem"])[None, :, None, None]
    assert found.keys() == {"weight"}
    assert torch.equal(found["weight"], expected.expand(4, 6, 3, 3))
    assert torch.equal(masks().for_module("stem")["bias"], torch.tensor(KEPT["stem"]))
    assert masks().for_module("stem_norm").keys() >= {"weight", "bias"}
    assert masks().for_module("head")["bias"].all()


def test_masks_of_an_unknown_module_suggest_the_nearest() -> None:
    """A module that does not exist, or that has no parameters, is refused."""
    with pytest.raises(gp.MaskError, match=r"no module with parameters is called 'steem'.*did you mean 'stem'"):
        masks().for_module("steem")
    with pytest.raises(gp.MaskError, match="no module with parameters is called ''"):
        masks().for_module("")


class Tied(nn.Module):
    """An embedding that is the output layer as well."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.hidden, self.head = nn.Embedding(11, 8), nn.Linear(8, 8), nn.Linear(8, 11)
        self.head.weight = self.words.weight

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """Returns a score per word."""
        scores: torch.Tensor = self.head(torch.tanh(self.hidden(self.words(tokens))))
        return scores


def test_tied_parameters_have_masks_and_explanations_under_both_names() -> None:
    """The weight of a tied layer is masked under each of the names that it has, and can be explained under each."""
    model = filled(Tied())
    graph = gp.trace(model, words(2))
    made = gp.Masks(graph, {graph.groups[0].name: np.arange(8) < 4})
    assert torch.equal(made.for_module("head")["weight"], made.for_module("words")["weight"])
    assert not made.for_module("head")["weight"][:, 4:].any()
    assert "group" in graph.explain("head")
    assert "group" in graph.explain("head.weight")


# -- applying ------------------------------------------------------------------------------------------------------------------------


def test_applying_zeroes_the_removed_slices_and_nothing_else() -> None:
    """Every masked entry becomes zero and every other keeps its bits; running variances stay, where zero would divide by nothing."""
    model, _ = residual()
    masked = masks().masked(model)
    assert type(masked) is Residual
    for name, tensor in model.state_dict().items():
        module, _, last = name.rpartition(".")
        if name.endswith("running_var") or not tensor.is_floating_point():
            assert same_bits(masked.state_dict()[name], tensor)
        else:
            assert same_bits(masked.state_dict()[name], tensor * masks().for_module(module)[last])
    assert not masked.get_parameter("inner.weight")[0].any()


def test_masked_copies_leave_the_model_alone_and_apply_does_not() -> None:
    """`masked` works on a copy, `apply` in place; both keep flags and identities."""
    model, inputs = residual()
    model.train()
    before = snapshot(model)
    masked = masks().masked(model)
    assert changes(before, snapshot(model)) == []
    assert masked.training
    identities = {name: id(p) for name, p in model.named_parameters()}
    masks().apply(model)
    assert {name: id(p) for name, p in model.named_parameters()} == identities
    assert_same(evaluate(masked, inputs), evaluate(model, inputs), "the two differ")
    assert all(p.requires_grad and p.is_leaf for p in model.parameters())


def test_applying_to_another_model_is_refused_before_anything_is_written() -> None:
    """A model with other shapes is refused with the parameter that differs, and stays as it was."""
    wider = Residual(8, 4)
    before = snapshot(wider)
    with pytest.raises(gp.MaskError, match=r"is \(\d.*in Residual, but \(\d.*where the masks were made"):
        masks().apply(wider)
    assert changes(before, snapshot(wider)) == []
    with pytest.raises(gp.MaskError, match="is missing in Network"):
        masks().apply(Network(lambda n, x: n.a(x), {"a": conv(3, 4)}))


# -- files ---------------------------------------------------------------------------------------------------------------------------


def test_masks_survive_a_round_trip(tmp_path: Path) -> None:
    """What was saved for a model is loaded for an equal one, flag by flag, and shrinks it to the same bits."""
    masks().save(tmp_path / "masks.safetensors")
    model, inputs = residual()
    loaded = gp.Masks.load(str(tmp_path / "masks.safetensors"), gp.trace(model, inputs))
    assert {name: mask.tolist() for name, mask in loaded.items()} == KEPT
    assert [path.name for path in tmp_path.iterdir()] == ["masks.safetensors"]
    one, two = gp.speedup(model, masks())[0], gp.speedup(model, loaded)[0]
    assert_same(evaluate(one, inputs), evaluate(two, inputs), "the loaded masks give another model")


def test_masks_are_written_without_pickle(tmp_path: Path) -> None:
    """The file is a plain safetensors file with one tensor per group and the fingerprint of the graph."""
    masks().save(tmp_path / "masks.safetensors")
    assert {name: tensor.tolist() for name, tensor in safetensors.numpy.load_file(tmp_path / "masks.safetensors").items()} == {
        name: [int(flag) for flag in kept] for name, kept in KEPT.items()
    }
    with safetensors.safe_open(str(tmp_path / "masks.safetensors"), framework="numpy") as file:
        assert file.metadata() == {"fingerprint": traced().fingerprint}


def test_masks_of_another_structure_are_refused(tmp_path: Path) -> None:
    """A file that was saved for a model with other groups is refused by its fingerprint, whatever its names."""
    path = tmp_path / "masks.safetensors"
    masks().save(path)
    wider = Residual(6, 8).double().eval()
    with pytest.raises(gp.MaskError, match="were made for another model"):
        gp.Masks.load(path, gp.trace(wider, residual()[1]))


def test_other_files_are_refused(tmp_path: Path) -> None:
    """A missing file, a folder, a file of another kind and one without a fingerprint are each one clear error."""
    (tmp_path / "text").write_text("no masks")
    (tmp_path / "empty").write_bytes(b"")
    for name in ("missing", "text", "empty", "."):
        with pytest.raises(gp.FileError, match=r"cannot read masks from .*Pass a file written by Masks\.save"):
            gp.Masks.load(tmp_path / name, traced())
    safetensors.numpy.save_file({"stem": np.ones(6, np.uint8)}, tmp_path / "foreign.safetensors")
    with pytest.raises(gp.MaskError, match="were made for another model"):
        gp.Masks.load(tmp_path / "foreign.safetensors", traced())


def test_folders_that_cannot_be_written_to_are_refused(tmp_path: Path) -> None:
    """A folder that does not exist, or that is a file, is one clear error."""
    (tmp_path / "file").write_text("")
    for folder in ("missing", "file"):
        with pytest.raises(gp.FileError, match=r"cannot write masks to .*Choose a folder that exists"):
            masks().save(tmp_path / folder / "masks.safetensors")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_a_failing_save_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """When writing fails halfway, the file that was there is still there, and no other."""
    path = tmp_path / "masks.safetensors"
    masks().save(path)
    before = path.read_bytes()

    def failing(_tensors: object, temporary: Path, _metadata: object) -> None:
        Path(temporary).write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(masks_module, "save_file", failing)
    with pytest.raises(gp.FileError, match="disk full"):
        gp.Masks(traced()).save(path)
    assert path.read_bytes() == before
    assert [file.name for file in tmp_path.iterdir()] == [path.name]
