"""Pruners that search, under their names and with the arguments of the first version.

They search the sparsities of coupled groups, for which the model is run once: without its inputs (`dummy_input`, or `example_inputs` as
today) an error says so. Nothing is written unless a folder is named.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

from torch import nn

from graphprune import search
from graphprune.compat.former import Former, epoch_trainer, today
from graphprune.compat.trained import criterion_or_cross_entropy, own_adam, with_rho
from graphprune.data.sources import split_batch
from graphprune.errors import ConfigError
from graphprune.pruners.budgets import Budget
from graphprune.repair import Reconstruction
from graphprune.search.autocompress import AutoCompressPruner as _AutoCompressPruner
from graphprune.training.session import refuse_former

if TYPE_CHECKING:
    from graphprune.trace.inputs import Inputs

ConfigList: TypeAlias = Sequence[Mapping[str, Any]]
Folder: TypeAlias = "str | os.PathLike[str] | None"
OptimizeMode: TypeAlias = Literal["maximize", "minimize"]

_SINGLE = "Write base_algo='l1', 'l2' or 'fpgm'; LevelPruner with a 'total_sparsity' ranks the single weights of all layers"
_RESUME = "Pass checkpoint_dir= to the pruner: scores that were measured are kept there, and not measured again"
_AGENT = {
    "hidden1": "hidden",
    "lr_a": "actor_rate",
    "lr_c": "critic_rate",
    "bsize": "batch",
    "tau": "tau",
    "discount": "discount",
    "init_delta": "noise",
    "delta_decay": "noise_decay",
    "rmsize": "replay",
    "warmup": "warm_up",
}
_IDLE = ("suffix", "model_type", "dataset", "hidden2", "max_episode_length", "window_length", "epsilon", "debug")
_FORMER = {
    "reward": "the reward into the evaluator, which returns it",
    "rbound": "lbound= alone, as no layer can be made to lose channels",
}


class SimulatedAnnealingPruner(Former, search.SimulatedAnnealingPruner):
    """`graphprune.SimulatedAnnealingPruner` with its former arguments.

    Args:
        model: left bit-identical.
        config_list: with the `sparsity` of all channels of an entry together, see `graphprune.pruners.config`.
        evaluator: from a shrunk model to a number.
        optimize_mode: "maximize" or "minimize".
        base_algo: "l1", "l2", "fpgm" or another criterion of channels.
        start_temperature: see `graphprune.SimulatedAnnealingPruner`, as of the following.
        stop_temperature: likewise.
        cool_down_rate: likewise.
        perturbation_magnitude: likewise.
        experiment_data_dir: where the run is kept; None keeps nothing.
        options: those of today; `dummy_input` is the example inputs.

    Raises:
        ConfigError: base_algo is "level", or as of `graphprune.SimulatedAnnealingPruner`.
    """

    def __init__(  # noqa: PLR0913, PLR0917 (the call shape of that time)
        self,
        model: nn.Module,
        config_list: ConfigList,
        evaluator: Callable[[nn.Module], float],
        optimize_mode: OptimizeMode = "maximize",
        base_algo: Any = "l1",
        start_temperature: float = 100,
        stop_temperature: float = 20,
        cool_down_rate: float = 0.9,
        perturbation_magnitude: float = 0.35,
        experiment_data_dir: Folder = None,
        **options: Any,
    ) -> None:
        _refuse_single(base_algo, type(self).__name__)
        temperatures = (start_temperature, stop_temperature, cool_down_rate, perturbation_magnitude)
        given = {"optimize_mode": optimize_mode, "base_algo": base_algo, "folder": experiment_data_dir, **today(options)}
        init: Any = super().__init__
        init(model, config_list, evaluator, *temperatures, **given)

    def compress(self, return_config_list: bool = False) -> Any:  # noqa: FBT001, FBT002 (likewise)
        """Returns (the masked copy, the masks), or the config list of the best trial."""
        found = super().compress()
        return self.get_best_result()[4] if return_config_list else found


class NetAdaptPruner(Former, search.NetAdaptPruner):
    """`graphprune.NetAdaptPruner` with its former arguments.

    Args:
        model: left bit-identical.
        config_list: with the `sparsity` of all channels of an entry together, see `graphprune.pruners.config`.
        short_term_fine_tuner: trains a shrunk model in place.
        evaluator: from a shrunk model to a number.
        optimize_mode: "maximize" or "minimize".
        base_algo: "l1", "l2", "fpgm" or another criterion of channels.
        sparsity_per_iteration: the share of the whole cost that an iteration saves.
        experiment_data_dir: where the run is kept; None keeps nothing.
        options: those of today; `dummy_input` is the example inputs.

    Raises:
        ConfigError: base_algo is "level", or as of `graphprune.NetAdaptPruner`.
    """

    def __init__(
        self,
        model: nn.Module,
        config_list: ConfigList,
        short_term_fine_tuner: Callable[[nn.Module], object] | None,
        evaluator: Callable[[nn.Module], float],
        optimize_mode: OptimizeMode = "maximize",
        base_algo: Any = "l1",
        sparsity_per_iteration: float = 0.05,
        experiment_data_dir: Folder = None,
        **options: Any,
    ) -> None:
        _refuse_single(base_algo, type(self).__name__)
        init: Any = super().__init__
        tuned = (model, config_list, short_term_fine_tuner, evaluator, optimize_mode, base_algo, sparsity_per_iteration)
        init(*tuned, **{"folder": experiment_data_dir, **today(options)})


class SensitivityPruner(Former, search.SensitivityPruner):
    """`graphprune.SensitivityPruner` with its former arguments.

    Args:
        model: left bit-identical.
        config_list: with the share of the weights that is to go as `sparsity`, see `graphprune.pruners.config`.
        evaluator: from a model to its score; see `compress`.
        finetuner: trains a model in place; see `compress`.
        base_algo: "l1", "l2", "fpgm" or another criterion of channels.
        sparsity_proportion_calc: see `graphprune.SensitivityPruner`, as of the following.
        sparsity_per_iter: likewise.
        acc_drop_threshold: likewise.
        checkpoint_dir: where rounds and scores are kept; None keeps nothing.
        options: those of today; `dummy_input` is the example inputs.

    Raises:
        ConfigError: base_algo is "level", or as of `graphprune.SensitivityPruner`.
    """

    def __init__(
        self,
        model: nn.Module,
        config_list: ConfigList | None = None,
        evaluator: Callable[..., float] | None = None,
        finetuner: Callable[..., object] | None = None,
        base_algo: Any = "l1",
        sparsity_proportion_calc: Any = None,
        sparsity_per_iter: float = 0.1,
        acc_drop_threshold: float = 0.05,
        checkpoint_dir: Folder = None,
        **options: Any,
    ) -> None:
        _refuse_single(base_algo, type(self).__name__)
        if config_list is None:
            what = "SensitivityPruner is given a model and no config list"
            raise ConfigError(what, "Write SensitivityPruner(model, config_list, evaluator)")
        how = (evaluator, finetuner, base_algo, sparsity_proportion_calc, sparsity_per_iter, acc_drop_threshold, checkpoint_dir)
        init: Any = super().__init__
        init(model, config_list, *how, **today(options))

    def compress(
        self,
        eval_args: Sequence[Any] | None = None,
        eval_kwargs: Mapping[str, Any] | None = None,
        finetune_args: Sequence[Any] | None = None,
        finetune_kwargs: Mapping[str, Any] | None = None,
        resume_sensitivity: Folder = None,
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
            raise ConfigError("SensitivityPruner.compress is given resume_sensitivity, a file of scores", _RESUME)
        evaluator, finetuner = self.evaluator, self.finetuner
        try:
            if evaluator is not None:
                self.evaluator = _at_hand(evaluator, self.model, eval_args, eval_kwargs)
            if finetuner is not None:
                self.finetuner = _at_hand(finetuner, self.model, finetune_args, finetune_kwargs)
            return super().compress()
        finally:
            self.evaluator, self.finetuner = evaluator, finetuner


class AMCPruner(Former, search.AMCPruner):
    """`graphprune.AMCPruner` with its former arguments, for any model.

    Args:
        model: left bit-identical.
        config_list: which layers lose channels, see `graphprune.pruners.config`.
        evaluator: evaluator(val_loader, model) returns the reward.
        val_loader: its first batch finds the groups where there is no `dummy_input`.
        others: none; what comes behind val_loader is given by name.
        flops_ratio: the share of the MACs that stays.
        lbound: the smallest share of its channels that a group keeps.
        n_calibration_batches: so many batches of val_loader are what weights are fitted to by least squares.
        n_points_per_layer: at so many positions per sample.
        channel_round: kept counts are multiples of this.
        train_episode: how many episodes.
        seed: of the search.
        output_dir: where the run is kept; None keeps nothing.
        options: `hidden1`, `lr_a`, `lr_c`, `bsize`, `tau`, `discount`, `init_delta`, `delta_decay`, `rmsize` and `warmup` of the agent;
            what named the network, the data set and the logs of that time, which is not needed; and those of today.

    Raises:
        ConfigError: an argument is not usable, or has no meaning any more; or as of `graphprune.AMCPruner`.
    """

    def __init__(  # noqa: PLR0913 (the call shape of that time)
        self,
        model: nn.Module,
        config_list: ConfigList,
        evaluator: Callable[[Any, nn.Module], float],
        val_loader: Iterable[Any],
        *others: Any,
        flops_ratio: float = 0.5,
        lbound: float = 0.2,
        n_calibration_batches: int = 60,
        n_points_per_layer: int = 10,
        channel_round: int = 8,
        train_episode: int = 800,
        seed: int | None = None,
        output_dir: Folder = None,
        **options: Any,
    ) -> None:
        who = type(self).__name__
        if others:
            raise ConfigError(
                f"{who} is given {len(others)} arguments behind val_loader", "Write them by name: flops_ratio=, lbound= and so on"
            )
        unset = {"reward": "acc_reward", "rbound": 1.0}
        refuse_former(who, (name for name, value in options.items() if name in unset and value != unset[name]), _FORMER)
        agent = {_AGENT[name]: value for name, value in options.items() if name in _AGENT}
        own = {name: value for name, value in options.items() if name not in {*_AGENT, *_IDLE, *unset}}
        if not 0.0 < flops_ratio < 1.0:
            raise ConfigError(f"flops_ratio is {flops_ratio!r}", "Give the share of the MACs that stays, in (0, 1)")
        given = {"budget": Budget(macs=1.0 - flops_ratio), "max_sparsity": 1.0 - lbound, "round_to": channel_round, "folder": output_dir}
        fits = {"reconstruct": Reconstruction(val_loader, n_points_per_layer, n_calibration_batches)} if "reconstruct" not in own else {}
        given |= {"ddpg_params": agent, "seed": seed or 0, **fits, **today(own)}
        if given.get("example_inputs") is None:
            given["example_inputs"] = _first(val_loader)
        init: Any = super().__init__
        init(train_episode, model, config_list, lambda small: evaluator(val_loader, small), **given)


class AutoCompressPruner(Former, _AutoCompressPruner):
    """`graphprune.AutoCompressPruner` with its former arguments, and an Adam of its own (1e-3, weight decay 5e-5) as then.

    Args:
        model: left bit-identical.
        config_list: with the `sparsity` of all channels of an entry together, see `graphprune.pruners.config`.
        trainer: trainer(model, optimizer, criterion, epoch), of ADMM.
        evaluator: from a shrunk model to a number.
        dummy_input: the example inputs.
        criterion: given to the trainer; cross entropy by default.
        num_iterations: how many rounds.
        optimize_mode: "maximize" or "minimize".
        base_algo: "l1", "l2", "fpgm" or another criterion of channels.
        start_temperature: of the annealing, see `graphprune.SimulatedAnnealingPruner`, as of the following.
        stop_temperature: likewise.
        cool_down_rate: likewise.
        perturbation_magnitude: likewise.
        admm_num_iterations: how often ADMM projects in a round.
        admm_epochs_per_iteration: how many epochs it trains in between.
        row: rho of all entries that have none.
        experiment_data_dir: where the run is kept; None keeps nothing.
        options: those of today, `optimizer` among them.

    Raises:
        ConfigError: base_algo is "level", or as of `graphprune.AutoCompressPruner`.
    """

    _smaller = True

    def __init__(  # noqa: PLR0913, PLR0917 (the call shape of that time)
        self,
        model: nn.Module,
        config_list: ConfigList,
        trainer: Callable[..., Any],
        evaluator: Callable[[nn.Module], float],
        dummy_input: object,
        criterion: Any = None,
        num_iterations: int = 3,
        optimize_mode: OptimizeMode = "maximize",
        base_algo: Any = "l1",
        start_temperature: float = 100,
        stop_temperature: float = 20,
        cool_down_rate: float = 0.9,
        perturbation_magnitude: float = 0.35,
        admm_num_iterations: int = 30,
        admm_epochs_per_iteration: int = 5,
        row: float = 1e-4,
        experiment_data_dir: Folder = None,
        **options: Any,
    ) -> None:
        _refuse_single(base_algo, type(self).__name__)
        if optimize_mode not in ("maximize", "minimize"):
            raise ConfigError(f"optimize_mode is {optimize_mode!r}", "Use 'maximize' or 'minimize'")
        scored = evaluator if optimize_mode == "maximize" else (lambda small: -evaluator(small))
        annealing = {"start_temperature": start_temperature, "stop_temperature": stop_temperature, "cool_down_rate": cool_down_rate}
        annealing |= {"perturbation_magnitude": perturbation_magnitude, "base_algo": base_algo}
        given = {"optimizer": own_adam, "folder": experiment_data_dir, **options}
        admm = {"trainer": epoch_trainer(trainer, admm_epochs_per_iteration), "optimizer": given.pop("optimizer")}
        admm |= {"criterion": criterion_or_cross_entropy(criterion)}
        admm |= {"iterations": admm_num_iterations, "training_epochs": admm_epochs_per_iteration}
        rounds = (num_iterations, admm, annealing)
        init: Any = super().__init__
        init(model, with_rho(config_list, row), *rounds, evaluator=scored, example_inputs=dummy_input, **given)


def _refuse_single(base_algo: object, who: str) -> None:
    """Raises where single weights are to go."""
    if base_algo == "level":
        raise ConfigError(f"{who} is given base_algo='level', and searches what groups of channels lose", _SINGLE)


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


def _first(batches: Iterable[Any]) -> Inputs:
    """Returns the inputs of a loader's first batch."""
    return split_batch(next(iter(batches)))[0]
