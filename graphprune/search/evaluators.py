"""Evaluators from data: accuracy, or minus a loss. They can be sent to other processes where their data and loss can."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from itertools import islice
from typing import Any, Literal, TypeAlias, get_args

import torch
from torch import Tensor, nn

from graphprune.data.sources import Loader, split_batch
from graphprune.errors import ConfigError, InputError, nearest
from graphprune.trace.inputs import preserve_state, run, tensors_in

Metric: TypeAlias = Literal["accuracy", "loss"]
_TARGETS = "Let the data yield (inputs, target), or dicts of keyword arguments with 'labels' among them"


@dataclass(frozen=True, eq=False)
class DataEvaluator:
    """Scores a model by its outputs on batches, in inference mode; the model is as it was afterwards.

    Attributes:
        batches: gone through once per call: (inputs, target) each, or dicts of keyword arguments, as in `graphprune.data.sources.Loader`.
        metric: "accuracy" is the share of positions whose largest output along dimension 1 (of an output of (n, classes, ...)) is the
            target; of dicts, their 'labels' are. "loss" is minus the mean loss of the batches, weighted by their samples.
        loss: from output and target (of dicts, the batch) to one number.
        limit: use so many batches and no more.

    Raises:
        ConfigError: the metric is unknown, a loss is missing, or the batches can be gone through only once.
    """

    batches: Iterable[Any]
    metric: Metric = "accuracy"
    loss: Callable[..., Any] | None = None
    limit: int | None = None

    def __post_init__(self) -> None:
        Loader(self.batches, self.loss, self.limit)  # says what is wrong with batches and limit
        if self.metric not in get_args(Metric):
            raise ConfigError(f"the metric is {self.metric!r}", nearest(str(self.metric), get_args(Metric)) or "Use 'accuracy' or 'loss'")
        if self.metric == "loss" and self.loss is None:
            raise ConfigError("the metric is a loss, and there is none", "Pass loss=, such as torch.nn.functional.cross_entropy")
        if iter(self.batches) is self.batches:
            raise ConfigError("the data gives every batch only once, and every model is to see it", "Pass a list or a DataLoader")

    def __call__(self, model: nn.Module) -> float:
        """Returns the score of a model, higher = better.

        Raises:
            InputError: there are no batches, one has no target, or the model or the loss cannot be run on one.
        """
        total = weight = 0.0
        with preserve_state(model), torch.no_grad():
            for batch in islice(self.batches, self.limit):
                inputs, target = split_batch(batch)
                if target is None:
                    raise InputError(f"the batch ({inputs}) has no target", _TARGETS)
                output = run(model, inputs.copied())
                score, samples = self._right(output, target) if self.metric == "accuracy" else self._lost(output, target, inputs.batch)
                total, weight = total + score, weight + samples
        if not weight:
            raise InputError("the data has no batches to score a model on", "Pass at least one")
        return total / weight

    def _right(self, output: Any, target: Any) -> tuple[float, float]:
        """Returns how many positions are right, and how many there are."""
        labels = target.get("labels") if isinstance(target, Mapping) else target
        scores = next(iter(tensors_in(getattr(output, "logits", output))), None)
        if not isinstance(labels, Tensor) or scores is None or scores.dim() < 2:
            what = f"accuracy needs labels and outputs of (n, classes, ...), not {_shape(labels)} and {_shape(scores)}"
            raise InputError(what, _TARGETS)
        found = scores.argmax(1)
        if found.shape != labels.shape:
            what = f"the model's outputs {_shape(scores)} have classes for {_shape(found)}, but the labels are {_shape(labels)}"
            raise InputError(what, "Give one label for each position that the model classifies")
        return float((found == labels).sum()), float(labels.numel())

    def _lost(self, output: Any, target: Any, samples: int | None) -> tuple[float, float]:
        """Returns minus the loss times the samples, and how many samples there are."""
        assert self.loss is not None  # noqa: S101 (checked when this was made)
        try:
            loss = float(self.loss(output, target))
        except Exception as error:
            reason = f"{type(error).__name__}: {' '.join(str(error).split())}".rstrip(".")
            raise InputError(
                f"the loss cannot be computed: {reason}", "Pass a loss= that takes the model's output and the target"
            ) from error
        weight = float(samples or 1)
        return -loss * weight, weight


def _shape(value: object) -> str:
    """Returns the shape of a tensor, or what else a value is."""
    return str(list(value.shape)) if isinstance(value, Tensor) else f"a {type(value).__name__}"
