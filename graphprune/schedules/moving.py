"""A model in training with masked weights, whose masks learn from the gradients that pass straight through them.

Behind an epoch all that the next one depends on is known by name: the copy's tensors, scores and masks, what both optimizers remember, and
how many steps there were. `saved` says it, `restore` puts it back, so that training goes on bit by bit as if it had never ended.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.optim import Optimizer

from graphprune.errors import ConfigError, InputError
from graphprune.runs.checkpoint import digest
from graphprune.schedules.history import Movement
from graphprune.torch_private import own_parameters
from graphprune.training.finetuning import checked_score
from graphprune.training.keeping import removed
from graphprune.training.packing import ModuleState, Packer, parameters_of, settings_of
from graphprune.training.session import Session, behind_closure, flags_kept

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from graphprune.schedules.scored import Scored
    from graphprune.training.session import Course


@dataclass(frozen=True, eq=False)
class MovementSettings:
    """What is trained, and how; see `MovementPruner` for what is not said here.

    Attributes:
        who: the pruner's name, for messages.
        course: the training.
        scored: what has scores.
        score_optimizer: from scores to what trains them.
        warm_up_step: the last step without masks.
        cool_down_beginning_step: the first step with the final masks.
        movement_mode: "hard" or "soft".
        regular_scale: strength of the regulariser of "soft".
        evaluator: from a model to its score, or None.
    """

    who: str
    course: Course
    scored: Scored
    score_optimizer: Callable[[Iterable[nn.Parameter]], object]
    warm_up_step: int
    cool_down_beginning_step: int
    movement_mode: str
    regular_scale: float
    evaluator: Callable[[nn.Module], float] | None

    def stage(self, step: int) -> float:
        """Returns r_t, the part of the sparsity or threshold asked for that holds behind `step` steps, in [0, 1]."""
        length = self.cool_down_beginning_step - self.warm_up_step
        return 1.0 - (1.0 - min(max((step - self.warm_up_step) / length, 0.0), 1.0)) ** 3


class _Mask(nn.Module):
    """W' = W * M, with M as a tensor that is no parameter of the model."""

    def __init__(self, mask: Tensor) -> None:
        super().__init__()
        self.mask = mask

    def forward(self, weight: Tensor) -> Tensor:
        """Returns the masked weight."""
        return weight * self.mask.to(weight.device)


class Moving:
    """A copy in training, with its scores and masks.

    The masks are leaves of autograd, so backward passes leave dL/dW' * W in their `.grad`. They stand in the optimizer's first group, where
    `zero_grad`, gradient scalers and averaging over processes reach them; their gradients are taken away before each step, so that the
    optimizer leaves them alone.

    Args:
        model: left bit-identical.
        settings: what is trained, and how.

    Attributes:
        session: trains the copy.
        scores: by name.
        kept: the same names -> which scores' weights are not masked now.

    Raises:
        ConfigError: the optimizer does not hold what is masked, or a masked weight cannot be reached.
    """

    def __init__(self, model: nn.Module, settings: MovementSettings) -> None:
        self.session = Session(model, settings.course, settings.scored.parameters, _no_penalty, does="masks")
        self._settings, self._scored, self._who = settings, settings.scored, settings.who
        self._tensors = dict(self.session.model.named_parameters(remove_duplicate=False))
        self._holders = _holders(self.session.model, self.session.weights, self._who)
        self._leaves = {name: torch.ones_like(w, requires_grad=True) for name, w in self.session.weights.items()}
        some = next(iter(self._leaves.values()))
        kind = torch.float64 if some.dtype == torch.float64 else torch.float32
        self.scores = {name: nn.Parameter(some.new_zeros(shape, dtype=kind)) for name, shape in self._scored.shapes.items()}
        self.kept = {name: torch.ones_like(score, dtype=torch.bool) for name, score in self.scores.items()}
        trainer: object = settings.score_optimizer(list(self.scores.values()))
        if not isinstance(trainer, Optimizer):
            what = f"the score_optimizer of {self._who} returned a {type(trainer).__name__}"
            raise ConfigError(what, "Pass a function from parameters to a torch.optim.Optimizer")
        self._trainer = trainer
        self._gradients: dict[str, Tensor] | None = None
        self._reached: set[str] = set()
        self._owned: dict[str, Tensor] = {}
        self._modules = {"model": ModuleState(self.session.model)}
        if isinstance(self.session.criterion, nn.Module):
            self._modules["criterion"] = ModuleState(self.session.criterion)
        optimizer = self.session.optimizer
        held = {id(p) for state in self._modules.values() for p in state.parameters.values()}
        self._others = [p for p in parameters_of(optimizer) if id(p) not in held]  # that the user's optimizer trains besides
        if not isinstance(optimizer, torch.optim.LBFGS):  # which remembers how many numbers it optimizes
            optimizer.param_groups[0]["params"].extend(self._leaves.values())
        self._sizes = [len(group["params"]) for group in optimizer.param_groups]
        optimizer.register_step_pre_hook(self._before)
        optimizer.register_step_post_hook(self._after)

    @contextmanager
    def masked(self) -> Iterator[None]:
        """Lets the copy compute with masked weights within the block; afterwards its modules are as they were, but for their values."""
        order = {module: list(own_parameters(module)) for module, _, _ in self._holders}  # parametrizing changes their order
        try:
            for module, attribute, name in self._holders:
                parametrize.register_parametrization(module, attribute, _Mask(self._leaves[name]))
            yield
        finally:
            for module, attribute, _ in self._holders:
                if parametrize.is_parametrized(module, attribute):
                    parametrize.remove_parametrizations(module, attribute, leave_parametrized=False)
            for module, names in order.items():
                found = own_parameters(module)
                for name in names:
                    found[name] = found.pop(name)

    def epoch(self, number: int) -> Movement:
        """Trains for one epoch and returns where training stands.

        Raises:
            ConfigError: the trainer never steps its optimizer, or the evaluator returns no finite number.
            InputError: weights or scores are no longer finite.
        """
        start = time.perf_counter()
        self.session.epochs(1)
        for leaf in self._leaves.values():
            leaf.grad = None  # as all gradients of the model
        for name, score in self.scores.items():
            if not bool(score.isfinite().all()):
                what = f"the training of {self._who} diverged: the scores of {name!r} are not finite after {self.session.steps} steps"
                raise InputError(what, "Lower the learning rate of the model or of score_optimizer")
        total = sum(flags.numel() for flags in self.kept.values())
        gone = total - sum(int(flags.sum()) for flags in self.kept.values())
        stage, said = self._settings.stage(self.session.steps), self._score()
        return Movement(number, self.session.steps, stage, gone / total, said, time.perf_counter() - start)

    def _score(self) -> float | None:
        """Returns what the evaluator says of the masked model; every module has the training flag of before afterwards."""
        if self._settings.evaluator is None:
            return None
        try:
            with flags_kept(self.session.model):
                return checked_score(self._settings.evaluator(self.session.model), self._who)
        finally:
            for leaf in self._leaves.values():
                leaf.grad = None

    def settings(self) -> dict[str, Any]:
        """Returns what both optimizers begin with, as plain values."""
        found: dict[str, Any] = {}
        for name, optimizer in (("optimizer", self.session.optimizer), ("score_optimizer", self._trainer)):
            packer = Packer(self._who)
            packer.pack(optimizer, name)
            found |= {name: settings_of(optimizer), f"{name}_state": digest(packer.tensors)}
        return found

    def saved(self) -> dict[str, Any]:
        """Returns where training stands behind an epoch, for `graphprune.training.packing.save`.

        Raises:
            ConfigError: the trainer added parameters to the optimizer.
        """
        if [len(group["params"]) for group in self.session.optimizer.param_groups] != self._sizes:
            what = f"the trainer of {self._who} added parameters to the optimizer, and which they are cannot be kept in a folder"
            raise ConfigError(what, "Give all parameters to the optimizer from the beginning, or leave folder= out")
        return {
            "optimizer": self.session.optimizer,
            "score_optimizer": self._trainer,
            "modules": self._modules,
            "others": self._others,
            "scores": self.scores,
            "kept": self.kept,
            "steps": self.session.steps,
            "reached": sorted(self._reached),
        }

    def restore(self, saved: Mapping[str, Any]) -> None:
        """Puts a training that has not begun where the saved one stood."""
        for name, state in self._modules.items():
            saved["modules"][name].fill(state)
        with torch.no_grad():
            for tensor, value in zip(self._others, saved["others"], strict=True):
                tensor.copy_(value)
            for name, score in self.scores.items():
                score.copy_(saved["scores"][name])
                self.kept[name] = saved["kept"][name].to(score.device)
            self._scored.spread(self.kept, self._leaves)
        saved["optimizer"].fill(self.session.optimizer)
        saved["score_optimizer"].fill(self._trainer)
        self.session.steps, self._reached = saved["steps"], set(saved["reached"])
        if self.session.steps >= self._settings.cool_down_beginning_step:
            self._owned = self._gone()

    def _gone(self) -> dict[str, Tensor]:
        """Returns parameter -> what of it goes with the masked scores."""
        return removed(self._tensors, self._scored.masks(self.kept))

    def check_reached(self) -> None:
        """Raises where nothing is known of a weight.

        Raises:
            ConfigError: no gradient ever reached its mask.
        """
        for name in self._leaves:
            if name not in self._reached:
                what = f"no gradient reached {name!r} in the training of {self._who}, so there is nothing to score it by"
                raise ConfigError(what, "Let the loss depend on it, or exclude the layer in the config list")

    def _before(self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Takes the gradients of the masks now, or behind the first call of a closure."""
        return behind_closure(optimizer, args, kwargs, self._take)

    def _take(self, scale: Tensor | None) -> None:
        found = {name: leaf.grad for name, leaf in self._leaves.items() if leaf.grad is not None}
        for leaf in self._leaves.values():
            leaf.grad = None
        if self._gradients is None:
            self._gradients = {n: g if scale is None else g / scale.to(g.device) for n, g in found.items()}

    def _after(self, *_: Any) -> None:
        """Trains the scores and computes the masks anew; in the cool-down, keeps at zero what has gone."""
        taken, self._gradients = self._gradients or {}, None
        steps, end = self.session.steps, self._settings.cool_down_beginning_step
        with torch.no_grad():
            if steps <= end:
                self._reached.update(taken)
                self._train_scores(taken, self._settings.stage(steps - 1))
                self._mask(self._settings.stage(steps))
            if steps == end:
                self._owned = self._gone()
            for name, gone in self._owned.items():
                self._tensors[name].masked_fill_(gone, 0)

    def _train_scores(self, taken: Mapping[str, Tensor], stage: float) -> None:
        for score in self.scores.values():
            score.grad = None
        for name, gradient in self._scored.gathered(taken).items():
            self.scores[name].grad = gradient.to(self.scores[name])
        if self._settings.movement_mode == "soft" and stage > 0:
            strength = stage * self._settings.regular_scale / len(self.scores)
            for score in self.scores.values():
                sigma = score.sigmoid()
                slope = strength / score.numel() * sigma * (1 - sigma)
                score.grad = slope if score.grad is None else score.grad + slope
        self._trainer.step()

    def _mask(self, stage: float) -> None:
        if stage > 0:
            choose = self._scored.highest if self._settings.movement_mode == "hard" else self._scored.above
            self.kept = choose(self.scores, stage)
            self._scored.spread(self.kept, self._leaves)


def _holders(model: nn.Module, weights: Mapping[str, nn.Parameter], who: str) -> list[tuple[nn.Module, str, str]]:
    """Returns (module, attribute, name of the weight) for all places where a weight is held; there are several where it is tied.

    Raises:
        ConfigError: a module computes with references to its weights of its own, which masks would not reach.
    """
    names = {id(weight): name for name, weight in weights.items()}
    found = []
    for module in model.modules():
        for attribute, parameter in module.named_parameters(recurse=False, remove_duplicate=False):
            if id(parameter) in names:
                if isinstance(module, nn.RNNBase):
                    what = f"{who} cannot mask {names[id(parameter)]!r} of a {type(module).__name__}, which keeps its weights in a list"
                    raise ConfigError(what, "Exclude the layer in the config list")
                found.append((module, attribute, names[id(parameter)]))
    return found


def _no_penalty(_: Mapping[str, Tensor]) -> Tensor:
    return torch.zeros((), requires_grad=True)
