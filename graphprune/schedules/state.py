"""Where a pruner that works in rounds is: the model that is worked on and all that goes along with it, as it is saved and put back."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from graphprune.groups.build import trace
from graphprune.masks.channels import Masks
from graphprune.masks.copying import copied
from graphprune.masks.elements import ElementMasks
from graphprune.schedules.history import Round
from graphprune.speedup.speedup import speedup
from graphprune.surgery.recipe import composed
from graphprune.training.finetuning import Snapshot, TrainingCopy, packed, unpacked
from graphprune.training.optimizers import slice_average
from graphprune.training.packing import packed_optimizer, restore_optimizer
from graphprune.training.tensors import Kept

if TYPE_CHECKING:
    from graphprune.groups.graph import DependencyGraph
    from graphprune.runs.checkpoint import Saved
    from graphprune.surgery.recipe import Kept as Positions


@dataclass(frozen=True, eq=False)
class Outcome:
    """What a round left.

    Attributes:
        round: its record.
        model: trained; with what the masks remove zeroed, or removed.
        masks: of the original model.
    """

    round: Round
    model: nn.Module
    masks: Masks | ElementMasks


@dataclass(eq=False)
class State:
    """Where the rounds are.

    Attributes:
        trainee: the copy of the model that is worked on.
        graph: the original model's, or None where single weights or layers are masked.
        masks: of the original model; None before the first pruning of single weights.
        rounds: the records so far.
        best: what the best round left, where there is an evaluator.
        checkpoint: what weights are rewound to, cut like the model; None where nothing is rewound.
        snapshot: what the optimizer is rewound to.
        chain: the speedups so far: the kind of result, and the masks of the model at that time.
        kept: parameter -> dim -> which positions of the original model the speedups have left.
    """

    trainee: TrainingCopy
    graph: DependencyGraph | None
    masks: Masks | ElementMasks | None = None
    rounds: tuple[Round, ...] = ()
    best: Outcome | None = None
    checkpoint: dict[str, Tensor] | None = None
    snapshot: Snapshot | None = None
    chain: list[tuple[str, dict[str, Any]]] = field(default_factory=list)
    kept: Positions = field(default_factory=dict)

    def shrink(self, masks: Masks, kind: Any = "auto", *, verify: bool = True) -> None:
        """Removes channels from the model that is worked on; optimizer, checkpoint and snapshot follow.

        Args:
            masks: of the model as it is.
            kind: of the result, see `speedup`.
            verify: compare with the masked model.

        Raises:
            VerificationError: the shrunk model does not compute what the masked one computes.
        """
        small, report = speedup(self.trainee.model, masks, verify=verify, result=kind)
        self.trainee.shrink_to(small, masks)
        if self.checkpoint is not None:
            self.checkpoint = slice_average(self.checkpoint, small, masks)
        if self.snapshot is not None:
            self.snapshot = self.snapshot.cut(masks)
        self.chain.append((report.kind, {name: masks[name].copy() for name in masks}))
        if self.graph is not None:
            self.kept = composed(self.kept, masks.positions(), self.graph.aliases)
            self.masks = _of_positions(self.graph, self.kept)

    def saved(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """Returns everything as plain values and tensors, for `Run.save`."""
        model, tensors = Kept(self.trainee.model, "model/").saved()
        state: dict[str, Any] = {"rounds": [asdict(r) for r in self.rounds], "model": model, "kinds": [kind for kind, _ in self.chain]}
        if self.trainee.optimizer is not None:
            state["optimizer"], own = packed_optimizer(self.trainee.optimizer, "optimizer/")
            tensors |= own
        for number, (_, masks) in enumerate(self.chain):
            tensors |= {f"chain/{number}/{name}": torch.from_numpy(mask) for name, mask in masks.items()}
        if not self.chain and self.masks is not None:
            tensors |= _named("mask/", _flags(self.masks))
        if self.best is not None:
            state["best"] = self.best.round.number
            state["best_model"], own = Kept(self.best.model, "best/").saved()
            tensors |= own
            tensors |= _named("best_mask/", _flags(self.best.masks))
        if self.checkpoint is not None:
            tensors |= _named("checkpoint/", self.checkpoint)
        if self.snapshot is not None:
            state["snapshot"], own = packed("snapshot/", self.snapshot)
            tensors |= own
        return state, tensors

    def restore(self, saved: Saved) -> None:
        """Puts a fresh state where it was when `saved` was written: speedups are done again, then tensors are filled in."""
        found = saved.tensors
        self.rounds = tuple(Round(**{**record, "asked": tuple(record["asked"])}) for record in saved.state["rounds"])
        self.checkpoint, self.snapshot = None, None
        best_model = None
        best = saved.state.get("best")
        widths = {name: tuple(t.shape) for name, t in _under("best/parameter/", found).items()}
        if best is not None and not saved.state["kinds"]:
            best_model = copied(self.trainee.model, {})
        for number, kind in enumerate(saved.state["kinds"]):
            if best is not None and best_model is None and _fits(self.trainee.model, widths):
                best_model = copied(self.trainee.model, {})
            assert self.graph is not None  # noqa: S101 (only groups are removed)
            now = trace(self.trainee.model, self.graph.engine.program.inputs)
            kept = {name: mask.numpy() for name, mask in _under(f"chain/{number}/", found).items()}
            self.shrink(Masks(now, kept), kind, verify=False)
        if best is not None and best_model is None:
            best_model = copied(self.trainee.model, {})
        Kept(self.trainee.model, "model/").restore(saved.state["model"], found)
        if self.trainee.optimizer is not None:
            restore_optimizer(self.trainee.optimizer, saved.state["optimizer"], found)
        if not saved.state["kinds"]:
            self.masks = self._masks_from(_under("mask/", found))
        if best_model is not None:
            Kept(best_model, "best/").restore(saved.state["best_model"], found)
            masks = self._masks_from(_under("best_mask/", found))
            record = next(r for r in self.rounds if r.number == best)
            self.best = None if masks is None else Outcome(record, best_model, masks)
        self.checkpoint = _under("checkpoint/", found) or None
        self.snapshot = unpacked("snapshot/", saved.state["snapshot"], found) if "snapshot" in saved.state else None

    def _masks_from(self, flags: Mapping[str, Tensor]) -> Masks | ElementMasks | None:
        if self.graph is not None:
            return Masks(self.graph, {name: flag.numpy() for name, flag in flags.items()})
        return ElementMasks(self.trainee.model, flags) if flags else None


def _of_positions(graph: DependencyGraph, kept: Positions) -> Masks:
    """Returns the masks of a graph by which these positions of its parameters are left."""
    found = {}
    for group in graph.groups:
        alive = np.ones(group.channels, dtype=bool)
        for s in group.producers or group.slices:
            keep = kept.get(s.parameter, {}).get(s.dim)
            if keep is not None:
                alive &= np.isin(s.index, keep).any(axis=1)  # of a head, some rows may go with the width of all heads
        found[group.name] = alive
    return Masks(graph, found)


def _flags(masks: Masks | ElementMasks) -> dict[str, Tensor]:
    return {name: torch.as_tensor(masks[name]) for name in masks}


def _named(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {f"{prefix}{name}": tensor for name, tensor in tensors.items()}


def _under(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


def _fits(model: nn.Module, shapes: Mapping[str, tuple[int, ...]]) -> bool:
    return {name: tuple(value.shape) for name, value in model.named_parameters()} == dict(shapes)
