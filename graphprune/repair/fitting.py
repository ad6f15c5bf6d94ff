"""The fit of one layer: what is looked at, and what becomes of its weights."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from graphprune.data.distributed import all_reduce_sum, rank
from graphprune.repair.equations import Sums
from graphprune.repair.report import LeftAlone, Refitted

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor, fx

    from graphprune.repair.readers import Block, Call, Reader
    from graphprune.repair.windows import Windows

_RANKS_APART = 1_000_003  # processes look at different positions of their different batches
_AT_ONCE = 4096  # points whose inputs are held at a time


class Fit:
    """One layer on its way to new weights.

    Args:
        reader: the layer.
        weight: its weight, for the device.
        points: positions to look at per sample, on average.
        seed: of the positions.

    Attributes:
        reader: the layer.
        samples: how many samples the batch has that is looked at.
    """

    def __init__(self, reader: Reader, weight: Tensor, points: int, seed: int) -> None:
        self.reader, self.samples = reader, 1
        self._points = points
        self._generator = torch.Generator().manual_seed(seed + _RANKS_APART * rank())
        self._ragged = False
        self._chosen: dict[fx.Node, tuple[tuple[int, ...], Tensor, Tensor]] = {}
        self._rows = [torch.from_numpy(b.rows).to(weight.device) for b in reader.blocks]
        self._columns = [torch.from_numpy(b.columns).to(weight.device) for b in reader.blocks]
        kernel = weight.shape[2:].numel()
        self._sums = [Sums(b.columns.size * kernel, b.rows.size, bias=reader.bias is not None, device=weight.device) for b in reader.blocks]

    def choose(self, call: Call, seen: Windows) -> None:
        """Chooses positions of a call in the original network, and remembers its outputs there until the pruned one has run."""
        total = seen.positions
        chosen = torch.randperm(total, generator=self._generator)[: self._points * self.samples].to(seen.device)
        self._chosen[call.node] = (seen.shape, chosen, seen.outputs(chosen))

    def compare(self, call: Call, seen: Windows) -> None:
        """Adds the same positions of the same call in the pruned network."""
        shape, chosen, wanted = self._chosen.pop(call.node)
        if shape != seen.shape:
            self._ragged = True
            return
        for part, targets in zip(chosen.split(_AT_ONCE), wanted.split(_AT_ONCE), strict=True):
            found = seen.outputs(part)
            for sums, rows, columns in zip(self._sums, self._rows, self._columns, strict=True):
                sums.add(seen.inputs(part, columns), targets[:, rows], found[:, rows])

    def finish(self, tensors: Mapping[str, Tensor], ridge: float) -> Refitted | LeftAlone:
        """Writes the new weights into the pruned network's tensors; returns what was done."""
        ragged = torch.tensor(float(self._ragged))
        *totals, ragged = all_reduce_sum([*(t for sums in self._sums for t in sums.parts()), ragged])
        for at, sums in enumerate(self._sums):
            sums.replace(totals[3 * at : 3 * at + 3])
        layer = self.reader.layer
        if ragged:
            return LeftAlone(layer, "has outputs whose number depends on values")
        points, wanted, before = (float(sum(sums.scalars[k] for sums in self._sums)) for k in range(3))
        points /= len(self._sums)
        if not points:
            return LeftAlone(layer, "has no finite outputs on the data")
        solved = [sums.solve(ridge) for sums in self._sums]
        if not self._write(tensors, [change for change, _ in solved]):
            return LeftAlone(layer, "has no finite solution")
        after = sum(error for _, error in solved)
        calls = len(self.reader.calls)
        return Refitted(layer, calls, self.reader.features, round(points), _relative(before, wanted), _relative(after, wanted))

    @torch.no_grad()
    def _write(self, tensors: Mapping[str, Tensor], changes: list[Tensor]) -> bool:
        """Adds changes to the weights, unless a weight would overflow; returns whether it did."""
        weight = tensors[self.reader.parameter]
        bias = tensors[self.reader.bias] if self.reader.bias is not None else None
        new_weight = weight.to(torch.float64, copy=True)
        new_bias = bias.to(torch.float64, copy=True) if bias is not None else None
        for block, rows, change in zip(self.reader.blocks, self._rows, changes, strict=True):
            if new_bias is not None:
                new_bias[rows] += change[-1]
                change = change[:-1]  # noqa: PLW2901 (the rest is the weight's)
            self._add(new_weight, block, change)
        new = [new_weight.to(weight.dtype), *([new_bias.to(bias.dtype)] if bias is not None and new_bias is not None else [])]
        if not all(bool(tensor.isfinite().all()) for tensor in new):
            return False
        for target, value in zip([weight, bias], new, strict=False):
            if target is not None:
                target.copy_(value)
        return True

    def _add(self, weight: Tensor, block: Block, change: Tensor) -> None:
        """Adds the change of a block, (features, outputs), where it belongs in the weight."""
        first, second = (torch.from_numpy(index).to(weight.device) for index in (block.first, block.second))
        shaped = change.reshape(block.columns.size, *weight.shape[2:], block.rows.size)
        outputs_first = self.reader.calls[0].outputs_first
        shaped = shaped.movedim(-1, 0 if outputs_first else 1)
        weight[first[:, None], second[None]] += shaped


def _relative(square: float, whole: float) -> float:
    """Returns the ratio of two norms, given their squares."""
    return (square / whole) ** 0.5 if whole else float("inf") if square else 0.0
