"""The lottery ticket of the first version: it masks and rewinds the user's own model, which the user trains between its rounds."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from graphprune import pruners
from graphprune.compat.former import Exporting
from graphprune.errors import ConfigError
from graphprune.masks.elements import ElementMasks
from graphprune.schedules.entries import check_entries, planned
from graphprune.schedules.functions import Exponential
from graphprune.training.keeping import Keeper
from graphprune.training.session import check_count

_ROUNDS = "prune_iterations"


class LotteryTicketPruner(Exporting):
    """Masks a model in place, round by round, and puts model, optimizer and scheduler back to where they were when this was made.

    Frankle & Carbin, arXiv 1803.03635; `graphprune.LotteryTicketPruner` trains by itself, on a copy, and can be interrupted. Use::

        pruner.compress()
        for _ in pruner.get_prune_iterations():     # one more than prune_iterations: the first trains the whole model
            pruner.prune_iteration_start()
            train(model, optimizer)
        pruner.export_model("model.pth", "mask.pth")

    Args:
        model: masked in place, and kept masked in every forward pass, from the second round on.
        config_list: entries with the `sparsity` to reach and `prune_iterations`, the same number in all; see `graphprune.pruners.config`.
        optimizer: of the model's parameters.
        lr_scheduler: of the optimizer.
        reset_weights: put weights, optimizer and scheduler back at the beginning of every round; otherwise they stay as trained.

    Raises:
        ConfigError: the config list is not usable, or there is no optimizer to put back.
    """

    def __init__(
        self,
        model: nn.Module,
        config_list: Sequence[Mapping[str, Any]],
        optimizer: torch.optim.Optimizer | None = None,
        lr_scheduler: Any = None,
        reset_weights: bool = True,  # noqa: FBT001, FBT002 (the call shape of that time)
    ) -> None:
        self.rounds = rounds = _rounds(config_list)
        entries = [{key: value for key, value in entry.items() if key != _ROUNDS} for entry in config_list]
        self._plan = planned(entries, "LotteryTicketPruner", lambda final: Exponential(final, rounds), own=False)
        if reset_weights and optimizer is None:
            what = "LotteryTicketPruner is to put the optimizer back, and has none"
            raise ConfigError(what, "Pass optimizer=, or write reset_weights=False")
        pruners.LevelPruner(model, self._plan.entries)  # says what is wrong with the config list
        self._model, self._keeper = model, Keeper(model)
        self._masks = ElementMasks(model, {})
        self._round = -1
        self._resets = [it for it in (model, optimizer, lr_scheduler) if it is not None] if reset_weights else []
        self._states = [copy.deepcopy(it.state_dict()) for it in self._resets]

    def compress(self) -> tuple[nn.Module, ElementMasks]:
        """Returns (the user's own model, the present masks: none before the second round)."""
        return self._model, self._masks

    def get_prune_iterations(self) -> range:
        """Returns the rounds, counted from 0, in which the whole model is trained."""
        return range(self.rounds + 1)

    def prune_iteration_start(self) -> None:
        """Begins a round: masks the smallest weights to 1 - (1 - P)^(i/n), and puts the others back.

        Raises:
            ConfigError: there have been all rounds.
        """
        if self._round >= self.rounds:
            raise ConfigError(f"LotteryTicketPruner has had its {self.rounds} rounds", "Iterate over pruner.get_prune_iterations()")
        self._round += 1
        self._keeper.release()
        if self._round:
            self._masks = pruners.LevelPruner(self._model, self._plan.at(self._round)).masks()
        for it, state in zip(self._resets, self._states, strict=True):
            it.load_state_dict(copy.deepcopy(state))
        self._keeper.hold(self._masks)

    def _finished(self) -> tuple[nn.Module, ElementMasks]:
        """Returns the model, off which the hooks are taken, and its masks."""
        if self._round < 0:
            raise ConfigError("LotteryTicketPruner has nothing to export yet", "Call pruner.prune_iteration_start() and train first")
        self._keeper.release()
        return self._model, self._masks


def _rounds(config_list: Sequence[Mapping[str, Any]]) -> int:
    """Returns how many rounds the entries ask for."""
    check_entries(config_list, "LotteryTicketPruner", "'prune_iterations': 5, 'sparsity': 0.8")
    for index, entry in enumerate(config_list):
        if not entry.get("exclude") and not (_ROUNDS in entry and "sparsity" in entry):
            what = f"config_list[{index}] of LotteryTicketPruner has no {'sparsity' if _ROUNDS in entry else _ROUNDS!r}"
            raise ConfigError(what, "Write both; graphprune.LotteryTicketPruner takes the number of rounds as total_iteration=")
    rounds = {check_count(entry[_ROUNDS], _ROUNDS, 1) for entry in config_list if _ROUNDS in entry}
    if len(rounds) != 1:
        raise ConfigError(f"the entries of config_list have {len(rounds)} values of {_ROUNDS}", "Give all the same number of rounds")
    return rounds.pop()
