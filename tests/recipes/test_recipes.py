"""A shrunk model survives the way to disk and back: same class, same integers, same outputs, onto a model with other weights."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import fx, nn

from graphprune import InputError, MaskError, export_onnx, prune
from graphprune.recipes.files import save
from graphprune.recipes.replay import load, slice_state_dict
from graphprune.surgery.recipe import recipe_of
from tests.support.networks import call, randomise
from tests.support.outputs import flatten_outputs
from tests.support.recipe_cases import CASES, IMAGES, Shuffled, built, every_case, metadata_of, outputs, shrunk
from tests.support.untouched import assert_same, changes, same_bits, snapshot


def plain(model: nn.Module) -> dict[str, dict[str, Any]]:
    """Returns the attributes of all modules that are numbers or sequences."""
    return {n: {k: v for k, v in vars(m).items() if isinstance(v, (int, float, tuple))} for n, m in model.named_modules()}


def assert_round_trip(small: nn.Module, case: str, path: Path) -> nn.Module:
    """Asserts that a saved model comes back bit for bit onto a dense model with other weights; returns what came back."""
    save(small, path)
    dense = built(case, seed=9)
    before = snapshot(dense)
    back = load(dense, path)
    assert changes(before, snapshot(dense)) == []
    assert list(back.state_dict()) == list(small.state_dict())
    assert all(same_bits(back.state_dict()[name], tensor) for name, tensor in small.state_dict().items())
    assert_same(outputs(small, case), outputs(back, case), "the loaded model computes something else")
    assert type(back).__name__ == type(small).__name__
    assert recipe_of(back).to_dict() == recipe_of(small).to_dict()
    return back


@every_case
def test_round_trip(case: str, tmp_path: Path) -> None:
    """What was saved comes back with equal tensors, attributes and outputs, and not with those of the model it was loaded onto."""
    small = shrunk(case)
    back = assert_round_trip(small, case, tmp_path / "small.safetensors")
    assert plain(back) == plain(small)
    assert outputs(built(case, 9), case)[0].shape == outputs(back, case)[0].shape
    assert not same_bits(outputs(built(case, 0), case)[0], outputs(back, case)[0])


@every_case
def test_fine_tuned_weights_are_saved(case: str, tmp_path: Path) -> None:
    """The file holds the weights and BatchNorm statistics of the moment of saving, not those of the pruning."""
    small = shrunk(case)
    before = outputs(small, case)
    optimizer = torch.optim.SGD(small.parameters(), lr=0.1)
    small.train()
    sum(t.square().mean() for t in flatten_outputs(call(small, CASES[case][1]))).backward()  # type: ignore[union-attr]
    optimizer.step()
    small.eval()
    assert not same_bits(before[0], outputs(small, case)[0])
    assert_round_trip(small, case, tmp_path / "small.safetensors")


@every_case
def test_prune_twice(case: str, tmp_path: Path) -> None:
    """A model that was pruned, loaded and pruned again still loads onto the fresh dense model."""
    path = tmp_path / "small.safetensors"
    once = assert_round_trip(shrunk(case, sparsity=0.25), case, path)
    twice, report = prune(once, CASES[case][1], 0.5)
    assert report.kind == CASES[case][2]
    assert sum(p.numel() for p in twice.parameters()) < 0.8 * sum(p.numel() for p in once.parameters())
    assert_round_trip(twice, case, path)
    assert len(recipe_of(twice).steps) == (1 if CASES[case][2] == "module" else 2)
    assert recipe_of(twice).fingerprint == recipe_of(once).fingerprint


@every_case
@pytest.mark.parametrize("times", [1, 2])
def test_slice_state_dict_cuts_a_checkpoint(case: str, times: int) -> None:
    """The dense weights, cut by the recipe, are the weights of the shrunk model; after two prunings, too."""
    dense = built(case, 0)
    small: nn.Module = dense
    for _ in range(times):
        small, _ = prune(small, CASES[case][1], 0.25)
    cut = slice_state_dict(recipe_of(small), dense.state_dict())
    expected = {name: t for name, t in small.state_dict().items() if name in dense.state_dict()}
    assert cut.keys() == expected.keys()
    assert all(same_bits(cut[name], tensor) for name, tensor in expected.items())
    assert small.load_state_dict(cut, strict=False).unexpected_keys == []


def test_masks_of_two_prunings_agree_with_positions() -> None:
    """Where both prunings found the same groups, the joint mask of a group keeps the positions that the recipe keeps."""
    once, _ = prune(built("residual", 0), IMAGES, 0.25)
    recipe = recipe_of(prune(once, IMAGES, 0.5)[0])
    assert np.array_equal(np.flatnonzero(recipe.steps[0].masks["expand"]), recipe.kept["expand.weight"][0])
    assert recipe.kept["expand.weight"][0].size == 4  # of 12, then of 9


def test_attributes_are_edited_as_pruning_did() -> None:
    """Conv groups and normalised shapes are among the recorded edits, with the values of the shrunk layers."""
    small = shrunk("residual")
    edits = recipe_of(small).steps[0].attributes
    grouped, depthwise = small.get_submodule("grouped"), small.get_submodule("depthwise")
    assert edits["depthwise"]["groups"] == depthwise.groups == depthwise.weight.shape[0]  # type: ignore[index]
    assert edits["grouped"]["in_channels"] == grouped.in_channels == grouped.weight.shape[1] * grouped.groups  # type: ignore[operator,index]
    assert "stride" not in edits["grouped"]
    assert recipe_of(shrunk("tied")).steps[0].attributes["norm"] == {"normalized_shape": [8]}


def test_tied_tensors_are_stored_once_and_stay_tied(tmp_path: Path) -> None:
    """Embedding and output layer share one entry in the file and one tensor after loading."""
    back = assert_round_trip(shrunk("tied"), "tied", tmp_path / "small.safetensors")
    assert back.get_parameter("output.weight") is back.get_parameter("embed.weight")
    assert len({"embed.weight", "output.weight"} & load_file(tmp_path / "small.safetensors").keys()) == 1


def test_weights_untied_since_do_not_load_onto_tied_model(tmp_path: Path) -> None:
    """Two different tensors cannot go into one: loading says so instead of keeping the last."""
    small: Any = shrunk("tied")
    small.output.weight = nn.Parameter(small.output.weight.detach() * 2)
    save(small, tmp_path / "small.safetensors")
    with pytest.raises(MaskError, match=r"'output.weight' and 'embed.weight' are tied"):
        load(built("tied", 0), tmp_path / "small.safetensors")


def test_dtype_of_file_wins(tmp_path: Path) -> None:
    """A model that was converted after pruning comes back in the converted type."""
    small = shrunk("residual").to(torch.bfloat16)
    save(small, tmp_path / "small.safetensors")
    back = load(built("residual", 3), tmp_path / "small.safetensors")
    assert back.get_parameter("stem.weight").dtype == back.get_buffer("norm.running_var").dtype == torch.bfloat16
    assert back.get_buffer("norm.num_batches_tracked").dtype == torch.int64
    assert all(same_bits(back.state_dict()[name], tensor) for name, tensor in small.state_dict().items())


def test_inplace_result_has_recipe(tmp_path: Path) -> None:
    """A model that was shrunk in place is saved like any other."""
    model = built("residual", 0)
    prune(model, IMAGES, 0.5, inplace=True)
    assert_round_trip(model, "residual", tmp_path / "small.safetensors")


@every_case
def test_recipe_travels_and_disturbs_nothing(case: str, tmp_path: Path) -> None:
    """The recipe survives copies, conversions and training flags, stays out of the state dict, and export works as without it."""
    small = shrunk(case)
    recipe = recipe_of(small)
    for other in (copy.deepcopy(small), copy.deepcopy(copy.deepcopy(small)), small.to(torch.float64).to(torch.float32).train().eval()):
        assert recipe_of(other) is recipe
    assert not any("graphprune" in name for name in small.state_dict())
    args, kwargs = CASES[case][1] if isinstance(CASES[case][1], tuple) else ((CASES[case][1],), {})
    exported = torch.export.export(small, args, kwargs)
    assert_same(outputs(small, case), flatten_outputs(exported.module()(*args, **kwargs)), "the exported program computes something else")
    assert_same(
        outputs(small, case), flatten_outputs(fx.symbolic_trace(small)(*args, **kwargs)), "the traced module computes something else"
    )
    assert export_onnx(small, CASES[case][1], tmp_path / "small.onnx").error is not None


@every_case
def test_recipe_is_json(case: str) -> None:
    """The recipe as a dict goes through JSON unchanged and says what was kept."""
    recipe = recipe_of(shrunk(case))
    exported = recipe.to_dict()
    assert json.loads(json.dumps(exported)) == exported
    assert exported["kind"] == CASES[case][2]
    name, dims = next(iter(recipe.kept.items()))
    assert exported["steps"][0]["kept"][name] == {str(dim): list(keep) for dim, keep in dims.items()}


def test_file_holds_positions_as_integers(tmp_path: Path) -> None:
    """Kept positions are int64 tensors under the reserved prefix, which any reader of safetensors can use."""
    save(shrunk("residual"), tmp_path / "small.safetensors")
    dense = built("residual", 0)
    with safe_open(tmp_path / "small.safetensors", framework="pt") as file:
        keep = file.get_tensor("graphprune.kept/0/expand.weight/0")
        assert keep.dtype == torch.int64
        assert same_bits(dense.state_dict()["expand.bias"][keep], file.get_tensor("expand.bias"))
    assert json.loads(metadata_of(tmp_path / "small.safetensors")["graphprune"])["class_name"] == "Residual"


def test_data_dependent_forward_needs_example_inputs(tmp_path: Path) -> None:
    """Where the recorded shapes lead to another program, loading says so, and works with inputs like those of the pruning."""

    class Branching(Shuffled):
        """Skips a layer for negative inputs."""

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            """Returns class scores."""
            return super().forward(x) if bool(x.min() > 0) else self.head(x.mean((2, 3)).repeat(1, 4))

    dense = randomise(Branching(), 0).eval()
    small, _ = prune(dense, IMAGES.abs(), 0.5)
    save(small, tmp_path / "small.safetensors")
    with pytest.raises(MaskError, match=r"another program.*example_inputs="):
        load(dense, tmp_path / "small.safetensors")
    back = load(randomise(Branching(), 3).eval(), tmp_path / "small.safetensors", IMAGES.abs())
    assert torch.equal(back(IMAGES.abs()), small(IMAGES.abs()))
    for network in (small, back):
        with pytest.raises(InputError, match="recorded with True where Python read a number"):
            network(IMAGES)


def test_inputs_that_cannot_be_described(tmp_path: Path) -> None:
    """An argument that JSON does not know is asked for, by name, when a GraphModule is loaded."""

    class Optioned(Shuffled):
        """Takes a dtype."""

        def forward(self, x: torch.Tensor, dtype: torch.dtype = torch.int8) -> torch.Tensor:
            """Returns class scores."""
            return super().forward(x).to(dtype)

    dense = randomise(Optioned(), 0).eval()
    small, _ = prune(dense, (IMAGES, torch.float64), 0.5)
    save(small, tmp_path / "small.safetensors")
    with pytest.raises(InputError, match=r"a dtype, which a recipe cannot hold.*example_inputs="):
        load(dense, tmp_path / "small.safetensors")
    back = load(dense, tmp_path / "small.safetensors", (IMAGES, torch.float64))
    assert torch.equal(back(IMAGES, torch.float64), small(IMAGES, torch.float64))
