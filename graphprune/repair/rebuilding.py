"""Least-squares reconstruction of layers whose inputs have lost channels.

He, Zhang and Sun, Channel Pruning for Accelerating Very Deep Neural Networks, arXiv 1707.06168, equation 1 with the channels given:

    minimise over W   || Y - sum over the channels i that are left of  X'_i W_i ||^2

with Y the layer's output in the original network and X' its input in the pruned one, layer after layer from the front (section 3.2), so
that a layer makes up for the errors of those before it as well. As in He et al., AMC, arXiv 1802.03494, a few positions of each output
are looked at. Biases are fitted too, as an intercept is in the authors' code of the first paper.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import islice
from typing import TYPE_CHECKING, Any

import torch

from graphprune.data.sources import Loader, Trainer, source
from graphprune.errors import ConfigError
from graphprune.masks.channels import Masks, checked_tensors
from graphprune.repair.fitting import Fit
from graphprune.repair.readers import Reader, readers
from graphprune.repair.report import LeftAlone, ReconstructionReport, Refitted
from graphprune.repair.runs import Runs
from graphprune.trace.threads import forked_generators
from graphprune.trace.turns import turn

if TYPE_CHECKING:
    from collections.abc import Iterable

    from torch import fx, nn

    from graphprune.data.sources import Source

_BATCHES = 60  # as in AMC


@dataclass(frozen=True, eq=False)
class Reconstruction:
    """How layers are fitted: what searches take as `reconstruct=`.

    Attributes:
        data: batches as `graphprune.prune` takes them: an iterable of batches, or a source.
        points: positions of a layer's output to look at per sample, on average; all of them where there are fewer.
        batches: use so many batches and no more; None for all.
        ridge: how strongly weights are held where they are, relative to the mean square of what they multiply; 0 for not at all.
        seed: of the positions, and of what a loader draws from PyTorch's global random numbers, which are put back.
    """

    data: Any
    points: int = 10
    batches: int | None = _BATCHES
    ridge: float = 1e-3
    seed: int = 0

    def __post_init__(self) -> None:
        """Refuses impossible numbers and data that cannot be used.

        Raises:
            ConfigError: one of these.
        """
        given: list[tuple[str, Any]] = [("points", self.points), ("batches", self.batches), ("seed", self.seed)]
        for name, value in given:
            least = 0 if name == "seed" else 1
            if (type(value) is not int or value < least) and not (name == "batches" and value is None):
                what = f"{name} of a reconstruction is {value!r}"
                raise ConfigError(what, f"Give a whole number of at least {least}{', or None for all' if name == 'batches' else ''}")
        ridge: Any = self.ridge
        if isinstance(ridge, bool) or not isinstance(ridge, (int, float)) or not 0 <= ridge < math.inf:
            raise ConfigError(f"ridge of a reconstruction is {ridge!r}", "Give a number of at least 0, such as 1e-3")
        object.__setattr__(self, "data", self._source())

    @classmethod
    def of(cls, value: Reconstruction | Iterable[Any] | Source) -> Reconstruction:
        """Returns what a user passed: options as they are, of data those with which nothing else is said.

        Raises:
            ConfigError: it is no data.
        """
        return value if isinstance(value, cls) else cls(value)

    def _source(self) -> Source:
        """Returns where the batches come from, limited; those of an iterator are kept, as every layer needs them anew."""
        made = source(data=self.data, limit=self.batches, who="reconstruct")
        if isinstance(made, (Loader, Trainer)) and self.batches is not None:
            made = replace(made, limit=self.batches if made.limit is None else min(made.limit, self.batches))
        if isinstance(made, Loader) and isinstance(made.batches, Iterator):
            made = replace(made, batches=list(islice(made.batches, made.limit)))
        return made

    def settings(self) -> dict[str, Any]:
        """Returns the numbers and the name of the data, as plain values, for runs that are continued."""
        batches = self.data.batches if isinstance(self.data, Loader) else getattr(self.data, "trainer", self.data)
        data = getattr(batches, "__qualname__", type(batches).__qualname__)
        return {"data": data, "points": self.points, "batches": self.batches, "ridge": self.ridge, "seed": self.seed}

    def __call__(self, model: nn.Module, masks: Masks) -> tuple[nn.Module, ReconstructionReport]:
        """Returns a masked copy of the model with fitted weights, and a report; see `reconstruct`."""
        start = time.perf_counter()
        if not isinstance(masks, Masks):
            what = f"the masks are {type(masks).__name__}, and what reads channels that go can be fitted for masks of channels only"
            raise ConfigError(what, "Pass masks of channels; of masks of single elements, masks.channels(graph)")
        with turn(model):
            return self._rebuilt(model, masks, start)

    def _rebuilt(self, model: nn.Module, masks: Masks, start: float) -> tuple[nn.Module, ReconstructionReport]:
        checked_tensors(model, masks.graph)
        found, left = readers(masks.graph, masks)
        runs = Runs(model, masks, self.data)
        stages: dict[fx.Node, list[Reader]] = {}
        for reader in found:  # what reads the same tensor first is fitted together
            stages.setdefault(reader.calls[0].source, []).append(reader)
        with forked_generators():
            torch.default_generator.manual_seed(self.seed)
            fitted = [each for stage in stages.values() for each in self._fitted(runs, stage)]
        layers = tuple(each for each in fitted if isinstance(each, Refitted))
        alone = (*left, *(each for each in fitted if isinstance(each, LeftAlone)))
        return runs.pruned, ReconstructionReport(layers, alone, runs.samples, time.perf_counter() - start)

    def _fitted(self, runs: Runs, stage: list[Reader]) -> list[Refitted | LeftAlone]:
        """Fits layers whose inputs do not depend on each other."""
        layers = [Fit(reader, runs.tensors[reader.parameter], self.points, self.seed) for reader in stage]
        runs.watch(layers)
        return [layer.finish(runs.tensors, self.ridge) for layer in layers]


def reconstruct(
    model: nn.Module,
    masks: Masks,
    data: Iterable[Any] | Source,
    *,
    points: int = 10,
    batches: int | None = _BATCHES,
    ridge: float = 1e-3,
    seed: int = 0,
) -> tuple[nn.Module, ReconstructionReport]:
    """Returns a masked copy of the model whose layers make up for the channels that go, and a report.

    Every layer that reads such channels (linear, convolution, transposed convolution, matrix product with a parameter) has the weights
    that are left, and its bias, fitted so that its output on the inputs that it gets in the pruned network is as close as possible to its
    output in the original network, at sampled positions. Layers are fitted in the order of execution, those before already fitted, so both
    networks go through the data once, up to that layer, for every tensor that such layers read. The pruned network is the one that
    `speedup` makes: norms take their statistics over the channels that are left. Both run in eval mode; of other layers nothing changes. A
    layer that is called several times is fitted to all its calls, when the first of them is reached.

    The result has the original shapes, with zeros where channels go, and is shrunk by `speedup(result, masks)`. BatchNorm statistics can be
    measured anew afterwards with `recalibrate`.

    Args:
        model: the model that the masks were made for; left bit-identical.
        masks: which channels stay.
        data: a few batches such as the model was trained on, in any form that `graphprune.prune` takes.
        points: positions of a layer's output to look at per sample, on average; all of them where there are fewer.
        batches: use so many batches and no more; None for all.
        ridge: how strongly weights are held where they are, relative to the mean square of what they multiply; 0 for not at all, which
            gives the change of least norm where the points do not determine it.
        seed: of the positions, and of what a loader draws from PyTorch's global random numbers, which are put back.

    Raises:
        ConfigError: the masks are not of channels, the data is none, or a number is impossible.
        MaskError: the masks were made for another model.
        InputError: there are no batches, or the model cannot run on one or takes another path on it than on the example inputs.
    """
    return Reconstruction(data, points, batches, ridge, seed)(model, masks)
