"""What a recipe cannot be written from or loaded onto is refused with a clear message, and nothing is left half done."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from graphprune import FileError, GraphPruneError, MaskError, prune
from graphprune.recipes import files as recipe_files
from graphprune.recipes.files import save
from graphprune.recipes.replay import load, slice_state_dict
from graphprune.surgery.recipe import recipe_of
from tests.support.recipe_cases import CASES, IMAGES, built, every_case, metadata_of, shrunk
from tests.support.untouched import changes, snapshot


def refused(model: nn.Module, path: Path, error: type[GraphPruneError], match: str) -> None:
    """Asserts that loading fails with a clear message and leaves the model alone."""
    before = snapshot(model)
    with pytest.raises(error, match=match):
        load(model, path)
    assert changes(before, snapshot(model)) == []


def test_load_refuses_other_files(tmp_path: Path) -> None:
    """Missing files, other formats, files without a recipe, newer formats and damaged recipes each say what is wrong."""
    model, path = built("residual", 0), tmp_path / "small.safetensors"
    refused(model, path, FileError, "cannot read a model")
    path.write_bytes(b"PK\x03\x04 not a safetensors file")
    refused(model, path, FileError, "cannot read a model")
    save_file(dict(model.state_dict()), path)
    refused(model, path, FileError, "no recipe")
    save(shrunk("residual"), path)
    tensors, metadata = load_file(path), metadata_of(path)
    header = json.loads(metadata["graphprune"])
    save_file(tensors, path, {"graphprune": json.dumps({**header, "format": 99})})
    refused(model, path, FileError, "format 99")
    save_file(tensors, path, {"graphprune": json.dumps({**header, "steps": []})})
    refused(model, path, FileError, "damaged")
    save_file({n: t for n, t in tensors.items() if "mask/0/expand" not in n}, path, metadata)
    refused(model, path, FileError, "damaged")
    beyond = {"graphprune.kept/0/expand.weight/0": tensors["graphprune.kept/0/expand.weight/0"] + 50}
    save_file({**tensors, **beyond}, path, metadata)
    refused(model, path, FileError, r"'expand.weight' dim 0 do not fit its size 12")


@every_case
def test_load_refuses_other_models(case: str, tmp_path: Path) -> None:
    """The first tensor that differs is named with both shapes."""
    path = tmp_path / "small.safetensors"
    small = shrunk(case)
    save(small, path)
    name, shape = next(iter(recipe_of(small).dense.items()))
    now = tuple(small.state_dict()[name].shape)
    refused(small, path, MaskError, re.escape(f"{name!r} is {now} in this {type(small).__name__}, but {shape} in the ") + ".*unpruned")
    wider: Any = built(case, 0)
    wider.extra = nn.Linear(2, 2)
    refused(wider, path, MaskError, r"'extra.weight' is \(2, 2\) in this .*but missing")
    with torch.device("meta"):
        skeleton = CASES[case][0]()
    with pytest.raises(MaskError, match="meta device"):
        load(skeleton, path)


def test_save_refuses_what_has_no_recipe(tmp_path: Path) -> None:
    """A dense model and a wrapper have no recipe, and the message says what to do."""
    for module in (built("residual", 0), nn.Sequential(shrunk("residual"))):
        with pytest.raises(MaskError, match="save a dense model with safetensors itself"):
            save(module, tmp_path / "small.safetensors")
    assert list(tmp_path.iterdir()) == []


def test_save_refuses_models_changed_since(tmp_path: Path) -> None:
    """A layer that was exchanged after pruning is named, for the file could not be loaded again."""
    small: Any = shrunk("residual")
    small.head = nn.Linear(small.head.in_features, 7)
    with pytest.raises(MaskError, match=r"'head.weight' of Residual is \(7, .*was \(5, "):
        save(small, tmp_path / "small.safetensors")


def test_changed_model_pruned_again_counts_as_new(tmp_path: Path) -> None:
    """After a layer was exchanged, the next pruning starts a recipe of its own, onto the model as it then was."""
    once: Any = shrunk("residual")
    once.head = nn.Linear(once.head.in_features, 7)
    twice, _ = prune(once, IMAGES, 0.5)
    save(twice, tmp_path / "small.safetensors")
    assert recipe_of(twice).dense["head.weight"][0] == 7
    assert torch.equal(load(once, tmp_path / "small.safetensors").eval()(IMAGES), twice(IMAGES))


def test_save_is_atomic(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A write that fails half-way leaves the earlier file and nothing beside it; whoever reads that file goes on doing so."""
    path = tmp_path / "small.safetensors"
    small = shrunk("residual")
    with pytest.raises(FileError, match="folder that exists"):
        save(small, tmp_path / "missing" / "small.safetensors")
    save(small, path)
    before = path.read_bytes()

    def broken(_tensors: object, file: Path, _metadata: object) -> None:
        file.write_bytes(b"half")
        raise OSError("no space left")

    monkeypatch.setattr(recipe_files, "save_file", broken)
    with pytest.raises(FileError, match="no space left"):
        save(small, path)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]
    monkeypatch.undo()
    (tmp_path / "reader").hardlink_to(path)
    save(shrunk("residual", seed=5), path)
    assert path.read_bytes() != before
    assert (tmp_path / "reader").read_bytes() == before


def test_slice_state_dict_refuses_other_tensors() -> None:
    """A prefix or another shape is named; what the shrunk model lacks is no matter."""
    dense = built("residual", 0)
    recipe = recipe_of(shrunk("residual"))
    with pytest.raises(MaskError, match=r"no tensor 'module.head.weight'.*did you mean 'head.weight'"):
        slice_state_dict(recipe, {f"module.{name}": tensor for name, tensor in dense.state_dict().items() if name == "head.weight"})
    with pytest.raises(MaskError, match=r"'head.weight' is \(5, 8\), but \(5, 16\)"):
        slice_state_dict(recipe, {"head.weight": torch.zeros(5, 8)})
    assert slice_state_dict(recipe, {"head.bias": dense.state_dict()["head.bias"], "ramp": torch.ones(1, 12, 1, 1)}).keys() == {"head.bias"}
