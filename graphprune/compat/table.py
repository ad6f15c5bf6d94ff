"""The table of the first version's pruners: which pruner of today each of them is, and how it was called.

A row is a class: its name, the pruner of today behind `Former`, and a `CallShape`. Methods stand only where a call of then did something
else. Pruners that search need `dummy_input` (or `example_inputs`, as today) to find groups, and write nothing unless a folder is named.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from graphprune import pruners, schedules, search
from graphprune.compat.former import Former
from graphprune.compat.shapes import CallShape, Refused
from graphprune.compat.trainers import epoch_trainer
from graphprune.data.sources import split_batch
from graphprune.errors import ConfigError
from graphprune.pruners.budgets import Budget
from graphprune.repair import Reconstruction
from graphprune.search.autocompress import AutoCompressPruner as _AutoCompressPruner
from graphprune.training.session import check_count

# -- what several rows share ----------------------------------------------------------------------------------------------------------


def _choose_mode(who: str, given: dict[str, Any]) -> None:
    """Puts today's mode in the place of `dependency_aware` and `global_sort`; left out, there are groups where there are inputs."""
    aware, ranked = given.pop("dependency_aware", None), given.pop("global_sort", False)
    if ranked and aware is not None and not aware:
        raise ConfigError(f"{who} is given global_sort=True, which ranks coupled groups, and dependency_aware=False", "Drop one of them")
    if ranked:
        given["mode"] = "global"
    elif aware is not None:
        given.setdefault("mode", "dependency_aware" if aware else "normal")


def _choose_mode_of_weights(who: str, given: dict[str, Any]) -> None:
    """Does the same for pruners that have no data to find groups with."""
    if given.get("dependency_aware") and not {"dummy_input", "example_inputs"} & given.keys():
        what = f"{who} is given dependency_aware=True and no dummy_input to find the dependencies with"
        raise ConfigError(what, "Pass dummy_input=, a tensor that model(...) accepts")
    _choose_mode(who, given)


def _train_as_admm(_who: str, given: dict[str, Any]) -> None:
    """Gives every entry its rho, and has the trainer count epochs from 0 in every iteration."""
    row, config_list = given.pop("row"), given["config_list"]
    if isinstance(config_list, (list, tuple)):  # otherwise the pruner says what is wrong
        plain = [isinstance(entry, Mapping) and not entry.get("exclude") for entry in config_list]
        given["config_list"] = [{"rho": row, **entry} if adds else entry for entry, adds in zip(config_list, plain, strict=True)]
    given["trainer"] = epoch_trainer(given.get("trainer"), given.get("admm_epochs_per_iteration", given.get("epochs_per_iteration")))


def own_adam(parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
    """Returns the optimizer that ADMM made for itself."""
    return torch.optim.Adam(parameters, lr=1e-3, weight_decay=5e-5)


_TRAINING = "model, config_list, optimizer=None, trainer=None, criterion=None"
_LOOKING = "sparsifying_training_batches=1, dependency_aware=None, dummy_input=None"
_ANNEALING = "start_temperature=100, stop_temperature=20, cool_down_rate=0.9, perturbation_magnitude=0.35"

_OF_WEIGHTS = CallShape("model, config_list, dependency_aware=None, dummy_input=None", code=_choose_mode_of_weights)
_OTHER_ACTIVATION = "{who} is given activation={value!r}, but it looks at what the model's own nonlinearity returns"
_OF_ACTIVATIONS = CallShape(
    f"{_TRAINING}, activation='relu', {_LOOKING}, *, statistics_batch_num=None",
    today={"activation": None},
    refused={"activation": Refused(lambda name: name != "relu", _OTHER_ACTIVATION, "Leave activation= out")},
    code=_choose_mode,
)
_SINGLE_WEIGHTS = Refused(
    lambda name: name == "level",
    "{who} is given base_algo='level', and searches what groups of channels lose",
    "Write base_algo='l1', 'l2' or 'fpgm'; LevelPruner with a 'total_sparsity' ranks the single weights of all layers",
)


def _required(fix: str) -> Refused:
    """Returns the refusal of a config list that is missing."""
    return Refused(lambda entries: entries is None, "{who} is given a model and no config list", fix)


# -- pruners of weights, and of what data do to a model ---------------------------------------------------------------------------------


class L1FilterPruner(Former, pruners.L1NormPruner):
    """`graphprune.L1NormPruner` by its former name; where nothing is said, groups are pruned if there is a `dummy_input`."""

    call_shape = _OF_WEIGHTS


class L2FilterPruner(Former, pruners.L2NormPruner):
    """`graphprune.L2NormPruner` by its former name; where nothing is said, groups are pruned if there is a `dummy_input`."""

    call_shape = _OF_WEIGHTS


class FPGMPruner(Former, pruners.FPGMPruner):
    """`graphprune.FPGMPruner` with its former arguments; where nothing is said, groups are pruned if there is a `dummy_input`."""

    call_shape = _OF_WEIGHTS


class ActivationAPoZRankFilterPruner(Former, pruners.ActivationAPoZRankPruner):
    """`graphprune.ActivationAPoZRankPruner` by its former name; instead of a trainer it may have `data`."""

    call_shape = _OF_ACTIVATIONS


class ActivationMeanRankFilterPruner(Former, pruners.ActivationMeanRankPruner):
    """`graphprune.ActivationMeanRankPruner` by its former name; instead of a trainer it may have `data`."""

    call_shape = _OF_ACTIVATIONS


class TaylorFOWeightFilterPruner(Former, pruners.TaylorFOWeightPruner):
    """`graphprune.TaylorFOWeightPruner` by its former name; instead of a trainer it may have `data`."""

    call_shape = CallShape(f"{_TRAINING}, {_LOOKING}, global_sort=False, *, statistics_batch_num=None", code=_choose_mode)


class LevelPruner(Former, pruners.LevelPruner):
    """`graphprune.LevelPruner` with its former arguments."""

    call_shape = CallShape(
        "model, config_list=None, dependency_aware=False, dummy_input=None",
        today={"dependency_aware": None, "dummy_input": None},
        refused={
            "config_list": _required("Write LevelPruner(model, config_list)"),
            "dependency_aware": Refused(
                bool,
                "{who} is given {value!r} behind the config list, and single weights depend on nothing",
                "Leave it out, or use L1FilterPruner for channels",
            ),
        },
    )


# -- pruners that train ---------------------------------------------------------------------------------------------------------------


class SlimPruner(Former, pruners.SlimPruner):
    """`graphprune.SlimPruner` with its former arguments: one ranking of all batch norms of an entry, in any case of coupled groups."""

    call_shape = CallShape(
        f"{_TRAINING}, sparsifying_training_epochs=10, scale=1e-4, dependency_aware=False, dummy_input=None",
        today={"dependency_aware": None},
        constants={"mode": "global"},
    )


class ADMMPruner(Former, pruners.ADMMPruner):
    """`graphprune.ADMMPruner` with its former arguments, and an Adam of its own (1e-3, weight decay 5e-5) and cross entropy, as then.

    The penalty is that of the paper, added to the gradients, where the first version moved the weights by `row` past the optimizer.
    A `base_algo` of "level" projects single weights; "l1" and "l2" project channels, by their L2 norm, as ADMM demands.
    """

    call_shape = CallShape(
        "model, config_list, trainer=None, criterion=None, num_iterations=30, epochs_per_iteration=5, row=1e-4, base_algo='l1', *, "
        "dummy_input=None",
        today={"num_iterations": "iterations", "base_algo": "granularity"},
        value={"base_algo": lambda name: "fine-grained" if name == "level" else "coarse-grained"},
        constants={"optimizer": own_adam, "criterion": nn.CrossEntropyLoss()},
        refused={
            "base_algo": Refused(
                lambda name: name not in ("l1", "l2", "level"),
                "{who} is given base_algo={value!r}, by which nothing can be projected",
                "Write 'level' for single weights, or 'l1' or 'l2' for channels",
            )
        },
        code=_train_as_admm,
    )


class AGPPruner(Former, schedules.AGPPruner):
    """`graphprune.AGPPruner` with its former arguments; masks are computed at the beginning of every iteration, by t/n for the t-th of n.

    With a `dummy_input`, algorithms of channels prune coupled groups.
    """

    call_shape = CallShape(
        f"{_TRAINING}, num_iterations=10, epochs_per_iteration=1, pruning_algorithm='level', *, dummy_input=None",
        value={"num_iterations": lambda count: check_count(count, "num_iterations", 1)},
    )


# -- pruners that search --------------------------------------------------------------------------------------------------------------


class SimulatedAnnealingPruner(Former, search.SimulatedAnnealingPruner):
    """`graphprune.SimulatedAnnealingPruner` with its former arguments; an entry's `sparsity` is that of all its channels together."""

    call_shape = CallShape(
        f"model, config_list, evaluator, optimize_mode='maximize', base_algo='l1', {_ANNEALING}, experiment_data_dir=None, *, "
        "dummy_input=None",
        refused={"base_algo": _SINGLE_WEIGHTS},
    )

    def compress(self, return_config_list: bool = False) -> Any:  # noqa: FBT001, FBT002 (the call shape of that time)
        """Returns (the masked copy, the masks), or the config list of the best trial."""
        found = super().compress()
        return self.get_best_result()[4] if return_config_list else found


class NetAdaptPruner(Former, search.NetAdaptPruner):
    """`graphprune.NetAdaptPruner` with its former arguments; an entry's `sparsity` is that of all its channels together."""

    call_shape = CallShape(
        "model, config_list, short_term_fine_tuner, evaluator, optimize_mode='maximize', base_algo='l1', sparsity_per_iteration=0.05, "
        "experiment_data_dir=None, *, dummy_input=None",
        refused={"base_algo": _SINGLE_WEIGHTS},
    )


class SensitivityPruner(Former, search.SensitivityPruner):
    """`graphprune.SensitivityPruner` with its former arguments; an entry's `sparsity` is the share of the weights that is to go."""

    call_shape = CallShape(
        "model, config_list=None, evaluator=None, finetuner=None, base_algo='l1', sparsity_proportion_calc=None, sparsity_per_iter=0.1, "
        "acc_drop_threshold=0.05, checkpoint_dir=None, *, dummy_input=None",
        refused={"base_algo": _SINGLE_WEIGHTS, "config_list": _required("Write SensitivityPruner(model, config_list, evaluator)")},
    )

    def compress(
        self,
        eval_args: Sequence[Any] | None = None,
        eval_kwargs: Mapping[str, Any] | None = None,
        finetune_args: Sequence[Any] | None = None,
        finetune_kwargs: Mapping[str, Any] | None = None,
        resume_sensitivity: str | os.PathLike[str] | None = None,
    ) -> Any:
        """Returns (the fine-tuned model, masked and in its original shapes, the masks).

        Evaluator and finetuner are called with these arguments, in which the model that was given to the pruner stands for the one at hand;
        where it is not among them, the one at hand comes first.

        Args:
            eval_args: of the evaluator.
            eval_kwargs: of the evaluator.
            finetune_args: of the finetuner.
            finetune_kwargs: of the finetuner.
            resume_sensitivity: None; see the error.

        Raises:
            ConfigError: there is a file to resume from, or as of `graphprune.SensitivityPruner`.
        """
        if resume_sensitivity is not None:
            fix = "Pass checkpoint_dir= to the pruner: scores that were measured are kept there, and not measured again"
            raise ConfigError("SensitivityPruner.compress is given resume_sensitivity, a file of scores", fix)
        evaluator, finetuner = self.evaluator, self.finetuner
        try:
            if evaluator is not None:
                self.evaluator = _at_hand(evaluator, self.model, eval_args, eval_kwargs)
            if finetuner is not None:
                self.finetuner = _at_hand(finetuner, self.model, finetune_args, finetune_kwargs)
            return super().compress()
        finally:
            self.evaluator, self.finetuner = evaluator, finetuner


def _at_hand(
    function: Callable[..., Any], original: nn.Module, args: Sequence[Any] | None, kwargs: Mapping[str, Any] | None
) -> Callable[[nn.Module], Any]:
    """Returns a function of a model that calls one with these arguments, the model among them."""
    others, named = list(args or ()), dict(kwargs or {})
    among = any(value is original for value in (*others, *named.values()))

    def calls(model: nn.Module) -> Any:
        positional = [model if value is original else value for value in others]
        keywords = {name: model if value is original else value for name, value in named.items()}
        return function(*positional, **keywords) if among else function(model, *positional, **keywords)

    return calls


def _use_loader(who: str, given: dict[str, Any]) -> None:
    """Gives AMC's batches to the evaluator, to the fitting of weights and, where there are no inputs, to the analysis."""
    if others := given.pop("others", ()):
        what = f"{who} is given {len(others)} arguments behind val_loader"
        raise ConfigError(what, "Write them by name: flops_ratio=, lbound= and so on")
    evaluator, loader = given["evaluator"], given.pop("val_loader")
    points, batches = given.pop("n_points_per_layer"), given.pop("n_calibration_batches")
    if "reconstruct" not in given:
        given["reconstruct"] = Reconstruction(loader, points, batches)
    if "dummy_input" not in given and given.get("example_inputs") is None:
        given["example_inputs"] = split_batch(next(iter(loader)))[0]
    given["evaluator"] = lambda small: evaluator(loader, small)


class AMCPruner(Former, search.AMCPruner):
    """`graphprune.AMCPruner` with its former arguments, for any model; `evaluator(val_loader, model)` returns the reward.

    Of the agent, there are `hidden1`, `lr_a`, `lr_c`, `bsize`, `tau`, `discount`, `init_delta`, `delta_decay`, `rmsize` and `warmup`; what
    named the network, the data set and the logs of that time is not needed.
    """

    call_shape = CallShape(
        "model, config_list, evaluator, val_loader, *others, flops_ratio=0.5, lbound=0.2, rbound=1.0, reward='acc_reward', "
        "n_calibration_batches=60, n_points_per_layer=10, channel_round=8, train_episode=800, seed=None, output_dir=None, dummy_input=None",
        today={
            "flops_ratio": "budget",
            "lbound": "max_sparsity",
            "channel_round": "round_to",
            "train_episode": "total_episode",
            "hidden1": "ddpg_params.hidden",
            "lr_a": "ddpg_params.actor_rate",
            "lr_c": "ddpg_params.critic_rate",
            "bsize": "ddpg_params.batch",
            "tau": "ddpg_params.tau",
            "discount": "ddpg_params.discount",
            "init_delta": "ddpg_params.noise",
            "delta_decay": "ddpg_params.noise_decay",
            "rmsize": "ddpg_params.replay",
            "warmup": "ddpg_params.warm_up",
            **dict.fromkeys(("rbound", "reward", "suffix", "model_type", "dataset", "hidden2")),
            **dict.fromkeys(("max_episode_length", "window_length", "epsilon", "debug")),
        },
        value={"flops_ratio": lambda kept: Budget(macs=1.0 - kept), "lbound": lambda kept: 1.0 - kept},
        refused={
            "reward": Refused(
                lambda it: it != "acc_reward", "{who} has no argument reward=", "Write the reward into the evaluator, which returns it"
            ),
            "rbound": Refused(
                lambda it: it != 1.0, "{who} has no argument rbound=", "Write lbound= alone, as no layer can be made to lose channels"
            ),
            "flops_ratio": Refused(
                lambda it: not 0.0 < it < 1.0, "flops_ratio is {value!r}", "Give the share of the MACs that stays, in (0, 1)"
            ),
        },
        code=_use_loader,
    )


def _train_and_score(who: str, given: dict[str, Any]) -> None:
    """Trains as ADMM does; where the score is to be minimized, its negative is maximized."""
    _train_as_admm(who, given)
    if given.pop("optimize_mode") == "minimize":
        evaluator = given["evaluator"]
        given["evaluator"] = lambda small: -evaluator(small)


class AutoCompressPruner(Former, _AutoCompressPruner):
    """`graphprune.AutoCompressPruner` with its former arguments, and an Adam of its own and cross entropy, as `ADMMPruner`."""

    call_shape = CallShape(
        "model, config_list, trainer, evaluator, dummy_input, criterion=None, num_iterations=3, optimize_mode='maximize', base_algo='l1', "
        f"{_ANNEALING}, admm_num_iterations=30, admm_epochs_per_iteration=5, row=1e-4, experiment_data_dir=None",
        today={
            "admm_num_iterations": "admm_params.iterations",
            "admm_epochs_per_iteration": "admm_params.training_epochs",
            **{name: f"admm_params.{name}" for name in ("trainer", "optimizer", "criterion")},
            **{name: f"sa_params.{name}" for name in ("base_algo", *(text.partition("=")[0] for text in _ANNEALING.split(", ")))},
        },
        constants={"admm_params.optimizer": own_adam, "admm_params.criterion": nn.CrossEntropyLoss()},
        refused={
            "base_algo": _SINGLE_WEIGHTS,
            "optimize_mode": Refused(
                lambda it: it not in ("maximize", "minimize"), "optimize_mode is {value!r}", "Use 'maximize' or 'minimize'"
            ),
        },
        code=_train_and_score,
    )

    _smaller = True
