"""Automated gradual pruning: in rounds of its own, or inside the user's training loop."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from torch import nn

from graphprune.errors import ConfigError
from graphprune.schedules.functions import AGP, Schedule
from graphprune.schedules.rounds import RoundsPruner
from graphprune.training.keeping import Keeper

if TYPE_CHECKING:
    from graphprune.masks.channels import Masks
    from graphprune.masks.elements import ElementMasks


class AGPPruner(RoundsPruner):
    """Raises sparsity fast at first and slower towards the end, s_t = s_f + (s_i - s_f) (1 - t/n)^3 (Zhu & Gupta, arXiv 1710.01878).

    Entries of the config list give a `sparsity` to reach in `total_iteration` steps, or a schedule of their own: `final_sparsity`,
    `end_epoch`, and where they differ from 0, 0 and 1, `initial_sparsity`, `start_epoch` and `frequency`. See `RoundsPruner` for the
    arguments. There are two ways to use it. `compress()` does the rounds, one per step. Or, inside a training loop::

        model = pruner.begin()                        # a copy, masked by step 0, to train with any optimizer
        for epoch in range(10):
            pruner.update_epoch(epoch)                # masks anew where the schedule says so; or pruner.step(), once per step
            train(model, optimizer)
        model, masks = pruner.finish()                # zeroed for good, ready for graphprune.speedup
    """

    kind: ClassVar[str] = "agp"
    own_schedules: ClassVar[bool] = True
    _keeper: Keeper | None = None
    _at_work = False  # in a training loop, now or before
    _at = 0
    _asked: tuple[float, ...] = ()

    def schedule(self, final: float, steps: int) -> Schedule:
        """Returns the cubic schedule."""
        return AGP(final, steps)

    def compress(self) -> tuple[nn.Module, Masks | ElementMasks]:
        """Does the rounds; see `RoundsPruner.compress`.

        Raises:
            ConfigError: besides, it is at work in a training loop.
        """
        if self._at_work:
            raise ConfigError(f"{type(self).__name__} is at work in a training loop", "Make another one for rounds")
        return super().compress()

    def begin(self) -> nn.Module:
        """Returns a copy of the model, masked by the sparsities of step 0, which stays masked while it is trained.

        Raises:
            ConfigError: it has begun already, or is to speed up, which a loop that holds one model cannot do.
        """
        if self.speedup:
            what = f"{type(self).__name__} is to speed up inside a training loop, which holds one model and its parameters"
            raise ConfigError(what, "Write speedup=False, and graphprune.speedup(*pruner.finish()) at the end; or use compress()")
        if self._at_work or self.history:
            raise ConfigError(f"{type(self).__name__} has begun already", "Make another one")
        self._at_work, self._keeper = True, Keeper(self.state.trainee.model)
        self._mask(0)
        return self.state.trainee.model

    def update_epoch(self, epoch: int) -> None:
        """Masks anew by the sparsities of a step, of epochs or whatever the caller counts; where these stay, so do the masks.

        Raises:
            ConfigError: it has not begun, or the step is no whole number of at least 0.
        """
        self._working()
        self._mask(epoch)

    def step(self) -> None:
        """Goes one step further than the last step or epoch, and masks by its sparsities.

        Raises:
            ConfigError: it has not begun.
        """
        self.update_epoch(self._at + 1)

    def masks(self) -> Masks | ElementMasks:
        """Returns the present masks.

        Raises:
            ConfigError: it has not begun.
        """
        self._working()
        found = self.state.masks
        assert found is not None  # noqa: S101 (begin has set it)
        return found

    def finish(self) -> tuple[nn.Module, Masks | ElementMasks]:
        """Zeroes what is masked for good and lets the model go; returns both.

        Raises:
            ConfigError: it has not begun.
        """
        masks, keeper = self.masks(), self._working()
        keeper.release()
        self._keeper = None
        return self.state.trainee.model, masks

    def _working(self) -> Keeper:
        if self._keeper is None:
            raise ConfigError(f"{type(self).__name__} is at work in no training loop", "Call begin() first, and train the model it returns")
        return self._keeper

    def _mask(self, step: int) -> None:
        keeper, asked = self._working(), self.plan.asked(step)
        self._at = step
        if asked == self._asked:
            return
        keeper.release()
        gradients = {name: p.grad for name, p in self.state.trainee.model.named_parameters()}
        self.prune(step)
        for name, parameter in self.state.trainee.model.named_parameters():
            parameter.grad = gradients[name]
        self._asked = asked
        keeper.hold(self.masks())
