"""Runs of the original and of the pruned network on the same batches, side by side."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from graphprune.criteria.statistics.following import follow, named
from graphprune.errors import GraphPruneError, InputError
from graphprune.groups.propagate import operators
from graphprune.masks.channels import checked_tensors
from graphprune.ops.registry import named_arguments
from graphprune.repair.windows import Windows
from graphprune.trace.recorder import record
from graphprune.verify.lockstep import ReferenceRun
from graphprune.verify.replay import MaskedModel

if TYPE_CHECKING:
    from torch import fx, nn

    from graphprune.criteria.statistics.following import Look
    from graphprune.data.sources import Source
    from graphprune.masks.channels import Masks
    from graphprune.repair.fitting import Fit
    from graphprune.repair.readers import Call
    from graphprune.trace.inputs import Inputs


class _EnoughError(GraphPruneError):
    """Ends a run once everything is seen that is looked for."""


class Runs:
    """The two networks.

    Args:
        original: left as it is.
        masks: what the pruned one is left with.
        data: the batches.

    Attributes:
        pruned: the masked copy, whose weights may be changed between runs.
        tensors: its parameters and buffers by name.
        samples: how many samples the last run of both had.
    """

    def __init__(self, original: nn.Module, masks: Masks, data: Source) -> None:
        self.original, self.data = original, data
        masked = MaskedModel.of(original, masks)
        self.pruned = masked.module()
        self.tensors = checked_tensors(self.pruned, masks.graph)
        self.samples = 0
        self._program, self._removal = masked.program, masked.removal

    def watch(self, fits: list[Fit]) -> None:
        """Runs both networks on every batch, and shows the calls of layers to their fits.

        Raises:
            InputError: there are no batches, or one takes another path through a network than the example inputs did.
        """
        wanted = {call.node: (fit, call) for fit in fits for call in fit.reader.calls}

        def visit(inputs: Inputs) -> None:
            for fit in fits:
                fit.samples = inputs.batch or 1
            with suppress(_EnoughError):
                follow(self.original, inputs, self._program, _looks(wanted, lambda fit, call, seen: fit.choose(call, seen)))
            with suppress(_EnoughError):
                self._follow_pruned(inputs, _looks(wanted, lambda fit, call, seen: fit.compare(call, seen)))

        self.samples = self.data.inputs(self.original, visit)

    def _follow_pruned(self, inputs: Inputs, look: Look) -> None:
        """Runs the masked network as `observing.following.follow` does, with statistics taken over the channels that are left."""
        follower = ReferenceRun(self._removal, masked=True, everything=False)
        recorded = operators(self._program)

        def runner(node: fx.Node, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            result = follower(node, func, args, kwargs)
            twin = next(recorded, None)
            if twin is None or follower.run.departed:
                what = f"a batch takes another path through the pruned network than the example inputs did, at {named(node)}"
                raise InputError(what, "Pass batches that take the same path, or exclude the layers whose values decide it")
            look(twin, args, kwargs, result)
            return result

        record(self.pruned, inputs, runner=runner)


def _looks(wanted: dict[fx.Node, tuple[Fit, Call]], show: Callable[[Fit, Call, Windows], None]) -> Look:
    """Returns what is to be called with every operator: it shows the calls that are wanted, and ends the run after the last of them."""
    left = set(wanted)

    def look(node: fx.Node, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> None:
        if node in left:
            fit, call = wanted[node]
            target: Any = node.target
            show(fit, call, Windows(call, named_arguments(target, args, kwargs), result, fit.reader.kernel))
            left.remove(node)
            if not left:
                raise _EnoughError("all is seen", "")

    return look
