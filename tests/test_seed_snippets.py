"""Every usage snippet of the seed documents, with only its import line changed: the right ones run, the wrong ones say what to write."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional

import graphprune as gp
from tests.support.untouched import changes, snapshot


@dataclass(frozen=True)
class Snippet:
    """One snippet of a seed document.

    Attributes:
        seed: the number of the document.
        code: the snippet as it stands there, except for the import line.
        after: the snippet that comes before it in the document and that it goes on from.
        error: the words of the error that it gives, or "" if it runs.
        instead: (what is wrong, what to write instead), as replacements of text.
    """

    seed: str
    code: str
    after: str = ""
    error: str = ""
    instead: tuple[tuple[str, str], ...] = ()

    @property
    def name(self) -> str:
        """The seed and what the snippet is about, for the test's name."""
        imported = re.search(r"import (\w+)", self.code)
        return f"{self.seed}-{imported[1] if imported else self.code.strip()}"


def version_2(name: str, sparsity: str, op_types: str, arguments: str = "") -> str:
    """Returns a snippet as document 002 has them."""
    lines = (
        f"from graphprune import {name}",
        f"config_list = [{{ 'sparsity': {sparsity}, 'op_types': ['{op_types}'] }}]",
        f"pruner = {name}(model, config_list{arguments})",
        "masked_model, masks = pruner.compress()",
    )
    return "\n".join(lines)


AGP = """from graphprune.compat import AGP_Pruner
config_list = [{
    'initial_sparsity': 0,
    'final_sparsity': 0.8,
    'start_epoch': 1,
    'end_epoch': 10,
    'frequency': 1,
    'op_types': 'default'
}]
pruner = AGP_Pruner(config_list)
"""
LEVEL = """from graphprune.compat import LevelPruner
config_list = [{ 'sparsity': 0.8, 'op_types': 'default' }]
pruner = LevelPruner(config_list)
"""
SENSITIVITY = """from graphprune.compat import SensitivityPruner
config_list = [{ 'sparsity':0.8, 'op_types': 'default' }]
pruner = SensitivityPruner(config_list)
"""
TRAINING = ", trainer, optimizer, criterion"
BATCHES = f"{TRAINING}, training_batches=20"
NORMS = (("BatchNorm2d", "Conv2d"),)
TENSORFLOW = "only PyTorch models can be pruned here.*Write pruner.model. with a torch.nn.Module"
SESSION = r"only PyTorch models can be pruned here.*Write pruner\.update_epoch\(epoch\)"
NOT_NORMS = "lists 'BatchNorm2d', but .* produce no channels of their own.*Use one of default, Conv2d, Linear"

SNIPPETS = (
    Snippet(
        "000",
        """from graphprune.compat import ActivationAPoZRankFilterPruner
config_list = [{ 'sparsity': 0.8, 'op_types': ['Conv2d'], 'op_names': ['conv1', 'conv2'] }]
pruner = ActivationAPoZRankFilterPruner(model, config_list,statistics_batch_num=1)
pruner.compress()
""",
        error="ActivationAPoZRankFilterPruner looks at data, and there is none.*Pass data=.*or trainer=.*optimizer=.*criterion=",
        instead=(("statistics_batch_num=1", "optimizer, trainer, criterion, statistics_batch_num=1"),),
    ),
    Snippet(
        "001",
        """from graphprune.compat import L1FilterPruner
config_list = [{ 'sparsity': 0.8, 'op_types': ['Conv2d'], 'op_names': ['conv1', 'conv2'] }]
pruner = L1FilterPruner(model, config_list)
pruner.compress()
""",
    ),
    Snippet("002", version_2("LevelPruner", "0.8", "default")),
    Snippet("002", version_2("L1NormPruner", "0.8", "Conv2d")),
    Snippet("002", version_2("L2NormPruner", "0.8", "Conv2d")),
    Snippet("002", version_2("FPGMPruner", "0.8", "Conv2d")),
    Snippet("002", version_2("SlimPruner", "0.8", "BatchNorm2d", f"{TRAINING}, training_epochs=1")),
    Snippet("002", version_2("ActivationAPoZRankPruner", "0.8", "BatchNorm2d", BATCHES), error=NOT_NORMS, instead=NORMS),
    Snippet("002", version_2("ActivationMeanRankPruner", "0.8", "BatchNorm2d", BATCHES), error=NOT_NORMS, instead=NORMS),
    Snippet("002", version_2("TaylorFOWeightPruner", "0.8", "BatchNorm2d", BATCHES), error=NOT_NORMS, instead=NORMS),
    Snippet(
        "002",
        version_2("ADMMPruner", "0.8", "BatchNorm2d", BATCHES),
        error="ADMMPruner has no argument training_batches=.*Write iterations= .* and training_epochs= ",
        instead=(*NORMS, ("training_batches=20", "iterations=2, training_epochs=1")),
    ),
    Snippet("003", LEVEL + "pruner(model_graph)\n", error=TENSORFLOW, instead=(("model_graph", "model"),)),
    Snippet("003", LEVEL + "pruner(model)\n"),
    Snippet("003", AGP + "pruner(tf.get_default_graph())\n", error=TENSORFLOW, instead=(("tf.get_default_graph()", "model"),)),
    Snippet("003", AGP + "pruner(model)\n"),
    Snippet("003", "pruner.update_epoch(epoch, sess)", AGP + "pruner(model)\n", error=SESSION, instead=((", sess", ""),)),
    Snippet("003", "pruner.update_epoch(epoch)", AGP + "pruner(model)\n"),
    Snippet("003", SENSITIVITY + "pruner(tf.get_default_graph())\n", error=TENSORFLOW, instead=(("tf.get_default_graph()", "model"),)),
    Snippet("003", SENSITIVITY + "pruner(model)\n"),
    Snippet("003", "pruner.update_epoch(epoch, sess)", SENSITIVITY + "pruner(model)\n", error=SESSION, instead=((", sess", ""),)),
    Snippet("003", "pruner.update_epoch(epoch)", SENSITIVITY + "pruner(model)\n"),
)
IN_PLACE = ("003",)
UNTRACED = ("L1FilterPruner", "L1NormPruner", "L2NormPruner", "FPGMPruner")  # which warn that they have nothing to find groups with


class Classifier(nn.Module):
    """Two convolutions with batch norms and a linear layer, by the names that the snippets use."""

    def __init__(self) -> None:
        """Builds the layers."""
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(1, 10, 3, padding=1), nn.BatchNorm2d(10)
        self.conv2, self.bn2 = nn.Conv2d(10, 20, 3, padding=1), nn.BatchNorm2d(20)
        self.fc = nn.Linear(20 * 16, 10)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Returns ten logits per image (1 x 4 x 4)."""
        x = functional.relu(self.bn1(self.conv1(images)))
        logits: torch.Tensor = self.fc(functional.relu(self.bn2(self.conv2(x))).flatten(1))
        return logits


def trainer(model: nn.Module, optimizer: torch.optim.Optimizer, criterion: Callable[..., torch.Tensor]) -> None:
    """Trains for one epoch on noise, as the snippets' trainer does on data."""
    generator = torch.Generator().manual_seed(1)
    model.train()
    for _ in range(3):
        optimizer.zero_grad()
        images = torch.randn(8, 1, 4, 4, generator=generator)
        criterion(model(images), torch.randint(10, (8,), generator=generator)).backward()
        optimizer.step()


def surroundings() -> dict[str, Any]:
    """Returns the names that the snippets take as given."""
    torch.manual_seed(0)
    model = Classifier()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    graph = object()
    tensorflow = {"model_graph": graph, "tf": SimpleNamespace(get_default_graph=lambda: graph), "sess": object()}
    return {"model": model, "trainer": trainer, "optimizer": optimizer, "criterion": nn.CrossEntropyLoss(), "epoch": 5, **tensorflow}


def run(snippet: Snippet, code: str) -> dict[str, Any]:
    """Runs a snippet after what it goes on from; returns the names that there are then."""
    names = surroundings()
    if snippet.after:
        exec(snippet.after, names)  # noqa: S102 (the snippets are the text of this file)
    with expected_warning(code):
        exec(code, names)  # noqa: S102
    return names


@contextlib.contextmanager
def expected_warning(code: str) -> Iterator[None]:
    """Expects the warning of pruners that mask every layer by itself; any other is an error."""
    if any(f" {name}(" in code for name in UNTRACED):
        with pytest.warns(UserWarning, match=r"was given no example inputs.*Pass example_inputs="):
            yield
    else:
        yield


def share(mask: torch.Tensor) -> float:
    """Returns the share of a mask's elements that go."""
    return 1 - float(mask.double().mean())


def check_masked(names: dict[str, Any]) -> None:
    """Asserts that a snippet masked what it asked for, and did not touch the user's model."""
    model = names["model"]
    masked, masks = (names["masked_model"], names["masks"]) if "masks" in names else names["pruner"].compress()
    unstructured = "LevelPruner" in names or "ADMMPruner" in names
    for layer in ("conv1", "conv2"):
        flags = masks.for_module(layer)["weight"]
        found = share(flags) if unstructured else share(flags.flatten(1).any(1))
        assert found == pytest.approx(0.8, abs=0.01)
        assert masked.get_submodule(layer).weight[~flags].abs().sum() == 0
        assert model.get_submodule(layer).weight.all()


def check_in_place(names: dict[str, Any]) -> None:
    """Asserts that a snippet masked the user's own model, and that it stays masked while the user trains it."""
    pruner, model = names["pruner"], names["model"]
    assert isinstance(pruner.masks(), gp.ElementMasks)
    trainer(model, names["optimizer"], names["criterion"])
    finished, masks = pruner.finish()
    assert finished is model
    assert list(masks) == ["conv1.weight", "conv2.weight", "fc.weight"]
    for name, mask in masks.items():
        assert not model.get_parameter(name)[~mask].any()


@pytest.mark.parametrize("snippet", [s for s in SNIPPETS if not s.error], ids=lambda s: s.name)
def test_snippets_run(snippet: Snippet) -> None:
    """A right snippet runs as it stands, and prunes what it says."""
    names = run(snippet, snippet.code)
    check_in_place(names) if snippet.seed in IN_PLACE else check_masked(names)


@pytest.mark.parametrize("snippet", [s for s in SNIPPETS if s.error], ids=lambda s: s.name)
def test_wrong_snippets_say_what_to_write(snippet: Snippet) -> None:
    """A wrong snippet is refused before anything is changed, in words that name what to write instead; so written it runs."""
    names = surroundings()
    if snippet.after:
        exec(snippet.after, names)  # noqa: S102
    before = snapshot(names["model"])
    with pytest.raises(gp.GraphPruneError, match=snippet.error):
        exec(snippet.code, names)  # noqa: S102
    assert changes(before, snapshot(names["model"])) == []
    code = snippet.code
    for wrong, right in snippet.instead:
        assert wrong in code
        code = code.replace(wrong, right)
    names = run(snippet, code)
    check_in_place(names) if snippet.seed in IN_PLACE else check_masked(names)


def test_the_level_snippet_masks_four_fifths() -> None:
    """The very first call shape zeroes int(0.8 n) weights of each layer of the model that it is called with."""
    names = run(SNIPPETS[12], SNIPPETS[12].code)
    for layer in ("conv1", "conv2", "fc"):
        weight = names["model"].get_submodule(layer).weight
        assert int((weight == 0).sum()) == weight.numel() * 4 // 5


def test_the_agp_snippet_goes_from_0_to_80_percent_in_10_epochs() -> None:
    """Nothing is masked before epoch 1, 0.8 from epoch 10 on, and what the cubic formula says in between."""
    names = run(SNIPPETS[14], SNIPPETS[14].code)
    found = []
    for epoch in range(12):
        names["pruner"].update_epoch(epoch)
        found.append(names["pruner"].masks().sparsity)
    assert found == pytest.approx([0, *(0.8 - 0.8 * (1 - t / 9) ** 3 for t in range(10)), 0.8], abs=2e-3)


def test_the_sensitivity_snippet_has_a_threshold_per_layer() -> None:
    """What is below 0.8 standard deviations of its layer's weights is masked."""
    dense: nn.Module = surroundings()["model"]
    names = run(SNIPPETS[18], SNIPPETS[18].code)
    for name, mask in names["pruner"].masks().items():
        weight = dense.get_parameter(name)
        assert torch.equal(mask, weight.abs() >= 0.8 * weight.std(correction=0))
